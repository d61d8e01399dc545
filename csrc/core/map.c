/* SPDX-License-Identifier: MIT */
/*
 * The two-level map of one image: unit -> slot. Readers take no lock: tables
 * and leaves are zeroed before their index is stored with release, slots are
 * stored with release after the record and the data they stand for are
 * complete. Nothing that exists is moved or taken away while the image lives.
 */
#include "arena.h"
#include "internal.h"

static struct bsu_table *table_of(const struct bsu_image *image, uint64_t unit)
{
	uint32_t index = atomic_load_explicit(&image->directory[unit / BSU_TABLE_UNITS], memory_order_acquire);

	return index ? bsu_arena_table(image->arena, index) : NULL;
}

static struct bsu_leaf *leaf_in(const struct bsu_image *image, struct bsu_table *table, uint64_t unit)
{
	uint64_t at = unit / BSU_LEAF_UNITS % BSU_TABLE_LEAVES;
	uint32_t index = atomic_load_explicit(&table->leaf[at], memory_order_acquire);

	return index ? bsu_arena_leaf(image->arena, index) : NULL;
}

uint32_t bsu_map_get(const struct bsu_image *image, uint64_t unit)
{
	struct bsu_table *table = table_of(image, unit);
	struct bsu_leaf *leaf = table ? leaf_in(image, table, unit) : NULL;

	return leaf ? atomic_load_explicit(&leaf->slot[unit % BSU_LEAF_UNITS], memory_order_acquire) : BSU_SLOT_EMPTY;
}

uint64_t bsu_map_absent(const struct bsu_image *image, uint64_t unit)
{
	struct bsu_table *table = table_of(image, unit);

	if (!table)
		return BSU_TABLE_UNITS - unit % BSU_TABLE_UNITS;
	if (!leaf_in(image, table, unit))
		return BSU_LEAF_UNITS - unit % BSU_LEAF_UNITS;
	return 0;
}

static int reserve_leaf(struct bsu_image *image, uint64_t unit)
{
	_Atomic uint32_t *entry = &image->directory[unit / BSU_TABLE_UNITS];
	struct bsu_table *table = table_of(image, unit);
	_Atomic uint32_t *leaf;
	uint32_t index;

	if (!table) {
		index = bsu_arena_new_table(image->arena);
		if (!index)
			return -ENOMEM;
		atomic_store_explicit(entry, index, memory_order_release);
		table = bsu_arena_table(image->arena, index);
	}
	leaf = &table->leaf[unit / BSU_LEAF_UNITS % BSU_TABLE_LEAVES];
	if (!atomic_load_explicit(leaf, memory_order_relaxed)) {
		index = bsu_arena_new_leaf(image->arena);
		if (!index)
			return -ENOMEM;
		atomic_store_explicit(leaf, index, memory_order_release);
	}
	return 0;
}

int bsu_map_reserve(struct bsu_image *image, uint64_t first, uint64_t count)
{
	uint64_t end = first + count;
	int ret = 0;

	pthread_mutex_lock(&image->map_lock);
	for (uint64_t unit = first - first % BSU_LEAF_UNITS; unit < end && !ret; unit += BSU_LEAF_UNITS)
		ret = reserve_leaf(image, unit);
	pthread_mutex_unlock(&image->map_lock);
	return ret;
}

void bsu_map_publish(struct bsu_image *image, uint64_t unit, uint32_t slot)
{
	struct bsu_leaf *leaf = leaf_in(image, table_of(image, unit), unit);

	atomic_store_explicit(&leaf->slot[unit % BSU_LEAF_UNITS], slot, memory_order_release);
}

void bsu_map_clear(struct bsu_image *image)
{
	for (uint64_t entry = 0; entry < image->state->directory_entries; entry++) {
		uint32_t index = atomic_exchange_explicit(&image->directory[entry], 0, memory_order_relaxed);
		struct bsu_table *table;

		if (!index)
			continue;
		table = bsu_arena_table(image->arena, index);
		for (unsigned int at = 0; at < BSU_TABLE_LEAVES; at++) {
			uint32_t leaf = atomic_load_explicit(&table->leaf[at], memory_order_relaxed);

			if (leaf)
				bsu_arena_put_leaf(image->arena, leaf);
		}
		bsu_arena_put_table(image->arena, index);
	}
}
