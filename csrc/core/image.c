/* SPDX-License-Identifier: MIT */
/* An image: one member of a snapshot, its map and whether it can be trusted. */
#include <stdlib.h>

#include "internal.h"

static uint64_t directory_entries(uint64_t device_size, uint32_t unit)
{
	uint64_t units = (device_size + unit - 1) / unit;

	return (units + BSU_TABLE_UNITS - 1) / BSU_TABLE_UNITS;
}

size_t bsu_image_state_bytes(uint64_t device_size, uint32_t unit)
{
	size_t bytes = BSU_IMAGE_HEADER + 2 * (size_t)directory_entries(device_size, unit) * sizeof(uint32_t);

	return (bytes + BSU_MAP_PAGE - 1) / BSU_MAP_PAGE * BSU_MAP_PAGE;
}

struct bsu_image *bsu_image_new(const struct bsu_image_config *config, int *err)
{
	struct bsu_image_state *state = config->state;
	struct bsu_device *dev = config->device;
	struct bsu_image *image;
	uint32_t *directory;

	*err = -EINVAL;
	if (!dev || !config->storage || !config->arena || !state)
		return NULL;
	if (config->storage->unit != dev->unit || !config->serial || config->serial >= 1u << 24)
		return NULL;
	*err = -ENOMEM;
	image = calloc(1, sizeof(*image));
	if (!image)
		return NULL;
	image->dev = dev;
	image->storage = config->storage;
	image->arena = config->arena;
	image->state = state;
	image->serial = config->serial;
	state->magic = BSU_IMAGE_MAGIC;
	state->version = BSU_STATE_VERSION;
	state->size = dev->size;
	state->unit = dev->unit;
	state->serial = config->serial;
	state->directory_entries = directory_entries(dev->size, dev->unit);
	directory = (uint32_t *)((char *)state + BSU_IMAGE_HEADER);
	bsu_map_init(&image->map, image->arena, directory, state->directory_entries);
	bsu_map_init(&image->written, image->arena, directory + state->directory_entries, state->directory_entries);
	atomic_store(&state->status, BSU_IMAGE_ACTIVE);
	atomic_fetch_add(&dev->images, 1);
	atomic_fetch_add(&image->storage->users, 1);
	*err = 0;
	return image;
}

int bsu_image_exempt(struct bsu_image *image, uint64_t start, uint64_t length)
{
	const struct bsu_device *dev = image->dev;

	if (start >= dev->size || !length || length > dev->size - start || (start | length) & (dev->unit - 1) ||
	    atomic_load(&image->taken))
		return -EINVAL;
	return bsu_map_fill_zero(&image->map, start >> dev->unit_shift,
				 (length >> dev->unit_shift) - MUTANT(BSU_MUTANT_EXEMPT_LESS));
}

bool bsu_image_idle(const struct bsu_image *image)
{
	return !atomic_load(&image->users);
}

/* A view that was replaced is in use until its switch is settled. */
static bool is_in(const struct bsu_view *view, const struct bsu_image *image)
{
	const struct bsu_chain *chain = bsu_view_chain(view, image->storage);

	for (unsigned int k = 0; chain && k < chain->nr_images; k++)
		if (chain->image[k] == image)
			return true;
	return false;
}

static bool is_used(const struct bsu_image *image)
{
	const struct bsu_device *dev = image->dev;

	if (!bsu_image_idle(image) && !MUTANT(BSU_MUTANT_FREE_UNDER_READER))
		return true;
	return atomic_load(&image->taken) || dev->changing == image || dev->older == image || is_in(dev->old_view, image);
}

int bsu_image_release(struct bsu_image *image)
{
	if (is_used(image))
		return -EBUSY;
	if (image->released == image->map.entries)
		return 0;
	bsu_map_clear(&image->map, image->storage, image->released);
	bsu_map_clear(&image->written, image->storage, image->released);
	return ++image->released < image->map.entries;
}

int bsu_image_free(struct bsu_image *image)
{
	int ret;

	if (!image)
		return 0;
	while ((ret = bsu_image_release(image)) > 0)
		;
	if (ret)
		return ret;
	atomic_fetch_sub(&image->storage->users, 1);
	atomic_fetch_sub(&image->dev->images, 1);
	pthread_mutex_destroy(&image->map.lock);
	pthread_mutex_destroy(&image->written.lock);
	free(image);
	return 0;
}

void bsu_image_break(struct bsu_image *image, enum bsu_image_status status, int error)
{
	struct bsu_image_state *state = image->state;
	uint32_t expected = BSU_IMAGE_ACTIVE;
	int32_t none = 0;

	/* The reason is complete before anybody can see the image broken. */
	if (atomic_load(&state->status) != BSU_IMAGE_ACTIVE)
		return;
	atomic_compare_exchange_strong(&state->error, &none, error < 0 ? -error : error);
	atomic_compare_exchange_strong(&state->status, &expected, status);
	/* Nobody needs room for it any more. */
	bsu_room_wake(image->storage);
}

enum bsu_image_status bsu_image_status(const struct bsu_image *image, int *error)
{
	/* In one order with all changes of it: see bsu_drop_begin(). */
	enum bsu_image_status status = atomic_load(&image->state->status);

	if (error)
		*error = status == BSU_IMAGE_ACTIVE ? 0 : atomic_load(&image->state->error);
	return status;
}

uint64_t bsu_image_preserved(const struct bsu_image *image)
{
	return atomic_load_explicit(&image->state->preserved, memory_order_relaxed) * image->dev->unit;
}

uint64_t bsu_image_written(const struct bsu_image *image)
{
	return atomic_load_explicit(&image->state->written, memory_order_relaxed) * image->dev->unit;
}
