/* SPDX-License-Identifier: MIT */
/*
 * Parts of requests to images. Waiting for storage has an end: after the limit,
 * or when the image is broken, a part is given up. Its request ends with EIO;
 * the part keeps buffer and places until its I/O has ended.
 *
 *   STILL --> BUFFER (waits for pool memory) --> STILL --> IO --> STILL
 *               |                                          |
 *               +---- given up: no request any more -------+--> free
 */
#include "internal.h"

struct bsu_segment *bsu_segment_get(struct bsu_queue *queue, struct bsu_request *rq)
{
	struct bsu_segment *segment = queue->free_segment;

	if (!segment)
		return NULL;
	queue->free_segment = segment->next;
	segment->rq = rq;
	segment->buf = NULL;
	segment->state = BSU_SEGMENT_STILL;
	segment->has_places = false;
	return segment;
}

void bsu_segment_put(struct bsu_segment *segment)
{
	struct bsu_queue *queue = segment->queue;
	struct bsu_task *task;

	segment->rq = NULL;
	segment->next = queue->free_segment;
	queue->free_segment = segment;
	task = bsu_tasks_pop(&queue->segment_waiters);
	if (task)
		bsu_task_ready(queue, task);
}

void bsu_segment_put_buffer(struct bsu_segment *segment)
{
	if (segment->buf)
		bsu_pool_put(segment->queue->pool, segment->queue, segment->buf, segment->buf_bytes);
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
	bsu_segment_put(segment);
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
	task->grant = bsu_pool_get(segment->queue->pool, kind, bytes, task);
	if (task->grant)
		run(task);
}

bool bsu_segment_granted(struct bsu_segment *segment)
{
	segment->buf = segment->task.grant;
	return bsu_segment_io_ended(segment);
}

static void give_up(struct bsu_segment *segment)
{
	struct bsu_queue *queue = segment->queue;
	struct bsu_request *rq = segment->rq;

	segment->rq = NULL;
	segment->io.rq = NULL;
	segment->io.given_up = true;
	queue->busy++;
	atomic_fetch_add_explicit(&queue->image->users, 1, memory_order_relaxed);
	if (segment->state == BSU_SEGMENT_BUFFER && bsu_pool_forget(queue->pool, &segment->task))
		free_given_up(segment);
	if (rq->op == BSU_OP_READ)
		bsu_read_given_up(queue, rq);
	else
		bsu_image_request_end(queue, rq, -EIO);
}

void bsu_segments_tick(struct bsu_queue *queue, uint64_t now)
{
	bool broken = bsu_image_status(queue->image, NULL) != BSU_IMAGE_ACTIVE;

	for (unsigned int i = 0; i < queue->nr_segments; i++) {
		struct bsu_segment *segment = &queue->segments[i];

		if (segment->rq && segment->state != BSU_SEGMENT_STILL && (broken || segment->limit <= now))
			give_up(segment);
	}
}
