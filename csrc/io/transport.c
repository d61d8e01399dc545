/* SPDX-License-Identifier: MIT */
/* What the ublk and the local transport have in common: a queue, or a Python target, on a thread. */
#include <errno.h>
#include <time.h>

#include "process.h"
#include "thread.h"

int bsu_transport_init(struct bsu_transport *transport, struct bsu_thread *thread, const struct bsu_target *target,
		       unsigned int depth, bool zero_copy)
{
	struct bsu_queue_config config = {
		.device = target->device,
		.image = target->image,
		.pool = thread->pool,
		.ops = transport->ops,
		.ctx = transport,
		.depth = depth,
		.zero_copy = zero_copy,
	};
	int err = 0;

	if (!!target->device + !!target->image + !!target->py != 1)
		return -EINVAL;
	transport->thread = thread;
	if (target->py)
		return bsu_py_join(target->py, transport, depth);
	transport->queue = bsu_queue_new(&config, &err);
	return transport->queue ? 0 : err;
}

void bsu_transport_exit(struct bsu_transport *transport)
{
	if (transport->port.py)
		bsu_py_leave(transport);
	else
		bsu_queue_free(transport->queue);
}

void bsu_transport_request(struct bsu_transport *transport, struct bsu_request *rq)
{
	transport->out++;
	if (transport->queue)
		bsu_queue_request(transport->queue, rq);
	else
		bsu_py_accept(transport, rq);
}

bool bsu_transport_idle(const struct bsu_transport *transport)
{
	return !transport->out && (!transport->queue || bsu_queue_idle(transport->queue));
}

void bsu_transport_wake(struct bsu_transport *transport)
{
	atomic_store(&transport->awake, true);
	/* Sequentially consistent, as is the thread's look at it before it sleeps. */
	atomic_store(&transport->thread->any_awake, true);
	bsu_thread_wake(transport->thread);
}

struct reading {
	const struct bsu_queue *queue;
	struct bsu_queue_counters *out;
};

static int read_counters(struct bsu_thread *thread, void *arg)
{
	struct reading *reading = arg;

	(void)thread;
	bsu_queue_counters(reading->queue, reading->out);
	return 0;
}

void bsu_transport_counters(struct bsu_transport *transport, struct bsu_queue_counters *out)
{
	struct reading reading = { transport->queue, out };

	*out = (struct bsu_queue_counters){ 0 };
	/* In its thread, which alone may look into the queue. */
	if (transport->queue)
		bsu_thread_call(transport->thread, read_counters, &reading);
}

void bsu_transport_submit(void *ctx, struct bsu_io *io)
{
	struct bsu_transport *transport = ctx;

	bsu_io_start(transport->thread, transport, io);
}

void bsu_transport_wake_op(void *ctx)
{
	bsu_transport_wake(ctx);
}

void bsu_transport_notify(void *ctx)
{
	(void)ctx;
	bsu_notify();
}

void bsu_transport_later(void *ctx, uint64_t when)
{
	struct bsu_transport *transport = ctx;
	struct bsu_thread *thread = transport->thread;

	if (!thread->next_run || when < thread->next_run)
		thread->next_run = when;
}

uint64_t bsu_transport_now(void *ctx)
{
	struct bsu_transport *transport = ctx;
	struct timespec ts;

	if (transport)
		return bsu_thread_now(transport->thread);
	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}
