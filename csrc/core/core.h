/* SPDX-License-Identifier: MIT */
/*
 * The sans-I/O core: what happens to a request between its arrival and its
 * completion. The core never makes a system call. Requests and I/O completions
 * go in through the bsu_queue_*() calls, I/O to submit and requests to complete
 * come out through struct bsu_queue_ops. The same code runs in ublk queue
 * threads, on the local transport and under the simulator.
 *
 * Threads: each bsu_queue belongs to one thread, which alone may make the
 * bsu_queue_*() calls on it. Everything else is called from one control thread
 * at a time, concurrently with the queues.
 *
 * All offsets and lengths are bytes unless a name says otherwise; errors are
 * negative errno values.
 */
#ifndef BSU_CORE_H
#define BSU_CORE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct bsu_arena;
struct bsu_device;
struct bsu_file;
struct bsu_image;
struct bsu_pool;
struct bsu_queue;
struct bsu_storage;
struct bsu_sweep;
struct bsu_task;

/* Values are those of UBLK_IO_OP_*. */
enum bsu_op {
	BSU_OP_READ = 0,
	BSU_OP_WRITE = 1,
	BSU_OP_FLUSH = 2,
	BSU_OP_DISCARD = 3,
	BSU_OP_WRITE_ZEROES = 5,
};

enum {
	BSU_FUA = 1,		/* on stable media before completion */
	BSU_NOUNMAP = 2,	/* write zeroes without giving up the space */
	BSU_NEED_COPY = 4,	/* this request's pages cannot be used in place */
};

/* A piece of work that a queue runs later: woken waiters, grants of memory. */
struct bsu_task {
	struct bsu_task *next;
	struct bsu_queue *queue;
	void (*run)(struct bsu_task *task);
	void *grant;		/* pool memory that was waited for */
	size_t want;
	const void *owner;	/* see bsu_pool_get() */
};

/*
 * One I/O the core wants done. It belongs to the core and stays in place until
 * bsu_queue_io_done(). Data is at @buf, or, when @buf is NULL, in the pages of
 * @rq from @rq_offset on (the executor maps that to its fixed buffer).
 */
struct bsu_io {
	struct bsu_file *file;
	uint64_t offset;
	uint64_t length;
	void *buf;
	struct bsu_request *rq;
	uint64_t rq_offset;
	uint8_t op;		/* enum bsu_op */
	uint8_t flags;		/* BSU_FUA, BSU_NOUNMAP */
	bool given_up;		/* nobody needs the rest of it */

	/* the executor's own, for instance the next pointer of a backlog */
	uint64_t cookie;
	struct bsu_io *next;

	/* the core's own */
	struct bsu_queue *queue;
	void (*done)(struct bsu_io *io, int res);
	uint64_t total;
	unsigned int retries;
};

/*
 * One request. The transport owns the memory (one per tag), fills in the first
 * block and hands it over with bsu_queue_request(); until ops->complete() it
 * is the core's.
 */
struct bsu_request {
	uint64_t start;
	uint64_t length;	/* 0 for a flush */
	uint32_t tag;
	uint8_t op;		/* enum bsu_op */
	uint8_t flags;

	/* the core's own */
	uint8_t state;
	uint8_t waits_for;
	bool in_gate;		/* counted as a write in flight */
	int result;
	unsigned int pending;	/* copies or segments under way */
	struct bsu_request *older, *newer;	/* requests of an image, by arrival */
	uint64_t cursor;	/* how far a read or a discard has been planned */
	uint64_t waiting_since;
	void *buf;
	struct bsu_task task;
	struct bsu_io io;
};

struct bsu_queue_ops {
	/* Start @io; its completion must not be reported from inside this call. */
	void (*submit)(void *ctx, struct bsu_io *io);
	/* @res: bytes for READ and WRITE, 0 for the rest, or a negative errno. */
	void (*complete)(void *ctx, struct bsu_request *rq, int res);
	/* Copy a request's data to or from memory. 0 or a negative errno. */
	int (*copy_from_request)(void *ctx, struct bsu_request *rq, uint64_t offset, void *to, size_t length);
	int (*copy_to_request)(void *ctx, struct bsu_request *rq, uint64_t offset, const void *from, size_t length);
	/* Any thread: let the queue's own thread call bsu_queue_run() soon. */
	void (*wake)(void *ctx);
	/* Any thread: something changed that the control side wants to know. */
	void (*notify)(void *ctx);
	/* Monotonic clock in ns. */
	uint64_t (*now)(void *ctx);
	/* Its thread: bsu_queue_run() is to be called at that time. Without it, bsu_queue_tick() does. */
	void (*later)(void *ctx, uint64_t when);
};

/* ---- buffers: one pool for each thread, shared by the queues on it ---- */

#define BSU_POOL_PAGE 4096u

/*
 * @memory: page aligned, @bytes a multiple of 2 * BSU_POOL_PAGE; stays the
 * caller's. @unstored: NULL, or bsu_pool_unstored_bytes() zeroed bytes of shared
 * memory. With it the second half of @memory has to be shared too, because writes
 * to an origin go on as soon as the old data is in there.
 */
struct bsu_pool *bsu_pool_new(void *memory, size_t bytes, void *unstored);
/* For a pool of so many bytes. */
size_t bsu_pool_unstored_bytes(size_t bytes);
void bsu_pool_free(struct bsu_pool *pool);
/* Bytes handed out at the moment; 0 when the thread is idle. */
size_t bsu_pool_used(const struct bsu_pool *pool);

/* ---- map memory: 4 KiB pages for tables and leaves of all maps ---- */

#define BSU_MAP_PAGE 4096u
#define BSU_ARENA_PORTION (16u << 20)

struct bsu_arena *bsu_arena_new(void);
void bsu_arena_free(struct bsu_arena *arena);
/* Add a portion of exactly BSU_ARENA_PORTION zeroed bytes, allocated ahead. */
int bsu_arena_add(struct bsu_arena *arena, void *memory);
/*
 * The same for portions that hold maps of a former process, in the order in
 * which that one added them, before any other (-EBUSY). See bsu_sweep_new().
 */
int bsu_arena_adopt(struct bsu_arena *arena, void *memory);
size_t bsu_arena_free_bytes(const struct bsu_arena *arena);
size_t bsu_arena_bytes(const struct bsu_arena *arena);

/* ---- difference storage ---- */

struct bsu_storage_config {
	uint32_t unit;			/* bytes */
	uint64_t number;		/* tells it from other storages, also after a death */
	void *state;			/* struct bsu_storage_state, zeroed, shared */
	/*
	 * The state is what a former process left, and the records of the areas
	 * that are added too; -EBADMSG if it does not fit. All that was ever given
	 * out is in quarantine.
	 */
	bool adopt;
};

struct bsu_storage *bsu_storage_new(const struct bsu_storage_config *config, int *err);
void bsu_storage_free(struct bsu_storage *storage);
/*
 * Append an area. @records: bsu_storage_records_bytes() zeroed bytes of shared
 * memory. -EINVAL when it is smaller than a unit, -ENOSPC when there is no
 * room for another area or place.
 */
int bsu_storage_add_area(struct bsu_storage *storage, struct bsu_file *file, uint64_t offset, uint64_t length, void *records);
size_t bsu_storage_records_bytes(const struct bsu_storage *storage, uint64_t length);
size_t bsu_storage_state_bytes(void);
/*
 * What happens when it is full: a writer waits for room so long, then what
 * lacks its units overflows; 0: at once, also for those that wait now. ops->notify()
 * is called, once, when less than @low bytes are free, and when a writer waits.
 */
void bsu_storage_set_room(struct bsu_storage *storage, uint64_t wait_ns, uint64_t low);
/* How fast copies may fill it; 0: no limit. Writers wait their turn. */
void bsu_storage_set_rate(struct bsu_storage *storage, uint64_t bytes_per_s);
/*
 * The storage I/O of former processes has ended, and the sweep: a portion of
 * giving back what no map holds. 1 while there is more.
 */
int bsu_storage_end_quarantine(struct bsu_storage *storage);
/*
 * What a former process had released early and perhaps not stored: @unstored and
 * the @bytes of its @buffers are what it gave bsu_pool_new(), the latter without
 * their first half. Finds a unit of this storage whose data @data is to be
 * written to @offset of @file before anybody reads an image; false when there
 * are no more. @at begins with 0.
 */
bool bsu_storage_unstored(const struct bsu_storage *storage, const void *unstored, const void *buffers, size_t bytes,
			  uint64_t *at, struct bsu_file **file, uint64_t *offset, const void **data);
/* Bytes. */
uint32_t bsu_storage_unit(const struct bsu_storage *storage);
uint64_t bsu_storage_capacity(const struct bsu_storage *storage);
uint64_t bsu_storage_used(const struct bsu_storage *storage);
uint64_t bsu_storage_area_used(const struct bsu_storage *storage, unsigned int area);

/* ---- devices ---- */

struct bsu_device_config {
	uint64_t size;
	uint32_t block;			/* logical block, bytes */
	uint32_t unit;			/* bytes, power of two, >= block */
	uint32_t tracking_block;	/* bytes, power of two, >= unit; 0: no tracking */
	struct bsu_file *origin;	/* NULL: a null device */
	void *bitmap;			/* active bitmap, shared, whole pages */
	void *swallowed;		/* one bit a tracking block, shared, or NULL */
	uint64_t copy_limit_ns;		/* 0: 30 s */
};

struct bsu_device *bsu_device_new(const struct bsu_device_config *config, int *err);
/* -EBUSY while it has queues or images. */
int bsu_device_free(struct bsu_device *dev);

/*
 * The gate. Closed, it parks writes, discards and write-zeroes that arrive;
 * drained, none that passed it is still in flight. Reads and flushes go on.
 */
void bsu_gate_close(struct bsu_device *dev);
bool bsu_gate_drained(struct bsu_device *dev);
void bsu_gate_open(struct bsu_device *dev);
/* The same without waking whoever waits: bsu_gate_open() follows when all gates of an instant are open. */
void bsu_gate_unlock(struct bsu_device *dev);
/* When the last write in flight ended with the gate closed, in the time of ops->now(); 0 if there was none. */
uint64_t bsu_gate_rested(const struct bsu_device *dev);

/*
 * Changes of the set of images, in three steps: prepare (may fail, changes
 * nothing), switch (gate closed and drained, cannot fail, constant time), and
 * bsu_settle() until it returns 0. One change at a time.
 * @bitmap: the zeroed active bitmap of the interval that begins, or NULL to
 * leave the active bitmap alone (images that go). Both the bitmap that it
 * replaces and this one are in use until the image taken is freed: writes to
 * the image mark the intervals before and after it.
 */
int bsu_prepare_take(struct bsu_device *dev, struct bsu_image *image);
/* -EBUSY also while the next younger image of its chain is GONE: that one goes first. */
int bsu_prepare_drop(struct bsu_device *dev, struct bsu_image *image);
void bsu_prepare_cancel(struct bsu_device *dev);
/*
 * Of a drop that was prepared: from now on nothing is copied for the image, also
 * if the drop is cancelled. True when the switch needs the gate closed and
 * drained: where a younger image is active, no copy for this one is under way.
 */
bool bsu_drop_begin(struct bsu_device *dev);
void bsu_switch(struct bsu_device *dev, void *bitmap);
/*
 * A portion of what follows a switch, in bounded time: what older images need
 * of one that goes is handed to them, then the former set is given up. 0 when
 * all is done, 1 when there is more, -EAGAIN when a queue's thread is still
 * inside the core and has to leave it first.
 */
int bsu_settle(struct bsu_device *dev);

/* Force blocks into the next increment; passes the gate by itself: call it
 * with the gate open, it returns -EAGAIN while the gate is closed. */
int bsu_device_mark(struct bsu_device *dev, uint64_t start, uint64_t length);

/*
 * Trims that were swallowed while a snapshot was held. With the gate closed
 * and drained and no image left: takes the next run out of the list and marks
 * it as changed; the caller sends it to the origin before the gate opens.
 * Returns false when none is left, or an image is held.
 */
bool bsu_device_next_swallowed(struct bsu_device *dev, uint64_t max_length, uint64_t *start, uint64_t *length);

/* Trims in a range are not sent any more: it belongs to somebody else now. */
void bsu_device_forget_swallowed(struct bsu_device *dev, uint64_t start, uint64_t length);
/* Whether a write that passed the gate waits for room in a storage. */
bool bsu_device_waits_for_room(struct bsu_device *dev);

/*
 * The origin has grown. With the gate closed and drained, nothing changing:
 * @bitmap, @swallowed: zeroed, for the new size; they get what the former ones
 * hold, and replace them, also where images mark. What is added counts as
 * changed. bsu_settle() until it returns 0, before the former ones may go.
 * Images keep their size. -EINVAL for a smaller size, -EBUSY while a change is
 * under way.
 */
int bsu_device_resize(struct bsu_device *dev, uint64_t size, void *bitmap, void *swallowed);

/* ---- images ---- */

enum bsu_image_status {
	BSU_IMAGE_ACTIVE = 1,
	BSU_IMAGE_OVERFLOWN = 2,
	BSU_IMAGE_CORRUPTED = 3,
	BSU_IMAGE_GONE = 4,
};

struct bsu_image_config {
	struct bsu_device *device;
	struct bsu_storage *storage;
	struct bsu_arena *arena;
	void *state;			/* bsu_image_state_bytes(), zeroed, shared */
	uint32_t serial;		/* names the map in the records, 1..2^24-1 */
};

size_t bsu_image_state_bytes(uint64_t device_size, uint32_t unit);
struct bsu_image *bsu_image_new(const struct bsu_image_config *config, int *err);
/*
 * An image that a former process had taken, of @size bytes: the youngest of its
 * device from now on, which has no queue yet (-EBUSY). @before, @after: bitmaps
 * of the intervals before and after it, or NULL for one that is never served.
 * -EBADMSG: the state does not fit; images of the same chain that are older
 * may read through it, they are to be broken.
 */
struct bsu_image *bsu_image_adopt(const struct bsu_image_config *config, uint64_t size, void *before, void *after, int *err);
/*
 * Before it is taken: these bytes, whole units, read as zeroes and are never
 * preserved for it. -ENOMEM when map memory is used up: add some, call it again.
 */
int bsu_image_exempt(struct bsu_image *image, uint64_t start, uint64_t length);
/*
 * A portion of giving back the places and the map memory of an image that was
 * dropped and settled, or never taken. 0 when all is done, 1 when there is
 * more, -EBUSY while a view, a queue or an I/O in flight refers to it.
 */
int bsu_image_release(struct bsu_image *image);
/* Releases what is left and frees it. -EBUSY as above. */
int bsu_image_free(struct bsu_image *image);
/*
 * Active to broken; the first reason stays. Any thread. Its requests end with
 * EIO, within a tick also those that wait for storage; what reads the origin
 * in place ends with its I/O.
 */
void bsu_image_break(struct bsu_image *image, enum bsu_image_status status, int error);
enum bsu_image_status bsu_image_status(const struct bsu_image *image, int *error);
uint64_t bsu_image_preserved(const struct bsu_image *image);
uint64_t bsu_image_written(const struct bsu_image *image);
bool bsu_image_idle(const struct bsu_image *image);

/* ---- the sweep: what a former process left is checked, and what it did not use is free ---- */

/*
 * Once all images are adopted. @lost: serials of images that could not be.
 * Devices may be served meanwhile, and images taken; no adopted image may be
 * served or dropped, or map memory and places of others added as adopted.
 *
 * Each slot must name a place whose record says so, each complete record must
 * be named by a slot. A record that no slot names belongs to a copy that was
 * about to be published: it is published now. What does not fit breaks the
 * image and the older ones of its chain (EBADMSG).
 */
struct bsu_sweep *bsu_sweep_new(struct bsu_arena *arena, const uint32_t *lost, unsigned int nr_lost, int *err);
/* All storages and images that were adopted. -ENOMEM. */
int bsu_sweep_add_storage(struct bsu_sweep *sweep, struct bsu_storage *storage);
int bsu_sweep_add_image(struct bsu_sweep *sweep, struct bsu_image *image);
/* A portion. 0 when all is done, 1 when there is more. */
int bsu_sweep_step(struct bsu_sweep *sweep);
void bsu_sweep_free(struct bsu_sweep *sweep);

/* ---- queues ---- */

struct bsu_queue_config {
	struct bsu_device *device;	/* serve a device (filtered, loop, null) … */
	struct bsu_image *image;	/* … or an image, which has one queue at most */
	struct bsu_pool *pool;
	const struct bsu_queue_ops *ops;
	void *ctx;
	unsigned int depth;		/* requests at once */
	bool zero_copy;			/* request pages can be used in I/O */
};

struct bsu_queue *bsu_queue_new(const struct bsu_queue_config *config, int *err);
/* Only when idle: -EBUSY otherwise. */
int bsu_queue_free(struct bsu_queue *queue);
bool bsu_queue_idle(const struct bsu_queue *queue);

void bsu_queue_request(struct bsu_queue *queue, struct bsu_request *rq);
/* @res: bytes done (short counts are continued here) or a negative errno. */
void bsu_queue_io_done(struct bsu_queue *queue, struct bsu_io *io, int res);
/* Run what others handed to this queue; call it after ops->wake(). */
void bsu_queue_run(struct bsu_queue *queue);
/* Call it about once a second: limits on waiting are kept here. */
void bsu_queue_tick(struct bsu_queue *queue);

/* Counters of a queue since its start, for status and benchmarks. */
struct bsu_queue_counters {
	uint64_t reads, writes, discards;	/* requests */
	uint64_t copies;			/* copies begun */
	uint64_t copied;			/* bytes preserved */
	uint64_t waits;				/* requests that waited for a claim */
	uint64_t parked;			/* requests that waited at the gate */
	uint64_t rereads;			/* image reads done again */
};
void bsu_queue_counters(const struct bsu_queue *queue, struct bsu_queue_counters *out);

uint32_t bsu_crc32c(uint32_t crc, const void *data, size_t length);

#endif
