/* SPDX-License-Identifier: MIT */
/*
 * The set of held images of a device. A view is immutable; a change prepares
 * another one, installs it, and frees the old one after every thread has left
 * the core once. An image is added while the gate is closed and nothing is in
 * flight. One that goes stops being copied to in the same way, and leaves the
 * view later: with or without it, everybody finds the same.
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

/* Before any queue of the device exists: nobody looks at the view that it replaces. */
int bsu_view_adopt(struct bsu_image *image)
{
	struct bsu_device *dev = image->dev;
	struct bsu_view *view;

	if (dev->queues || dev->next_view || dev->settling != BSU_SETTLE_IDLE)
		return -EBUSY;
	view = view_change(atomic_load(&dev->view), image, NULL);
	if (!view)
		return -ENOMEM;
	free(atomic_exchange(&dev->view, view));
	atomic_store(&image->taken, true);
	return 0;
}

/* The image before @image in its chain, which reads through the map of @image. */
static struct bsu_image *older_neighbour(const struct bsu_device *dev, const struct bsu_image *image)
{
	const struct bsu_chain *chain = bsu_view_chain(atomic_load(&dev->view), image->storage);
	unsigned int k = 0;

	while (chain->image[k] != image)
		k++;
	return k ? chain->image[k - 1] : NULL;
}

/* Leaves and tables pass from image to image: all of a chain have one arena. */
static bool fits_chain(const struct bsu_device *dev, const struct bsu_image *image)
{
	const struct bsu_chain *chain = bsu_view_chain(atomic_load(&dev->view), image->storage);

	return !chain || chain->image[0]->map.arena == image->map.arena;
}

/*
 * The image after @image in its chain was going when a process died: it may
 * have tables and leaves in common with @image, and has to go first.
 */
static bool goes_later(const struct bsu_device *dev, const struct bsu_image *image)
{
	const struct bsu_chain *chain = bsu_view_chain(atomic_load(&dev->view), image->storage);

	for (unsigned int k = 0; k + 1 < chain->nr_images; k++)
		if (chain->image[k] == image)
			return bsu_image_status(chain->image[k + 1], NULL) == BSU_IMAGE_GONE && !MUTANT(BSU_MUTANT_OLDER_FIRST);
	return false;
}

static int prepare(struct bsu_device *dev, struct bsu_image *image, bool take)
{
	if (dev->next_view || dev->settling != BSU_SETTLE_IDLE)
		return -EBUSY;
	if (image->dev != dev || !dev->origin || atomic_load(&image->taken) == take)
		return -EINVAL;
	if (take && !fits_chain(dev, image))
		return -EINVAL;
	if (!take && goes_later(dev, image))
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

/*
 * Images only ever stop being active. So if a younger one is active now that
 * this one is not, it was the younger one all the time since it was taken, when
 * writes came to rest: no copy for this one can be under way.
 */
bool bsu_drop_begin(struct bsu_device *dev)
{
	struct bsu_image *image = dev->changing;
	const struct bsu_chain *chain = bsu_view_chain(atomic_load(&dev->view), image->storage);
	bool younger = MUTANT(BSU_MUTANT_DROP_OPEN);

	atomic_store(&image->state->status, BSU_IMAGE_GONE);
	for (unsigned int k = chain->nr_images; k-- > 0 && chain->image[k] != image;)
		younger = younger || bsu_image_status(chain->image[k], NULL) == BSU_IMAGE_ACTIVE;
	/* Nobody needs room for it any more. */
	bsu_room_wake(image->storage);
	return !younger;
}

void bsu_prepare_cancel(struct bsu_device *dev)
{
	free(dev->next_view);
	dev->next_view = NULL;
	dev->changing = NULL;
}

void bsu_grace_begin(struct bsu_device *dev)
{
	pthread_mutex_lock(&dev->lock);
	for (struct bsu_queue *queue = dev->queues; queue; queue = queue->next)
		queue->pass_seen = atomic_load(&queue->pass);
	pthread_mutex_unlock(&dev->lock);
}

static void install(struct bsu_device *dev)
{
	dev->old_view = atomic_exchange(&dev->view, dev->next_view);
	dev->next_view = NULL;
	dev->settling = BSU_SETTLE_GRACE;
	bsu_grace_begin(dev);
}

static void switch_take(struct bsu_device *dev, void *bitmap)
{
	struct bsu_image *image = dev->changing;

	if (dev->tracking_block) {
		image->before = atomic_load_explicit(&dev->bitmap, memory_order_relaxed);
		if (bitmap)
			atomic_store_explicit(&dev->bitmap, bitmap, memory_order_release);
		image->after = atomic_load_explicit(&dev->bitmap, memory_order_relaxed);
	}
	dev->changing = NULL;
	install(dev);
	atomic_store(&image->taken, true);
}

/*
 * From now on copies go to others, so its map does not change any more; it
 * stays in the view until older images have what they need of it.
 */
static void switch_drop(struct bsu_device *dev)
{
	struct bsu_image *image = dev->changing;

	atomic_store(&image->state->status, BSU_IMAGE_GONE);
	atomic_store(&image->taken, false);
	dev->older = older_neighbour(dev, image);
	dev->settled = 0;
	if (dev->older && !MUTANT(BSU_MUTANT_NO_HAND_OVER)) {
		dev->settling = BSU_SETTLE_HAND_OVER;
		return;
	}
	install(dev);
}

void bsu_switch(struct bsu_device *dev, void *bitmap)
{
	bool taken = atomic_load(&dev->changing->taken);

	/* Seeded: every second member of a take goes on with the old set until a write has ended. */
	if (MUTANT(BSU_MUTANT_SWITCH_LATE) && !taken && atomic_load(&dev->gate_closed) && dev->changing->serial % 2 == 0) {
		atomic_store(&dev->bitmap, bitmap);
		return;
	}
	if (taken)
		switch_drop(dev);
	else
		switch_take(dev, bitmap);
}

bool bsu_grace_passed(struct bsu_device *dev)
{
	bool passed = true;

	pthread_mutex_lock(&dev->lock);
	for (struct bsu_queue *queue = dev->queues; queue; queue = queue->next)
		if (queue->pass_seen % 2 && atomic_load(&queue->pass) == queue->pass_seen)
			passed = false;
	pthread_mutex_unlock(&dev->lock);
	return passed || MUTANT(BSU_MUTANT_NO_GRACE);
}

/* The neighbour was going itself when a process died, and still is: images before it may have leaves in common with it. */
static unsigned int count_heirs(const struct bsu_chain *chain, const struct bsu_image *older)
{
	unsigned int k = 0;

	if (bsu_image_status(older, NULL) != BSU_IMAGE_GONE)
		return 0;
	while (chain->image[k] != older)
		k++;
	return k;
}

/* Counted is what has been given: a successor takes an image with less than was counted for broken. */
static int settle_hand_over(struct bsu_device *dev)
{
	const struct bsu_chain *chain = bsu_view_chain(atomic_load(&dev->view), dev->older->storage);
	struct bsu_image *image = dev->changing, *older = dev->older;
	unsigned int heirs = count_heirs(chain, older);
	uint64_t given;

	for (unsigned int k = 0; k < heirs; k++)
		bsu_map_share(&chain->image[k]->map, &image->map, &older->map, dev->settled);
	given = bsu_map_hand_over(&image->map, &older->map, dev->settled);
	for (unsigned int k = heirs; k-- > 0;)
		atomic_fetch_add_explicit(&chain->image[k]->state->preserved, bsu_map_shared(&chain->image[k]->map),
					  memory_order_release);
	atomic_fetch_add_explicit(&older->state->preserved, given, memory_order_release);
	if (++dev->settled == image->map.entries)
		install(dev);
	return 1;
}

static int settle_grace(struct bsu_device *dev)
{
	if (!bsu_grace_passed(dev))
		return -EAGAIN;
	free(dev->old_view);
	dev->old_view = NULL;
	dev->settled = 0;
	if (dev->older) {
		dev->settling = BSU_SETTLE_PRUNE;
		return 1;
	}
	dev->changing = NULL;
	dev->settling = BSU_SETTLE_IDLE;
	return 0;
}

static int settle_marks(struct bsu_device *dev)
{
	if (!bsu_grace_passed(dev))
		return -EAGAIN;
	bsu_resize_settle(dev);
	dev->settling = BSU_SETTLE_IDLE;
	return 0;
}

static int settle_prune(struct bsu_device *dev)
{
	bsu_map_prune(&dev->changing->map, &dev->older->map, dev->settled);
	if (++dev->settled < dev->changing->map.entries)
		return 1;
	dev->changing = NULL;
	dev->older = NULL;
	dev->settling = BSU_SETTLE_IDLE;
	return 0;
}

int bsu_settle(struct bsu_device *dev)
{
	switch (dev->settling) {
	case BSU_SETTLE_HAND_OVER:
		return settle_hand_over(dev);
	case BSU_SETTLE_GRACE:
		return settle_grace(dev);
	case BSU_SETTLE_PRUNE:
		return settle_prune(dev);
	case BSU_SETTLE_MARKS:
		return settle_marks(dev);
	default:
		return 0;
	}
}
