/* SPDX-License-Identifier: MIT */
/*
 * Requests of a device that go to the origin as they are: reads, flushes, and
 * writes that write.c has let through. In the copy way the data passes through
 * a buffer of the pool.
 */
#include "internal.h"

static void origin_done(struct bsu_io *io, int res)
{
	struct bsu_request *rq = container_of(io, struct bsu_request, io);
	struct bsu_queue *queue = io->queue;

	if (MUTANT(BSU_MUTANT_MARK_LATE) && rq->op != BSU_OP_READ)
		bsu_device_mark_range(queue->dev, rq->start, rq->length);
	if (MUTANT(BSU_MUTANT_FAILED_UNMARKED) && rq->op == BSU_OP_WRITE && res)
		bsu_bits_clear(queue->dev->bitmap, rq->start >> queue->dev->tracking_shift,
			       (rq->start + rq->length - 1) >> queue->dev->tracking_shift);
	if (rq->buf) {
		if (!res && rq->op == BSU_OP_READ)
			res = queue->ops->copy_to_request(queue->ctx, rq, 0, rq->buf, rq->length);
		bsu_pool_put(queue->pool, queue, NULL, rq->buf, rq->length);
		rq->buf = NULL;
	}
	if (!res && (rq->op == BSU_OP_READ || rq->op == BSU_OP_WRITE))
		res = (int)rq->length;
	bsu_request_end(queue, rq, res);
}

static void submit_to_origin(struct bsu_queue *queue, struct bsu_request *rq)
{
	rq->io = (struct bsu_io) {
		.file = queue->dev->origin,
		.offset = rq->start,
		.length = rq->length,
		.buf = rq->buf,
		.rq = rq,
		.op = rq->op,
		.flags = rq->flags & (BSU_FUA | BSU_NOUNMAP),
		.done = origin_done,
	};
	/* FUA on a read means nothing here, and some disks lose data over it. */
	if ((rq->op == BSU_OP_READ && !MUTANT(BSU_MUTANT_FUA_ON_READ)) || MUTANT(BSU_MUTANT_DROP_FUA))
		rq->io.flags &= (uint8_t)~BSU_FUA;
	bsu_submit(queue, &rq->io);
}

static void origin_granted(struct bsu_task *task)
{
	struct bsu_request *rq = container_of(task, struct bsu_request, task);
	struct bsu_queue *queue = task->queue;
	int ret = 0;

	rq->buf = task->grant;
	if (rq->op == BSU_OP_WRITE)
		ret = queue->ops->copy_from_request(queue->ctx, rq, 0, rq->buf, rq->length);
	if (ret) {
		bsu_pool_put(queue->pool, queue, NULL, rq->buf, rq->length);
		bsu_request_end(queue, rq, ret);
		return;
	}
	submit_to_origin(queue, rq);
}

void bsu_origin_io(struct bsu_queue *queue, struct bsu_request *rq)
{
	bool data = rq->op == BSU_OP_READ || rq->op == BSU_OP_WRITE;

	if (!data || (queue->zero_copy && !(rq->flags & BSU_NEED_COPY))) {
		submit_to_origin(queue, rq);
		return;
	}
	if (rq->length > bsu_pool_largest(queue->pool)) {
		bsu_request_end(queue, rq, -EINVAL);
		return;
	}
	rq->task.run = origin_granted;
	rq->task.grant = bsu_pool_get(queue->pool, BSU_POOL_ORIGIN, NULL, rq->length, &rq->task);
	if (rq->task.grant)
		origin_granted(&rq->task);
}

void bsu_device_request(struct bsu_queue *queue, struct bsu_request *rq)
{
	bool data = rq->op == BSU_OP_READ || rq->op == BSU_OP_WRITE;

	/* Looked at first: the line is shared by all queues. */
	if (!atomic_load_explicit(&queue->dev->seen, memory_order_relaxed))
		atomic_store_explicit(&queue->dev->seen, true, memory_order_relaxed);
	if (!queue->dev->origin) {
		bsu_request_end(queue, rq, data ? (int)rq->length : 0);
		return;
	}
	switch (rq->op) {
	case BSU_OP_READ:
		queue->counters.reads++;
		bsu_origin_io(queue, rq);
		break;
	case BSU_OP_FLUSH:
		bsu_origin_io(queue, rq);
		break;
	case BSU_OP_WRITE:
	case BSU_OP_WRITE_ZEROES:
	case BSU_OP_DISCARD:
		bsu_write_request(queue, rq);
		break;
	default:
		bsu_request_end(queue, rq, -EOPNOTSUPP);
	}
}
