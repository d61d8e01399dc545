/* SPDX-License-Identifier: MIT */
/*
 * Executors of the core on io_uring: queue threads, the ublk transport, the
 * local transport, the ring to /dev/ublk-control.
 *
 * Every function returns 0 or a positive result, or a negative errno; those
 * that return a pointer store the negative errno in *err and return NULL.
 * Nothing here prints. Handles are opaque. Calls are made from the control
 * thread of the process (any one thread at a time) unless noted.
 */
#ifndef BSU_IO_H
#define BSU_IO_H

#include "../core/core.h"

struct bsu_control;
struct bsu_local;
struct bsu_py;
struct bsu_thread;
struct bsu_ublk;

/* ---- files: what a struct bsu_io goes to ---- */

struct bsu_file_info {
	uint64_t size;			/* bytes */
	uint32_t block;			/* what O_DIRECT offsets and lengths are a multiple of */
	bool is_device;
	bool direct;			/* opened with O_DIRECT */
};

/* Takes a duplicate of @fd, a file or a block device. */
struct bsu_file *bsu_file_new(int fd, int *err);
int bsu_file_info(const struct bsu_file *file, struct bsu_file_info *out);
/* Only when no I/O goes to it any more. */
void bsu_file_free(struct bsu_file *file);
/* Marks a file as storage: its I/O goes to the threads' storage rings. */
void bsu_file_set_storage(struct bsu_file *file);

/* ---- queue threads ---- */

struct bsu_thread_config {
	int cpu;			/* -1: any */
	size_t pool_bytes;		/* 0: 8 MiB */
	int lock_fd;			/* flock()ed file put in the storage ring's file table, or -1 */
	unsigned int entries;		/* ring size; 0: 256 */
	unsigned int slots;		/* fixed buffers for zero copy, all queues together; 0: 1024 */
	bool io_flusher;		/* PR_SET_IO_FLUSHER; -EPERM if refused */
	/*
	 * A file in memory, allocated and zeroed, for what is to outlive the process
	 * of this thread: bsu_thread_buffers_bytes() from @buffers_offset on. Writes to
	 * an origin then do not wait for the difference storage. -1: none.
	 */
	int buffers_fd;
	uint64_t buffers_offset;
};

size_t bsu_thread_buffers_bytes(size_t pool_bytes);

struct bsu_thread *bsu_thread_start(const struct bsu_thread_config *config, int *err);
/* -EBUSY while it serves a queue; -ETIMEDOUT if I/O is still out after that. */
int bsu_thread_stop(struct bsu_thread *thread, unsigned int timeout_ms);
/*
 * Puts @fd (a /dev/ublkcN) in the fixed-file table of the thread's origin ring,
 * so that recovery of that device is refused by the kernel until the last I/O
 * of the ring has ended. Returns a slot number for bsu_thread_del_barrier().
 */
int bsu_thread_add_barrier(struct bsu_thread *thread, int fd);
int bsu_thread_del_barrier(struct bsu_thread *thread, int slot);
/* Readable (eventfd) whenever a queue died or ops->notify() was called. */
int bsu_notify_fd(void);
/* Another eventfd that is told the same, of somebody else; -1: none. */
void bsu_set_doorbell(int fd);

/* ---- what dead threads had released early ---- */

struct bsu_storing;

/*
 * Begins to store it, by @thread. @buffers: @bytes that threads with pools of the
 * default size had; they, and the storage, are in use until it has ended.
 */
struct bsu_storing *bsu_storing_start(struct bsu_thread *thread, const struct bsu_storage *storage, const void *buffers,
				      size_t bytes, int *err);
/* -EBUSY while it is under way; then 0, or an error, and the rest is stored all the same. */
int bsu_storing_result(const struct bsu_storing *storing);
/* -EBUSY while it is under way. */
int bsu_storing_free(struct bsu_storing *storing);

/* ---- ublk transport: one queue of one ublk device on a thread ---- */

enum bsu_ublk_status {
	BSU_UBLK_ARMED = 1,		/* every tag is fetched */
	BSU_UBLK_STOPPING = 2,		/* the kernel takes tags back */
	BSU_UBLK_DONE = 3,		/* all tags are back, no request is out */
};

struct bsu_ublk_config {
	int char_fd;			/* /dev/ublkcN; duplicated */
	uint16_t queue_id;
	uint16_t depth;
	uint32_t desc_size;		/* bytes of a descriptor in the shared array */
	uint64_t flags;			/* UBLK_F_* as granted */
	bool zero_copy;			/* use AUTO_BUF_REG (granted) */
	struct bsu_device *device;	/* exactly one of the three */
	struct bsu_image *image;
	struct bsu_py *py;
};

/* Returns when all tags are armed. */
struct bsu_ublk *bsu_ublk_start(struct bsu_thread *thread, const struct bsu_ublk_config *config, int *err);
enum bsu_ublk_status bsu_ublk_status(const struct bsu_ublk *ublk);
/* After STOP_DEV (or a lost device): waits for DONE, detaches. -ETIMEDOUT. */
int bsu_ublk_finish(struct bsu_ublk *ublk, unsigned int timeout_ms);
void bsu_ublk_counters(struct bsu_ublk *ublk, struct bsu_queue_counters *out);

/* ---- local transport: the same queues without a kernel device ---- */

struct bsu_local_config {
	unsigned int depth;
	bool zero_copy;			/* false: forces the copy way */
	struct bsu_device *device;	/* exactly one of the three */
	struct bsu_image *image;
	struct bsu_py *py;
};

struct bsu_local *bsu_local_start(struct bsu_thread *thread, const struct bsu_local_config *config, int *err);
int bsu_local_finish(struct bsu_local *local, unsigned int timeout_ms);
/* Any thread. Starts a request; -EAGAIN when all tags are taken. Returns the tag. */
int bsu_local_submit(struct bsu_local *local, uint8_t op, uint8_t flags, uint64_t start, uint64_t length, void *buf);
/* Any thread. Waits for that tag and frees it: the request's result, or -ETIMEDOUT (the tag stays taken). */
int bsu_local_wait(struct bsu_local *local, int tag, unsigned int timeout_ms);
/* Both in one; waits for a free tag. */
int bsu_local_io(struct bsu_local *local, uint8_t op, uint8_t flags, uint64_t start, uint64_t length, void *buf);
void bsu_local_counters(struct bsu_local *local, struct bsu_queue_counters *out);

/* ---- targets written in Python: requests in batches through a ring ---- */

struct bsu_py_request {
	uint32_t slot;			/* index of the buffer, and what bsu_py_commit() takes */
	uint8_t op;
	uint8_t flags;
	uint16_t pad;
	uint64_t start;
	uint64_t length;
};

/*
 * @slots requests at once for all queues that serve this target, each with a
 * buffer of @max_bytes: that of slot n is at @memory + n * @max_bytes, which
 * stays the caller's. Data of a write is in the buffer when the request is
 * seen; data of a read is taken from there when it is committed.
 */
struct bsu_py *bsu_py_new(void *memory, unsigned int slots, size_t max_bytes, int *err);
int bsu_py_free(struct bsu_py *py);		/* -EBUSY while queues serve it */
/*
 * Any thread: nobody serves the target any more. All its requests, those to
 * come too, end with -EIO; taken slots may no longer be committed.
 */
void bsu_py_close(struct bsu_py *py);
/* Readable when requests wait, and always after bsu_py_close(). */
int bsu_py_event_fd(const struct bsu_py *py);
/* Any thread: up to @max requests, 0 when none waits, -ESHUTDOWN when closed. */
int bsu_py_take(struct bsu_py *py, struct bsu_py_request *out, unsigned int max);
/* Any thread: results in a batch; -errno or >= 0. */
int bsu_py_commit(struct bsu_py *py, const uint32_t *slots, const int32_t *results, unsigned int count);

/* ---- one instant for several devices ---- */

/*
 * Waits until no write of any of @devices waits for room in a storage: it would
 * keep a gate from being drained. -EBUSY after @limit_ms, *late: of which device.
 */
int bsu_wait_for_room(struct bsu_device **devices, unsigned int count, unsigned int limit_ms, unsigned int *late);

/*
 * Closes the gates of all @devices in that order, waits until the writes in
 * flight have ended, switches all (each to what bsu_prepare_*() prepared, with
 * bitmaps[i]), stores 1 to *commit (may be NULL), opens the gates. -ETIMEDOUT after @limit_ms:
 * gates reopened, nothing switched; *late is then the index of a device that
 * was not drained. *gate_ns: how long the first gate was closed; *writes_ns:
 * how much of that until the last write in flight had ended.
 */
int bsu_switch_all(struct bsu_device **devices, void **bitmaps, unsigned int count, unsigned int limit_ms,
		   uint32_t *commit, uint64_t *gate_ns, uint64_t *writes_ns, unsigned int *late);
/* bsu_device_resize() under the gate; bsu_switch_settle() follows. -ETIMEDOUT when writes do not come to rest. */
int bsu_resize_within(struct bsu_device *device, uint64_t size, void *bitmap, void *swallowed, unsigned int limit_ms);
/* bsu_settle() to its end. -ETIMEDOUT: call it again, it goes on where it was. */
int bsu_switch_settle(struct bsu_device *device, unsigned int timeout_ms);
/* bsu_image_release() to its end, in the same way. */
int bsu_image_release_within(struct bsu_image *image, unsigned int timeout_ms);
/*
 * Sends swallowed trims to the origin (a block device or a file) through the
 * origin ring of @thread, which must have the device's barrier, with the gate
 * closed for a slice of at most @slice bytes and about 10 ms. Returns 1 while there are more.
 * -ETIMEDOUT when writes in flight have not ended after @limit_ms.
 */
int bsu_replay_swallowed(struct bsu_thread *thread, struct bsu_device *device, struct bsu_file *origin, uint64_t slice,
			 unsigned int limit_ms);

/* ---- /dev/ublk-control ---- */

struct bsu_control *bsu_control_open(int *err);
void bsu_control_close(struct bsu_control *control);
/*
 * One control command (UBLK_U_CMD_*). @buf/@len: what it reads or fills in.
 * -ETIME when it has not ended after @timeout_ms; a late completion is
 * discarded and @buf is not touched after the return.
 */
int bsu_control_command(struct bsu_control *control, uint32_t command, uint32_t dev_id, uint16_t queue_id,
			void *buf, uint16_t len, uint64_t data, unsigned int timeout_ms);

/* ---- the process ---- */

/* mlockall(CURRENT|FUTURE). */
int bsu_lock_memory(void);
/* PR_SET_IO_FLUSHER for the calling thread and all it creates from then on. */
int bsu_set_io_flusher(void);
int bsu_get_io_flusher(void);

#endif
