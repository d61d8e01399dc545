/* SPDX-License-Identifier: MIT */
/*
 * A device that grows. Its bitmaps are replaced by larger ones with the gate
 * closed, so no write marks meanwhile; but requests to images do. What they
 * still mark in the former bitmap is carried over when no thread can have its
 * address any more.
 */
#include "internal.h"

static void carry_over(_Atomic uint64_t *to, const _Atomic uint64_t *from, uint64_t blocks)
{
	for (uint64_t at = 0; at < (blocks + 63) / 64; at++) {
		uint64_t marks = atomic_load_explicit(&from[at], memory_order_relaxed);

		if (marks)
			atomic_fetch_or_explicit(&to[at], marks, memory_order_relaxed);
	}
}

static void replace_in_images(struct bsu_device *dev, _Atomic uint64_t *old, _Atomic uint64_t *bitmap)
{
	const struct bsu_view *view = atomic_load(&dev->view);

	for (unsigned int c = 0; view && c < view->nr_chains; c++) {
		for (unsigned int k = 0; k < view->chain[c].nr_images; k++) {
			struct bsu_image *image = view->chain[c].image[k];

			if (atomic_load(&image->before) == old)
				atomic_store(&image->before, bitmap);
			if (atomic_load(&image->after) == old)
				atomic_store(&image->after, bitmap);
		}
	}
}

int bsu_device_resize(struct bsu_device *dev, uint64_t size, void *bitmap, void *swallowed)
{
	_Atomic uint64_t *old = atomic_load(&dev->bitmap);
	uint64_t former = bsu_device_size(dev);

	if (size < former || size & (dev->block - 1) || !dev->tracking_block || !bitmap || !swallowed != !dev->swallowed)
		return -EINVAL;
	if (dev->next_view || dev->settling != BSU_SETTLE_IDLE)
		return -EBUSY;
	dev->old_bitmap = old;
	dev->old_blocks = ((former - 1) >> dev->tracking_shift) + 1;
	carry_over(bitmap, old, dev->old_blocks);
	bsu_mark_range(dev, bitmap, former, size - former);
	atomic_store(&dev->bitmap, (_Atomic uint64_t *)bitmap);
	replace_in_images(dev, old, bitmap);
	if (swallowed) {
		carry_over(swallowed, dev->swallowed, dev->old_blocks);
		/* The last block was trimmed up to the former end, and is longer now. */
		if (size > former && former & (dev->tracking_block - 1))
			bsu_bits_clear(swallowed, dev->old_blocks - 1, dev->old_blocks - 1);
		/* A plain pointer: only what has passed the gate uses it, and the control thread. */
		dev->swallowed = swallowed;
	}
	atomic_store(&dev->size, size);
	dev->settling = BSU_SETTLE_MARKS;
	bsu_grace_begin(dev);
	return 0;
}

void bsu_resize_settle(struct bsu_device *dev)
{
	if (!MUTANT(BSU_MUTANT_LATE_MARK_LOST))
		carry_over(atomic_load(&dev->bitmap), dev->old_bitmap, dev->old_blocks);
	dev->old_bitmap = NULL;
}
