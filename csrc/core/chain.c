/* SPDX-License-Identifier: MIT */
/*
 * What the images of a chain have. One copy serves all: image k reads a unit
 * from the first of the maps k, k+1, … newest that has it. Being broken is a
 * property of an image, not of its map: an older image goes on reading through
 * the maps of broken newer ones.
 */
#include "internal.h"

uint32_t bsu_chain_slot(const struct bsu_chain *chain, unsigned int k, uint64_t unit)
{
	uint32_t slot = BSU_SLOT_EMPTY;

	for (; k < chain->nr_images && slot == BSU_SLOT_EMPTY; k++) {
		slot = bsu_map_get(&chain->image[k]->map, unit);
		if (MUTANT(BSU_MUTANT_OWN_MAP_ONLY))
			break;
	}
	return slot;
}

int bsu_chain_newest(const struct bsu_chain *chain)
{
	for (unsigned int k = chain->nr_images; k-- > 0;)
		if (bsu_image_status(chain->image[k], NULL) == BSU_IMAGE_ACTIVE)
			return (int)k;
	return -1;
}

/* Units from @unit on that no map from k on has, judged by whole leaves and tables. */
static uint64_t absent(const struct bsu_chain *chain, unsigned int k, uint64_t unit)
{
	uint64_t least = UINT64_MAX;

	for (; k < chain->nr_images && least; k++)
		least = min_u64(least, bsu_map_absent(&chain->image[k]->map, unit));
	return least;
}

uint64_t bsu_chain_run(const struct bsu_chain *chain, unsigned int k, uint64_t unit, uint64_t max, bool *has)
{
	uint64_t run = 0;

	while (run < max) {
		uint64_t skip = absent(chain, k, unit + run);
		bool here = !skip && bsu_chain_slot(chain, k, unit + run) != BSU_SLOT_EMPTY;

		if (!run)
			*has = here;
		else if (here != *has)
			break;
		run += skip ? skip : 1;
	}
	return min_u64(run, max);
}

void bsu_chain_break_slot(struct bsu_queue *queue, const struct bsu_chain *chain, uint64_t unit, uint32_t slot, int error)
{
	for (unsigned int k = 0; k < chain->nr_images; k++)
		if (bsu_chain_slot(chain, k, unit) == slot)
			bsu_image_break(chain->image[k], BSU_IMAGE_CORRUPTED, error);
	queue->ops->notify(queue->ctx);
}

void bsu_chain_break(struct bsu_queue *queue, const struct bsu_chain *chain, uint64_t unit, enum bsu_image_status status, int error)
{
	for (unsigned int k = chain->nr_images; k-- > 0;) {
		if (bsu_map_get(&chain->image[k]->map, unit) != BSU_SLOT_EMPTY)
			break;
		if (unit >= bsu_image_units(chain->image[k]))
			continue;
		bsu_image_break(chain->image[k], status, error);
		if (MUTANT(BSU_MUTANT_BREAK_NEWEST))
			break;
	}
	/*
	 * The origin write that overwrites the unit is submitted after this: whoever
	 * reads its data must then see the image broken.
	 */
	atomic_thread_fence(memory_order_seq_cst);
	queue->ops->notify(queue->ctx);
}

const struct bsu_chain *bsu_view_chain(const struct bsu_view *view, const struct bsu_storage *storage)
{
	for (unsigned int c = 0; view && c < view->nr_chains; c++)
		if (view->chain[c].storage == storage)
			return &view->chain[c];
	return NULL;
}
