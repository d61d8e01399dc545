/* SPDX-License-Identifier: MIT */
/*
 * Where an image finds the data of a unit: in what was written to it, else in
 * its chain, else on the origin. The answer may change at any time, so whoever
 * has read looks again.
 */
#include "internal.h"

bool bsu_find_source(struct bsu_image *image, struct bsu_source *source)
{
	if (bsu_image_status(image, NULL) != BSU_IMAGE_ACTIVE)
		return false;
	source->image = image;
	source->chain = bsu_view_chain(atomic_load(&image->dev->view), image->storage);
	for (source->k = 0; source->chain && source->k < source->chain->nr_images; source->k++)
		if (source->chain->image[source->k] == image)
			return true;
	return false;
}

static uint32_t slot_of(const struct bsu_source *source, uint64_t unit)
{
	uint32_t slot = bsu_map_get(&source->image->written, unit);

	return slot ? slot : bsu_chain_slot(source->chain, source->k, unit);
}

/* Units from @unit on, which is on the origin, that are too, at most @max. */
static uint32_t origin_run(const struct bsu_source *source, uint64_t unit, uint32_t max)
{
	const struct bsu_map *written = &source->image->written;
	uint64_t run = 0, least;
	bool has;

	max = (uint32_t)max_u64(1, bsu_chain_run(source->chain, source->k, unit, max, &has));
	while (run < max) {
		least = bsu_map_absent(written, unit + run);
		if (!least && bsu_map_get(written, unit + run) != BSU_SLOT_EMPTY)
			break;
		run += least ? least : 1;
	}
	return (uint32_t)min_u64(max_u64(run, 1), max);
}

uint32_t bsu_source_run(const struct bsu_source *source, uint64_t unit, uint32_t max, uint32_t *slot)
{
	const struct bsu_area *area;
	uint32_t run = 1;

	*slot = slot_of(source, unit);
	if (*slot == BSU_SLOT_BAD)
		return 1;
	if (*slot == BSU_SLOT_EMPTY)
		return origin_run(source, unit, max);
	if (*slot == BSU_SLOT_ZERO) {
		while (run < max && slot_of(source, unit + run) == BSU_SLOT_ZERO)
			run++;
		return run;
	}
	area = bsu_storage_area(source->chain->storage, *slot - 1);
	max = (uint32_t)min_u64(max, area->first + (uint64_t)area->count - (*slot - 1));
	while (run < max && slot_of(source, unit + run) == *slot + run)
		run++;
	return run;
}

static bool source_is(const struct bsu_source *source, uint64_t unit, uint32_t units, uint32_t slot)
{
	for (uint32_t i = 0; i < units; i++)
		if (slot_of(source, unit + i) != (bsu_slot_is_place(slot) ? slot + i : slot))
			return false;
	return true;
}

/* Whether what was read from storage is what was put there. */
static bool records_hold(const struct bsu_storage *storage, uint32_t slot, uint64_t unit, uint32_t units, const void *data)
{
	const struct bsu_area *area = bsu_storage_area(storage, slot - 1);
	const struct bsu_record *record = &area->records[slot - 1 - area->first];

	for (uint32_t i = 0; i < units; i++)
		if (!bsu_record_holds(&record[i], unit + i, (const char *)data + (size_t)i * storage->unit, storage->unit))
			return false;
	return true;
}

bool bsu_source_holds(struct bsu_queue *queue, uint64_t unit, uint32_t units, uint32_t slot, const void *data, int *res)
{
	struct bsu_image *image = queue->image;
	struct bsu_source source;

	/* Data that an origin write replaced come with its publishing, or with the image broken: see copy_publish(). */
	atomic_thread_fence(memory_order_seq_cst);
	if (!bsu_find_source(image, &source)) {
		*res = -EIO;
		return true;
	}
	if (!source_is(&source, unit, units, slot))
		return false;
	if (bsu_slot_is_place(slot) && (*res || !records_hold(image->storage, slot, unit, units, data))) {
		bsu_image_break(image, BSU_IMAGE_CORRUPTED, *res ? *res : EBADMSG);
		queue->ops->notify(queue->ctx);
		*res = -EIO;
	}
	return true;
}
