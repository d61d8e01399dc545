/* SPDX-License-Identifier: MIT */
/*
 * Waiting for a difference storage: for room where some may come, and for
 * one's turn where the rate is limited. Whoever waits holds nothing that
 * others could need. All that wait are woken when anything has changed, and
 * look again.
 */
#include "internal.h"

#define BURST_NS (NS_PER_S / 20)	/* of a limited rate that may be saved up */

void bsu_storage_set_room(struct bsu_storage *storage, uint64_t wait_ns, uint64_t low)
{
	pthread_mutex_lock(&storage->lock);
	atomic_store_explicit(&storage->wait_ns, wait_ns, memory_order_relaxed);
	storage->low = low / storage->unit;
	storage->low_told = false;
	bsu_room_changed(storage);
	pthread_mutex_unlock(&storage->lock);
}

void bsu_storage_set_rate(struct bsu_storage *storage, uint64_t bytes_per_s)
{
	pthread_mutex_lock(&storage->lock);
	/* What was begun at another rate is forgotten. */
	if (atomic_exchange(&storage->rate, bytes_per_s) != bytes_per_s)
		atomic_store_explicit(&storage->next_turn, 0, memory_order_relaxed);
	pthread_mutex_unlock(&storage->lock);
}

uint64_t bsu_room_limit(const struct bsu_storage *storage)
{
	uint64_t wait = atomic_load_explicit(&storage->wait_ns, memory_order_relaxed);

	/* After a death, room comes with the end of quarantine. */
	return atomic_load_explicit(&storage->quarantined, memory_order_relaxed) ? max_u64(wait, BSU_QUARANTINE_WAIT_NS) : wait;
}

void bsu_room_changed(struct bsu_storage *storage)
{
	struct bsu_task *task;

	atomic_store_explicit(&storage->state->waiting, 0, memory_order_relaxed);
	while ((task = bsu_tasks_pop(&storage->room_waiters)))
		if (!MUTANT(BSU_MUTANT_LOSE_ROOM_WAITER))
			bsu_task_ready(NULL, task);
}

void bsu_room_wake(struct bsu_storage *storage)
{
	if (!atomic_load_explicit(&storage->state->waiting, memory_order_relaxed))
		return;
	pthread_mutex_lock(&storage->lock);
	bsu_room_changed(storage);
	pthread_mutex_unlock(&storage->lock);
}

bool bsu_room_wait(struct bsu_storage *storage, enum bsu_places_for whom, struct bsu_task *task)
{
	struct bsu_storage_state *state = storage->state;
	bool waits;

	pthread_mutex_lock(&storage->lock);
	waits = bsu_room_limit(storage) && !bsu_storage_room(storage, whom);
	if (waits) {
		bsu_tasks_push(&storage->room_waiters, task);
		atomic_fetch_add_explicit(&state->waiting, 1, memory_order_relaxed);
	}
	pthread_mutex_unlock(&storage->lock);
	return waits;
}

void bsu_room_recall(struct bsu_storage *storage, struct bsu_queue *queue)
{
	struct bsu_tasks others = { 0 };
	struct bsu_task *task;

	if (!atomic_load_explicit(&storage->state->waiting, memory_order_relaxed))
		return;
	pthread_mutex_lock(&storage->lock);
	while ((task = bsu_tasks_pop(&storage->room_waiters))) {
		if (task->queue == queue) {
			atomic_fetch_sub_explicit(&storage->state->waiting, 1, memory_order_relaxed);
			bsu_task_ready(queue, task);
		} else {
			bsu_tasks_push(&others, task);
		}
	}
	storage->room_waiters = others;
	pthread_mutex_unlock(&storage->lock);
}

static bool waits_for(struct bsu_storage *storage, const struct bsu_device *dev)
{
	bool found = false;

	pthread_mutex_lock(&storage->lock);
	for (const struct bsu_task *task = storage->room_waiters.first; task && !found; task = task->next)
		found = task->queue->dev == dev && !task->queue->image;
	pthread_mutex_unlock(&storage->lock);
	return found;
}

bool bsu_device_waits_for_room(struct bsu_device *dev)
{
	const struct bsu_view *view = atomic_load(&dev->view);

	for (unsigned int c = 0; view && c < view->nr_chains; c++)
		if (waits_for(view->chain[c].storage, dev))
			return true;
	return false;
}

/* Turns are points of time: each copy moves the next one by what it takes. */
uint64_t bsu_turn(const struct bsu_storage *storage, struct bsu_queue *queue)
{
	uint64_t next;

	if (!atomic_load_explicit(&storage->rate, memory_order_relaxed) || MUTANT(BSU_MUTANT_TURN_IGNORED))
		return 0;
	next = atomic_load_explicit(&storage->next_turn, memory_order_relaxed);
	return next > bsu_now(queue) ? next : 0;
}

void bsu_turn_taken(struct bsu_storage *storage, struct bsu_queue *queue, uint64_t bytes)
{
	uint64_t rate = atomic_load_explicit(&storage->rate, memory_order_relaxed);
	uint64_t next, now;

	if (!rate)
		return;
	now = bsu_now(queue);
	pthread_mutex_lock(&storage->lock);
	next = max_u64(atomic_load_explicit(&storage->next_turn, memory_order_relaxed), now > BURST_NS ? now - BURST_NS : 0);
	atomic_store_explicit(&storage->next_turn, next + bytes * NS_PER_S / rate, memory_order_relaxed);
	pthread_mutex_unlock(&storage->lock);
}
