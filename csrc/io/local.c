/* SPDX-License-Identifier: MIT */
/*
 * The local transport: requests of this process's own threads, on memory of
 * theirs, through the same queues and without a kernel device.
 *
 *   FREE -> BUSY -> DONE -> FREE
 *             \-> WAITED -^      somebody sleeps until it is done
 */
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "thread.h"

#define NS_PER_S 1000000000ull
#define NS_PER_MS 1000000ull
#define NO_LIMIT UINT64_MAX

/* What direct I/O demands of memory, at most. */
#define MEMORY_ALIGNMENT 512u

enum {
	FREE = 0,
	BUSY,
	WAITED,
	DONE,
};

struct local_tag {
	struct bsu_request rq;
	void *buf;
	int result;
	uint32_t next;			/* tag plus one, in the free or the incoming list */
	_Atomic uint32_t state;
};

struct bsu_local {
	struct bsu_transport transport;
	unsigned int depth;
	bool zero_copy;
	_Atomic int users;		/* threads inside a call */
	_Atomic bool closed;

	pthread_mutex_t lock;		/* the two lists */
	uint32_t free;
	uint32_t first_incoming, last_incoming;

	_Atomic uint32_t freed;		/* a futex: counts tags given back */
	_Atomic int want_free;
	struct local_tag tag[];
};

static struct bsu_local *of_transport(struct bsu_transport *transport)
{
	return (struct bsu_local *)((char *)transport - offsetof(struct bsu_local, transport));
}

static struct local_tag *of_request(struct bsu_request *rq)
{
	return (struct local_tag *)((char *)rq - offsetof(struct local_tag, rq));
}

static void futex_wake(_Atomic uint32_t *word)
{
	syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

/* Sleeps while *word is @value, until @deadline (monotonic ns); -ETIMEDOUT. */
static int futex_wait(_Atomic uint32_t *word, uint32_t value, uint64_t deadline)
{
	const struct timespec ts = {
		.tv_sec = (time_t)(deadline / NS_PER_S),
		.tv_nsec = (long)(deadline % NS_PER_S),
	};
	long ret = syscall(SYS_futex, word, FUTEX_WAIT_BITSET_PRIVATE, value, deadline == NO_LIMIT ? NULL : &ts,
			   NULL, FUTEX_BITSET_MATCH_ANY);

	return ret < 0 && errno == ETIMEDOUT ? -ETIMEDOUT : 0;
}

/* ---- the queue's side ---- */

static int local_copy_from_request(void *ctx, struct bsu_request *rq, uint64_t offset, void *to, size_t length)
{
	(void)ctx;
	memcpy(to, (char *)of_request(rq)->buf + offset, length);
	return 0;
}

static int local_copy_to_request(void *ctx, struct bsu_request *rq, uint64_t offset, const void *from, size_t length)
{
	(void)ctx;
	memcpy((char *)of_request(rq)->buf + offset, from, length);
	return 0;
}

static int local_locate(struct bsu_transport *transport, const struct bsu_request *rq, uint64_t offset, uint64_t *addr)
{
	const struct local_tag *tag = &of_transport(transport)->tag[rq->tag];

	*addr = (uint64_t)(uintptr_t)tag->buf + offset;
	return -1;
}

static void local_complete(void *ctx, struct bsu_request *rq, int res)
{
	struct bsu_transport *transport = ctx;
	struct local_tag *tag = of_request(rq);

	transport->out--;
	tag->result = res;
	if (atomic_exchange(&tag->state, DONE) == WAITED)
		futex_wake(&tag->state);
}

static void local_run(struct bsu_transport *transport)
{
	struct bsu_local *local = of_transport(transport);
	uint32_t at;

	if (transport->port.py)
		bsu_py_run(transport);
	pthread_mutex_lock(&local->lock);
	at = local->first_incoming;
	local->first_incoming = local->last_incoming = 0;
	pthread_mutex_unlock(&local->lock);
	while (at) {
		struct local_tag *tag = &local->tag[at - 1];

		/* Once completed, the tag may be in use again. */
		at = tag->next;
		bsu_transport_request(transport, &tag->rq);
	}
}

static bool local_flush(struct bsu_transport *transport, struct io_uring *ring)
{
	(void)transport;
	(void)ring;
	return true;
}

static void local_command_done(struct bsu_transport *transport, uint16_t tag, int res)
{
	(void)transport;
	(void)tag;
	(void)res;
}

static void local_tick(struct bsu_transport *transport)
{
	(void)transport;
}

static const struct bsu_transport_kind local_kind = {
	.run = local_run,
	.flush = local_flush,
	.command_done = local_command_done,
	.tick = local_tick,
	.locate = local_locate,
};

static const struct bsu_queue_ops local_ops = {
	.submit = bsu_transport_submit,
	.complete = local_complete,
	.copy_from_request = local_copy_from_request,
	.copy_to_request = local_copy_to_request,
	.wake = bsu_transport_wake_op,
	.notify = bsu_transport_notify,
	.now = bsu_transport_now,
	.later = bsu_transport_later,
};

/* ---- start and finish ---- */

static int local_attach(struct bsu_thread *thread, void *arg)
{
	struct bsu_local *local = arg;

	return bsu_thread_attach(thread, &local->transport);
}

static int local_detach(struct bsu_thread *thread, void *arg)
{
	struct bsu_local *local = arg;

	/* A submitter that was let in before the end has woken us by now. */
	if (atomic_load(&local->users) || atomic_load(&local->transport.awake) ||
	    !bsu_transport_idle(&local->transport))
		return -EBUSY;
	bsu_thread_detach(thread, &local->transport);
	return 0;
}

struct bsu_local *bsu_local_start(struct bsu_thread *thread, const struct bsu_local_config *config, int *err)
{
	const struct bsu_target target = { config->device, config->image, config->py };
	struct bsu_local *local;

	*err = -EINVAL;
	if (!config->depth || config->depth > UINT16_MAX)
		return NULL;
	*err = -ENOMEM;
	local = calloc(1, sizeof(*local) + config->depth * sizeof(local->tag[0]));
	if (!local)
		return NULL;
	local->transport.kind = &local_kind;
	local->transport.ops = &local_ops;
	local->depth = config->depth;
	local->zero_copy = config->zero_copy;
	pthread_mutex_init(&local->lock, NULL);
	for (uint32_t tag = config->depth; tag--;) {
		local->tag[tag].rq.tag = tag;
		local->tag[tag].next = local->free;
		local->free = tag + 1;
	}
	*err = bsu_transport_init(&local->transport, thread, &target, local->depth, local->zero_copy);
	if (*err)
		goto out_free;
	*err = bsu_thread_call(thread, local_attach, local);
	if (*err)
		goto out_exit;
	return local;

out_exit:
	bsu_transport_exit(&local->transport);
out_free:
	pthread_mutex_destroy(&local->lock);
	free(local);
	return NULL;
}

int bsu_local_finish(struct bsu_local *local, unsigned int timeout_ms)
{
	int ret;

	atomic_store(&local->closed, true);
	atomic_fetch_add(&local->freed, 1);
	futex_wake(&local->freed);
	ret = bsu_thread_call_until(local->transport.thread, local_detach, local, timeout_ms);
	if (ret)
		return ret;
	bsu_transport_exit(&local->transport);
	pthread_mutex_destroy(&local->lock);
	free(local);
	return 0;
}

void bsu_local_counters(struct bsu_local *local, struct bsu_queue_counters *out)
{
	bsu_transport_counters(&local->transport, out);
}

/* ---- the users' side ---- */

static struct local_tag *take_tag(struct bsu_local *local)
{
	struct local_tag *tag = NULL;

	pthread_mutex_lock(&local->lock);
	if (local->free) {
		tag = &local->tag[local->free - 1];
		local->free = tag->next;
	}
	pthread_mutex_unlock(&local->lock);
	return tag;
}

static void give_tag(struct bsu_local *local, struct local_tag *tag)
{
	pthread_mutex_lock(&local->lock);
	tag->next = local->free;
	local->free = tag->rq.tag + 1;
	pthread_mutex_unlock(&local->lock);
	/* As with the thread's sleep: who looks for a tag says so, then looks again. */
	atomic_fetch_add(&local->freed, 1);
	if (atomic_load(&local->want_free))
		futex_wake(&local->freed);
}

static int submit(struct bsu_local *local, uint8_t op, uint8_t flags, uint64_t start, uint64_t length, void *buf)
{
	bool has_data = op == BSU_OP_READ || op == BSU_OP_WRITE;
	struct local_tag *tag;

	if (op > BSU_OP_WRITE_ZEROES || op == 4 || (has_data && !buf) || length > INT_MAX)
		return -EINVAL;
	if (atomic_load(&local->closed))
		return -ESHUTDOWN;
	tag = take_tag(local);
	if (!tag)
		return -EAGAIN;
	tag->buf = buf;
	tag->rq.op = op;
	tag->rq.flags = flags & (BSU_FUA | BSU_NOUNMAP);
	if (!local->zero_copy || (uintptr_t)buf % MEMORY_ALIGNMENT)
		tag->rq.flags |= BSU_NEED_COPY;
	tag->rq.start = start;
	tag->rq.length = op == BSU_OP_FLUSH ? 0 : length;
	tag->next = 0;
	atomic_store_explicit(&tag->state, BUSY, memory_order_relaxed);

	pthread_mutex_lock(&local->lock);
	if (local->first_incoming)
		local->tag[local->last_incoming - 1].next = tag->rq.tag + 1;
	else
		local->first_incoming = tag->rq.tag + 1;
	local->last_incoming = tag->rq.tag + 1;
	pthread_mutex_unlock(&local->lock);
	bsu_transport_wake(&local->transport);
	return (int)tag->rq.tag;
}

static int wait_done(struct bsu_local *local, int number, uint64_t deadline)
{
	struct local_tag *tag;
	uint32_t state;
	int result;

	if (number < 0 || (unsigned int)number >= local->depth)
		return -EINVAL;
	tag = &local->tag[number];
	for (;;) {
		state = atomic_load(&tag->state);
		if (state == FREE)
			return -EINVAL;
		if (state == DONE)
			break;
		if (state == BUSY && !atomic_compare_exchange_strong(&tag->state, &state, WAITED))
			continue;
		if (futex_wait(&tag->state, WAITED, deadline) && atomic_load(&tag->state) != DONE)
			return -ETIMEDOUT;
	}
	result = tag->result;
	if (!atomic_compare_exchange_strong(&tag->state, &state, FREE))
		return -EINVAL;
	give_tag(local, tag);
	return result;
}

int bsu_local_submit(struct bsu_local *local, uint8_t op, uint8_t flags, uint64_t start, uint64_t length, void *buf)
{
	int ret;

	atomic_fetch_add(&local->users, 1);
	ret = submit(local, op, flags, start, length, buf);
	atomic_fetch_sub(&local->users, 1);
	return ret;
}

int bsu_local_wait(struct bsu_local *local, int tag, unsigned int timeout_ms)
{
	int ret;

	atomic_fetch_add(&local->users, 1);
	ret = wait_done(local, tag, bsu_transport_now(NULL) + timeout_ms * NS_PER_MS);
	atomic_fetch_sub(&local->users, 1);
	return ret;
}

int bsu_local_io(struct bsu_local *local, uint8_t op, uint8_t flags, uint64_t start, uint64_t length, void *buf)
{
	int ret;

	atomic_fetch_add(&local->users, 1);
	for (;;) {
		uint32_t freed = atomic_load(&local->freed);

		ret = submit(local, op, flags, start, length, buf);
		if (ret != -EAGAIN)
			break;
		atomic_fetch_add(&local->want_free, 1);
		futex_wait(&local->freed, freed, NO_LIMIT);
		atomic_fetch_sub(&local->want_free, 1);
	}
	if (ret >= 0)
		ret = wait_done(local, ret, NO_LIMIT);
	atomic_fetch_sub(&local->users, 1);
	return ret;
}
