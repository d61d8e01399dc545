/* SPDX-License-Identifier: MIT */
/*
 * What the files of the core share.
 *
 * Lock order: device.lock -> map.lock, those of older images first ->
 * storage.lock, arena.lock. A queue's inbox is lock-free. Map lookups take no
 * lock. Nothing is called out of the core (ops->*) with a lock held, except
 * ops->wake and ops->notify, which only write to an eventfd or the like.
 */
#ifndef BSU_INTERNAL_H
#define BSU_INTERNAL_H

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>

#include "core.h"
#include "mutant.h"
#include "state.h"
#include "storage.h"
#include "task.h"

#define NS_PER_S 1000000000ull
#define BSU_COPY_UNITS 256u		/* the most one copy covers: 1 MiB at 4 KiB units */
#define BSU_COPY_BYTES (1u << 20)
#define BSU_COPY_CLAIMS (BSU_COPY_UNITS / BSU_LEAF_UNITS + 1)
#define BSU_CLAIM_BUCKETS 256u
#define BSU_IO_RETRIES 1000u		/* EAGAIN and EINTR in a row, without progress */
#define BSU_ARENA_PORTIONS 1024u
#define BSU_MAP_WAIT_NS (5 * NS_PER_S)	/* for map memory that control adds */
#define BSU_QUARANTINE_WAIT_NS (5 * NS_PER_S)
#define BSU_COPY_LIMIT_NS (30 * NS_PER_S)

#define container_of(ptr, type, member) ((type *)((char *)(ptr) - offsetof(type, member)))

static inline uint64_t min_u64(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

static inline uint64_t max_u64(uint64_t a, uint64_t b)
{
	return a > b ? a : b;
}

/* ---- bitmap.c: arrays of 64-bit words shared with numpy ---- */

void bsu_bits_set(_Atomic uint64_t *bits, uint64_t first, uint64_t last);
void bsu_bits_clear(_Atomic uint64_t *bits, uint64_t first, uint64_t last);
/* First set bit at or after @from and before @end; @end if there is none. */
uint64_t bsu_bits_next(const _Atomic uint64_t *bits, uint64_t from, uint64_t end);
uint64_t bsu_bits_next_clear(const _Atomic uint64_t *bits, uint64_t from, uint64_t end);

/* ---- pool.c ---- */

/* What the holder of a buffer waits for; each kind has half of the pool. */
enum bsu_pool_kind {
	BSU_POOL_ORIGIN = 0,		/* I/O to the origin only */
	BSU_POOL_STORAGE = 1,		/* also to the difference storage, which may be silent */
};

/*
 * NULL: @task is queued and will run with task->grant set. @owner: whose silence
 * could keep the memory, for instance a storage; others find some left. NULL: nobody's.
 */
void *bsu_pool_get(struct bsu_pool *pool, enum bsu_pool_kind kind, const void *owner, size_t bytes, struct bsu_task *task);
/* The largest request that can ever be granted. */
size_t bsu_pool_largest(const struct bsu_pool *pool);
void bsu_pool_put(struct bsu_pool *pool, struct bsu_queue *self, const void *owner, void *memory, size_t bytes);
bool bsu_pool_forget(struct bsu_pool *pool, struct bsu_task *task);
/* The entry of a buffer for the storage; NULL where nothing is released early. */
struct bsu_unstored *bsu_pool_unstored(const struct bsu_pool *pool, const void *memory);

/* ---- map.c ---- */

/* What maps of a former process take of the adopted portions: one bit a page, one bit a leaf. */
struct bsu_arena_use {
	uint32_t pages;
	uint64_t *page;
	uint64_t *leaf;
};

struct bsu_arena {
	pthread_mutex_t lock;
	struct bsu_arena_use adopted;
	_Atomic(char *) portion[BSU_ARENA_PORTIONS];
	unsigned int portions;
	uint32_t next_page;
	uint32_t pages;
	uint32_t leaf_page;		/* page that leaves are cut from, and how many are left */
	unsigned int leaves_left;
	uint32_t free_page;		/* chains of freed pages and leaves: index plus one */
	uint32_t free_leaf;
	_Atomic uint64_t free_bytes;
};

struct bsu_map {
	struct bsu_arena *arena;
	_Atomic uint32_t *directory;
	uint64_t entries;
	pthread_mutex_t lock;		/* who adds tables and leaves */
	uint64_t shared;		/* between bsu_map_share() and bsu_map_shared() */
};

void bsu_map_init(struct bsu_map *map, struct bsu_arena *arena, void *directory, uint64_t entries);
/* Slot of @unit: 0, a place plus one, BSU_SLOT_BAD or BSU_SLOT_ZERO. */
uint32_t bsu_map_get(const struct bsu_map *map, uint64_t unit);
/* Units from @unit on that certainly have no slot: 0, or up to the end of an absent leaf or table. */
uint64_t bsu_map_absent(const struct bsu_map *map, uint64_t unit);
/* Makes the leaves for [first, first+count) exist; -ENOMEM when map memory is used up. */
int bsu_map_reserve(struct bsu_map *map, uint64_t first, uint64_t count);
/* The same, and zeroes where nothing is published yet. For a map that nobody uses. */
int bsu_map_fill_zero(struct bsu_map *map, uint64_t first, uint64_t count, uint64_t *filled);
void bsu_map_publish(struct bsu_map *map, uint64_t unit, uint32_t slot);
/* The same unless something is published there. */
bool bsu_map_publish_first(struct bsu_map *map, uint64_t unit, uint32_t slot);
/* The same where nothing but @old is. */
bool bsu_map_replace(struct bsu_map *map, uint64_t unit, uint32_t old, uint32_t slot);

/* ---- handover.c: maps of images that go ---- */

/*
 * One directory entry at a time. Gives @older what @map has and it lacks;
 * returns how many slots that were. Leaves and tables that @older has none of
 * become common to both, so this needs no memory.
 */
uint64_t bsu_map_hand_over(const struct bsu_map *map, struct bsu_map *older, uint64_t entry);
/*
 * Around that, for each map older than @older that may have tables and leaves in common with it: nobody adds leaves to
 * @heir meanwhile. The second returns how many slots @heir was given.
 */
void bsu_map_share(struct bsu_map *heir, const struct bsu_map *map, const struct bsu_map *older, uint64_t entry);
uint64_t bsu_map_shared(struct bsu_map *heir);
/* Afterwards, when nobody looks at @map any more: takes out of it what @older was given. */
void bsu_map_prune(struct bsu_map *map, const struct bsu_map *older, uint64_t entry);
/* Gives back the places, the leaves and the table of an entry. */
void bsu_map_clear(struct bsu_map *map, struct bsu_storage *storage, uint64_t entry);

/* ---- device.c, switch.c ---- */

/*
 * The held snapshots of a device that share a storage, oldest to newest. A
 * view, the set of chains of a device, is never altered: a switch replaces it.
 */
struct bsu_chain {
	struct bsu_storage *storage;
	unsigned int nr_images;
	struct bsu_image **image;
};

struct bsu_view {
	unsigned int nr_chains;
	unsigned int nr_images;
	struct bsu_chain chain[];
};

struct bsu_claim {
	struct bsu_claim *next;		/* in the bucket */
	const struct bsu_copy *early;	/* published, and its buffer is still there; NULL: not yet */
	const struct bsu_storage *storage;
	uint64_t leaf;			/* unit / BSU_LEAF_UNITS */
	uint64_t mask;			/* units of that leaf */
	struct bsu_tasks waiters;
};

/*
 * What follows a switch, one step after the other:
 *
 *   take:  GRACE -> IDLE
 *   drop:  HAND_OVER (of each entry of the map) -> GRACE -> PRUNE -> IDLE
 *   resize: MARKS (a grace period as well) -> IDLE
 */
enum bsu_settling {
	BSU_SETTLE_IDLE = 0,
	BSU_SETTLE_HAND_OVER,
	BSU_SETTLE_GRACE,
	BSU_SETTLE_PRUNE,
	BSU_SETTLE_MARKS,
};

struct bsu_device {
	_Atomic uint64_t size;
	uint32_t block;
	uint32_t unit;
	unsigned int unit_shift;
	uint32_t tracking_block;
	unsigned int tracking_shift;
	struct bsu_file *origin;
	unsigned int copy_units;	/* the most one copy or one storage read covers */
	uint64_t copy_limit_ns;
	_Atomic(_Atomic uint64_t *) bitmap;
	_Atomic uint64_t *swallowed;
	_Atomic bool any_swallowed;
	_Atomic uint64_t *old_bitmap;	/* that a resize replaced, for so many blocks */
	uint64_t old_blocks;

	_Atomic bool gate_closed;
	_Atomic uint64_t rested;	/* see bsu_gate_rested() */
	_Atomic(struct bsu_view *) view;
	struct bsu_view *next_view;
	struct bsu_view *old_view;
	struct bsu_image *changing;	/* the image that next_view adds or leaves out */
	struct bsu_image *older;	/* of the image that goes: who gets what it leaves */
	enum bsu_settling settling;
	uint64_t settled;		/* directory entries dealt with */
	_Atomic int images;
	_Atomic bool any_throttled;	/* a write waits for its turn */
	_Atomic bool seen;		/* a request to the device itself, for images to yield to */
	_Atomic uint64_t seen_at;	/* ns */

	pthread_mutex_t lock;		/* queues, claims */
	struct bsu_queue *queues;	/* of the device and of its images */
	struct bsu_claim *claim[BSU_CLAIM_BUCKETS];
};

struct bsu_image {
	struct bsu_device *dev;
	struct bsu_storage *storage;
	struct bsu_arena *arena;
	struct bsu_image_state *state;
	struct bsu_map map;		/* what was preserved */
	struct bsu_map written;		/* what was written to the image itself; changed by its queue alone */
	uint32_t serial;
	/* Bitmaps of the intervals that end and begin with it. */
	_Atomic(_Atomic uint64_t *) before;
	_Atomic(_Atomic uint64_t *) after;
	uint64_t size;
	uint64_t released;		/* directory entries given back */
	/* Units that a former process had in its maps. */
	uint64_t least_preserved;
	uint64_t least_written;
	uint64_t least_exempt;
	_Atomic bool taken;
	_Atomic int queues;		/* one at most */
	_Atomic int users;		/* queues, and I/O in flight that may use its map */
};

static inline uint64_t bsu_device_size(const struct bsu_device *dev)
{
	return atomic_load_explicit(&dev->size, memory_order_relaxed);
}

/* Devices grow, images do not. */
static inline uint64_t bsu_image_units(const struct bsu_image *image)
{
	return (image->size + image->dev->unit - 1) >> image->dev->unit_shift;
}

/* Bytes of @count units from @unit on that lie on the device. */
static inline uint64_t bsu_units_bytes(const struct bsu_device *dev, uint64_t unit, uint64_t count)
{
	return min_u64((unit + count) << dev->unit_shift, bsu_device_size(dev)) - (unit << dev->unit_shift);
}

void bsu_device_mark_range(struct bsu_device *dev, uint64_t start, uint64_t length);
/* The same in a bitmap that need not be the active one; NULL: none. */
void bsu_mark_range(const struct bsu_device *dev, _Atomic uint64_t *bitmap, uint64_t start, uint64_t length);
void bsu_device_swallow(struct bsu_device *dev, uint64_t start, uint64_t length);
void bsu_device_unswallow(struct bsu_device *dev, uint64_t start, uint64_t length);

/* An image that a former process had: the youngest of its device from now on, which has no queue yet. */
int bsu_view_adopt(struct bsu_image *image);

/* ---- adopt.c: maps of a former process ---- */

/*
 * Checks that tables and leaves of @map exist and are used once, or by a map of
 * @chain at the same place too. -EBADMSG otherwise: it must not be used.
 */
int bsu_map_adopt(const struct bsu_map *map, const struct bsu_chain *chain);

/* From now on a grace period runs, which has passed when each thread has left the core once. */
void bsu_grace_begin(struct bsu_device *dev);
bool bsu_grace_passed(struct bsu_device *dev);

/* After the grace period of a resize: the last marks in the bitmap that it replaced. */
void bsu_resize_settle(struct bsu_device *dev);

/* ---- chain.c: what the images of a chain have ---- */

/* Slot that @chain->image[k] reads @unit from, 0 for the origin. */
uint32_t bsu_chain_slot(const struct bsu_chain *chain, unsigned int k, uint64_t unit);
/* Index of the newest image that is not broken; -1 when all are. */
int bsu_chain_newest(const struct bsu_chain *chain);
/* Units from @unit on, at most @max, that all lack or all have a slot as image k sees them. */
uint64_t bsu_chain_run(const struct bsu_chain *chain, unsigned int k, uint64_t unit, uint64_t max, bool *has);
/* Break every image of the chain that reads @unit from @slot. */
void bsu_chain_break_slot(struct bsu_queue *queue, const struct bsu_chain *chain, uint64_t unit, uint32_t slot, int error);
/* Break every image of the chain that does not have @unit. */
void bsu_chain_break(struct bsu_queue *queue, const struct bsu_chain *chain, uint64_t unit, enum bsu_image_status status, int error);
const struct bsu_chain *bsu_view_chain(const struct bsu_view *view, const struct bsu_storage *storage);

/* ---- claim.c (device.lock held) ---- */

/* Units of the leaf that somebody preserves at the moment. */
uint64_t bsu_claimed(struct bsu_device *dev, const struct bsu_storage *storage, uint64_t leaf, uint64_t mask, struct bsu_claim **conflict);
void bsu_claim_add(struct bsu_device *dev, struct bsu_claim *claim);
/* Its waiters are moved to @woken. */
void bsu_claim_wake(struct bsu_claim *claim, struct bsu_tasks *woken);
/* The same, and takes the claim out. */
void bsu_claim_remove(struct bsu_device *dev, struct bsu_claim *claim, struct bsu_tasks *woken);
/* The copy that was published early as @slot for @unit; NULL if there is none. */
const struct bsu_copy *bsu_claim_copy(struct bsu_device *dev, const struct bsu_storage *storage, uint64_t unit, uint32_t slot);

/* ---- copy.c: preserving ---- */

/*
 *   FREE -> BUFFER (waits for pool memory) -> READ -> STORE -> FREE
 *                       |                      |        |
 *                       +---- limit passed: GIVEN_UP until the I/O ends -> FREE
 *
 * READ has a slow form, one unit at a time, after a read error of several.
 *
 * A copy is published, and what waits for it goes on, at the end of STORE; or at
 * its beginning (early release), where the buffer outlives the process. Then
 * images read from the buffer until STORE has ended, and the copy counts as a
 * write in flight: so a switch still finds no copy under way.
 */
enum bsu_copy_state {
	BSU_COPY_FREE = 0,
	BSU_COPY_BUFFER,
	BSU_COPY_READ,
	BSU_COPY_STORE,
};

struct bsu_copy {
	struct bsu_copy *next;		/* free list */
	struct bsu_copy *older, *newer;	/* copies under way, by age */
	enum bsu_copy_state state;
	bool given_up;
	bool early;			/* published before it is stored, */
	struct bsu_unstored *unstored;	/* which this tells; NULL when nobody needs the buffer */
	struct bsu_request *rq;		/* who waits for it; NULL once given up */
	struct bsu_image *image;	/* whose map it is published in */
	uint64_t unit;
	uint32_t count;
	uint32_t place;
	uint32_t reading;		/* slow form: the unit being read, counted from 0 */
	bool slow;
	uint64_t limit;			/* ns */
	uint64_t stored;		/* when its write to the storage was begun */
	void *buf;
	struct bsu_io io;
	struct bsu_task task;
	unsigned int nr_claims;
	struct bsu_claim claim[BSU_COPY_CLAIMS];
	uint64_t bad[BSU_COPY_UNITS / 64];
	uint64_t unpublished[BSU_COPY_UNITS / 64];	/* early: places that no map has */
};

/* Claims a run of lacking units, for which a place and map memory are reserved; device.lock held. */
void bsu_copy_claim(struct bsu_copy *copy, struct bsu_request *rq, struct bsu_image *image, uint64_t unit, uint32_t count, uint32_t place);
void bsu_copy_start(struct bsu_copy *copy);
void bsu_copies_tick(struct bsu_queue *queue, uint64_t now);
/*
 * What was published as @units places from @slot on and may not be stored yet:
 * returns how many of them, from the first on, are alike, and whether those were
 * copied to @to. Otherwise they are stored.
 */
uint32_t bsu_copy_fetch(struct bsu_device *dev, const struct bsu_storage *storage, uint64_t unit, uint32_t slot,
			uint32_t units, void *to, bool *fetched);

/* ---- image_source.c: where an image finds its data ---- */

struct bsu_source {
	const struct bsu_image *image;
	const struct bsu_chain *chain;
	unsigned int k;			/* the image's place in it */
};

/* False when the image is not trusted, or not in the set of its device. */
bool bsu_find_source(struct bsu_image *image, struct bsu_source *source);
/* Units from @unit on, at most @max, that come from one source in a row; the slot of the first. */
uint32_t bsu_source_run(const struct bsu_source *source, uint64_t unit, uint32_t max, uint32_t *slot);
/*
 * After a read of these units from @slot on into @data (NULL: the origin, in
 * place), which ended with *@res: false when the source has changed, and they
 * are to be read again. Otherwise the data can be trusted, or *@res is an error;
 * storage that did not give what was put there breaks the image.
 */
bool bsu_source_holds(struct bsu_queue *queue, uint64_t unit, uint32_t units, uint32_t slot, const void *data, int *res);

static inline bool bsu_slot_is_place(uint32_t slot)
{
	return slot && slot < BSU_SLOT_ZERO;
}

/* ---- image_read.c, image_write.c ---- */

/*
 * What a segment waits for. An I/O to or from a buffer can be given up: the
 * request ends, the segment is busy until the I/O has ended.
 */
enum bsu_segment_state {
	BSU_SEGMENT_STILL = 0,		/* nothing that could be given up */
	BSU_SEGMENT_BUFFER,
	BSU_SEGMENT_IO,
};

/* A part of a request to an image. */
struct bsu_segment {
	struct bsu_segment *next;	/* free list */
	struct bsu_queue *queue;
	struct bsu_request *rq;		/* NULL: given up, what is left only frees */
	enum bsu_segment_state state;
	uint64_t limit;			/* ns, of what is waited for */
	uint64_t start, end;		/* bytes still to be read or written */
	uint64_t length;		/* bytes of the run under way */
	uint32_t slot;			/* its source: 0, or the slot of its first unit */
	uint32_t units;
	uint32_t place;			/* what is written goes there … */
	bool has_places;		/* … and these places are not published yet */
	bool slow;			/* no longer counted in segments_out */
	uint64_t filling;		/* unit whose old data is read for a write to a part of it */
	void *buf;
	size_t buf_bytes;
	struct bsu_io io;
	struct bsu_task task;
};

struct bsu_segment *bsu_segment_get(struct bsu_queue *queue, struct bsu_request *rq);
/* For a request that has none: @run goes on when there may be one. Not for ever: the request may end with EIO. */
void bsu_segment_wait(struct bsu_queue *queue, struct bsu_request *rq, void (*run)(struct bsu_task *));
/* Back to the free list; who waits for one goes on. */
void bsu_segment_put(struct bsu_segment *segment);
void bsu_segment_put_buffer(struct bsu_segment *segment);
/* Submits its I/O, which has a limit if the data go through the segment's buffer. */
void bsu_segment_submit(struct bsu_segment *segment);
/* Its I/O has ended: false when the segment was given up, and is free now. */
bool bsu_segment_io_ended(struct bsu_segment *segment);
/* Waits for pool memory, after which @run goes on with task->grant. */
void bsu_segment_get_buffer(struct bsu_segment *segment, enum bsu_pool_kind kind, size_t bytes, void (*run)(struct bsu_task *));
/* The same for a buffer that was granted. */
bool bsu_segment_granted(struct bsu_segment *segment);
void bsu_segments_tick(struct bsu_queue *queue, uint64_t now);
/* How a segment's request goes on when it was given up. */
void bsu_read_given_up(struct bsu_queue *queue, struct bsu_request *rq);
void bsu_image_read(struct bsu_request *rq);
void bsu_image_write(struct bsu_request *rq);
/* A request has ended, one way or the other. */
void bsu_image_request_end(struct bsu_queue *queue, struct bsu_request *rq, int res);

/* ---- queue.c ---- */

struct bsu_queue {
	struct bsu_device *dev;		/* also for an image: the device it shows */
	struct bsu_image *image;
	struct bsu_pool *pool;
	const struct bsu_queue_ops *ops;
	void *ctx;
	bool zero_copy;
	unsigned int depth;
	struct bsu_queue *next;		/* of the device */

	/* Odd while the thread is inside the core: what a grace period waits for. */
	_Atomic uint64_t pass;
	uint64_t pass_seen;		/* by the control thread */
	/* Writes that passed the gate; written by the queue's thread alone. */
	_Atomic uint64_t entered, left;

	_Atomic(struct bsu_task *) inbox;
	_Atomic unsigned int visitors;	/* threads that are handing it a task */
	_Atomic bool retry;		/* the gate was opened, or map memory added */
	struct bsu_tasks ready;
	struct bsu_tasks parked;
	struct bsu_tasks map_waiters;
	struct bsu_tasks copy_waiters;
	struct bsu_tasks throttled;
	uint64_t throttled_until;
	struct bsu_tasks segment_waiters;
	/* Requests of an image, by arrival, and how many of them change it. */
	struct bsu_request *oldest_request, *newest_request;
	unsigned int changes;

	unsigned int busy;		/* requests and copies not ended */
	struct bsu_copy *free_copy;
	struct bsu_copy *oldest, *newest;
	struct bsu_segment *free_segment;
	struct bsu_copy *copies;
	struct bsu_segment *segments;
	unsigned int nr_copies, nr_segments;
	unsigned int segments_out, copies_out;
	struct bsu_queue_counters counters;
};

static inline uint64_t bsu_now(struct bsu_queue *queue)
{
	return queue->ops->now(queue->ctx);
}

void bsu_submit(struct bsu_queue *queue, struct bsu_io *io);
/* Something that a switch has to wait for begins, in a queue that has such a thing already; and ends. */
void bsu_flight_begin(struct bsu_queue *queue);
void bsu_flight_end(struct bsu_queue *queue);
void bsu_request_end(struct bsu_queue *queue, struct bsu_request *rq, int res);

enum bsu_wait {
	BSU_WAIT_COPY = 1,
	BSU_WAIT_MAP,
	BSU_WAIT_ROOM,
	BSU_WAIT_TURN,
};

/* Whether the request has waited for @what for @limit (ns), since the last time that it made progress. */
bool bsu_waited(struct bsu_queue *queue, struct bsu_request *rq, enum bsu_wait what, uint64_t limit);
void bsu_notify_queues(struct bsu_device *dev);

/* device_request.c, write.c, image_read.c: where a request goes */
void bsu_device_request(struct bsu_queue *queue, struct bsu_request *rq);
void bsu_write_request(struct bsu_queue *queue, struct bsu_request *rq);
void bsu_write_again(struct bsu_task *task);
void bsu_origin_io(struct bsu_queue *queue, struct bsu_request *rq);
void bsu_image_request(struct bsu_queue *queue, struct bsu_request *rq);

#endif
