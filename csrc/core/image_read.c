/* SPDX-License-Identifier: MIT */
/*
 * Reading an image. A request is cut into segments where the source changes:
 * the origin, or places in a row of the difference storage. Each segment is
 * read and then checked: the image is not broken and the current chain still
 * gives the same answer; otherwise it is read again. That proves the data,
 * because an origin write is only submitted after publishing or breaking.
 */
#include "internal.h"

static void segment_step(struct bsu_segment *segment);

struct source {
	const struct bsu_chain *chain;
	unsigned int k;
};

static bool find_source(struct bsu_image *image, struct source *source)
{
	if (bsu_image_status(image, NULL) != BSU_IMAGE_ACTIVE)
		return false;
	source->chain = bsu_view_chain(atomic_load(&image->dev->view), image->storage);
	for (source->k = 0; source->chain && source->k < source->chain->nr_images; source->k++)
		if (source->chain->image[source->k] == image)
			return true;
	return false;
}

/* Units from @unit on, at most @max, that come from one source in a row. */
static uint32_t source_run(const struct source *source, uint64_t unit, uint32_t max, uint32_t *slot)
{
	const struct bsu_area *area;
	uint32_t run = 1;
	bool has;

	*slot = bsu_chain_slot(source->chain, source->k, unit);
	if (*slot == BSU_SLOT_BAD)
		return 1;
	if (*slot == BSU_SLOT_EMPTY)
		return (uint32_t)max_u64(1, bsu_chain_run(source->chain, source->k, unit, max, &has));
	area = bsu_storage_area(source->chain->storage, *slot - 1);
	max = (uint32_t)min_u64(max, area->first + (uint64_t)area->count - (*slot - 1));
	while (run < max && bsu_chain_slot(source->chain, source->k, unit + run) == *slot + run)
		run++;
	return run;
}

static bool source_is(const struct source *source, uint64_t unit, uint32_t units, uint32_t slot)
{
	for (uint32_t i = 0; i < units; i++)
		if (bsu_chain_slot(source->chain, source->k, unit + i) != (slot ? slot + i : 0))
			return false;
	return true;
}

static void end_if_done(struct bsu_queue *queue, struct bsu_request *rq)
{
	if (rq->pending || (rq->cursor < rq->start + rq->length && !rq->result))
		return;
	atomic_fetch_sub_explicit(&queue->image->users, 1, memory_order_release);
	bsu_request_end(queue, rq, rq->result ? rq->result : (int)rq->length);
}

static void plan_segments(struct bsu_task *task)
{
	struct bsu_request *rq = container_of(task, struct bsu_request, task);
	struct bsu_queue *queue = task->queue;
	struct bsu_device *dev = queue->dev;
	uint64_t end = rq->start + rq->length;

	/* The request counts as one while we plan: a segment may end at once. */
	rq->pending++;
	while (rq->cursor < end && !rq->result) {
		struct bsu_segment *segment = queue->free_segment;
		uint64_t unit = rq->cursor >> dev->unit_shift;
		struct source source;
		uint32_t slot, units;

		if (!segment) {
			if (rq->pending == 1) {
				rq->pending = 0;
				task->run = plan_segments;
				bsu_tasks_push(&queue->segment_waiters, task);
				return;
			}
			break;
		}
		if (!find_source(queue->image, &source)) {
			rq->result = -EIO;
			break;
		}
		units = source_run(&source, unit, dev->copy_units, &slot);
		queue->free_segment = segment->next;
		segment->rq = rq;
		segment->start = rq->cursor;
		segment->end = min_u64(end, (unit + units) << dev->unit_shift);
		rq->cursor = segment->end;
		rq->pending++;
		segment_step(segment);
	}
	rq->pending--;
	end_if_done(queue, rq);
}

static void segment_end(struct bsu_segment *segment, int res)
{
	struct bsu_queue *queue = segment->queue;
	struct bsu_request *rq = segment->rq;
	struct bsu_task *task;

	segment->next = queue->free_segment;
	queue->free_segment = segment;
	if (res && !rq->result)
		rq->result = res;
	if (!--rq->pending && rq->cursor < rq->start + rq->length && !rq->result) {
		rq->task.run = plan_segments;
		bsu_task_ready(queue, &rq->task);
	} else {
		end_if_done(queue, rq);
	}
	task = bsu_tasks_pop(&queue->segment_waiters);
	if (task)
		bsu_task_ready(queue, task);
}

static void put_buffer(struct bsu_segment *segment)
{
	if (segment->buf)
		bsu_pool_put(segment->queue->pool, segment->queue, segment->buf, segment->buf_bytes);
	segment->buf = NULL;
}

/* What came from storage is what was preserved, by its records. */
static bool records_hold(const struct bsu_segment *segment, const struct bsu_storage *storage)
{
	const struct bsu_area *area = bsu_storage_area(storage, segment->slot - 1);
	const struct bsu_record *record = &area->records[segment->slot - 1 - area->first];
	uint64_t unit = segment->start >> segment->queue->dev->unit_shift;

	for (uint32_t i = 0; i < segment->units; i++)
		if (!bsu_record_holds(&record[i], unit + i, (char *)segment->buf + (size_t)i * storage->unit, storage->unit))
			return false;
	return true;
}

static int deliver(struct bsu_segment *segment)
{
	struct bsu_queue *queue = segment->queue;
	uint64_t skip = segment->slot && !MUTANT(BSU_MUTANT_SKIP_IN_UNIT) ? segment->start & (queue->dev->unit - 1) : 0;

	if (!segment->buf)
		return 0;
	return queue->ops->copy_to_request(queue->ctx, segment->rq, segment->start - segment->rq->start,
					   (char *)segment->buf + skip, segment->length);
}

static int check(struct bsu_segment *segment, int res, bool *again)
{
	struct bsu_image *image = segment->queue->image;
	uint64_t unit = segment->start >> segment->queue->dev->unit_shift;
	struct source source;

	*again = false;
	if (MUTANT(BSU_MUTANT_NO_IMAGE_CHECK))
		return res ? res : deliver(segment);
	atomic_thread_fence(memory_order_seq_cst);
	if (!find_source(image, &source))
		return -EIO;
	if (!source_is(&source, unit, segment->units, segment->slot)) {
		*again = true;
		return 0;
	}
	if (segment->slot && (res || !records_hold(segment, image->storage))) {
		bsu_image_break(image, BSU_IMAGE_CORRUPTED, res ? res : EBADMSG);
		segment->queue->ops->notify(segment->queue->ctx);
		return -EIO;
	}
	return res ? res : deliver(segment);
}

static void segment_done(struct bsu_io *io, int res)
{
	struct bsu_segment *segment = container_of(io, struct bsu_segment, io);
	bool again;

	res = check(segment, res, &again);
	put_buffer(segment);
	if (again)
		segment->queue->counters.rereads++;
	else
		segment->start += segment->length;
	if (res || segment->start == segment->end)
		segment_end(segment, res);
	else
		segment_step(segment);
}

static void segment_read(struct bsu_task *task)
{
	struct bsu_segment *segment = container_of(task, struct bsu_segment, task);
	struct bsu_queue *queue = segment->queue;
	struct bsu_device *dev = queue->dev;
	uint64_t offset = segment->start;
	struct bsu_file *file = dev->origin;

	segment->buf = task->grant;
	if (segment->slot) {
		const struct bsu_storage *storage = queue->image->storage;
		const struct bsu_area *area = bsu_storage_area(storage, segment->slot - 1);

		file = area->file;
		offset = bsu_storage_offset(storage, area, segment->slot - 1);
	}
	segment->io = (struct bsu_io) {
		.file = file,
		.offset = offset,
		.length = segment->slot ? segment->buf_bytes : segment->length,
		.buf = segment->buf,
		.rq = segment->rq,
		.rq_offset = segment->start - segment->rq->start,
		.op = BSU_OP_READ,
		.done = segment_done,
	};
	bsu_submit(queue, &segment->io);
}

static void segment_step(struct bsu_segment *segment)
{
	struct bsu_queue *queue = segment->queue;
	struct bsu_device *dev = queue->dev;
	uint64_t unit = segment->start >> dev->unit_shift;
	uint64_t last = (segment->end - 1) >> dev->unit_shift;
	enum bsu_pool_kind kind;
	struct source source;

	if (!find_source(queue->image, &source)) {
		segment_end(segment, -EIO);
		return;
	}
	segment->units = source_run(&source, unit, (uint32_t)(last + 1 - unit), &segment->slot);
	segment->length = min_u64((unit + segment->units) << dev->unit_shift, segment->end) - segment->start;
	if (segment->slot == BSU_SLOT_BAD) {
		segment_end(segment, -EIO);
		return;
	}
	segment->task.grant = NULL;
	segment->task.run = segment_read;
	if (!segment->slot && queue->zero_copy && !(segment->rq->flags & BSU_NEED_COPY)) {
		segment_read(&segment->task);
		return;
	}
	kind = segment->slot ? BSU_POOL_STORAGE : BSU_POOL_ORIGIN;
	segment->buf_bytes = segment->slot ? (size_t)segment->units << dev->unit_shift : segment->length;
	segment->task.grant = bsu_pool_get(queue->pool, kind, segment->buf_bytes, &segment->task);
	if (segment->task.grant)
		segment_read(&segment->task);
}

void bsu_image_request(struct bsu_queue *queue, struct bsu_request *rq)
{
	switch (rq->op) {
	case BSU_OP_READ:
		queue->counters.reads++;
		atomic_fetch_add_explicit(&queue->image->users, 1, memory_order_relaxed);
		plan_segments(&rq->task);
		break;
	case BSU_OP_FLUSH:
		bsu_request_end(queue, rq, 0);
		break;
	default:
		bsu_request_end(queue, rq, -EROFS);
	}
}
