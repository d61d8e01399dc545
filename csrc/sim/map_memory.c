/* SPDX-License-Identifier: MIT */
/* What a test keeps from others: all pages of map memory but a few, or a map. */
#include <stdlib.h>

#include "../core/arena.h"
#include "private.h"

struct bsu_sim_held {
	struct bsu_arena *arena;
	unsigned int count;
	uint32_t page[];
};

struct bsu_sim_held *bsu_sim_hold_map(struct bsu_arena *arena, unsigned int leave)
{
	size_t pages = bsu_arena_bytes(arena) / BSU_MAP_PAGE;
	struct bsu_sim_held *held = calloc(1, sizeof(*held) + pages * sizeof(uint32_t));

	if (!held)
		return NULL;
	held->arena = arena;
	while (held->count < pages && (held->page[held->count] = bsu_arena_new_table(arena)))
		held->count++;
	for (; leave && held->count; leave--)
		bsu_arena_put_table(arena, held->page[--held->count]);
	return held;
}

unsigned int bsu_sim_give_map(struct bsu_sim_held *held, unsigned int pages)
{
	for (; pages && held->count; pages--)
		bsu_arena_put_table(held->arena, held->page[--held->count]);
	return held->count;
}

void bsu_sim_free_held(struct bsu_sim_held *held)
{
	if (held)
		bsu_sim_give_map(held, held->count);
	free(held);
}

void bsu_sim_lock_map(struct bsu_image *image)
{
	pthread_mutex_lock(&image->map.lock);
}

void bsu_sim_unlock_map(struct bsu_image *image)
{
	pthread_mutex_unlock(&image->map.lock);
}
