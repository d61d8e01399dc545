/* SPDX-License-Identifier: MIT */
/*
 * Rules that the core keeps at every moment, checked without its help: at each
 * I/O it submits, and, for an image, between any two steps.
 */
#include <string.h>

#include "private.h"

static bool changes_origin(const struct bsu_queue *queue, const struct bsu_io *io, const struct bsu_request *rq)
{
	return rq && io->file == queue->dev->origin && io->op != BSU_OP_READ && io->op != BSU_OP_FLUSH;
}

/* Whether the newest image that is not broken finds @unit in the maps of its chain, or none needs it. */
static bool preserved(const struct bsu_chain *chain, uint64_t unit)
{
	for (unsigned int k = chain->nr_images; k-- > 0;) {
		if (bsu_map_get(&chain->image[k]->map, unit) != BSU_SLOT_EMPTY)
			return true;
		if (bsu_image_status(chain->image[k], NULL) == BSU_IMAGE_ACTIVE)
			return false;
	}
	return true;
}

static const char *watch_change(const struct bsu_device *dev, const struct bsu_io *io, const struct bsu_request *rq)
{
	const struct bsu_view *view = atomic_load(&dev->view);
	const _Atomic uint64_t *bitmap = atomic_load(&dev->bitmap);
	uint64_t end = io->offset + io->length;

	for (unsigned int c = 0; view && c < view->nr_chains; c++)
		for (uint64_t unit = io->offset >> dev->unit_shift; unit << dev->unit_shift < end; unit++)
			if (!preserved(&view->chain[c], unit))
				return "the origin is changed where an image that is not broken lacks a unit";
	for (uint64_t block = io->offset >> dev->tracking_shift; bitmap && block << dev->tracking_shift < end; block++)
		if (!(atomic_load(&bitmap[block / 64]) >> (block % 64) & 1))
			return "the origin is changed before its tracking block is marked";
	if (io->op != BSU_OP_DISCARD && (io->flags ^ rq->flags) & (BSU_FUA | BSU_NOUNMAP))
		return "FUA or NOUNMAP of a request is not that of its I/O";
	return NULL;
}

const char *bsu_watch_submit(const struct bsu_queue *queue, const struct bsu_io *io, const struct bsu_request *rq)
{
	if (io->op == BSU_OP_READ && io->flags)
		return "a read carries FUA";
	if (queue->image && io->op != BSU_OP_READ && io->file == queue->dev->origin)
		return "an image's queue writes to the origin";
	if (!rq && io->file == queue->dev->origin && io->op != BSU_OP_READ)
		return "a copy writes to the origin";
	return changes_origin(queue, io, rq) ? watch_change(queue->dev, io, rq) : NULL;
}

uint32_t bsu_sim_slot(const struct bsu_image *image, uint64_t unit)
{
	return bsu_map_get(&image->map, unit);
}

uint32_t bsu_sim_written_slot(const struct bsu_image *image, uint64_t unit)
{
	return bsu_map_get(&image->written, unit);
}

bool bsu_sim_place_used(const struct bsu_storage *storage, uint32_t place)
{
	const struct bsu_area *area = bsu_storage_area(storage, place);

	return area->given[(place - area->first) / 64] >> ((place - area->first) % 64) & 1;
}

/* The largest unit. */
static const char zeroes[1 << 20];

int64_t bsu_sim_first_wrong(const struct bsu_image *image, const void *expected, uint64_t from)
{
	const struct bsu_device *dev = image->dev;
	const struct bsu_chain *chain = bsu_view_chain(atomic_load(&dev->view), image->storage);
	unsigned int k = 0;

	while (chain && k < chain->nr_images && chain->image[k] != image)
		k++;
	if (!chain || k == chain->nr_images)
		return -ENOENT;
	for (uint64_t unit = from; unit < bsu_image_units(image); unit++) {
		uint32_t own = bsu_map_get(&image->written, unit);
		uint32_t slot = own ? own : bsu_chain_slot(chain, k, unit);
		uint64_t start = unit << dev->unit_shift;
		const char *data = dev->origin->data + start;

		if (slot == BSU_SLOT_BAD)
			return (int64_t)unit;
		if (slot == BSU_SLOT_ZERO) {
			data = zeroes;
		} else if (slot != BSU_SLOT_EMPTY) {
			const struct bsu_area *area = bsu_storage_area(chain->storage, slot - 1);
			const struct bsu_copy *copy = bsu_claim_copy(image->dev, chain->storage, unit, slot);

			data = area->file->data + bsu_storage_offset(chain->storage, area, slot - 1);
			if (copy)
				data = (const char *)copy->buf + ((unit - copy->unit) << dev->unit_shift);
		}
		if (memcmp(data, (const char *)expected + start, min_u64(dev->unit, image->size - start)))
			return (int64_t)unit;
	}
	return -ENOENT;
}
