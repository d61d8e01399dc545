/* SPDX-License-Identifier: MIT */
/*
 * Difference storage: an ordered list of areas whose places are given out in
 * order, round and round, so that writes to it are sequential whatever the
 * origin's workload is. Areas are only ever added; looking one up takes no lock.
 * Which places are free is private memory: after a death all that were ever
 * given out are in quarantine, until it follows from the maps which are not.
 */
#include <stdlib.h>
#include <string.h>

#include "internal.h"

#define IMAGE_WRITE_SHARE 8	/* one part in so many is left to copies by image writes */
#define UNIT_MASK (BSU_OWNER_WRITTEN - 1)
#define QUARANTINE_SLICE (1u << 18)	/* places */

/* What a former process left; it is not trusted further than can be checked. */
static bool fits(const struct bsu_storage_state *state, uint32_t unit)
{
	return state->magic == BSU_STORAGE_MAGIC && state->version == BSU_STATE_VERSION && state->unit == unit;
}

static uint32_t high_water(const struct bsu_storage_state *state)
{
	uint64_t one = atomic_load(&state->high_water), again = atomic_load(&state->high_water_again);

	return (uint32_t)min_u64(max_u64(one, again), BSU_PLACES_MAX);
}

static void set_high_water(struct bsu_storage_state *state, uint64_t place)
{
	atomic_store_explicit(&state->high_water, place, memory_order_relaxed);
	atomic_store_explicit(&state->high_water_again, place, memory_order_relaxed);
}

static void adopt(struct bsu_storage *storage)
{
	struct bsu_storage_state *state = storage->state;

	storage->adopted = MUTANT(BSU_MUTANT_NO_QUARANTINE) ? 0 : high_water(state);
	storage->cursor = storage->adopted;
	state->areas = 0;
	atomic_store(&state->capacity, 0);
	atomic_store(&state->used, 0);
	memset(state->area_used, 0, sizeof(state->area_used));
	atomic_store(&storage->quarantined, storage->adopted != 0);
}

struct bsu_storage *bsu_storage_new(const struct bsu_storage_config *config, int *err)
{
	struct bsu_storage_state *state = config->state;
	struct bsu_storage *storage;

	*err = -EINVAL;
	if (!state || config->unit < 512 || config->unit & (config->unit - 1))
		return NULL;
	*err = -EBADMSG;
	if (config->adopt && !fits(state, config->unit))
		return NULL;
	*err = -ENOMEM;
	storage = calloc(1, sizeof(*storage));
	if (!storage)
		return NULL;
	pthread_mutex_init(&storage->lock, NULL);
	storage->unit = config->unit;
	storage->number = config->number;
	storage->state = state;
	state->magic = BSU_STORAGE_MAGIC;
	state->version = BSU_STATE_VERSION;
	state->unit = config->unit;
	atomic_store(&state->waiting, 0);
	if (config->adopt)
		adopt(storage);
	*err = 0;
	return storage;
}

void bsu_storage_free(struct bsu_storage *storage)
{
	if (!storage)
		return;
	for (unsigned int at = 0; at < atomic_load(&storage->nr_areas); at++) {
		free(storage->area[at].given);
		free(storage->area[at].kept);
	}
	pthread_mutex_destroy(&storage->lock);
	free(storage);
}

size_t bsu_storage_records_bytes(const struct bsu_storage *storage, uint64_t length)
{
	size_t bytes = (size_t)(length / storage->unit) * sizeof(struct bsu_record);

	return (bytes + BSU_MAP_PAGE - 1) / BSU_MAP_PAGE * BSU_MAP_PAGE;
}

size_t bsu_storage_state_bytes(void)
{
	return (sizeof(struct bsu_storage_state) + BSU_MAP_PAGE - 1) / BSU_MAP_PAGE * BSU_MAP_PAGE;
}

/* Places of a new area that a former process gave out. */
static uint32_t adopted_places(const struct bsu_storage *storage, uint64_t first, uint64_t count)
{
	return first < storage->adopted ? (uint32_t)min_u64(count, storage->adopted - first) : 0;
}

static void count_used(struct bsu_storage *storage, const struct bsu_area *area, int64_t places)
{
	struct bsu_storage_state *state = storage->state;

	atomic_fetch_add_explicit(&state->used, (uint64_t)places, memory_order_relaxed);
	atomic_fetch_add_explicit(&state->area_used[area - storage->area], (uint32_t)places, memory_order_release);
}

int bsu_storage_add_area(struct bsu_storage *storage, struct bsu_file *file, uint64_t offset, uint64_t length, void *records)
{
	uint64_t count = length / storage->unit, first;
	uint64_t *given;
	unsigned int at;
	int ret = 0;

	if (!count || !records)
		return -EINVAL;
	if (count > BSU_PLACES_MAX)
		return -ENOSPC;
	given = calloc((count + 63) / 64, sizeof(*given));
	if (!given)
		return -ENOMEM;
	pthread_mutex_lock(&storage->lock);
	at = atomic_load_explicit(&storage->nr_areas, memory_order_relaxed);
	first = at ? (uint64_t)storage->area[at - 1].first + storage->area[at - 1].count : 0;
	if (at == BSU_AREAS_MAX || first + count > BSU_PLACES_MAX) {
		ret = -ENOSPC;
		free(given);
	} else {
		storage->area[at] = (struct bsu_area) {
			.file = file,
			.offset = offset,
			.first = (uint32_t)first,
			.count = (uint32_t)count,
			.records = records,
			.given = given,
			.adopted = adopted_places(storage, first, count),
		};
		for (uint32_t place = 0; place < storage->area[at].adopted; place++)
			given[place / 64] |= 1ull << (place % 64);
		count_used(storage, &storage->area[at], storage->area[at].adopted);
		atomic_store_explicit(&storage->nr_areas, at + 1, memory_order_release);
		storage->state->areas = at + 1;
		atomic_store_explicit(&storage->state->capacity, first + count, memory_order_release);
		storage->low_told = false;
		bsu_room_changed(storage);
	}
	pthread_mutex_unlock(&storage->lock);
	return ret;
}

uint32_t bsu_storage_unit(const struct bsu_storage *storage)
{
	return storage->unit;
}

uint64_t bsu_storage_capacity(const struct bsu_storage *storage)
{
	return atomic_load_explicit(&storage->state->capacity, memory_order_acquire) * storage->unit;
}

uint64_t bsu_storage_used(const struct bsu_storage *storage)
{
	return atomic_load_explicit(&storage->state->used, memory_order_acquire) * storage->unit;
}

uint64_t bsu_storage_area_used(const struct bsu_storage *storage, unsigned int area)
{
	if (area >= BSU_AREAS_MAX)
		return 0;
	return (uint64_t)atomic_load_explicit(&storage->state->area_used[area], memory_order_acquire) * storage->unit;
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

/* First place at or after @from that is not given out; @end if there is none before it. */
static uint32_t next_free(const uint64_t *given, uint32_t from, uint32_t end)
{
	while (from < end) {
		uint64_t word = ~given[from / 64] >> (from % 64);

		if (word)
			return (uint32_t)min_u64(end, from + (unsigned int)__builtin_ctzll(word));
		from += 64 - from % 64;
	}
	return end;
}

static bool is_free(const struct bsu_area *area, uint32_t at)
{
	return !(area->given[at / 64] >> (at % 64) & 1);
}

/* storage.lock held, and a place is free: the first one from the cursor on. */
static struct bsu_area *find_free(struct bsu_storage *storage, uint32_t *at)
{
	unsigned int areas = atomic_load_explicit(&storage->nr_areas, memory_order_relaxed);
	unsigned int index = (unsigned int)(bsu_storage_area(storage, storage->cursor) - storage->area);
	uint32_t from = storage->cursor - storage->area[index].first;

	/* The area of the cursor comes twice: from it on, and at last before it. */
	for (unsigned int tried = 0; tried <= areas; tried++) {
		struct bsu_area *area = &storage->area[index];

		*at = next_free(area->given, from, area->count);
		if (*at < area->count)
			return area;
		index = (index + 1) % areas;
		from = 0;
	}
	return NULL;
}

/* storage.lock held. */
static uint32_t take_run(struct bsu_storage *storage, struct bsu_area *area, uint32_t at, uint32_t want)
{
	struct bsu_storage_state *state = storage->state;
	uint32_t count = 0, end = (uint32_t)min_u64(area->count, (uint64_t)at + want);

	while (at + count < end && is_free(area, at + count)) {
		if (!(MUTANT(BSU_MUTANT_PLACE_TWICE) && (at + count) % 8 == 7))
			area->given[(at + count) / 64] |= 1ull << ((at + count) % 64);
		count++;
	}
	storage->cursor = area->first + at + count - (MUTANT(BSU_MUTANT_PLACE_TWICE) && (at + count) % 8 == 0);
	if (atomic_load_explicit(&state->high_water, memory_order_relaxed) < (uint64_t)area->first + at + count)
		set_high_water(state, (uint64_t)area->first + at + count);
	count_used(storage, area, count);
	return count;
}

uint64_t bsu_storage_room(const struct bsu_storage *storage, enum bsu_places_for whom)
{
	const struct bsu_storage_state *state = storage->state;
	uint64_t capacity = atomic_load_explicit(&state->capacity, memory_order_relaxed);
	uint64_t unused = capacity - min_u64(capacity, atomic_load_explicit(&state->used, memory_order_relaxed));
	uint64_t kept = whom == BSU_FOR_IMAGE_WRITE ? (capacity + IMAGE_WRITE_SHARE - 1) / IMAGE_WRITE_SHARE : 0;

	return unused - min_u64(unused, kept);
}

uint32_t bsu_storage_give(struct bsu_storage *storage, enum bsu_places_for whom, uint32_t want, uint32_t *first)
{
	struct bsu_storage_state *state = storage->state;
	uint64_t room;
	struct bsu_area *area;
	uint32_t count = 0, at;

	pthread_mutex_lock(&storage->lock);
	room = bsu_storage_room(storage, whom);
	area = room ? find_free(storage, &at) : NULL;
	if (area) {
		count = take_run(storage, area, at, (uint32_t)min_u64(want, room));
		*first = area->first + at;
		if (bsu_storage_room(storage, BSU_FOR_COPY) < storage->low && !storage->low_told) {
			storage->low_told = true;
			atomic_store_explicit(&storage->got_low, true, memory_order_relaxed);
		}
	} else if (whom == BSU_FOR_COPY) {
		atomic_store_explicit(&state->full, 1, memory_order_relaxed);
	}
	pthread_mutex_unlock(&storage->lock);
	return count;
}

bool bsu_storage_got_low(struct bsu_storage *storage)
{
	if (MUTANT(BSU_MUTANT_LOW_NEVER_TOLD))
		return false;
	return atomic_load_explicit(&storage->got_low, memory_order_relaxed) && atomic_exchange(&storage->got_low, false);
}

/* storage.lock held: whether a former process may still write to the place. */
static bool in_quarantine(const struct bsu_storage *storage, const struct bsu_area *area, uint32_t at)
{
	if (!area->kept || at >= area->adopted || MUTANT(BSU_MUTANT_LATE_STORE_UNSEEN))
		return false;
	return area != &storage->area[storage->freeing] || at >= storage->freed;
}

/* storage.lock held: places [begin, end) of the area, counted from its first, are free. */
static void take_back(struct bsu_storage *storage, const struct bsu_area *area, uint32_t begin, uint32_t end)
{
	if (!MUTANT(BSU_MUTANT_KEEP_RECORDS))
		memset(&area->records[begin], 0, (size_t)(end - begin) * sizeof(struct bsu_record));
	for (uint32_t at = begin; at < end; at++)
		area->given[at / 64] &= ~(1ull << (at % 64));
	count_used(storage, area, -(int64_t)(end - begin));
}

/* storage.lock held: nobody has the place any more. */
static void give_back(struct bsu_storage *storage, const struct bsu_area *area, uint32_t at)
{
	if (in_quarantine(storage, area, at)) {
		memset(&area->records[at], 0, sizeof(struct bsu_record));
		area->kept[at / 64] &= ~(1ull << (at % 64));
	} else {
		take_back(storage, area, at, at + 1);
	}
}

void bsu_storage_return(struct bsu_storage *storage, uint32_t first, uint32_t count)
{
	pthread_mutex_lock(&storage->lock);
	/* Places in a row may lie in several areas. */
	while (count) {
		const struct bsu_area *area = bsu_storage_area(storage, first);
		uint32_t begin = first - area->first;
		uint32_t end = (uint32_t)min_u64(area->count, (uint64_t)begin + count);

		if (area->kept)
			for (uint32_t at = begin; at < end; at++)
				give_back(storage, area, at);
		else
			take_back(storage, area, begin, end);
		first += end - begin;
		count -= end - begin;
	}
	bsu_room_changed(storage);
	pthread_mutex_unlock(&storage->lock);
}

void bsu_storage_forget(struct bsu_storage *storage, const struct bsu_area *area, uint32_t at)
{
	pthread_mutex_lock(&storage->lock);
	memset(&area->records[at], 0, sizeof(struct bsu_record));
	pthread_mutex_unlock(&storage->lock);
}

static uint32_t record_check(const struct bsu_record *record)
{
	return bsu_crc32c(0x42535531u, record, offsetof(struct bsu_record, check));
}

void bsu_record_set(struct bsu_record *record, uint32_t serial, bool written, uint64_t unit, uint32_t data_crc)
{
	record->owner = (uint64_t)serial << BSU_OWNER_SERIAL_SHIFT | (written ? BSU_OWNER_WRITTEN : 0) | (unit & UNIT_MASK);
	record->data_crc = data_crc;
	record->check = record_check(record);
}

bool bsu_record_is_whole(const struct bsu_record *record)
{
	return record->owner && record->check == record_check(record);
}

uint64_t bsu_record_unit(const struct bsu_record *record)
{
	return record->owner & UNIT_MASK;
}

bool bsu_storage_is_given(struct bsu_storage *storage, uint32_t place)
{
	const struct bsu_area *area;
	bool given;

	if (place >= atomic_load_explicit(&storage->state->capacity, memory_order_acquire))
		return false;
	area = bsu_storage_area(storage, place);
	pthread_mutex_lock(&storage->lock);
	given = !is_free(area, place - area->first);
	pthread_mutex_unlock(&storage->lock);
	return given;
}

int bsu_storage_end_quarantine(struct bsu_storage *storage)
{
	unsigned int areas = atomic_load(&storage->nr_areas);
	uint32_t left = QUARANTINE_SLICE;

	pthread_mutex_lock(&storage->lock);
	while (left && storage->freeing < areas) {
		struct bsu_area *area = &storage->area[storage->freeing];
		uint32_t adopted = area->kept ? area->adopted : 0;
		uint32_t end = (uint32_t)min_u64(adopted, (uint64_t)storage->freed + left);

		left -= end - storage->freed;
		for (; storage->freed < end; storage->freed++)
			if (!(area->kept[storage->freed / 64] >> (storage->freed % 64) & 1))
				take_back(storage, area, storage->freed, storage->freed + 1);
		if (end == adopted) {
			free(area->kept);
			area->kept = NULL;
			storage->freeing++;
			storage->freed = 0;
		}
	}
	if (storage->freeing == areas)
		atomic_store(&storage->quarantined, false);
	bsu_room_changed(storage);
	pthread_mutex_unlock(&storage->lock);
	return storage->freeing < areas;
}

bool bsu_record_holds(const struct bsu_record *record, uint64_t unit, const void *data, uint32_t length)
{
	if (MUTANT(BSU_MUTANT_NO_CRC))
		return true;
	return record->check == record_check(record) && (record->owner & UNIT_MASK) == (unit & UNIT_MASK) &&
	       record->data_crc == bsu_crc32c(0, data, length);
}
