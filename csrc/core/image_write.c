/* SPDX-License-Identifier: MIT */
/*
 * Writing to an image: never to the origin, and never over a place that holds
 * something. New places are filled, recorded and only then published in the
 * image's own map; what they replace goes back. A request is done in portions,
 * one after another:
 *
 *   map memory -> places -> buffer -> old data of units written in part -> data
 *      -> storage write -> records -> publish -> next portion, or the end
 *
 * Zeroes need no places where they cover whole units.
 */
#include <string.h>

#include "internal.h"

#define ZERO_UNITS 4096u		/* in one go; others get their turn then */

static void next_portion(struct bsu_segment *segment);

static struct bsu_map *written(const struct bsu_queue *queue)
{
	return MUTANT(BSU_MUTANT_WRITE_TO_ORIGIN_MAP) ? &queue->image->map : &queue->image->written;
}

static void write_end(struct bsu_segment *segment, int res)
{
	struct bsu_queue *queue = segment->queue;
	struct bsu_request *rq = segment->rq;

	bsu_segment_put_buffer(segment);
	bsu_segment_put(segment);
	if (!res && rq->op == BSU_OP_WRITE)
		res = (int)rq->length;
	bsu_image_request_end(queue, rq, res);
}

static void publish(struct bsu_segment *segment, uint64_t unit, uint32_t slot)
{
	struct bsu_queue *queue = segment->queue;
	uint32_t old = bsu_map_get(written(queue), unit);

	bsu_map_publish(written(queue), unit, slot);
	if (old == BSU_SLOT_EMPTY)
		atomic_fetch_add_explicit(&queue->image->state->written, 1, memory_order_release);
	else if (bsu_slot_is_place(old) && !MUTANT(BSU_MUTANT_KEEP_OLD_PLACE))
		bsu_storage_return(queue->image->storage, old - 1, 1);
}

static void return_places(struct bsu_segment *segment)
{
	bsu_storage_return(segment->queue->image->storage, segment->place, segment->units);
	segment->has_places = false;
}

static void store_done(struct bsu_io *io, int res)
{
	struct bsu_segment *segment = container_of(io, struct bsu_segment, io);
	struct bsu_queue *queue = segment->queue;
	const struct bsu_storage *storage = queue->image->storage;
	const struct bsu_area *area = bsu_storage_area(storage, segment->place);
	uint64_t unit = segment->start >> queue->dev->unit_shift;

	bsu_storage_answers(queue->image->storage);
	if (!bsu_segment_io_ended(segment))
		return;
	if (!res && bsu_image_status(queue->image, NULL) != BSU_IMAGE_ACTIVE)
		res = -EIO;
	if (res) {
		return_places(segment);
		write_end(segment, res);
		return;
	}
	for (uint32_t i = 0; i < segment->units; i++) {
		const char *data = (const char *)segment->buf + (size_t)i * storage->unit;

		bsu_record_set(&area->records[segment->place - area->first + i], queue->image->serial, true, unit + i,
			       bsu_crc32c(0, data, storage->unit));
		publish(segment, unit + i, segment->place + i + 1);
	}
	segment->has_places = false;
	bsu_segment_put_buffer(segment);
	segment->start += segment->length;
	next_portion(segment);
}

static void store(struct bsu_segment *segment)
{
	struct bsu_queue *queue = segment->queue;
	const struct bsu_storage *storage = queue->image->storage;
	const struct bsu_area *area = bsu_storage_area(storage, segment->place);
	struct bsu_request *rq = segment->rq;
	char *data = (char *)segment->buf + (segment->start & (queue->dev->unit - 1));
	int ret = 0;

	if (rq->op == BSU_OP_WRITE)
		ret = queue->ops->copy_from_request(queue->ctx, rq, segment->start - rq->start, data, segment->length);
	else
		memset(data, 0, segment->length);
	if (ret) {
		return_places(segment);
		write_end(segment, ret);
		return;
	}
	segment->io = (struct bsu_io) {
		.file = area->file,
		.offset = bsu_storage_offset(storage, area, segment->place),
		.length = segment->buf_bytes,
		.buf = segment->buf,
		.rq = rq,
		.op = BSU_OP_WRITE,
		.done = store_done,
	};
	bsu_segment_submit(segment);
}

/* The next unit, from @unit on, of which only a part is written; UINT64_MAX if there is none. */
static uint64_t part_unit(const struct bsu_segment *segment, uint64_t unit)
{
	const struct bsu_device *dev = segment->queue->dev;
	uint64_t first = segment->start >> dev->unit_shift;
	uint64_t stop = segment->start + segment->length;
	uint64_t last = (stop - 1) >> dev->unit_shift;

	if (unit <= first && segment->start & (dev->unit - 1))
		return first;
	if (unit <= last && stop & (dev->unit - 1) && stop != segment->queue->image->size)
		return last;
	return UINT64_MAX;
}

static void fill(struct bsu_segment *segment, uint64_t unit);

static char *filled_at(const struct bsu_segment *segment)
{
	const struct bsu_device *dev = segment->queue->dev;

	return (char *)segment->buf + ((segment->filling - (segment->start >> dev->unit_shift)) << dev->unit_shift);
}

static void fill_done(struct bsu_io *io, int res)
{
	struct bsu_segment *segment = container_of(io, struct bsu_segment, io);
	struct bsu_queue *queue = segment->queue;
	uint64_t unit = segment->filling;

	if (!bsu_segment_io_ended(segment))
		return;
	if (!bsu_source_holds(queue, unit, 1, segment->slot, filled_at(segment), &res) && !MUTANT(BSU_MUTANT_FILL_UNCHECKED)) {
		queue->counters.rereads++;
		fill(segment, unit);
		return;
	}
	if (res) {
		return_places(segment);
		write_end(segment, res);
		return;
	}
	fill(segment, unit + 1);
}

/* Reads the old data of units that are written in part, from @unit on; then the rest follows. */
static void fill(struct bsu_segment *segment, uint64_t unit)
{
	struct bsu_queue *queue = segment->queue;
	struct bsu_device *dev = queue->dev;
	struct bsu_file *file = dev->origin;
	struct bsu_source source;
	uint64_t offset;

	unit = part_unit(segment, unit);
	if (unit == UINT64_MAX) {
		store(segment);
		return;
	}
	segment->filling = unit;
	if (!bsu_find_source(queue->image, &source)) {
		return_places(segment);
		write_end(segment, -EIO);
		return;
	}
	bsu_source_run(&source, unit, 1, &segment->slot);
	if (segment->slot == BSU_SLOT_BAD) {
		return_places(segment);
		write_end(segment, -EIO);
		return;
	}
	memset(filled_at(segment), 0, dev->unit);
	if (segment->slot == BSU_SLOT_ZERO) {
		fill(segment, unit + 1);
		return;
	}
	offset = unit << dev->unit_shift;
	if (segment->slot) {
		const struct bsu_area *area = bsu_storage_area(queue->image->storage, segment->slot - 1);
		bool fetched;

		bsu_copy_fetch(dev, queue->image->storage, unit, segment->slot, 1, filled_at(segment), &fetched);
		if (fetched) {
			fill_done(&segment->io, 0);
			return;
		}
		file = area->file;
		offset = bsu_storage_offset(queue->image->storage, area, segment->slot - 1);
	}
	segment->io = (struct bsu_io) {
		.file = file,
		.offset = offset,
		.length = segment->slot ? dev->unit : bsu_units_bytes(dev, unit, 1),
		.buf = filled_at(segment),
		.rq = segment->rq,
		.op = BSU_OP_READ,
		.done = fill_done,
	};
	bsu_segment_submit(segment);
}

static void granted(struct bsu_task *task)
{
	struct bsu_segment *segment = container_of(task, struct bsu_segment, task);
	uint64_t stop = segment->start + segment->length;

	if (!bsu_segment_granted(segment))
		return;
	/* The last unit of a device may be short; its place is not. */
	if (stop == segment->queue->image->size && stop & (segment->queue->dev->unit - 1))
		memset((char *)segment->buf + segment->buf_bytes - segment->queue->dev->unit, 0, segment->queue->dev->unit);
	fill(segment, 0);
}

static void go_on(struct bsu_task *task)
{
	next_portion(container_of(task, struct bsu_segment, task));
}

/* False: what is to be written there has no map memory yet, and goes on when there is some. */
static bool reserve(struct bsu_segment *segment, uint64_t unit, uint64_t count)
{
	struct bsu_queue *queue = segment->queue;

	if (!bsu_map_reserve(written(queue), unit, count))
		return true;
	if (bsu_waited(queue, segment->rq, BSU_WAIT_MAP, BSU_MAP_WAIT_NS)) {
		write_end(segment, -ENOSPC);
		return false;
	}
	segment->task.run = go_on;
	bsu_tasks_push(&queue->map_waiters, &segment->task);
	queue->ops->notify(queue->ctx);
	return false;
}

/* Whole units of zeroes from the beginning of the segment on. */
static uint64_t zero_units(const struct bsu_segment *segment)
{
	const struct bsu_image *image = segment->queue->image;
	const struct bsu_device *dev = image->dev;
	uint64_t end = segment->end == image->size ? bsu_image_units(image) : segment->end >> dev->unit_shift;

	if (segment->rq->op != BSU_OP_WRITE_ZEROES || segment->start & (dev->unit - 1))
		return 0;
	return min_u64(end - (segment->start >> dev->unit_shift), ZERO_UNITS);
}

static void write_zeroes(struct bsu_segment *segment, uint64_t units)
{
	struct bsu_queue *queue = segment->queue;
	uint64_t unit = segment->start >> queue->dev->unit_shift;

	if (!reserve(segment, unit, units))
		return;
	for (uint64_t i = 0; i < units; i++)
		publish(segment, unit + i, BSU_SLOT_ZERO);
	segment->start = min_u64((unit + units) << queue->dev->unit_shift, segment->end);
	segment->rq->waiting_since = 0;
	segment->task.run = go_on;
	bsu_task_ready(queue, &segment->task);
}

/* As copies do, but what does not come is ENOSPC. */
static void wait_for_room(struct bsu_segment *segment)
{
	struct bsu_queue *queue = segment->queue;
	struct bsu_storage *storage = queue->image->storage;

	if (bsu_waited(queue, segment->rq, BSU_WAIT_ROOM, bsu_room_limit(storage))) {
		write_end(segment, -ENOSPC);
		return;
	}
	segment->task.run = go_on;
	if (bsu_room_wait(storage, BSU_FOR_IMAGE_WRITE, &segment->task))
		queue->ops->notify(queue->ctx);
	else
		bsu_task_ready(queue, &segment->task);
}

static void next_portion(struct bsu_segment *segment)
{
	struct bsu_queue *queue = segment->queue;
	struct bsu_device *dev = queue->dev;
	uint64_t unit = segment->start >> dev->unit_shift;
	uint64_t units, zeroes;

	if (segment->start == segment->end) {
		write_end(segment, 0);
		return;
	}
	if (bsu_image_status(queue->image, NULL) != BSU_IMAGE_ACTIVE) {
		write_end(segment, -EIO);
		return;
	}
	zeroes = zero_units(segment);
	if (zeroes) {
		write_zeroes(segment, zeroes);
		return;
	}
	units = ((segment->end - 1) >> dev->unit_shift) + 1 - unit;
	/* Zeroes come here for a part of one unit at a time. */
	units = segment->rq->op == BSU_OP_WRITE_ZEROES ? 1 : min_u64(units, dev->copy_units);
	if (!reserve(segment, unit, units))
		return;
	segment->units = bsu_storage_give(queue->image->storage,
					  MUTANT(BSU_MUTANT_NO_RESERVE) ? BSU_FOR_COPY : BSU_FOR_IMAGE_WRITE,
					  (uint32_t)units, &segment->place);
	if (bsu_storage_got_low(queue->image->storage))
		queue->ops->notify(queue->ctx);
	if (!segment->units) {
		wait_for_room(segment);
		return;
	}
	segment->rq->waiting_since = 0;
	segment->has_places = true;
	segment->length = min_u64((unit + segment->units) << dev->unit_shift, segment->end) - segment->start;
	bsu_segment_get_buffer(segment, BSU_POOL_STORAGE, (size_t)segment->units << dev->unit_shift, granted);
}

static void write_begin(struct bsu_task *task)
{
	struct bsu_request *rq = container_of(task, struct bsu_request, task);
	struct bsu_queue *queue = task->queue;
	struct bsu_image *image = queue->image;
	struct bsu_segment *segment = bsu_segment_get(queue, rq);

	if (!segment) {
		bsu_segment_wait(queue, rq, write_begin);
		return;
	}
	/*
	 * A backup of this image differs from its instant there, and so does whatever
	 * comes after it: both intervals have changed. Marked before anybody can read it.
	 */
	if (!MUTANT(BSU_MUTANT_IMAGE_UNMARKED))
		bsu_mark_range(image->dev, atomic_load_explicit(&image->before, memory_order_acquire), rq->start, rq->length);
	if (!MUTANT(BSU_MUTANT_IMAGE_UNMARKED) && !MUTANT(BSU_MUTANT_IMAGE_MARKS_ONE))
		bsu_mark_range(image->dev, atomic_load_explicit(&image->after, memory_order_acquire), rq->start, rq->length);
	segment->start = rq->start;
	segment->end = rq->start + rq->length;
	next_portion(segment);
}

void bsu_image_write(struct bsu_request *rq)
{
	write_begin(&rq->task);
}
