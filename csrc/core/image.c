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

static struct bsu_image *image_new(const struct bsu_image_config *config, uint64_t size, int *err)
{
	struct bsu_device *dev = config->device;
	uint64_t entries = directory_entries(size, dev->unit);
	struct bsu_image *image;
	uint32_t *directory;

	*err = -ENOMEM;
	image = calloc(1, sizeof(*image));
	if (!image)
		return NULL;
	image->dev = dev;
	image->storage = config->storage;
	image->arena = config->arena;
	image->state = config->state;
	image->serial = config->serial;
	image->size = size;
	directory = (uint32_t *)((char *)config->state + BSU_IMAGE_HEADER);
	bsu_map_init(&image->map, image->arena, directory, entries);
	bsu_map_init(&image->written, image->arena, directory + entries, entries);
	atomic_fetch_add(&dev->images, 1);
	atomic_fetch_add(&image->storage->users, 1);
	*err = 0;
	return image;
}

static void image_free(struct bsu_image *image)
{
	atomic_fetch_sub(&image->storage->users, 1);
	atomic_fetch_sub(&image->dev->images, 1);
	pthread_mutex_destroy(&image->map.lock);
	pthread_mutex_destroy(&image->written.lock);
	free(image);
}

static bool is_config(const struct bsu_image_config *config)
{
	return config->device && config->storage && config->arena && config->state &&
	       config->storage->unit == config->device->unit && config->serial && config->serial < 1u << 24;
}

struct bsu_image *bsu_image_new(const struct bsu_image_config *config, int *err)
{
	struct bsu_image_state *state = config->state;
	struct bsu_image *image;
	uint64_t size;

	*err = -EINVAL;
	if (!is_config(config))
		return NULL;
	size = bsu_device_size(config->device);
	image = image_new(config, size, err);
	if (!image)
		return NULL;
	state->magic = BSU_IMAGE_MAGIC;
	state->version = BSU_STATE_VERSION;
	state->size = size;
	state->unit = config->device->unit;
	state->serial = config->serial;
	state->directory_entries = image->map.entries;
	atomic_store(&state->status, BSU_IMAGE_ACTIVE);
	return image;
}

static bool fits(const struct bsu_image_state *state, const struct bsu_image_config *config, uint64_t size)
{
	return state->magic == BSU_IMAGE_MAGIC && state->version == BSU_STATE_VERSION && state->size == size &&
	       state->unit == config->device->unit && state->serial == config->serial &&
	       state->directory_entries == directory_entries(size, state->unit);
}

/* Broken with a reason, or active without one; anything else has been tampered with. */
static void check_status(struct bsu_image *image)
{
	struct bsu_image_state *state = image->state;
	uint32_t status = atomic_load(&state->status);
	int error = atomic_load(&state->error);

	if (MUTANT(BSU_MUTANT_STATUS_TRUSTED) || status == BSU_IMAGE_GONE || (status == BSU_IMAGE_ACTIVE && !error))
		return;
	/* Death came while it was being broken for want of room. */
	if (status == BSU_IMAGE_ACTIVE && error == ENOSPC)
		atomic_store(&state->status, status = BSU_IMAGE_OVERFLOWN);
	if ((status == BSU_IMAGE_OVERFLOWN || status == BSU_IMAGE_CORRUPTED) && error)
		return;
	atomic_store(&state->error, EBADMSG);
	atomic_store(&state->status, BSU_IMAGE_CORRUPTED);
}

/* Whose tables and leaves an image may have in common: it was being handed over to them. */
static const struct bsu_chain *heirs(const struct bsu_image *image)
{
	if (atomic_load(&image->state->status) != BSU_IMAGE_GONE)
		return NULL;
	return bsu_view_chain(atomic_load(&image->dev->view), image->storage);
}

struct bsu_image *bsu_image_adopt(const struct bsu_image_config *config, uint64_t size, void *before, void *after, int *err)
{
	struct bsu_image *image;

	*err = -EINVAL;
	if (!is_config(config) || !size || size > bsu_device_size(config->device))
		return NULL;
	*err = -EBADMSG;
	if (!fits(config->state, config, size))
		return NULL;
	image = image_new(config, size, err);
	if (!image)
		return NULL;
	check_status(image);
	image->least_preserved = atomic_load(&image->state->preserved);
	image->least_written = atomic_load(&image->state->written);
	image->least_exempt = atomic_load(&image->state->exempt);
	atomic_store(&image->before, before);
	atomic_store(&image->after, after);
	*err = bsu_map_adopt(&image->map, heirs(image));
	if (!*err)
		*err = bsu_map_adopt(&image->written, NULL);
	if (!*err)
		*err = bsu_view_adopt(image);
	if (!*err)
		return image;
	image_free(image);
	return NULL;
}

int bsu_image_exempt(struct bsu_image *image, uint64_t start, uint64_t length)
{
	const struct bsu_device *dev = image->dev;
	_Atomic uint32_t *exempt = &image->state->exempt;
	uint64_t filled = 0;
	int ret;

	if (start >= image->size || !length || length > image->size - start || (start | length) & (dev->unit - 1) ||
	    atomic_load(&image->taken))
		return -EINVAL;
	ret = bsu_map_fill_zero(&image->map, start >> dev->unit_shift,
				(length >> dev->unit_shift) - MUTANT(BSU_MUTANT_EXEMPT_LESS), &filled);
	atomic_store(exempt, (uint32_t)min_u64(UINT32_MAX, atomic_load(exempt) + filled));
	return ret;
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
	atomic_store(&image->state->releasing, (uint32_t)image->released + 1);
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
	image_free(image);
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
