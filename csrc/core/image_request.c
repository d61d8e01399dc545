/* SPDX-License-Identifier: MIT */
/*
 * Requests to an image, in the order in which they arrive. A write excludes
 * everything else from the units that it touches: it replaces places, and what
 * reads them must have ended before. So a request waits for older ones that
 * overlap it if one of the two is a write; all of an image's requests come
 * through one queue, and nothing here is shared with other threads.
 *
 *   arrives --> WAITING <-- an older one overlaps
 *      |           |
 *      +-----------+--> RUNNING --> ends, and lets others go on
 */
#include "internal.h"

enum {
	RUNNING = 0,
	WAITING,
};

static bool is_change(const struct bsu_request *rq)
{
	return rq->op == BSU_OP_WRITE || rq->op == BSU_OP_WRITE_ZEROES;
}

static bool overlap(const struct bsu_device *dev, const struct bsu_request *a, const struct bsu_request *b)
{
	uint64_t first_a = a->start >> dev->unit_shift, last_a = (a->start + a->length - 1) >> dev->unit_shift;
	uint64_t first_b = b->start >> dev->unit_shift, last_b = (b->start + b->length - 1) >> dev->unit_shift;

	return first_a <= last_b && first_b <= last_a;
}

static bool is_blocked(const struct bsu_queue *queue, const struct bsu_request *rq)
{
	if (MUTANT(BSU_MUTANT_NO_RANGE_LOCK))
		return false;
	for (const struct bsu_request *other = rq->older; other; other = other->older)
		if ((is_change(rq) || is_change(other)) && overlap(queue->dev, rq, other))
			return true;
	return false;
}

static void add(struct bsu_queue *queue, struct bsu_request *rq)
{
	rq->newer = NULL;
	rq->older = queue->newest_request;
	if (queue->newest_request)
		queue->newest_request->newer = rq;
	else
		queue->oldest_request = rq;
	queue->newest_request = rq;
	queue->changes += is_change(rq);
}

static void take_out(struct bsu_queue *queue, struct bsu_request *rq)
{
	if (rq->older)
		rq->older->newer = rq->newer;
	else
		queue->oldest_request = rq->newer;
	if (rq->newer)
		rq->newer->older = rq->older;
	else
		queue->newest_request = rq->older;
	queue->changes -= is_change(rq);
}

static void begin(struct bsu_task *task)
{
	struct bsu_request *rq = container_of(task, struct bsu_request, task);

	if (is_change(rq))
		bsu_image_write(rq);
	else
		bsu_image_read(rq);
}

static void wake(struct bsu_queue *queue)
{
	for (struct bsu_request *rq = queue->oldest_request; rq; rq = rq->newer) {
		if (rq->state != WAITING || is_blocked(queue, rq))
			continue;
		rq->state = RUNNING;
		rq->task.run = begin;
		bsu_task_ready(queue, &rq->task);
	}
}

void bsu_image_request_end(struct bsu_queue *queue, struct bsu_request *rq, int res)
{
	bool changes = queue->changes;

	take_out(queue, rq);
	if (changes)
		wake(queue);
	atomic_fetch_sub_explicit(&queue->image->users, 1, memory_order_release);
	bsu_request_end(queue, rq, res);
}

void bsu_image_request(struct bsu_queue *queue, struct bsu_request *rq)
{
	switch (rq->op) {
	case BSU_OP_READ:
		queue->counters.reads++;
		break;
	case BSU_OP_WRITE:
	case BSU_OP_WRITE_ZEROES:
		queue->counters.writes++;
		break;
	case BSU_OP_FLUSH:
		/* What was written to an image lives no longer than the snapshot. */
		bsu_request_end(queue, rq, 0);
		return;
	default:
		bsu_request_end(queue, rq, -EOPNOTSUPP);
		return;
	}
	atomic_fetch_add_explicit(&queue->image->users, 1, memory_order_relaxed);
	add(queue, rq);
	rq->state = queue->changes && is_blocked(queue, rq) ? WAITING : RUNNING;
	if (rq->state == RUNNING)
		begin(&rq->task);
}
