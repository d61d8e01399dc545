/* SPDX-License-Identifier: MIT */
/*
 * Reading an image. A request is cut into segments where the source changes:
 * the origin, or places in a row of the difference storage. Each segment is
 * read and then checked: the image is not broken and its source is still the
 * same; otherwise it is read again. That proves the data, because an origin
 * write is only submitted after publishing or breaking.
 */
#include <string.h>

#include "internal.h"

static void segment_step(struct bsu_segment *segment);

static void end_if_done(struct bsu_queue *queue, struct bsu_request *rq)
{
	if (rq->pending || (rq->cursor < rq->start + rq->length && !rq->result))
		return;
	bsu_image_request_end(queue, rq, rq->result ? rq->result : (int)rq->length);
}

static void plan_segments(struct bsu_task *task)
{
	struct bsu_request *rq = container_of(task, struct bsu_request, task);
	struct bsu_queue *queue = task->queue;
	struct bsu_device *dev = queue->dev;
	uint64_t end = rq->start + rq->length, last = (end - 1) >> dev->unit_shift;

	/* The request counts as one while we plan: a segment may end at once. */
	rq->pending++;
	while (rq->cursor < end && !rq->result) {
		uint64_t unit = rq->cursor >> dev->unit_shift;
		struct bsu_segment *segment;
		struct bsu_source source;
		uint32_t slot, units;

		if (!bsu_find_source(queue->image, &source)) {
			rq->result = -EIO;
			break;
		}
		segment = bsu_segment_get(queue, rq);
		if (!segment) {
			if (rq->pending == 1) {
				rq->pending = 0;
				bsu_segment_wait(queue, rq, plan_segments);
				return;
			}
			break;
		}
		units = bsu_source_run(&source, unit, (uint32_t)min_u64(dev->copy_units, last + 1 - unit), &slot);
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

	bsu_segment_put(segment);
	if (res && !rq->result)
		rq->result = res;
	if (!--rq->pending && rq->cursor < rq->start + rq->length && !rq->result) {
		rq->task.run = plan_segments;
		bsu_task_ready(queue, &rq->task);
	} else {
		end_if_done(queue, rq);
	}
}

void bsu_read_given_up(struct bsu_queue *queue, struct bsu_request *rq)
{
	if (!rq->result)
		rq->result = -EIO;
	rq->pending--;
	end_if_done(queue, rq);
}

static int deliver(struct bsu_segment *segment)
{
	struct bsu_queue *queue = segment->queue;
	bool place = bsu_slot_is_place(segment->slot);
	uint64_t skip = place && !MUTANT(BSU_MUTANT_SKIP_IN_UNIT) ? segment->start & (queue->dev->unit - 1) : 0;

	if (!segment->buf)
		return 0;
	return queue->ops->copy_to_request(queue->ctx, segment->rq, segment->start - segment->rq->start,
					   (char *)segment->buf + skip, segment->length);
}

static int check(struct bsu_segment *segment, int res, bool *again)
{
	uint64_t unit = segment->start >> segment->queue->dev->unit_shift;

	*again = false;
	if (!MUTANT(BSU_MUTANT_NO_IMAGE_CHECK)) {
		*again = !bsu_source_holds(segment->queue, unit, segment->units, segment->slot, segment->buf, &res);
		if (*again)
			return 0;
	}
	return res ? res : deliver(segment);
}

static void segment_done(struct bsu_io *io, int res)
{
	struct bsu_segment *segment = container_of(io, struct bsu_segment, io);
	bool again;

	if (!bsu_segment_io_ended(segment))
		return;
	res = check(segment, res, &again);
	bsu_segment_put_buffer(segment);
	if (again)
		segment->queue->counters.rereads++;
	else
		segment->start += segment->length;
	if (res || segment->start == segment->end)
		segment_end(segment, res);
	else
		segment_step(segment);
}

/* True when the data was still in the buffer of a copy. The segment gets shorter where only a part of it is. */
static bool fetch(struct bsu_segment *segment)
{
	struct bsu_device *dev = segment->queue->dev;
	uint64_t unit = segment->start >> dev->unit_shift;
	bool fetched;
	uint32_t alike = bsu_copy_fetch(dev, segment->queue->image->storage, unit, segment->slot, segment->units,
					segment->buf, &fetched);

	if (alike < segment->units) {
		segment->units = alike;
		segment->length = ((unit + alike) << dev->unit_shift) - segment->start;
	}
	return fetched;
}

static void segment_read(struct bsu_task *task)
{
	struct bsu_segment *segment = container_of(task, struct bsu_segment, task);
	struct bsu_queue *queue = segment->queue;
	struct bsu_device *dev = queue->dev;
	bool place = bsu_slot_is_place(segment->slot);
	uint64_t offset = segment->start;
	struct bsu_file *file = dev->origin;

	if (!bsu_segment_granted(segment))
		return;
	if (segment->slot == BSU_SLOT_ZERO) {
		memset(segment->buf, 0, segment->length);
		segment_done(&segment->io, 0);
		return;
	}
	if (place) {
		const struct bsu_storage *storage = queue->image->storage;
		const struct bsu_area *area = bsu_storage_area(storage, segment->slot - 1);

		if (fetch(segment)) {
			segment_done(&segment->io, 0);
			return;
		}
		file = area->file;
		offset = bsu_storage_offset(storage, area, segment->slot - 1);
	}
	segment->io = (struct bsu_io) {
		.file = file,
		.offset = offset,
		.length = place ? (uint64_t)segment->units << dev->unit_shift : segment->length,
		.buf = segment->buf,
		.rq = segment->rq,
		.rq_offset = segment->start - segment->rq->start,
		.op = BSU_OP_READ,
		.done = segment_done,
	};
	bsu_segment_submit(segment);
}

static void segment_step(struct bsu_segment *segment)
{
	struct bsu_queue *queue = segment->queue;
	struct bsu_device *dev = queue->dev;
	uint64_t unit = segment->start >> dev->unit_shift;
	uint64_t last = (segment->end - 1) >> dev->unit_shift;
	enum bsu_pool_kind kind;
	struct bsu_source source;
	bool place;

	if (!bsu_find_source(queue->image, &source)) {
		segment_end(segment, -EIO);
		return;
	}
	segment->units = bsu_source_run(&source, unit, (uint32_t)(last + 1 - unit), &segment->slot);
	segment->length = min_u64((unit + segment->units) << dev->unit_shift, segment->end) - segment->start;
	if (segment->slot == BSU_SLOT_BAD) {
		segment_end(segment, -EIO);
		return;
	}
	if (!segment->slot && queue->zero_copy && !(segment->rq->flags & BSU_NEED_COPY)) {
		segment->task.grant = NULL;
		segment_read(&segment->task);
		return;
	}
	place = bsu_slot_is_place(segment->slot);
	kind = place ? BSU_POOL_STORAGE : BSU_POOL_ORIGIN;
	bsu_segment_get_buffer(segment, kind, place ? (size_t)segment->units << dev->unit_shift : segment->length, segment_read);
}

void bsu_image_read(struct bsu_request *rq)
{
	plan_segments(&rq->task);
}
