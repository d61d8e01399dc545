/* SPDX-License-Identifier: MIT */
/* A device: its geometry, its change bitmap, its swallowed trims, its gate. */
#include <stdlib.h>

#include "internal.h"

static bool power_of_two(uint32_t value)
{
	return value && !(value & (value - 1));
}

struct bsu_device *bsu_device_new(const struct bsu_device_config *config, int *err)
{
	struct bsu_device *dev;

	*err = -EINVAL;
	if (!config->size || !power_of_two(config->block) || config->block < 512 || config->size % config->block)
		return NULL;
	if (!power_of_two(config->unit) || config->unit < config->block || config->unit > 65536)
		return NULL;
	if (config->tracking_block &&
	    (!power_of_two(config->tracking_block) || config->tracking_block < config->unit || !config->bitmap))
		return NULL;
	if (config->swallowed && !config->tracking_block)
		return NULL;
	*err = -ENOMEM;
	dev = calloc(1, sizeof(*dev));
	if (!dev)
		return NULL;
	pthread_mutex_init(&dev->lock, NULL);
	dev->size = config->size;
	dev->block = config->block;
	dev->unit = config->unit;
	dev->unit_shift = (unsigned int)__builtin_ctz(config->unit);
	dev->tracking_block = config->tracking_block;
	if (config->tracking_block)
		dev->tracking_shift = (unsigned int)__builtin_ctz(config->tracking_block);
	dev->copy_units = BSU_COPY_BYTES >> dev->unit_shift < BSU_COPY_UNITS ? BSU_COPY_BYTES >> dev->unit_shift : BSU_COPY_UNITS;
	dev->origin = config->origin;
	dev->copy_limit_ns = config->copy_limit_ns ? config->copy_limit_ns : BSU_COPY_LIMIT_NS;
	atomic_init(&dev->bitmap, config->tracking_block ? config->bitmap : NULL);
	dev->swallowed = config->swallowed;
	if (dev->swallowed) {
		uint64_t blocks = ((dev->size - 1) >> dev->tracking_shift) + 1;

		atomic_init(&dev->any_swallowed, bsu_bits_next(dev->swallowed, 0, blocks) < blocks &&
						 !MUTANT(BSU_MUTANT_FORGET_SWALLOWED));
	}
	*err = 0;
	return dev;
}

int bsu_device_free(struct bsu_device *dev)
{
	if (!dev)
		return 0;
	if (dev->queues || atomic_load(&dev->images) || dev->next_view || dev->old_view)
		return -EBUSY;
	free(atomic_load(&dev->view));
	pthread_mutex_destroy(&dev->lock);
	free(dev);
	return 0;
}

void bsu_mark_range(const struct bsu_device *dev, _Atomic uint64_t *bitmap, uint64_t start, uint64_t length)
{
	uint64_t first, last;

	if (!bitmap || !length)
		return;
	first = start >> dev->tracking_shift;
	last = (start + length - 1) >> dev->tracking_shift;
	if (MUTANT(BSU_MUTANT_RANGE_FIRST) && first < last)
		first++;
	if (MUTANT(BSU_MUTANT_RANGE_LAST) && first < last)
		last--;
	bsu_bits_set(bitmap, first, last);
}

void bsu_device_mark_range(struct bsu_device *dev, uint64_t start, uint64_t length)
{
	bsu_mark_range(dev, atomic_load_explicit(&dev->bitmap, memory_order_acquire), start, length);
}

/* Only whole tracking blocks are remembered: a trim may be forgotten, never invented. */
void bsu_device_swallow(struct bsu_device *dev, uint64_t start, uint64_t length)
{
	uint64_t first, end;

	if (!dev->swallowed)
		return;
	first = (start + dev->tracking_block - 1) >> dev->tracking_shift;
	end = (start + length) >> dev->tracking_shift;
	if (MUTANT(BSU_MUTANT_SWALLOW_PART))
		first = start >> dev->tracking_shift;
	if (start + length == dev->size)
		end = ((dev->size - 1) >> dev->tracking_shift) + 1;
	if (first >= end)
		return;
	bsu_bits_set(dev->swallowed, first, end - 1);
	atomic_store_explicit(&dev->any_swallowed, true, memory_order_release);
}

void bsu_device_unswallow(struct bsu_device *dev, uint64_t start, uint64_t length)
{
	if (MUTANT(BSU_MUTANT_KEEP_SWALLOWED))
		return;
	if (!dev->swallowed || !atomic_load_explicit(&dev->any_swallowed, memory_order_acquire))
		return;
	bsu_bits_clear(dev->swallowed, start >> dev->tracking_shift, (start + length - 1) >> dev->tracking_shift);
}

void bsu_device_forget_swallowed(struct bsu_device *dev, uint64_t start, uint64_t length)
{
	if (start < dev->size && length && length <= dev->size - start)
		bsu_device_unswallow(dev, start, length);
}

bool bsu_device_next_swallowed(struct bsu_device *dev, uint64_t max_length, uint64_t *start, uint64_t *length)
{
	const struct bsu_view *view = atomic_load(&dev->view);
	uint64_t blocks, first, end;

	if (view && view->nr_images)
		return false;
	if (!dev->swallowed || !atomic_load(&dev->any_swallowed))
		return false;
	blocks = ((dev->size - 1) >> dev->tracking_shift) + 1;
	first = bsu_bits_next(dev->swallowed, 0, blocks);
	if (first == blocks) {
		atomic_store(&dev->any_swallowed, false);
		return false;
	}
	end = bsu_bits_next_clear(dev->swallowed, first,
				  min_u64(blocks, first + max_u64(1, max_length >> dev->tracking_shift)));
	bsu_bits_clear(dev->swallowed, first, end - 1);
	*start = first << dev->tracking_shift;
	*length = min_u64(end << dev->tracking_shift, dev->size) - *start;
	bsu_device_mark_range(dev, *start, *length);
	return true;
}

/*
 * The gate. A writer counts itself in, then looks at the gate; who closes it
 * sets the flag, then counts. Both steps are sequentially consistent: either
 * the writer sees the flag, or its count is seen here.
 */
void bsu_gate_close(struct bsu_device *dev)
{
	atomic_store(&dev->rested, 0);
	atomic_store(&dev->gate_closed, true);
	if (atomic_exchange(&dev->any_throttled, false))
		bsu_notify_queues(dev);
}

uint64_t bsu_gate_rested(const struct bsu_device *dev)
{
	return atomic_load(&dev->rested);
}

bool bsu_gate_drained(struct bsu_device *dev)
{
	bool drained = true;

	pthread_mutex_lock(&dev->lock);
	for (struct bsu_queue *queue = dev->queues; queue && drained; queue = queue->next) {
		/* "left" first: the other order could miss a writer that came in between */
		uint64_t left = atomic_load(&queue->left);

		drained = left == atomic_load(&queue->entered) || MUTANT(BSU_MUTANT_DRAINED_EARLY);
	}
	pthread_mutex_unlock(&dev->lock);
	return drained;
}

void bsu_notify_queues(struct bsu_device *dev)
{
	pthread_mutex_lock(&dev->lock);
	for (struct bsu_queue *queue = dev->queues; queue; queue = queue->next) {
		atomic_store(&queue->retry, true);
		queue->ops->wake(queue->ctx);
	}
	pthread_mutex_unlock(&dev->lock);
}

void bsu_gate_unlock(struct bsu_device *dev)
{
	atomic_store(&dev->gate_closed, false);
}

void bsu_gate_open(struct bsu_device *dev)
{
	bsu_gate_unlock(dev);
	bsu_notify_queues(dev);
}

int bsu_device_mark(struct bsu_device *dev, uint64_t start, uint64_t length)
{
	if (start >= dev->size || length > dev->size - start)
		return -EINVAL;
	if (atomic_load(&dev->gate_closed))
		return -EAGAIN;
	bsu_device_mark_range(dev, start, length);
	return 0;
}
