/* SPDX-License-Identifier: MIT */
/* What other threads ask of a queue thread: calls, wake-ups, changes of its tables. */
#include <errno.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "thread.h"

#define NS_PER_MS 1000000ull
#define NAP_NS (NS_PER_MS / 2)

uint64_t bsu_thread_now(struct bsu_thread *thread)
{
	if (!thread->now)
		thread->now = bsu_transport_now(NULL);
	return thread->now;
}

void bsu_thread_wake(struct bsu_thread *thread)
{
	const uint64_t one = 1;

	/* Awake, it looks at everything before it sleeps again. */
	if (!atomic_load(&thread->asleep) || !atomic_exchange(&thread->asleep, false))
		return;
	/* Cannot fail: the counter would have to reach 2^64 - 1. */
	if (write(thread->wake_fd, &one, sizeof(one)) < 0)
		return;
}

int bsu_thread_call(struct bsu_thread *thread, int (*run)(struct bsu_thread *thread, void *arg), void *arg)
{
	struct bsu_message message = { .run = run, .arg = arg };
	struct bsu_message **end;

	pthread_mutex_lock(&thread->lock);
	for (end = &thread->messages; *end; end = &(*end)->next)
		;
	*end = &message;
	atomic_store(&thread->any_message, true);
	bsu_thread_wake(thread);
	while (!message.answered)
		pthread_cond_wait(&thread->answered, &thread->lock);
	pthread_mutex_unlock(&thread->lock);
	return message.result;
}

int bsu_thread_call_until(struct bsu_thread *thread, int (*run)(struct bsu_thread *thread, void *arg), void *arg,
			  unsigned int timeout_ms)
{
	uint64_t deadline = bsu_transport_now(NULL) + timeout_ms * NS_PER_MS;
	const struct timespec nap = { .tv_nsec = NAP_NS };

	for (;;) {
		int ret = bsu_thread_call(thread, run, arg);

		if (ret != -EBUSY)
			return ret;
		if (bsu_transport_now(NULL) >= deadline)
			return -ETIMEDOUT;
		nanosleep(&nap, NULL);
	}
}

/* ---- transports ---- */

int bsu_thread_attach(struct bsu_thread *thread, struct bsu_transport *transport)
{
	unsigned int index = 0;

	while (index < BSU_THREAD_TRANSPORTS && thread->transport[index])
		index++;
	if (index == BSU_THREAD_TRANSPORTS)
		return -ENOSPC;
	transport->index = index;
	thread->transport[index] = transport;
	/* It may have been woken before it was there to be found. */
	atomic_store(&thread->any_awake, true);
	if (index >= thread->top)
		thread->top = index + 1;
	return 0;
}

void bsu_thread_detach(struct bsu_thread *thread, struct bsu_transport *transport)
{
	thread->transport[transport->index] = NULL;
	while (thread->top && !thread->transport[thread->top - 1])
		thread->top--;
}

/* ---- fixed buffers ---- */

static bool slot_used(const struct bsu_thread *thread, unsigned int slot)
{
	return thread->slots[slot / 64] >> (slot % 64) & 1;
}

int bsu_thread_take_slots(struct bsu_thread *thread, unsigned int count)
{
	unsigned int run = 0;

	for (unsigned int slot = 0; slot < thread->config.slots; slot++) {
		run = slot_used(thread, slot) ? 0 : run + 1;
		if (run < count)
			continue;
		for (unsigned int i = slot + 1 - count; i <= slot; i++)
			thread->slots[i / 64] |= 1ull << (i % 64);
		return (int)(slot + 1 - count);
	}
	return -ENOSPC;
}

void bsu_thread_give_slots(struct bsu_thread *thread, unsigned int first, unsigned int count)
{
	for (unsigned int i = first; i < first + count; i++)
		thread->slots[i / 64] &= ~(1ull << (i % 64));
}

/* ---- barriers ---- */

/*
 * No request ever names these files by their slot: before Linux 6.13 a file
 * taken out of the table is only let go when all older requests that used a
 * slot of it have ended, and a ublk fetch may stay for ever.
 */
int bsu_thread_barrier_set(struct bsu_thread *thread, int fd)
{
	for (unsigned int slot = 0; slot < BSU_THREAD_FILES; slot++) {
		int ret;

		if (thread->barrier[slot])
			continue;
		ret = io_uring_register_files_update(&thread->origin.uring, slot, &fd, 1);
		if (ret < 0)
			return ret;
		thread->barrier[slot] = true;
		return (int)slot;
	}
	return -ENOSPC;
}

int bsu_thread_barrier_clear(struct bsu_thread *thread, int slot)
{
	int none = -1, ret;

	if (slot < 0 || (unsigned int)slot >= BSU_THREAD_FILES || !thread->barrier[slot])
		return -EINVAL;
	ret = io_uring_register_files_update(&thread->origin.uring, (unsigned int)slot, &none, 1);
	if (ret < 0)
		return ret;
	thread->barrier[slot] = false;
	return 0;
}

static int add_barrier(struct bsu_thread *thread, void *arg)
{
	return bsu_thread_barrier_set(thread, *(int *)arg);
}

static int del_barrier(struct bsu_thread *thread, void *arg)
{
	return bsu_thread_barrier_clear(thread, *(int *)arg);
}

int bsu_thread_add_barrier(struct bsu_thread *thread, int fd)
{
	return bsu_thread_call(thread, add_barrier, &fd);
}

int bsu_thread_del_barrier(struct bsu_thread *thread, int slot)
{
	return bsu_thread_call(thread, del_barrier, &slot);
}

/* ---- I/O without a queue ---- */

struct lone_io {
	struct bsu_io io;
	int result;
	bool ended;
};

static void lone_io_done(struct bsu_io *io, int res)
{
	struct lone_io *lone = (struct lone_io *)((char *)io - offsetof(struct lone_io, io));

	lone->result = res;
	lone->ended = true;
}

static int lone_io_start(struct bsu_thread *thread, void *arg)
{
	struct lone_io *lone = arg;

	bsu_io_start(thread, NULL, &lone->io);
	return 0;
}

static int lone_io_ended(struct bsu_thread *thread, void *arg)
{
	struct lone_io *lone = arg;

	(void)thread;
	return lone->ended ? 0 : -EBUSY;
}

int bsu_thread_discard(struct bsu_thread *thread, struct bsu_file *file, uint64_t start, uint64_t length)
{
	struct lone_io lone = {
		.io = { .file = file, .offset = start, .length = length, .op = BSU_OP_DISCARD, .done = lone_io_done },
	};

	bsu_thread_call(thread, lone_io_start, &lone);
	/* The memory is the kernel's until then. */
	while (bsu_thread_call_until(thread, lone_io_ended, &lone, UINT32_MAX))
		;
	return lone.result;
}
