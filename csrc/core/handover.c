/* SPDX-License-Identifier: MIT */
/*
 * Maps of images that go. Nothing is copied into the map of such an image any
 * more, so it does not change: what its older neighbour lacks is given to that
 * one, places and all, while everybody goes on reading through both. Only when
 * nobody looks at it any more is it taken apart.
 */
#include "arena.h"
#include "internal.h"

static struct bsu_table *table_at(const struct bsu_map *map, uint64_t entry)
{
	uint32_t index = atomic_load_explicit(&map->directory[entry], memory_order_acquire);

	return index ? bsu_arena_table(map->arena, index) : NULL;
}

static struct bsu_leaf *leaf_at(const struct bsu_map *map, const struct bsu_table *table, unsigned int at)
{
	uint32_t index = atomic_load_explicit(&table->leaf[at], memory_order_acquire);

	return index ? bsu_arena_leaf(map->arena, index) : NULL;
}

static uint32_t slot_at(const struct bsu_leaf *leaf, unsigned int at)
{
	return atomic_load_explicit(&leaf->slot[at], memory_order_acquire);
}

/* Zeroes in a map of what was preserved are exempt from that. */
static bool is_preserved(uint32_t slot)
{
	return slot != BSU_SLOT_EMPTY && slot != BSU_SLOT_ZERO;
}

static uint64_t count_slots(const struct bsu_leaf *leaf)
{
	uint64_t count = 0;

	for (unsigned int at = 0; at < BSU_LEAF_UNITS; at++)
		count += is_preserved(slot_at(leaf, at));
	return count;
}

static bool lacks(const struct bsu_leaf *leaf, unsigned int at)
{
	uint32_t slot = slot_at(leaf, at);

	return slot == BSU_SLOT_EMPTY || (MUTANT(BSU_MUTANT_EXEMPT_LOST) && slot == BSU_SLOT_ZERO);
}

static uint64_t count_lacking(const struct bsu_leaf *leaf, const struct bsu_leaf *older)
{
	uint64_t count = 0;

	for (unsigned int at = 0; at < BSU_LEAF_UNITS; at++)
		count += lacks(older, at) && is_preserved(slot_at(leaf, at));
	return count;
}

static uint64_t give_slots(const struct bsu_leaf *leaf, struct bsu_leaf *older)
{
	uint64_t count = 0;

	for (unsigned int at = 0; at < BSU_LEAF_UNITS; at++) {
		uint32_t slot = slot_at(leaf, at);

		if (slot == BSU_SLOT_EMPTY || !lacks(older, at))
			continue;
		atomic_store_explicit(&older->slot[at], slot, memory_order_release);
		count += is_preserved(slot);
	}
	return count;
}

static uint64_t give_leaves(const struct bsu_map *map, const struct bsu_table *table, struct bsu_table *older)
{
	uint64_t count = 0;

	for (unsigned int at = 0; at < BSU_TABLE_LEAVES; at++) {
		struct bsu_leaf *leaf = leaf_at(map, table, at);
		struct bsu_leaf *own = older ? leaf_at(map, older, at) : NULL;

		if (!leaf || (MUTANT(BSU_MUTANT_HAND_OVER_LESS) && at))
			continue;
		if (own) {
			count += give_slots(leaf, own);
			continue;
		}
		count += count_slots(leaf);
		if (older)
			atomic_store_explicit(&older->leaf[at], atomic_load_explicit(&table->leaf[at], memory_order_relaxed),
					      memory_order_release);
	}
	return count;
}

uint64_t bsu_map_hand_over(const struct bsu_map *map, struct bsu_map *older, uint64_t entry)
{
	struct bsu_table *table = table_at(map, entry);
	uint64_t count;

	/* An older image may be smaller; what lies beyond it nobody older needs. */
	if (!table || entry >= older->entries)
		return 0;
	/* Writers that add leaves to the older map wait for one entry at most. */
	pthread_mutex_lock(&older->lock);
	count = give_leaves(map, table, table_at(older, entry));
	if (!table_at(older, entry))
		atomic_store_explicit(&older->directory[entry],
				      atomic_load_explicit(&map->directory[entry], memory_order_relaxed), memory_order_release);
	pthread_mutex_unlock(&older->lock);
	return count;
}

static uint64_t count_given(const struct bsu_map *map, const struct bsu_map *older, const struct bsu_map *heir, uint64_t entry)
{
	const struct bsu_table *table = table_at(map, entry), *own, *common;
	uint64_t count = 0;

	if (!table || entry >= older->entries || entry >= heir->entries)
		return 0;
	own = table_at(older, entry);
	common = table_at(heir, entry);
	for (unsigned int at = 0; own && common && at < BSU_TABLE_LEAVES; at++) {
		const struct bsu_leaf *leaf = leaf_at(map, table, at), *mine = leaf_at(older, own, at);

		if (!leaf)
			continue;
		if (!mine)
			count += own == common ? count_slots(leaf) : 0;
		else if (mine == leaf_at(heir, common, at))
			count += count_lacking(leaf, mine);
	}
	return count;
}

void bsu_map_share(struct bsu_map *heir, const struct bsu_map *map, const struct bsu_map *older, uint64_t entry)
{
	pthread_mutex_lock(&heir->lock);
	heir->shared = count_given(map, older, heir, entry);
}

uint64_t bsu_map_shared(struct bsu_map *heir)
{
	uint64_t count = heir->shared;

	pthread_mutex_unlock(&heir->lock);
	return count;
}

static bool is_zero_leaf(const struct bsu_table *table, unsigned int at)
{
	return atomic_load_explicit(&table->leaf[at], memory_order_relaxed) == BSU_LEAF_ZERO;
}

static void prune_slots(struct bsu_leaf *leaf, const struct bsu_leaf *older)
{
	if (MUTANT(BSU_MUTANT_PLACE_UNDER_READER))
		return;
	for (unsigned int at = 0; at < BSU_LEAF_UNITS; at++)
		if (slot_at(leaf, at) == slot_at(older, at))
			atomic_store_explicit(&leaf->slot[at], BSU_SLOT_EMPTY, memory_order_relaxed);
}

void bsu_map_prune(struct bsu_map *map, const struct bsu_map *older, uint64_t entry)
{
	struct bsu_table *table = table_at(map, entry), *common;

	if (!table || entry >= older->entries)
		return;
	common = table_at(older, entry);
	if (table == common) {
		atomic_store_explicit(&map->directory[entry], 0, memory_order_relaxed);
		return;
	}
	for (unsigned int at = 0; at < BSU_TABLE_LEAVES; at++) {
		struct bsu_leaf *leaf = leaf_at(map, table, at);
		struct bsu_leaf *own = leaf_at(map, common, at);

		if (!leaf)
			continue;
		if (MUTANT(BSU_MUTANT_FREE_SHARED_LEAF) && leaf == own)
			continue;
		if (leaf == own || (is_zero_leaf(table, at) && !MUTANT(BSU_MUTANT_ZERO_LEAF_PRUNED)))
			atomic_store_explicit(&table->leaf[at], 0, memory_order_relaxed);
		else if (own)
			prune_slots(leaf, own);
	}
}

/* Places in a row go back together. */
static void clear_leaf(struct bsu_leaf *leaf, struct bsu_storage *storage)
{
	uint32_t first = 0, count = 0;

	for (unsigned int at = 0; at < BSU_LEAF_UNITS; at++) {
		uint32_t slot = slot_at(leaf, at);

		if (!bsu_slot_is_place(slot))
			continue;
		if (count && slot - 1 == first + count) {
			count++;
			continue;
		}
		if (count)
			bsu_storage_return(storage, first, count);
		first = slot - 1;
		count = 1;
	}
	if (count)
		bsu_storage_return(storage, first, count);
}

void bsu_map_clear(struct bsu_map *map, struct bsu_storage *storage, uint64_t entry)
{
	uint32_t index = atomic_exchange_explicit(&map->directory[entry], 0, memory_order_relaxed);
	struct bsu_table *table;

	if (!index)
		return;
	table = bsu_arena_table(map->arena, index);
	for (unsigned int at = 0; at < BSU_TABLE_LEAVES; at++) {
		uint32_t leaf = atomic_load_explicit(&table->leaf[at], memory_order_relaxed);

		if (!leaf)
			continue;
		clear_leaf(bsu_arena_leaf(map->arena, leaf), storage);
		bsu_arena_put_leaf(map->arena, leaf);
	}
	bsu_arena_put_table(map->arena, index);
}
