/* SPDX-License-Identifier: MIT */
/* Pieces of map memory. An index is never 0 for a piece that exists. */
#ifndef BSU_ARENA_H
#define BSU_ARENA_H

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
void bsu_arena_put_table(struct bsu_arena *arena, uint32_t index);
void bsu_arena_put_leaf(struct bsu_arena *arena, uint32_t index);

#endif
