/* SPDX-License-Identifier: MIT */
/*
 * The set of held images of a device. A view is immutable; a change prepares
 * another one, installs it while the gate is closed and nothing is in flight,
 * and frees the old one after every thread has left the core once. Writers use
 * one view from the gate to their end; image reads take the current one each
 * time they look.
 */
#include <stdlib.h>

#include "internal.h"

struct bsu_view_size {
	unsigned int chains;
	unsigned int images;
};

static struct bsu_view *view_new(struct bsu_view_size size)
{
	struct bsu_view *view;
	struct bsu_image **image;

	view = calloc(1, sizeof(*view) + size.chains * sizeof(struct bsu_chain) + size.images * sizeof(*image));
	if (!view)
		return NULL;
	image = (struct bsu_image **)&view->chain[size.chains];
	/* Each chain gets its part of the array as it is filled. */
	if (size.chains)
		view->chain[0].image = image;
	return view;
}

static void append_chain(struct bsu_view *view, struct bsu_storage *storage)
{
	struct bsu_chain *chain = &view->chain[view->nr_chains];

	if (view->nr_chains)
		chain->image = chain[-1].image + chain[-1].nr_images;
	chain->storage = storage;
	view->nr_chains++;
}

static void append_image(struct bsu_view *view, struct bsu_image *image)
{
	struct bsu_chain *chain = &view->chain[view->nr_chains - 1];

	chain->image[chain->nr_images++] = image;
	view->nr_images++;
}

/* @old without @drop and with @add (either may be NULL). */
static struct bsu_view *view_change(const struct bsu_view *old, struct bsu_image *add, const struct bsu_image *drop)
{
	struct bsu_view_size size = {
		.chains = (old ? old->nr_chains : 0) + (add ? 1 : 0),
		.images = (old ? old->nr_images : 0) + (add ? 1 : 0),
	};
	struct bsu_view *view = view_new(size);

	if (!view)
		return NULL;
	for (unsigned int c = 0; old && c < old->nr_chains; c++) {
		const struct bsu_chain *from = &old->chain[c];

		if (from->nr_images == 1 && from->image[0] == drop)
			continue;
		append_chain(view, from->storage);
		for (unsigned int k = 0; k < from->nr_images; k++)
			if (from->image[k] != drop)
				append_image(view, from->image[k]);
		if (add && from->storage == add->storage) {
			append_image(view, add);
			add = NULL;
		}
	}
	if (add) {
		append_chain(view, add->storage);
		append_image(view, add);
	}
	return view;
}

/* Older images of its chain read through the map of @image: it cannot go before them. */
static bool is_read_through(const struct bsu_device *dev, const struct bsu_image *image)
{
	return bsu_view_chain(atomic_load(&dev->view), image->storage)->image[0] != image;
}

static int prepare(struct bsu_device *dev, struct bsu_image *image, bool take)
{
	if (dev->next_view || dev->old_view)
		return -EBUSY;
	if (image->dev != dev || !dev->origin || atomic_load(&image->taken) == take)
		return -EINVAL;
	if (!take && is_read_through(dev, image))
		return -EBUSY;
	dev->next_view = view_change(atomic_load(&dev->view), take ? image : NULL, take ? NULL : image);
	if (!dev->next_view)
		return -ENOMEM;
	dev->changing = image;
	return 0;
}

int bsu_prepare_take(struct bsu_device *dev, struct bsu_image *image)
{
	return prepare(dev, image, true);
}

int bsu_prepare_drop(struct bsu_device *dev, struct bsu_image *image)
{
	return prepare(dev, image, false);
}

void bsu_prepare_cancel(struct bsu_device *dev)
{
	free(dev->next_view);
	dev->next_view = NULL;
	dev->changing = NULL;
}

void bsu_switch(struct bsu_device *dev, void *bitmap)
{
	bool taken = !atomic_load(&dev->changing->taken);

	if (!taken)
		atomic_store(&dev->changing->state->status, BSU_IMAGE_GONE);
	if (bitmap && dev->tracking_block)
		atomic_store_explicit(&dev->bitmap, bitmap, memory_order_release);
	dev->old_view = atomic_exchange(&dev->view, dev->next_view);
	dev->next_view = NULL;
	atomic_store(&dev->changing->taken, taken);
	dev->changing = NULL;

	pthread_mutex_lock(&dev->lock);
	for (struct bsu_queue *queue = dev->queues; queue; queue = queue->next)
		queue->pass_seen = atomic_load(&queue->pass);
	pthread_mutex_unlock(&dev->lock);
}

bool bsu_grace_passed(struct bsu_device *dev)
{
	bool passed = true;

	pthread_mutex_lock(&dev->lock);
	for (struct bsu_queue *queue = dev->queues; queue; queue = queue->next)
		if (queue->pass_seen % 2 && atomic_load(&queue->pass) == queue->pass_seen)
			passed = false;
	pthread_mutex_unlock(&dev->lock);
	return passed;
}

void bsu_switch_finish(struct bsu_device *dev)
{
	free(dev->old_view);
	dev->old_view = NULL;
}
