/* SPDX-License-Identifier: MIT */
/* kill -9: what only the process had is gone, and shared memory stays as it is at this moment. */
#include <stdlib.h>
#include <string.h>

#include "private.h"

void bsu_sim_kill_image(struct bsu_image *image)
{
	pthread_mutex_destroy(&image->map.lock);
	pthread_mutex_destroy(&image->written.lock);
	free(image);
}

void bsu_sim_kill_device(struct bsu_device *dev)
{
	free(atomic_load(&dev->view));
	free(dev->next_view);
	free(dev->old_view);
	pthread_mutex_destroy(&dev->lock);
	free(dev);
}

void bsu_sim_kill(struct bsu_sim *sim)
{
	for (unsigned int i = 0; i < sim->queues; i++) {
		struct bsu_queue *queue = sim->queue[i] ? sim->queue[i]->queue : NULL;

		if (!queue)
			continue;
		free(queue->segments);
		free(queue->copies);
		free(queue);
	}
	bsu_sim_free(sim);
}

unsigned int bsu_sim_store_unstored(const struct bsu_storage *storage, const void *unstored, const void *buffers, size_t bytes)
{
	struct bsu_file *file;
	unsigned int count = 0;
	const void *data;
	uint64_t offset, at = 0;

	for (; bsu_storage_unstored(storage, unstored, buffers, bytes, &at, &file, &offset, &data); count++)
		memcpy(file->data + offset, data, storage->unit);
	return count;
}

void bsu_sim_unpublish(struct bsu_image *image, bool written, uint64_t unit, uint32_t slot)
{
	struct bsu_map *map = written ? &image->written : &image->map;

	if (bsu_map_get(map, unit) != BSU_SLOT_EMPTY)
		bsu_map_publish(map, unit, slot);
}
