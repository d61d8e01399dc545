/* SPDX-License-Identifier: MIT */
/* Pieces of map memory. An index is never 0 for a piece that exists. */
#ifndef BSU_ARENA_H
#define BSU_ARENA_H

#include <stdbool.h>
#include <stdint.h>

struct bsu_arena;
struct bsu_leaf;
struct bsu_table;

struct bsu_table *bsu_arena_table(const struct bsu_arena *arena, uint32_t index);
/* BSU_LEAF_ZERO is one that all have in common, never to be written. */
struct bsu_leaf *bsu_arena_leaf(const struct bsu_arena *arena, uint32_t index);
/* Zeroed; 0 when map memory is used up. */
uint32_t bsu_arena_new_table(struct bsu_arena *arena);
uint32_t bsu_arena_new_leaf(struct bsu_arena *arena);
/*
 * Of portions that a former process used: what its maps hold is found by going
 * through them, and only then is the rest free. bsu_arena_use_*() return true
 * when the piece is in use by something else already.
 */
bool bsu_arena_is_adopted_table(const struct bsu_arena *arena, uint32_t index);
bool bsu_arena_is_adopted_leaf(const struct bsu_arena *arena, uint32_t index);
bool bsu_arena_use_table(struct bsu_arena *arena, uint32_t index);
bool bsu_arena_use_leaf(struct bsu_arena *arena, uint32_t index);
void bsu_arena_use_nothing(struct bsu_arena *arena);
void bsu_arena_free_unused(struct bsu_arena *arena, uint32_t page);
void bsu_arena_end_adopted(struct bsu_arena *arena);

void bsu_arena_put_table(struct bsu_arena *arena, uint32_t index);
void bsu_arena_put_leaf(struct bsu_arena *arena, uint32_t index);

#endif
