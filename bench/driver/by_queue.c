/* SPDX-License-Identifier: MIT */
/*
 * Requests made by the queue's own thread, as they arrive from ublk: whatever
 * has ended is followed by the next one, in the same turn of the loop. So
 * there is no other thread to be woken, and the same happens in each run.
 */
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "driver.h"
#include "io/thread.h"

#define PYTHON_SLOTS 32

struct own_tag {
	struct bsu_request rq;
	struct own_tag *next;
	char *buf;
	uint64_t begun;
};

struct own {
	struct bsu_transport transport;
	const struct options *options;
	struct result *result;
	uint64_t made, ended;
	struct own_tag *free;
	struct bsu_py *py;
	pthread_mutex_t lock;
	pthread_cond_t over;
	bool is_over;
	struct own_tag tag[];
};

static struct own *of_transport(struct bsu_transport *transport)
{
	return (struct own *)((char *)transport - offsetof(struct own, transport));
}

static struct own_tag *of_request(struct bsu_request *rq)
{
	return (struct own_tag *)((char *)rq - offsetof(struct own_tag, rq));
}

static int copy_from(void *ctx, struct bsu_request *rq, uint64_t offset, void *to, size_t length)
{
	(void)ctx;
	memcpy(to, of_request(rq)->buf + offset, length);
	return 0;
}

static int copy_to(void *ctx, struct bsu_request *rq, uint64_t offset, const void *from, size_t length)
{
	(void)ctx;
	memcpy(of_request(rq)->buf + offset, from, length);
	return 0;
}

static int locate(struct bsu_transport *transport, const struct bsu_request *rq, uint64_t offset, uint64_t *addr)
{
	*addr = (uint64_t)(uintptr_t)of_transport(transport)->tag[rq->tag].buf + offset;
	return -1;
}

static void complete(void *ctx, struct bsu_request *rq, int res)
{
	struct bsu_transport *transport = ctx;
	struct own *own = of_transport(transport);
	struct own_tag *tag = of_request(rq);

	must(res, "request");
	transport->out--;
	if (own->options->timed)
		times_add(&own->result->times, now_ns() - tag->begun);
	tag->next = own->free;
	own->free = tag;
	bsu_transport_wake(transport);
	if (++own->ended < own->options->requests)
		return;
	result_end(own->result);
	pthread_mutex_lock(&own->lock);
	own->is_over = true;
	pthread_cond_signal(&own->over);
	pthread_mutex_unlock(&own->lock);
}

/* What a null target in Python would do. */
static void answer(struct own *own)
{
	struct bsu_py_request request[PYTHON_SLOTS];
	uint32_t slot[PYTHON_SLOTS];
	int32_t result[PYTHON_SLOTS];
	int count;

	while ((count = must(bsu_py_take(own->py, request, PYTHON_SLOTS), "take"))) {
		for (int i = 0; i < count; i++) {
			slot[i] = request[i].slot;
			result[i] = (int32_t)request[i].length;
		}
		must(bsu_py_commit(own->py, slot, result, (unsigned int)count), "commit");
	}
}

static void run(struct bsu_transport *transport)
{
	struct own *own = of_transport(transport);
	const struct options *options = own->options;

	if (own->py)
		bsu_py_run(transport);
	while (own->free && own->made < options->requests) {
		struct own_tag *tag = own->free;

		own->free = tag->next;
		tag->rq.op = options->write ? BSU_OP_WRITE : BSU_OP_READ;
		tag->rq.flags = options->copy_way ? BSU_NEED_COPY : 0;
		tag->rq.start = place_of(options, own->made++);
		tag->rq.length = options->length;
		if (options->timed)
			tag->begun = now_ns();
		bsu_transport_request(transport, &tag->rq);
	}
	if (own->py)
		answer(own);
}

static bool flush(struct bsu_transport *transport, struct io_uring *ring)
{
	(void)transport;
	(void)ring;
	return true;
}

static void command_done(struct bsu_transport *transport, uint16_t tag, int res)
{
	(void)transport;
	(void)tag;
	(void)res;
}

static void tick(struct bsu_transport *transport)
{
	(void)transport;
}

static const struct bsu_transport_kind own_kind = {
	.run = run,
	.flush = flush,
	.command_done = command_done,
	.tick = tick,
	.locate = locate,
};

static const struct bsu_queue_ops own_ops = {
	.submit = bsu_transport_submit,
	.complete = complete,
	.copy_from_request = copy_from,
	.copy_to_request = copy_to,
	.wake = bsu_transport_wake_op,
	.notify = bsu_transport_notify,
	.now = bsu_transport_now,
	.later = bsu_transport_later,
};

static int begin(struct bsu_thread *thread, void *arg)
{
	struct own *own = arg;
	int ret = bsu_thread_attach(thread, &own->transport);

	result_begin(own->result);
	bsu_transport_wake(&own->transport);
	return ret;
}

static int detach(struct bsu_thread *thread, void *arg)
{
	struct own *own = arg;

	if (!bsu_transport_idle(&own->transport))
		return -EBUSY;
	bsu_thread_detach(thread, &own->transport);
	return 0;
}

void by_queue(struct disk *disk, const struct options *options, struct result *result)
{
	struct own *own = calloc(1, sizeof(*own) + options->depth * sizeof(own->tag[0]));
	struct bsu_target target = { .device = disk->device };
	char *memory = new_memory((uint64_t)options->depth * options->length);
	int err = 0;

	must(own ? 0 : -ENOMEM, "memory");
	own->transport.kind = &own_kind;
	own->transport.ops = &own_ops;
	own->options = options;
	own->result = result;
	pthread_mutex_init(&own->lock, NULL);
	pthread_cond_init(&own->over, NULL);
	for (unsigned int i = 0; i < options->depth; i++) {
		own->tag[i].rq.tag = i;
		own->tag[i].buf = memory + (uint64_t)i * options->length;
		own->tag[i].next = own->free;
		own->free = &own->tag[i];
	}
	if (options->target == TARGET_IMAGE)
		target = (struct bsu_target){ .image = disk->oldest };
	if (options->target == TARGET_PYTHON) {
		own->py = bsu_py_new(new_memory((uint64_t)PYTHON_SLOTS * options->length), PYTHON_SLOTS,
				     options->length, &err);
		must(err, "Python target");
		target = (struct bsu_target){ .py = own->py };
	}
	must(bsu_transport_init(&own->transport, disk->thread, &target, options->depth, !options->copy_way), "queue");
	must(bsu_thread_call(disk->thread, begin, own), "begin");

	pthread_mutex_lock(&own->lock);
	while (!own->is_over)
		pthread_cond_wait(&own->over, &own->lock);
	pthread_mutex_unlock(&own->lock);
	bsu_transport_counters(&own->transport, &result->counters);
	must(bsu_thread_call_until(disk->thread, detach, own, 10000), "end");
	bsu_transport_exit(&own->transport);
	free(own);
}
