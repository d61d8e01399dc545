/* SPDX-License-Identifier: MIT */
/*
 * A queue thread and what lives on it, for the files of this folder.
 *
 * A thread has two rings, both created, filled and emptied by it alone: the
 * origin ring (ublk commands, origin I/O, wake-ups) and the storage ring, so
 * that a storage which never answers cannot keep the barrier of an origin (see
 * bsu_thread_add_barrier()). It sleeps only in the wait of the origin ring; what
 * the storage ring completes and what other threads want wakes it from that
 * through one eventfd that the origin ring reads. Awake, it looks for itself.
 */
#ifndef BSU_THREAD_H
#define BSU_THREAD_H

#include <liburing.h>
#include <pthread.h>
#include <stdatomic.h>

#include "io.h"

#define BSU_THREAD_TRANSPORTS 512u
#define BSU_THREAD_FILES 512u
#define BSU_THREAD_POOL (8u << 20)

/* ---- user_data: a struct bsu_io, a command of a transport, a wake-up, or a second gone by ---- */

enum {
	BSU_TAG_IO = 0,
	BSU_TAG_COMMAND = 1,
	BSU_TAG_WAKE = 2,
	BSU_TAG_TICK = 3,
	BSU_TAG_MASK = 7,
};

_Static_assert(_Alignof(struct bsu_io) > BSU_TAG_MASK, "the low bits of its address hold the kind");
_Static_assert(BSU_THREAD_TRANSPORTS <= 1u << 16, "transport and tag share a word");

static inline uint64_t bsu_tag_io(const struct bsu_io *io)
{
	return (uint64_t)(uintptr_t)io | BSU_TAG_IO;
}

static inline struct bsu_io *bsu_tagged_io(uint64_t user_data)
{
	return (struct bsu_io *)(uintptr_t)(user_data & ~(uint64_t)BSU_TAG_MASK);
}

static inline uint64_t bsu_tag_command(unsigned int transport, uint16_t tag)
{
	return (uint64_t)transport << 32 | (uint64_t)tag << 16 | BSU_TAG_COMMAND;
}

static inline unsigned int bsu_tagged_transport(uint64_t user_data)
{
	return (unsigned int)(user_data >> 32);
}

static inline uint16_t bsu_tagged_tag(uint64_t user_data)
{
	return (uint16_t)(user_data >> 16);
}

/* ---- transports: where requests come from ---- */

struct bsu_transport;

struct bsu_transport_kind {
	/* Its thread, after bsu_transport_wake(). */
	void (*run)(struct bsu_transport *transport);
	/* Its thread, before a submission, with thread->any_command: false if the ring had no room for all. */
	bool (*flush)(struct bsu_transport *transport, struct io_uring *ring);
	/* Its thread: a command of tag @tag has ended. */
	void (*command_done)(struct bsu_transport *transport, uint16_t tag, int res);
	/* Its thread, about once a second. */
	void (*tick)(struct bsu_transport *transport);
	/* Where the data of a request is: a fixed buffer (returned) or memory (-1). */
	int (*locate)(struct bsu_transport *transport, const struct bsu_request *rq, uint64_t offset, uint64_t *addr);
};

struct bsu_py_wait;

/* What a transport that serves a Python target keeps; guarded by the target's lock. */
struct bsu_py_port {
	struct bsu_py *py;
	struct bsu_py_wait *wait;	/* one for each tag */
	uint32_t granted, done;		/* slots plus one; 0 ends the list */
	struct bsu_py_wait *refused;
	struct bsu_transport *next;	/* all ports of the target */
};

struct bsu_transport {
	const struct bsu_transport_kind *kind;
	const struct bsu_queue_ops *ops;
	struct bsu_thread *thread;
	struct bsu_queue *queue;	/* NULL: a Python target */
	struct bsu_py_port port;
	unsigned int index;		/* on the thread */
	unsigned int out;		/* requests handed over and not completed */
	bool orphan;			/* nobody will finish it; it frees itself */
	_Atomic bool awake;
};

/* ---- the thread ---- */

struct bsu_ring {
	struct io_uring uring;
	struct bsu_io *first, *last;	/* I/O that found no room in the ring */
	unsigned int out;		/* I/O with the kernel or in that list */
	bool fixed_pool;		/* the pool's memory is a fixed buffer, */
	unsigned int pool_slot;		/* this one */
};

struct bsu_message {
	struct bsu_message *next;
	int (*run)(struct bsu_thread *thread, void *arg);
	void *arg;
	int result;
	bool answered;
};

struct bsu_thread {
	struct bsu_thread_config config;
	pthread_t pthread;
	struct bsu_ring origin, storage;
	struct bsu_pool *pool;
	void *memory;
	void *unstored;			/* what of it is released early; NULL: nothing ever is */
	uint64_t *slots;		/* bit set: fixed buffer belongs to a transport */
	bool barrier[BSU_THREAD_FILES];
	struct bsu_transport *transport[BSU_THREAD_TRANSPORTS];
	unsigned int top;		/* highest index in use plus one */
	/* Where there are many transports, most have nothing to say: do not ask them all each time. */
	_Atomic bool any_awake;		/* one of them may be */
	bool any_command;		/* one has commands for the ring */
	uint64_t now;			/* ns, read once a pass; 0: not yet, see bsu_thread_now() */
	uint64_t next_run;		/* when queues are to be run; 0: not by time */
	bool quit;
	unsigned int name;

	int wake_fd;
	uint64_t wake_count;		/* what the ring reads from wake_fd */
	bool wake_armed;
	bool tick_armed, tick_due;
	_Atomic bool asleep;

	pthread_mutex_t lock;		/* messages, started */
	pthread_cond_t answered;
	struct bsu_message *messages;
	_Atomic bool any_message;
	int started;			/* 1, or a negative errno; 0 at first */
};

/* ---- buffers.c: the memory of its pool ---- */

int bsu_thread_map_memory(struct bsu_thread *thread);
void bsu_thread_unmap_memory(struct bsu_thread *thread);

/* Runs @run in the thread and returns what it returns. Not from a queue thread. */
int bsu_thread_call(struct bsu_thread *thread, int (*run)(struct bsu_thread *thread, void *arg), void *arg);
/* Repeats bsu_thread_call() while it returns -EBUSY; then -ETIMEDOUT. */
int bsu_thread_call_until(struct bsu_thread *thread, int (*run)(struct bsu_thread *thread, void *arg), void *arg,
			  unsigned int timeout_ms);
/* The thread itself: monotonic ns, the same until it has been in the kernel for its rings. */
uint64_t bsu_thread_now(struct bsu_thread *thread);
/* Any thread: wakes it from its sleep. */
void bsu_thread_wake(struct bsu_thread *thread);
/* A discard on its own through the thread's origin ring; waits for the end. */
int bsu_thread_discard(struct bsu_thread *thread, struct bsu_file *file, uint64_t start, uint64_t length);

/* The thread itself: add and take out a transport; -ENOSPC. */
int bsu_thread_attach(struct bsu_thread *thread, struct bsu_transport *transport);
void bsu_thread_detach(struct bsu_thread *thread, struct bsu_transport *transport);
/* The thread itself: a range of fixed buffers; the first, or -ENOSPC. */
int bsu_thread_take_slots(struct bsu_thread *thread, unsigned int count);
void bsu_thread_give_slots(struct bsu_thread *thread, unsigned int first, unsigned int count);
/* The thread itself: see bsu_thread_add_barrier(). */
int bsu_thread_barrier_set(struct bsu_thread *thread, int fd);
int bsu_thread_barrier_clear(struct bsu_thread *thread, int slot);

/* ---- transport.c: what all transports have in common ---- */

struct bsu_target {
	struct bsu_device *device;
	struct bsu_image *image;
	struct bsu_py *py;
};

/* Any one thread: makes the queue, or joins the Python target. -EINVAL unless @target has exactly one. */
int bsu_transport_init(struct bsu_transport *transport, struct bsu_thread *thread, const struct bsu_target *target,
		       unsigned int depth, bool zero_copy);
/* After bsu_thread_detach(). */
void bsu_transport_exit(struct bsu_transport *transport);
/* Its thread: hands a request over. */
void bsu_transport_request(struct bsu_transport *transport, struct bsu_request *rq);
bool bsu_transport_idle(const struct bsu_transport *transport);
/* Any thread: lets kind->run() be called soon. */
void bsu_transport_wake(struct bsu_transport *transport);
void bsu_transport_counters(struct bsu_transport *transport, struct bsu_queue_counters *out);
/* Of struct bsu_queue_ops. */
void bsu_transport_submit(void *ctx, struct bsu_io *io);
void bsu_transport_wake_op(void *ctx);
void bsu_transport_notify(void *ctx);
uint64_t bsu_transport_now(void *ctx);	/* NULL: any thread */
void bsu_transport_later(void *ctx, uint64_t when);

/* ---- executor.c: a struct bsu_io on the rings ---- */

/* @transport is NULL for I/O without a queue, whose io->done() is called. */
void bsu_io_start(struct bsu_thread *thread, struct bsu_transport *transport, struct bsu_io *io);
void bsu_io_ended(struct bsu_thread *thread, struct bsu_ring *ring, struct bsu_io *io, int res);
/* Puts what waits into the ring; false if there is more than it holds. */
bool bsu_ring_flush(struct bsu_thread *thread, struct bsu_ring *ring);

/* ---- py.c: the queue's side ---- */

int bsu_py_join(struct bsu_py *py, struct bsu_transport *transport, unsigned int depth);
void bsu_py_leave(struct bsu_transport *transport);
void bsu_py_accept(struct bsu_transport *transport, struct bsu_request *rq);
/* After a wake: takes up what the target's side left. */
void bsu_py_run(struct bsu_transport *transport);

#endif
