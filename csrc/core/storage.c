/* SPDX-License-Identifier: MIT */
/*
 * Difference storage: an ordered list of areas whose places are given out in
 * order, so that writes to it are sequential whatever the origin's workload
 * is. Areas are only ever added; looking one up takes no lock.
 */
#include <stdlib.h>

#include "internal.h"

#define UNIT_BITS 40
#define UNIT_MASK ((1ull << UNIT_BITS) - 1)

struct bsu_storage *bsu_storage_new(const struct bsu_storage_config *config, int *err)
{
	struct bsu_storage_state *state = config->state;
	struct bsu_storage *storage;

	*err = -EINVAL;
	if (!state || config->unit < 512 || config->unit & (config->unit - 1))
		return NULL;
	*err = -ENOMEM;
	storage = calloc(1, sizeof(*storage));
	if (!storage)
		return NULL;
	pthread_mutex_init(&storage->lock, NULL);
	storage->unit = config->unit;
	storage->state = state;
	state->magic = BSU_STORAGE_MAGIC;
	state->version = BSU_STATE_VERSION;
	state->unit = config->unit;
	*err = 0;
	return storage;
}

void bsu_storage_free(struct bsu_storage *storage)
{
	if (!storage)
		return;
	pthread_mutex_destroy(&storage->lock);
	free(storage);
}

size_t bsu_storage_records_bytes(const struct bsu_storage *storage, uint64_t length)
{
	size_t bytes = (size_t)(length / storage->unit) * sizeof(struct bsu_record);

	return (bytes + BSU_MAP_PAGE - 1) / BSU_MAP_PAGE * BSU_MAP_PAGE;
}

int bsu_storage_add_area(struct bsu_storage *storage, struct bsu_file *file, uint64_t offset, uint64_t length, void *records)
{
	uint64_t count = length / storage->unit, first;
	unsigned int at;
	int ret = 0;

	if (!count || !records)
		return -EINVAL;
	pthread_mutex_lock(&storage->lock);
	at = atomic_load_explicit(&storage->nr_areas, memory_order_relaxed);
	first = at ? (uint64_t)storage->area[at - 1].first + storage->area[at - 1].count : 0;
	if (at == BSU_AREAS_MAX || first + count > BSU_PLACES_MAX) {
		ret = -ENOSPC;
	} else {
		storage->area[at] = (struct bsu_area) {
			.file = file,
			.offset = offset,
			.first = (uint32_t)first,
			.count = (uint32_t)count,
			.records = records,
		};
		atomic_store_explicit(&storage->nr_areas, at + 1, memory_order_release);
		storage->state->areas = at + 1;
		atomic_store_explicit(&storage->state->capacity, first + count, memory_order_release);
	}
	pthread_mutex_unlock(&storage->lock);
	return ret;
}

uint64_t bsu_storage_capacity(const struct bsu_storage *storage)
{
	return atomic_load_explicit(&storage->state->capacity, memory_order_acquire) * storage->unit;
}

uint64_t bsu_storage_used(const struct bsu_storage *storage)
{
	return atomic_load_explicit(&storage->state->next_place, memory_order_acquire) * storage->unit;
}

uint64_t bsu_storage_area_used(const struct bsu_storage *storage, unsigned int area)
{
	uint64_t next = atomic_load_explicit(&storage->state->next_place, memory_order_acquire);

	if (area >= atomic_load_explicit(&storage->nr_areas, memory_order_acquire) || next <= storage->area[area].first)
		return 0;
	return min_u64(next - storage->area[area].first, storage->area[area].count) * storage->unit;
}

const struct bsu_area *bsu_storage_area(const struct bsu_storage *storage, uint32_t place)
{
	unsigned int low = 0, high = atomic_load_explicit(&storage->nr_areas, memory_order_acquire);

	while (high - low > 1) {
		unsigned int middle = (low + high) / 2;

		if (storage->area[middle].first <= place)
			low = middle;
		else
			high = middle;
	}
	return &storage->area[low];
}

uint64_t bsu_storage_offset(const struct bsu_storage *storage, const struct bsu_area *area, uint32_t place)
{
	return area->offset + (uint64_t)(place - area->first) * storage->unit;
}

uint32_t bsu_storage_give(struct bsu_storage *storage, uint32_t want, uint32_t *first)
{
	struct bsu_storage_state *state = storage->state;
	uint32_t count = 0;
	uint64_t next;

	pthread_mutex_lock(&storage->lock);
	next = atomic_load_explicit(&state->next_place, memory_order_relaxed);
	if (next < atomic_load_explicit(&state->capacity, memory_order_relaxed)) {
		const struct bsu_area *area = bsu_storage_area(storage, (uint32_t)next);

		count = (uint32_t)min_u64(want, area->first + (uint64_t)area->count - next);
		*first = (uint32_t)next;
		if (!(MUTANT(BSU_MUTANT_PLACE_TWICE) && next % 8 == 7))
			atomic_store_explicit(&state->next_place, next + count, memory_order_release);
	} else {
		atomic_store_explicit(&state->full, 1, memory_order_relaxed);
	}
	pthread_mutex_unlock(&storage->lock);
	return count;
}

void bsu_storage_return(struct bsu_storage *storage, uint32_t first, uint32_t count)
{
	struct bsu_storage_state *state = storage->state;

	pthread_mutex_lock(&storage->lock);
	if (atomic_load_explicit(&state->next_place, memory_order_relaxed) == (uint64_t)first + count)
		atomic_store_explicit(&state->next_place, first, memory_order_release);
	pthread_mutex_unlock(&storage->lock);
}

static uint32_t record_check(const struct bsu_record *record)
{
	return bsu_crc32c(0x42535531u, record, offsetof(struct bsu_record, check));
}

void bsu_record_set(struct bsu_record *record, uint32_t serial, uint64_t unit, uint32_t data_crc)
{
	record->owner = (uint64_t)serial << UNIT_BITS | (unit & UNIT_MASK);
	record->data_crc = data_crc;
	record->check = record_check(record);
}

bool bsu_record_holds(const struct bsu_record *record, uint64_t unit, const void *data, uint32_t length)
{
	if (MUTANT(BSU_MUTANT_NO_CRC))
		return true;
	return record->check == record_check(record) && (record->owner & UNIT_MASK) == (unit & UNIT_MASK) &&
	       record->data_crc == bsu_crc32c(0, data, length);
}
