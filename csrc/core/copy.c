/* SPDX-License-Identifier: MIT */
/*
 * Preserving a run of units: read the old data from the origin, write it to
 * the difference storage, complete the records, publish. Only then does the
 * request that wants to overwrite the units go on; or, where buffers outlive the
 * process, as soon as the data is in one (early release), and what cannot be
 * stored then breaks the images that need it. When anything else fails, the
 * images that lack the units are broken first and the request goes on as well.
 */
#include <string.h>

#include "internal.h"

static void copy_read_done(struct bsu_io *io, int res);
static void copy_store_done(struct bsu_io *io, int res);

void bsu_copy_claim(struct bsu_copy *copy, struct bsu_request *rq, struct bsu_image *image, uint64_t unit, uint32_t count, uint32_t place)
{
	uint64_t end = unit + count;

	copy->rq = rq;
	copy->image = image;
	copy->unit = unit;
	copy->count = count;
	copy->place = place;
	copy->given_up = false;
	copy->early = false;
	copy->unstored = NULL;
	copy->slow = false;
	copy->buf = NULL;
	copy->nr_claims = 0;
	memset(copy->bad, 0, sizeof(copy->bad));
	memset(copy->unpublished, 0, sizeof(copy->unpublished));
	while (unit < end) {
		uint64_t leaf = unit / BSU_LEAF_UNITS;
		uint64_t stop = min_u64(end, (leaf + 1) * BSU_LEAF_UNITS);
		struct bsu_claim *claim = &copy->claim[copy->nr_claims++];

		claim->early = NULL;
		claim->storage = image->storage;
		claim->leaf = leaf;
		claim->mask = ~0ull >> (64 - (stop - unit)) << (unit % BSU_LEAF_UNITS);
		bsu_claim_add(image->dev, claim);
		unit = stop;
	}
}

static size_t copy_bytes(const struct bsu_copy *copy)
{
	return (size_t)copy->count << copy->image->dev->unit_shift;
}

static void release_request(struct bsu_queue *queue, struct bsu_copy *copy)
{
	struct bsu_request *rq = copy->rq;

	copy->rq = NULL;
	if (rq && !--rq->pending) {
		rq->task.run = bsu_write_again;
		bsu_task_ready(queue, &rq->task);
	}
}

/*
 * device.lock held, still: another queue may run a task, end and be freed before
 * we have woken it, but leaving the device takes the lock.
 */
static void wake_all(struct bsu_queue *queue, struct bsu_tasks *woken)
{
	struct bsu_task *task;

	while ((task = bsu_tasks_pop(woken)))
		bsu_task_ready(queue, task);
}

/* Whoever waits for the units of this copy, its own request included, looks again. */
static void release_waiters(struct bsu_queue *queue, struct bsu_copy *copy)
{
	struct bsu_device *dev = copy->image->dev;
	struct bsu_tasks woken = { 0 };

	release_request(queue, copy);
	pthread_mutex_lock(&dev->lock);
	while (copy->nr_claims)
		bsu_claim_remove(dev, &copy->claim[--copy->nr_claims], &woken);
	wake_all(queue, &woken);
	pthread_mutex_unlock(&dev->lock);
}

static void copy_end(struct bsu_queue *queue, struct bsu_copy *copy)
{
	struct bsu_image *image = copy->image;
	struct bsu_task *task;

	/* First: with a claim, others may look into the buffer. */
	release_waiters(queue, copy);
	if (copy->buf && !(MUTANT(BSU_MUTANT_LEAK_BUFFER) && copy->given_up))
		bsu_pool_put(queue->pool, queue, image->storage, copy->buf, copy_bytes(copy));
	if (copy->older)
		copy->older->newer = copy->newer;
	else
		queue->oldest = copy->newer;
	if (copy->newer)
		copy->newer->older = copy->older;
	else
		queue->newest = copy->older;
	copy->state = BSU_COPY_FREE;
	copy->next = queue->free_copy;
	queue->free_copy = copy;
	queue->copies_out--;
	queue->busy--;
	atomic_fetch_sub_explicit(&image->users, 1, memory_order_release);
	/* The first may have its share already, others not: all look where there are several storages. */
	while ((task = bsu_tasks_pop(&queue->copy_waiters))) {
		if (!MUTANT(BSU_MUTANT_LOSE_COPY_WAITER))
			bsu_task_ready(queue, task);
		if (atomic_load(&queue->dev->view)->nr_chains < 2)
			break;
	}
}

static void copy_break(struct bsu_queue *queue, struct bsu_copy *copy, int error)
{
	const struct bsu_chain *chain = bsu_view_chain(atomic_load(&queue->dev->view), copy->image->storage);

	/* A copy that was given up may end after its image has gone. */
	for (uint32_t i = 0; chain && i < copy->count; i++)
		bsu_chain_break(queue, chain, copy->unit + i, BSU_IMAGE_CORRUPTED, error);
}

static void copy_read(struct bsu_queue *queue, struct bsu_copy *copy)
{
	struct bsu_device *dev = queue->dev;
	uint64_t unit = copy->unit + (copy->slow ? copy->reading : 0);
	uint64_t count = copy->slow ? 1 : copy->count;

	copy->state = BSU_COPY_READ;
	copy->io = (struct bsu_io) {
		.file = dev->origin,
		.offset = unit << dev->unit_shift,
		.length = bsu_units_bytes(dev, unit, count),
		.buf = (char *)copy->buf + ((unit - copy->unit) << dev->unit_shift),
		.op = BSU_OP_READ,
		.done = copy_read_done,
	};
	bsu_submit(queue, &copy->io);
}

static void copy_granted(struct bsu_task *task)
{
	struct bsu_copy *copy = container_of(task, struct bsu_copy, task);
	struct bsu_queue *queue = task->queue;
	uint64_t bytes = bsu_units_bytes(queue->dev, copy->unit, copy->count);

	copy->buf = task->grant;
	if (copy->given_up) {
		bsu_storage_return(copy->image->storage, copy->place, copy->count);
		copy_end(queue, copy);
		return;
	}
	/* The last unit of a device may be short; its place is not. */
	memset((char *)copy->buf + bytes, 0, copy_bytes(copy) - bytes);
	copy_read(queue, copy);
}

void bsu_copy_start(struct bsu_copy *copy)
{
	struct bsu_queue *queue = copy->task.queue;

	copy->state = BSU_COPY_BUFFER;
	copy->limit = bsu_now(queue) + queue->dev->copy_limit_ns;
	copy->newer = NULL;
	copy->older = queue->newest;
	if (queue->newest)
		queue->newest->newer = copy;
	else
		queue->oldest = copy;
	queue->newest = copy;
	queue->busy++;
	queue->counters.copies++;
	atomic_fetch_add_explicit(&copy->image->users, 1, memory_order_relaxed);
	copy->task.run = copy_granted;
	copy->task.grant = bsu_pool_get(queue->pool, BSU_POOL_STORAGE, copy->image->storage, copy_bytes(copy), &copy->task);
	if (copy->task.grant)
		copy_granted(&copy->task);
}

static bool is_bad(const struct bsu_copy *copy, uint32_t at)
{
	return copy->bad[at / 64] >> (at % 64) & 1 && !MUTANT(BSU_MUTANT_BAD_AS_GOOD);
}

static void complete_records(struct bsu_copy *copy)
{
	const struct bsu_area *area = bsu_storage_area(copy->image->storage, copy->place);
	struct bsu_record *record = &area->records[copy->place - area->first];
	uint32_t unit_bytes = copy->image->storage->unit;

	for (uint32_t i = 0; i < copy->count; i++) {
		const char *data = (const char *)copy->buf + (size_t)i * unit_bytes;

		if (is_bad(copy, i))
			continue;
		bsu_record_set(&record[i], copy->image->serial, false, copy->unit + i, bsu_crc32c(0, data, unit_bytes));
	}
}

static void publish_slots(struct bsu_queue *queue, struct bsu_copy *copy)
{
	struct bsu_storage *storage = copy->image->storage;
	uint32_t published = 0;

	for (uint32_t i = 0; i < copy->count; i++) {
		uint32_t slot = is_bad(copy, i) ? BSU_SLOT_BAD : copy->place + i + 1;
		/* A sweep may have published what a former process had preserved. */
		bool first = bsu_map_publish_first(&copy->image->map, copy->unit + i, slot);

		if (MUTANT(BSU_MUTANT_PUBLISH_OVER) && !first) {
			bsu_map_publish(&copy->image->map, copy->unit + i, slot);
			continue;
		}
		published += first;
		if (first && slot != BSU_SLOT_BAD)
			continue;
		if (copy->early)
			copy->unpublished[i / 64] |= 1ull << (i % 64);
		else
			bsu_storage_return(storage, copy->place + i, 1);
	}
	atomic_fetch_add_explicit(&copy->image->state->preserved, published, memory_order_release);
	queue->counters.copied += copy_bytes(copy);
	/* Readers must see the slots before the origin write that follows can reach the disk. */
	atomic_thread_fence(memory_order_seq_cst);
}

static void copy_publish(struct bsu_queue *queue, struct bsu_copy *copy)
{
	complete_records(copy);
	publish_slots(queue, copy);
}

/* Its limit begins again: it is the newest now, by age. */
static void renew(struct bsu_queue *queue, struct bsu_copy *copy)
{
	copy->limit = copy->stored + queue->dev->copy_limit_ns;
	if (!copy->newer)
		return;
	copy->newer->older = copy->older;
	if (copy->older)
		copy->older->newer = copy->newer;
	else
		queue->oldest = copy->newer;
	copy->older = queue->newest;
	copy->newer = NULL;
	queue->newest->newer = copy;
	queue->newest = copy;
}

static bool any_bad(const struct bsu_copy *copy)
{
	for (unsigned int i = 0; i < BSU_COPY_UNITS / 64; i++)
		if (copy->bad[i])
			return true;
	return false;
}

/* The data is where it outlives us: it need not be stored for the origin to be overwritten. */
static void release_early(struct bsu_queue *queue, struct bsu_copy *copy)
{
	struct bsu_storage *storage = copy->image->storage;
	struct bsu_unstored *unstored = bsu_pool_unstored(queue->pool, copy->buf);
	struct bsu_tasks woken = { 0 };

	if (!unstored || any_bad(copy))
		return;
	copy->early = true;
	copy->unstored = unstored;
	/* Nobody waits for the storage: it has all of the time. */
	renew(queue, copy);
	unstored->storage = storage->number;
	unstored->place = copy->place;
	if (!MUTANT(BSU_MUTANT_UNSTORED_UNTOLD))
		atomic_store_explicit(&unstored->units, copy->count, memory_order_release);
	/* A successor sees what this thread has done in the order of the program: only the compiler could alter that. */
	atomic_signal_fence(memory_order_seq_cst);
	if (!MUTANT(BSU_MUTANT_UNSTORED_UNSEEN))
		atomic_fetch_add(&storage->unstored, 1);
	if (!MUTANT(BSU_MUTANT_UNSTORED_NOT_IN_FLIGHT))
		bsu_flight_begin(queue);
	complete_records(copy);
	/* Locked: who finds a slot finds the buffer. */
	pthread_mutex_lock(&queue->dev->lock);
	publish_slots(queue, copy);
	for (unsigned int i = 0; i < copy->nr_claims; i++) {
		copy->claim[i].early = copy;
		bsu_claim_wake(&copy->claim[i], &woken);
	}
	wake_all(queue, &woken);
	pthread_mutex_unlock(&queue->dev->lock);
	release_request(queue, copy);
}

/* Nobody needs the buffer of an early copy any more. */
static void forget_unstored(struct bsu_queue *queue, struct bsu_copy *copy)
{
	if (!copy->unstored)
		return;
	atomic_store(&copy->unstored->units, 0);
	copy->unstored = NULL;
	if (!MUTANT(BSU_MUTANT_UNSTORED_UNSEEN))
		atomic_fetch_sub(&copy->image->storage->unstored, 1);
	if (!MUTANT(BSU_MUTANT_UNSTORED_NOT_IN_FLIGHT))
		bsu_flight_end(queue);
}

/*
 * An early copy cannot be stored: what reads it is broken, and then it is found
 * nowhere any more. No map of an image that goes can have been given it, because
 * it is in flight: see enum bsu_copy_state.
 */
static void take_back(struct bsu_queue *queue, struct bsu_copy *copy, int error)
{
	const struct bsu_chain *chain = bsu_view_chain(atomic_load(&queue->dev->view), copy->image->storage);

	for (uint32_t i = 0; i < copy->count; i++) {
		uint64_t unit = copy->unit + i, bit = 1ull << (i % 64);
		uint32_t slot = copy->place + i + 1;

		if (copy->unpublished[i / 64] & bit)
			continue;
		if (chain && !MUTANT(BSU_MUTANT_UNSTORED_UNBROKEN))
			bsu_chain_break_slot(queue, chain, unit, slot, error);
		if (bsu_map_replace(&copy->image->map, unit, slot, BSU_SLOT_BAD))
			copy->unpublished[i / 64] |= bit;
	}
}

/* Nobody writes to its places any more: those that no map has are free. */
static void return_places(struct bsu_copy *copy)
{
	for (uint32_t i = 0; copy->early && i < copy->count; i++)
		if (copy->unpublished[i / 64] >> (i % 64) & 1)
			bsu_storage_return(copy->image->storage, copy->place + i, 1);
	if (!copy->early)
		bsu_storage_return(copy->image->storage, copy->place, copy->count);
}

static void copy_store(struct bsu_queue *queue, struct bsu_copy *copy)
{
	struct bsu_storage *storage = copy->image->storage;
	const struct bsu_area *area = bsu_storage_area(storage, copy->place);

	copy->state = BSU_COPY_STORE;
	copy->stored = bsu_now(queue);
	copy->io = (struct bsu_io) {
		.file = area->file,
		.offset = bsu_storage_offset(storage, area, copy->place),
		.length = copy_bytes(copy),
		.buf = copy->buf,
		.op = BSU_OP_WRITE,
		.done = copy_store_done,
	};
	if (MUTANT(BSU_MUTANT_PUBLISH_EARLY)) {
		copy_publish(queue, copy);
		release_waiters(queue, copy);
	} else {
		release_early(queue, copy);
	}
	bsu_submit(queue, &copy->io);
}

static void copy_read_done(struct bsu_io *io, int res)
{
	struct bsu_copy *copy = container_of(io, struct bsu_copy, io);
	struct bsu_queue *queue = io->queue;

	if (copy->given_up) {
		bsu_storage_return(copy->image->storage, copy->place, copy->count);
		copy_end(queue, copy);
		return;
	}
	if (res && !copy->slow && copy->count > 1) {
		copy->slow = true;
		copy->reading = 0;
		copy_read(queue, copy);
		return;
	}
	if (res) {
		uint32_t at = copy->slow ? copy->reading : 0;

		copy->bad[at / 64] |= 1ull << (at % 64);
		memset((char *)copy->buf + ((size_t)at << queue->dev->unit_shift), 0, queue->dev->unit);
	}
	if (copy->slow && ++copy->reading < copy->count) {
		copy_read(queue, copy);
		return;
	}
	copy_store(queue, copy);
}

/* For a seeded bug: a copy that was given up, published in a map that is younger than its data. */
static bool publish_in_newest(struct bsu_queue *queue, struct bsu_copy *copy)
{
	const struct bsu_chain *chain = bsu_view_chain(atomic_load(&queue->dev->view), copy->image->storage);
	int k = chain ? bsu_chain_newest(chain) : -1;
	struct bsu_image *own = copy->image;

	if (k < 0 || bsu_map_reserve(&chain->image[k]->map, copy->unit, copy->count))
		return false;
	copy->image = chain->image[k];
	copy_publish(queue, copy);
	copy->image = own;
	return true;
}

static void copy_store_done(struct bsu_io *io, int res)
{
	struct bsu_copy *copy = container_of(io, struct bsu_copy, io);
	struct bsu_queue *queue = io->queue;

	bsu_storage_answers(copy->image->storage);
	if (MUTANT(BSU_MUTANT_LATE_COPY) && copy->given_up && !res && publish_in_newest(queue, copy)) {
		copy_end(queue, copy);
		return;
	}
	if ((MUTANT(BSU_MUTANT_BREAK_AFTER_WRITE) || MUTANT(BSU_MUTANT_STORE_ERROR_TO_WRITER)) && copy->rq)
		copy->rq->result = res;
	if (copy->early) {
		if (res && !copy->given_up)
			take_back(queue, copy, res);
		forget_unstored(queue, copy);
		return_places(copy);
	} else if (copy->given_up || (res && !MUTANT(BSU_MUTANT_PUBLISH_ON_ERROR))) {
		if (res && !copy->given_up && !MUTANT(BSU_MUTANT_BREAK_AFTER_WRITE))
			copy_break(queue, copy, res);
		return_places(copy);
	} else {
		copy_publish(queue, copy);
	}
	copy_end(queue, copy);
}

uint32_t bsu_copy_fetch(struct bsu_device *dev, const struct bsu_storage *storage, uint64_t unit, uint32_t slot,
			uint32_t units, void *to, bool *fetched)
{
	uint32_t alike = 0;

	*fetched = false;
	/* It counts before it is published, and until it is stored. */
	if (!atomic_load(&storage->unstored))
		return units;
	pthread_mutex_lock(&dev->lock);
	for (; alike < units; alike++) {
		const struct bsu_copy *copy = bsu_claim_copy(dev, storage, unit + alike, slot + alike);

		if (alike && !copy == *fetched)
			break;
		*fetched = copy;
		if (copy)
			memcpy((char *)to + ((size_t)alike << dev->unit_shift),
			       (const char *)copy->buf + ((size_t)(unit + alike - copy->unit) << dev->unit_shift), dev->unit);
	}
	pthread_mutex_unlock(&dev->lock);
	return alike;
}

/*
 * The limit of a copy has passed: the images are broken, the writers go on,
 * and what is left of the copy only frees when its I/O ends.
 */
static void give_up(struct bsu_queue *queue, struct bsu_copy *copy)
{
	copy->given_up = true;
	/* Not where the time went by before it was asked. */
	if (copy->state == BSU_COPY_STORE && bsu_now(queue) - copy->stored >= queue->dev->copy_limit_ns / 3)
		atomic_store_explicit(&copy->image->storage->silent, true, memory_order_relaxed);
	if (MUTANT(BSU_MUTANT_RETURN_EARLY))
		bsu_storage_return(copy->image->storage, copy->place, copy->count);
	if (copy->early) {
		take_back(queue, copy, -ETIMEDOUT);
		forget_unstored(queue, copy);
	} else if (!MUTANT(BSU_MUTANT_GIVE_UP_SILENTLY)) {
		copy_break(queue, copy, -ETIMEDOUT);
	}
	if (copy->state == BSU_COPY_BUFFER && bsu_pool_forget(queue->pool, &copy->task)) {
		bsu_storage_return(copy->image->storage, copy->place, copy->count);
		copy_end(queue, copy);
		return;
	}
	release_waiters(queue, copy);
}

void bsu_copies_tick(struct bsu_queue *queue, uint64_t now)
{
	struct bsu_copy *copy = queue->oldest, *newer;

	for (; copy && copy->limit <= now; copy = newer) {
		newer = copy->newer;
		if (!copy->given_up)
			give_up(queue, copy);
	}
}
