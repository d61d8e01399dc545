/* SPDX-License-Identifier: MIT */
/*
 * A queue: the ways into the core, the list of work that is ready, and the
 * continuation of short I/O. The thread is "inside" between enter() and
 * leave(); a grace period waits until it has been outside once.
 */
#include <stdlib.h>

#include "internal.h"

static void enter(struct bsu_queue *queue)
{
	atomic_store(&queue->pass, atomic_load_explicit(&queue->pass, memory_order_relaxed) + 1);
}

static void leave(struct bsu_queue *queue)
{
	struct bsu_task *task;

	while ((task = bsu_tasks_pop(&queue->ready)))
		task->run(task);
	/* What was looked at inside was looked at before; nothing outside has to wait for this to be seen. */
	atomic_store_explicit(&queue->pass, atomic_load_explicit(&queue->pass, memory_order_relaxed) + 1,
			      memory_order_release);
}

static int make_operations(struct bsu_queue *queue)
{
	if (queue->image) {
		queue->nr_segments = queue->depth * 2 + 16;
		queue->segments = calloc(queue->nr_segments, sizeof(*queue->segments));
		if (!queue->segments)
			return -ENOMEM;
		for (unsigned int i = 0; i < queue->nr_segments; i++) {
			struct bsu_segment *segment = &queue->segments[i];

			segment->queue = segment->task.queue = segment->io.queue = queue;
			segment->next = queue->free_segment;
			queue->free_segment = segment;
		}
		return 0;
	}
	if (!queue->dev->origin)
		return 0;
	queue->nr_copies = queue->depth * 2 + 16;
	queue->copies = calloc(queue->nr_copies, sizeof(*queue->copies));
	if (!queue->copies)
		return -ENOMEM;
	for (unsigned int i = 0; i < queue->nr_copies; i++) {
		struct bsu_copy *copy = &queue->copies[i];

		copy->task.queue = copy->io.queue = queue;
		copy->next = queue->free_copy;
		queue->free_copy = copy;
	}
	return 0;
}

struct bsu_queue *bsu_queue_new(const struct bsu_queue_config *config, int *err)
{
	struct bsu_device *dev = config->image ? config->image->dev : config->device;
	struct bsu_queue *queue;

	*err = -EINVAL;
	if (!config->device == !config->image || !config->pool || !config->ops || !config->depth)
		return NULL;
	if (bsu_pool_largest(config->pool) < BSU_COPY_BYTES)
		return NULL;
	*err = -EBUSY;
	if (config->image && atomic_load(&config->image->queues))
		return NULL;
	*err = -ENOMEM;
	queue = calloc(1, sizeof(*queue));
	if (!queue)
		return NULL;
	queue->dev = dev;
	queue->image = config->image;
	queue->pool = config->pool;
	queue->ops = config->ops;
	queue->ctx = config->ctx;
	queue->zero_copy = config->zero_copy;
	queue->depth = config->depth;
	*err = make_operations(queue);
	if (*err) {
		free(queue);
		return NULL;
	}
	pthread_mutex_lock(&dev->lock);
	queue->next = dev->queues;
	dev->queues = queue;
	pthread_mutex_unlock(&dev->lock);
	if (queue->image) {
		atomic_fetch_add(&queue->image->queues, 1);
		atomic_fetch_add(&queue->image->users, 1);
	}
	return queue;
}

bool bsu_queue_idle(const struct bsu_queue *queue)
{
	return !queue->busy && !atomic_load(&queue->inbox) && !atomic_load_explicit(&queue->visitors, memory_order_acquire);
}

int bsu_queue_free(struct bsu_queue *queue)
{
	struct bsu_queue **at;

	if (!queue)
		return 0;
	if (!bsu_queue_idle(queue))
		return -EBUSY;
	pthread_mutex_lock(&queue->dev->lock);
	for (at = &queue->dev->queues; *at != queue;)
		at = &(*at)->next;
	*at = queue->next;
	pthread_mutex_unlock(&queue->dev->lock);
	if (queue->image) {
		atomic_fetch_sub(&queue->image->queues, 1);
		atomic_fetch_sub(&queue->image->users, 1);
	}
	free(queue->segments);
	free(queue->copies);
	free(queue);
	return 0;
}

void bsu_queue_counters(const struct bsu_queue *queue, struct bsu_queue_counters *out)
{
	*out = queue->counters;
}

void bsu_submit(struct bsu_queue *queue, struct bsu_io *io)
{
	io->queue = queue;
	io->total = io->length;
	io->retries = 0;
	io->next = NULL;
	queue->ops->submit(queue->ctx, io);
}

void bsu_flight_begin(struct bsu_queue *queue)
{
	atomic_store(&queue->entered, atomic_load_explicit(&queue->entered, memory_order_relaxed) + 1);
}

void bsu_flight_end(struct bsu_queue *queue)
{
	/* Before "left": whoever finds the gate drained finds the time too. */
	if (atomic_load_explicit(&queue->dev->gate_closed, memory_order_relaxed))
		atomic_store(&queue->dev->rested, bsu_now(queue));
	atomic_store(&queue->left, atomic_load_explicit(&queue->left, memory_order_relaxed) + 1);
}

void bsu_request_end(struct bsu_queue *queue, struct bsu_request *rq, int res)
{
	if (rq->in_gate) {
		if (MUTANT(BSU_MUTANT_SWITCH_LATE) && queue->dev->changing && !atomic_load(&queue->dev->gate_closed))
			bsu_switch(queue->dev, NULL);
		rq->in_gate = false;
		bsu_flight_end(queue);
	}
	queue->busy--;
	queue->ops->complete(queue->ctx, rq, res);
}

bool bsu_waited(struct bsu_queue *queue, struct bsu_request *rq, enum bsu_wait what, uint64_t limit)
{
	uint64_t now = bsu_now(queue);

	if (!rq->waiting_since || rq->waits_for != what)
		rq->waiting_since = now;
	rq->waits_for = what;
	if (now - rq->waiting_since < limit)
		return false;
	rq->waiting_since = 0;
	return true;
}

static bool is_valid(const struct bsu_queue *queue, const struct bsu_request *rq)
{
	uint64_t size = queue->image ? queue->image->size : bsu_device_size(queue->dev);

	if (rq->op == BSU_OP_FLUSH)
		return true;
	return rq->length && rq->start < size && rq->length <= size - rq->start &&
	       !((rq->start | rq->length) & (queue->dev->block - 1));
}

void bsu_queue_request(struct bsu_queue *queue, struct bsu_request *rq)
{
	enter(queue);
	queue->busy++;
	rq->in_gate = false;
	rq->result = 0;
	rq->pending = 0;
	rq->cursor = rq->start;
	rq->waiting_since = 0;
	rq->buf = NULL;
	rq->task = (struct bsu_task) { .queue = queue };
	if (!is_valid(queue, rq))
		bsu_request_end(queue, rq, -EINVAL);
	else if (queue->image)
		bsu_image_request(queue, rq);
	else
		bsu_device_request(queue, rq);
	leave(queue);
}

/*
 * The rest of a short READ or WRITE. What O_DIRECT takes is a multiple of the
 * block, so an odd count is cut down: the bytes in between are simply done
 * again.
 */
static bool continue_io(struct bsu_queue *queue, struct bsu_io *io, uint64_t done)
{
	uint64_t granule = io->file == queue->dev->origin ? queue->dev->block : queue->dev->unit;

	done -= done % granule;
	if (!done && ++io->retries > BSU_IO_RETRIES)
		return false;
	if (done)
		io->retries = 0;
	io->offset += done;
	io->length -= done;
	if (MUTANT(BSU_MUTANT_SAME_BUFFER))
		;
	else if (io->buf)
		io->buf = (char *)io->buf + done;
	else
		io->rq_offset += done;
	queue->ops->submit(queue->ctx, io);
	return true;
}

static void io_result(struct bsu_queue *queue, struct bsu_io *io, int res)
{
	if (io->given_up) {
		io->done(io, res < 0 ? res : 0);
		return;
	}
	if ((res == -EAGAIN || res == -EINTR) && !MUTANT(BSU_MUTANT_AGAIN_IS_ERROR)) {
		if (++io->retries <= BSU_IO_RETRIES) {
			queue->ops->submit(queue->ctx, io);
			return;
		}
		res = -EIO;
	}
	if (res >= 0 && (io->op == BSU_OP_READ || io->op == BSU_OP_WRITE)) {
		if (!res || (uint64_t)res > io->length) {
			res = -EIO;
		} else if ((uint64_t)res < io->length && !MUTANT(BSU_MUTANT_SHORT_IS_FULL)) {
			if (continue_io(queue, io, (uint64_t)res))
				return;
			res = -EIO;
		}
	}
	io->done(io, res < 0 ? res : 0);
}

void bsu_queue_io_done(struct bsu_queue *queue, struct bsu_io *io, int res)
{
	enter(queue);
	io_result(queue, io, res);
	leave(queue);
}

static void empty_inbox(struct bsu_queue *queue)
{
	struct bsu_task *task = atomic_exchange_explicit(&queue->inbox, NULL, memory_order_acquire);
	struct bsu_task *reversed = NULL, *next;

	for (; task; task = next) {
		next = task->next;
		task->next = reversed;
		reversed = task;
	}
	for (task = reversed; task; task = next) {
		next = task->next;
		bsu_tasks_push(&queue->ready, task);
	}
}

static void move_all(struct bsu_tasks *to, struct bsu_tasks *from)
{
	struct bsu_task *task;

	while ((task = bsu_tasks_pop(from)))
		bsu_tasks_push(to, task);
}

static void run_throttled(struct bsu_queue *queue)
{
	struct bsu_tasks waiters = queue->throttled;
	struct bsu_task *task;

	if (atomic_load(&queue->dev->gate_closed)) {
		move_all(&queue->ready, &queue->throttled);
		return;
	}
	/* In their order, until one has to wait again; it comes first next time. */
	queue->throttled = (struct bsu_tasks) { 0 };
	while (queue->throttled_until <= bsu_now(queue) && (task = bsu_tasks_pop(&waiters)))
		task->run(task);
	move_all(&queue->throttled, &waiters);
	if (queue->throttled.first && queue->ops->later)
		queue->ops->later(queue->ctx, queue->throttled_until);
}

void bsu_queue_run(struct bsu_queue *queue)
{
	enter(queue);
	empty_inbox(queue);
	if (atomic_load_explicit(&queue->retry, memory_order_relaxed) && atomic_exchange(&queue->retry, false)) {
		if (!MUTANT(BSU_MUTANT_LOSE_PARKED))
			move_all(&queue->ready, &queue->parked);
		move_all(&queue->ready, &queue->map_waiters);
	}
	if (queue->throttled.first)
		run_throttled(queue);
	leave(queue);
}

/* Their limits may have passed. */
static void recall_from_storages(struct bsu_queue *queue)
{
	const struct bsu_view *view = atomic_load(&queue->dev->view);

	if (queue->image) {
		bsu_room_recall(queue->image->storage, queue);
		return;
	}
	for (unsigned int c = 0; view && c < view->nr_chains; c++)
		bsu_room_recall(view->chain[c].storage, queue);
}

void bsu_queue_tick(struct bsu_queue *queue)
{
	enter(queue);
	if (queue->oldest)
		bsu_copies_tick(queue, bsu_now(queue));
	if (queue->image)
		bsu_segments_tick(queue, bsu_now(queue));
	move_all(&queue->ready, &queue->copy_waiters);
	move_all(&queue->ready, &queue->map_waiters);
	move_all(&queue->ready, &queue->throttled);
	recall_from_storages(queue);
	leave(queue);
}
