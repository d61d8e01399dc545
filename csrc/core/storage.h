/* SPDX-License-Identifier: MIT */
/* Difference storage as the rest of the core knows it: places and their records, waiting for room and for a turn. */
#ifndef BSU_STORAGE_H
#define BSU_STORAGE_H

#include <pthread.h>
#include <stdatomic.h>

#include "core.h"
#include "state.h"
#include "task.h"

struct bsu_area {
	struct bsu_file *file;
	uint64_t offset;		/* bytes */
	uint32_t first;			/* place */
	uint32_t count;
	struct bsu_record *records;
	uint64_t *given;		/* bit set: the place is given out */
	uint32_t adopted;		/* places of it that a former process gave out … */
	uint64_t *kept;			/* … and which of them maps hold; NULL without a sweep */
};

struct bsu_storage {
	pthread_mutex_t lock;
	uint32_t unit;
	uint64_t number;
	_Atomic unsigned int unstored;	/* copies that were released early and are not stored */
	struct bsu_storage_state *state;
	uint32_t cursor;		/* place from which free ones are looked for */
	_Atomic unsigned int nr_areas;
	_Atomic int users;		/* images */
	_Atomic bool silent;		/* a write to it was given up, and none has ended since */
	_Atomic uint64_t wait_ns;	/* for room; 0: full is full */
	uint64_t low;			/* places; when less is free, control is told, once */
	bool low_told;
	_Atomic bool got_low;
	uint32_t adopted;		/* high-water mark of a former process */
	_Atomic bool quarantined;	/* more room comes when it is known what that one still writes */
	unsigned int freeing;		/* area and place that the end of quarantine has come to */
	uint32_t freed;
	struct bsu_tasks room_waiters;
	_Atomic uint64_t rate;		/* bytes/s of copies, 0: any */
	_Atomic uint64_t next_turn;	/* ns */
	struct bsu_area area[BSU_AREAS_MAX];
};

/* For whom places are: image writes leave some to copies. */
enum bsu_places_for {
	BSU_FOR_COPY,
	BSU_FOR_IMAGE_WRITE,
};

/* storage.lock held: places that may be given. */
uint64_t bsu_storage_room(const struct bsu_storage *storage, enum bsu_places_for whom);
/* Up to @want places in a row of one area. Returns how many, 0 when there are none. */
uint32_t bsu_storage_give(struct bsu_storage *storage, enum bsu_places_for whom, uint32_t want, uint32_t *first);
static inline void bsu_storage_answers(struct bsu_storage *storage)
{
	if (atomic_load_explicit(&storage->silent, memory_order_relaxed))
		atomic_store_explicit(&storage->silent, false, memory_order_relaxed);
}

/* Whether less than what was asked for was left since the last call. */
bool bsu_storage_got_low(struct bsu_storage *storage);
/* Places that nobody reads, writes or finds in a map any more. */
void bsu_storage_return(struct bsu_storage *storage, uint32_t first, uint32_t count);
/* What the record of a place in quarantine tells, which no map names: the place is given back at the end. */
void bsu_storage_forget(struct bsu_storage *storage, const struct bsu_area *area, uint32_t at);
const struct bsu_area *bsu_storage_area(const struct bsu_storage *storage, uint32_t place);
uint64_t bsu_storage_offset(const struct bsu_storage *storage, const struct bsu_area *area, uint32_t place);
void bsu_record_set(struct bsu_record *record, uint32_t serial, bool written, uint64_t unit, uint32_t data_crc);
/* Whether it was completed and not cleared since. */
bool bsu_record_is_whole(const struct bsu_record *record);
uint64_t bsu_record_unit(const struct bsu_record *record);
/* Also of places that do not exist. */
bool bsu_storage_is_given(struct bsu_storage *storage, uint32_t place);
/* Whether @data is what the record says was preserved for @unit. */
bool bsu_record_holds(const struct bsu_record *record, uint64_t unit, const void *data, uint32_t length);

/* ---- room.c: waiting for a storage ---- */

/* ns that a writer waits for room; 0: not at all. */
uint64_t bsu_room_limit(const struct bsu_storage *storage);
/* False when there is room, or nobody is to wait any more: look again. */
bool bsu_room_wait(struct bsu_storage *storage, enum bsu_places_for whom, struct bsu_task *task);
/* storage.lock held: all that wait look again. */
void bsu_room_changed(struct bsu_storage *storage);
/* The same for callers without the lock. */
void bsu_room_wake(struct bsu_storage *storage);
/* The tasks of one queue look again. */
void bsu_room_recall(struct bsu_storage *storage, struct bsu_queue *queue);
/* When the next copy may begin, in ns; 0: now. */
uint64_t bsu_turn(const struct bsu_storage *storage, struct bsu_queue *queue);
void bsu_turn_taken(struct bsu_storage *storage, struct bsu_queue *queue, uint64_t bytes);

#endif
