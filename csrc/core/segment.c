/* SPDX-License-Identifier: MIT */
/*
 * Parts of requests to images. Waiting for storage has an end: after the limit,
 * or when the image is broken, a part is given up. Its request ends with EIO;
 * the part keeps buffer and places until its I/O has ended.
 *
 *   STILL --> BUFFER (waits for pool memory) --> STILL --> IO --> STILL
 *               |                                          |
 *               +---- given up: no request any more -------+--> free
 *
 * While the filtered device itself has requests, its images make do with a few;
 * what is slow, say in a silent storage, does not count.
 */
#include "internal.h"

#define YIELD_NS (NS_PER_S / 50)	/* a request has been seen that lately */
#define YIELD_SEGMENTS 4u
#define SLOW_NS NS_PER_S

/* How many segments may be in use at once. */
static unsigned int allowance(struct bsu_queue *queue)
{
	struct bsu_device *dev = queue->dev;
	uint64_t now = bsu_now(queue);

	if (MUTANT(BSU_MUTANT_YIELD_FOR_EVER))
		return YIELD_SEGMENTS;
	if (atomic_load_explicit(&dev->seen, memory_order_relaxed)) {
		atomic_store_explicit(&dev->seen, false, memory_order_relaxed);
		atomic_store_explicit(&dev->seen_at, now, memory_order_relaxed);
		return YIELD_SEGMENTS;
	}
	return now - atomic_load_explicit(&dev->seen_at, memory_order_relaxed) < YIELD_NS ? YIELD_SEGMENTS : queue->nr_segments;
}

struct bsu_segment *bsu_segment_get(struct bsu_queue *queue, struct bsu_request *rq)
{
	struct bsu_segment *segment = queue->free_segment;

	if (!segment || queue->segments_out >= allowance(queue))
		return NULL;
	queue->segments_out++;
	queue->free_segment = segment->next;
	segment->rq = rq;
	segment->buf = NULL;
	segment->state = BSU_SEGMENT_STILL;
	segment->has_places = false;
	segment->slow = false;
	rq->waiting_since = 0;
	return segment;
}

/* As many as there are to be had: several where the device has come to rest. */
static void wake_waiters(struct bsu_queue *queue)
{
	struct bsu_task *task;

	for (unsigned int left = allowance(queue); queue->free_segment && left > queue->segments_out; left--) {
		task = bsu_tasks_pop(&queue->segment_waiters);
		if (!task)
			break;
		if (!MUTANT(BSU_MUTANT_LOSE_SEGMENT_WAITER))
			bsu_task_ready(queue, task);
	}
}

static void to_free_list(struct bsu_segment *segment)
{
	struct bsu_queue *queue = segment->queue;

	segment->rq = NULL;
	segment->next = queue->free_segment;
	queue->free_segment = segment;
	wake_waiters(queue);
}

void bsu_segment_put(struct bsu_segment *segment)
{
	if (!segment->slow)
		segment->queue->segments_out--;
	to_free_list(segment);
}

void bsu_segment_wait(struct bsu_queue *queue, struct bsu_request *rq, void (*run)(struct bsu_task *))
{
	if (!rq->waiting_since)
		rq->waiting_since = bsu_now(queue);
	rq->task.run = run;
	bsu_tasks_push(&queue->segment_waiters, &rq->task);
}

void bsu_segment_put_buffer(struct bsu_segment *segment)
{
	if (segment->buf)
		bsu_pool_put(segment->queue->pool, segment->queue, segment->task.owner, segment->buf, segment->buf_bytes);
	segment->buf = NULL;
}

static void set_limit(struct bsu_segment *segment, enum bsu_segment_state state)
{
	segment->state = state;
	segment->limit = bsu_now(segment->queue) + segment->queue->dev->copy_limit_ns;
}

/* What was given up has ended. */
static void free_given_up(struct bsu_segment *segment)
{
	struct bsu_queue *queue = segment->queue;

	if (segment->has_places)
		bsu_storage_return(queue->image->storage, segment->place, segment->units);
	bsu_segment_put_buffer(segment);
	to_free_list(segment);
	queue->busy--;
	atomic_fetch_sub_explicit(&queue->image->users, 1, memory_order_release);
}

void bsu_segment_submit(struct bsu_segment *segment)
{
	/* I/O to the request's own pages must end before the request does. */
	if (segment->buf)
		set_limit(segment, BSU_SEGMENT_IO);
	bsu_submit(segment->queue, &segment->io);
}

bool bsu_segment_io_ended(struct bsu_segment *segment)
{
	segment->state = BSU_SEGMENT_STILL;
	if (segment->rq)
		return true;
	free_given_up(segment);
	return false;
}

void bsu_segment_get_buffer(struct bsu_segment *segment, enum bsu_pool_kind kind, size_t bytes, void (*run)(struct bsu_task *))
{
	struct bsu_task *task = &segment->task;

	set_limit(segment, BSU_SEGMENT_BUFFER);
	segment->buf_bytes = bytes;
	task->run = run;
	task->owner = kind == BSU_POOL_STORAGE ? (const void *)segment->queue->image->storage : segment->queue->dev;
	task->grant = bsu_pool_get(segment->queue->pool, kind, task->owner, bytes, task);
	if (task->grant)
		run(task);
}

bool bsu_segment_granted(struct bsu_segment *segment)
{
	segment->buf = segment->task.grant;
	return bsu_segment_io_ended(segment);
}

static void count_out(struct bsu_segment *segment)
{
	if (!segment->slow)
		segment->queue->segments_out--;
	segment->slow = true;
}

static void give_up(struct bsu_segment *segment)
{
	struct bsu_queue *queue = segment->queue;
	struct bsu_request *rq = segment->rq;

	segment->rq = NULL;
	segment->io.rq = NULL;
	segment->io.given_up = true;
	count_out(segment);
	queue->busy++;
	atomic_fetch_add_explicit(&queue->image->users, 1, memory_order_relaxed);
	if (segment->state == BSU_SEGMENT_BUFFER && bsu_pool_forget(queue->pool, &segment->task))
		free_given_up(segment);
	if (rq->op == BSU_OP_READ)
		bsu_read_given_up(queue, rq);
	else
		bsu_image_request_end(queue, rq, -EIO);
}

/* All segments may be kept by I/O that never ends. */
static void give_up_waiters(struct bsu_queue *queue, bool broken, uint64_t now)
{
	struct bsu_tasks waiters = queue->segment_waiters;
	struct bsu_task *task;

	queue->segment_waiters = (struct bsu_tasks) { 0 };
	while ((task = bsu_tasks_pop(&waiters))) {
		struct bsu_request *rq = container_of(task, struct bsu_request, task);

		if (broken || now - rq->waiting_since >= queue->dev->copy_limit_ns)
			bsu_image_request_end(queue, rq, -EIO);
		else
			bsu_tasks_push(&queue->segment_waiters, task);
	}
}

void bsu_segments_tick(struct bsu_queue *queue, uint64_t now)
{
	bool broken = bsu_image_status(queue->image, NULL) != BSU_IMAGE_ACTIVE;

	for (unsigned int i = 0; i < queue->nr_segments; i++) {
		struct bsu_segment *segment = &queue->segments[i];

		if (!segment->rq || segment->state == BSU_SEGMENT_STILL)
			continue;
		if (broken || segment->limit <= now)
			give_up(segment);
		else if (segment->limit - now + SLOW_NS <= queue->dev->copy_limit_ns)
			count_out(segment);
	}
	wake_waiters(queue);
	if (broken || !queue->free_segment)
		give_up_waiters(queue, broken, now);
}
