/* SPDX-License-Identifier: MIT */
/*
 * Maps of a former process: before anybody looks a unit up in one, each table
 * and each leaf that it names must exist and be nobody else's.
 */
#include "arena.h"
#include "internal.h"

static uint32_t table_index(const struct bsu_map *map, uint64_t entry)
{
	return entry < map->entries ? atomic_load_explicit(&map->directory[entry], memory_order_relaxed) : 0;
}

static uint32_t leaf_index(const struct bsu_map *map, uint64_t entry, unsigned int at)
{
	uint32_t index = table_index(map, entry);

	return index ? atomic_load_explicit(&bsu_arena_table(map->arena, index)->leaf[at], memory_order_relaxed) : 0;
}

/* A map that was being handed over has tables and leaves in common with an older one, at the same place. */
static bool is_common_table(const struct bsu_chain *chain, uint64_t entry, uint32_t index)
{
	for (unsigned int k = 0; chain && k < chain->nr_images; k++)
		if (table_index(&chain->image[k]->map, entry) == index)
			return true;
	return false;
}

static bool is_common_leaf(const struct bsu_chain *chain, uint64_t entry, unsigned int at, uint32_t index)
{
	for (unsigned int k = 0; chain && k < chain->nr_images; k++)
		if (leaf_index(&chain->image[k]->map, entry, at) == index)
			return true;
	return false;
}

static int adopt_leaf(const struct bsu_map *map, const struct bsu_chain *chain, uint64_t entry, unsigned int at)
{
	uint32_t index = leaf_index(map, entry, at);

	if (!index || index == BSU_LEAF_ZERO)
		return 0;
	if (!bsu_arena_is_adopted_leaf(map->arena, index))
		return -EBADMSG;
	if (bsu_arena_use_leaf(map->arena, index) && !is_common_leaf(chain, entry, at, index))
		return -EBADMSG;
	return 0;
}

static int adopt_table(const struct bsu_map *map, const struct bsu_chain *chain, uint64_t entry)
{
	uint32_t index = table_index(map, entry);
	int ret = 0;

	if (!index)
		return 0;
	if (!bsu_arena_is_adopted_table(map->arena, index))
		return -EBADMSG;
	if (bsu_arena_use_table(map->arena, index))
		return is_common_table(chain, entry, index) ? 0 : -EBADMSG;
	for (unsigned int at = 0; at < BSU_TABLE_LEAVES && !ret; at++)
		ret = adopt_leaf(map, chain, entry, at);
	return ret;
}

int bsu_map_adopt(const struct bsu_map *map, const struct bsu_chain *chain)
{
	int ret = 0;

	for (uint64_t entry = 0; entry < map->entries && !ret; entry++)
		ret = adopt_table(map, chain, entry);
	return ret;
}
