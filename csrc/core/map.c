/* SPDX-License-Identifier: MIT */
/*
 * A two-level map: unit -> slot. Readers take no lock: tables and leaves are
 * zeroed before their index is stored with release, slots are stored with
 * release after the record and the data they stand for are complete. Nothing
 * that exists is moved or taken away while anybody may look.
 */
#include "arena.h"
#include "internal.h"

void bsu_map_init(struct bsu_map *map, struct bsu_arena *arena, void *directory, uint64_t entries)
{
	map->arena = arena;
	map->directory = directory;
	map->entries = entries;
	pthread_mutex_init(&map->lock, NULL);
}

/* A device may have grown since: what lies beyond the map is in none of its leaves. */
static struct bsu_table *table_of(const struct bsu_map *map, uint64_t unit)
{
	uint32_t index;

	if (unit / BSU_TABLE_UNITS >= map->entries)
		return NULL;
	index = atomic_load_explicit(&map->directory[unit / BSU_TABLE_UNITS], memory_order_acquire);
	return index ? bsu_arena_table(map->arena, index) : NULL;
}

static struct bsu_leaf *leaf_in(const struct bsu_map *map, struct bsu_table *table, uint64_t unit)
{
	uint64_t at = unit / BSU_LEAF_UNITS % BSU_TABLE_LEAVES;
	uint32_t index = atomic_load_explicit(&table->leaf[at], memory_order_acquire);

	return index ? bsu_arena_leaf(map->arena, index) : NULL;
}

uint32_t bsu_map_get(const struct bsu_map *map, uint64_t unit)
{
	struct bsu_table *table = table_of(map, unit);
	struct bsu_leaf *leaf = table ? leaf_in(map, table, unit) : NULL;

	return leaf ? atomic_load_explicit(&leaf->slot[unit % BSU_LEAF_UNITS], memory_order_acquire) : BSU_SLOT_EMPTY;
}

uint64_t bsu_map_absent(const struct bsu_map *map, uint64_t unit)
{
	struct bsu_table *table = table_of(map, unit);

	if (!table)
		return BSU_TABLE_UNITS - unit % BSU_TABLE_UNITS;
	if (!leaf_in(map, table, unit))
		return BSU_LEAF_UNITS - unit % BSU_LEAF_UNITS;
	return 0;
}

/* The entry of the leaf of @unit; NULL when map memory is used up. */
static _Atomic uint32_t *reserve_table(struct bsu_map *map, uint64_t unit)
{
	struct bsu_table *table = table_of(map, unit);
	uint32_t index;

	if (!table) {
		index = bsu_arena_new_table(map->arena);
		if (!index)
			return NULL;
		atomic_store_explicit(&map->directory[unit / BSU_TABLE_UNITS], index, memory_order_release);
		table = bsu_arena_table(map->arena, index);
	}
	return &table->leaf[unit / BSU_LEAF_UNITS % BSU_TABLE_LEAVES];
}

static int reserve_leaf(struct bsu_map *map, uint64_t unit)
{
	_Atomic uint32_t *leaf = reserve_table(map, unit);
	uint32_t index;

	if (!leaf)
		return -ENOMEM;
	if (!atomic_load_explicit(leaf, memory_order_relaxed)) {
		index = bsu_arena_new_leaf(map->arena);
		if (!index)
			return -ENOMEM;
		atomic_store_explicit(leaf, index, memory_order_release);
	}
	return 0;
}

int bsu_map_reserve(struct bsu_map *map, uint64_t first, uint64_t count)
{
	uint64_t end = first + count;
	int ret = 0;

	pthread_mutex_lock(&map->lock);
	for (uint64_t unit = first - first % BSU_LEAF_UNITS; unit < end && !ret; unit += BSU_LEAF_UNITS)
		ret = reserve_leaf(map, unit);
	pthread_mutex_unlock(&map->lock);
	return ret;
}

void bsu_map_publish(struct bsu_map *map, uint64_t unit, uint32_t slot)
{
	struct bsu_leaf *leaf = leaf_in(map, table_of(map, unit), unit);

	atomic_store_explicit(&leaf->slot[unit % BSU_LEAF_UNITS], slot, memory_order_release);
}

bool bsu_map_publish_first(struct bsu_map *map, uint64_t unit, uint32_t slot)
{
	struct bsu_leaf *leaf = leaf_in(map, table_of(map, unit), unit);
	uint32_t empty = BSU_SLOT_EMPTY;

	return atomic_compare_exchange_strong(&leaf->slot[unit % BSU_LEAF_UNITS], &empty, slot);
}

bool bsu_map_replace(struct bsu_map *map, uint64_t unit, uint32_t old, uint32_t slot)
{
	struct bsu_leaf *leaf = leaf_in(map, table_of(map, unit), unit);

	return atomic_compare_exchange_strong(&leaf->slot[unit % BSU_LEAF_UNITS], &old, slot);
}

int bsu_map_fill_zero(struct bsu_map *map, uint64_t first, uint64_t count, uint64_t *filled)
{
	uint64_t end = first + count, stop;

	for (uint64_t unit = first; unit < end; unit = stop) {
		_Atomic uint32_t *leaf = reserve_table(map, unit);

		stop = min_u64(end, (unit / BSU_LEAF_UNITS + 1) * BSU_LEAF_UNITS);
		if (!leaf)
			return -ENOMEM;
		if (stop - unit == BSU_LEAF_UNITS && !atomic_load_explicit(leaf, memory_order_relaxed)) {
			atomic_store_explicit(leaf, BSU_LEAF_ZERO, memory_order_release);
			*filled += BSU_LEAF_UNITS;
			continue;
		}
		if (reserve_leaf(map, unit))
			return -ENOMEM;
		if (atomic_load_explicit(leaf, memory_order_relaxed) == BSU_LEAF_ZERO)
			continue;
		for (; unit < stop; unit++)
			*filled += bsu_map_publish_first(map, unit, BSU_SLOT_ZERO);
	}
	return 0;
}
