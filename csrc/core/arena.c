/* SPDX-License-Identifier: MIT */
/*
 * Map memory: portions of zeroed pages, allocated ahead by the control side.
 * Pages become tables as they are, or are cut into leaves. Indices are stable
 * for ever; freed pieces are chained through their first word.
 */
#include <stdlib.h>
#include <string.h>

#include "arena.h"
#include "internal.h"

#define PORTION_PAGES (BSU_ARENA_PORTION / BSU_MAP_PAGE)
#define PAGE_LEAVES (BSU_MAP_PAGE / sizeof(struct bsu_leaf))

static struct bsu_leaf zero_leaf = { .slot = { [0 ... BSU_LEAF_UNITS - 1] = BSU_SLOT_ZERO } };

struct bsu_arena *bsu_arena_new(void)
{
	struct bsu_arena *arena = calloc(1, sizeof(*arena));

	if (arena)
		pthread_mutex_init(&arena->lock, NULL);
	return arena;
}

void bsu_arena_free(struct bsu_arena *arena)
{
	if (!arena)
		return;
	bsu_arena_end_adopted(arena);
	pthread_mutex_destroy(&arena->lock);
	free(arena);
}

void bsu_arena_end_adopted(struct bsu_arena *arena)
{
	free(arena->adopted.page);
	free(arena->adopted.leaf);
	arena->adopted = (struct bsu_arena_use) { 0 };
}

static int grow_bits(uint64_t **bits, size_t old, size_t words)
{
	uint64_t *grown = realloc(*bits, words * sizeof(*grown));

	if (!grown)
		return -ENOMEM;
	memset(grown + old, 0, (words - old) * sizeof(*grown));
	*bits = grown;
	return 0;
}

int bsu_arena_adopt(struct bsu_arena *arena, void *memory)
{
	uint32_t pages = arena->adopted.pages;
	int ret;

	if (arena->pages != pages)
		return -EBUSY;
	ret = grow_bits(&arena->adopted.page, pages / 64, (pages + PORTION_PAGES) / 64);
	if (!ret)
		ret = grow_bits(&arena->adopted.leaf, pages * PAGE_LEAVES / 64, (pages + PORTION_PAGES) * PAGE_LEAVES / 64);
	if (!ret)
		ret = bsu_arena_add(arena, memory);
	if (ret)
		return ret;
	pthread_mutex_lock(&arena->lock);
	arena->adopted.pages = arena->next_page = arena->pages;
	atomic_fetch_sub_explicit(&arena->free_bytes, BSU_ARENA_PORTION, memory_order_relaxed);
	pthread_mutex_unlock(&arena->lock);
	return 0;
}

void bsu_arena_use_nothing(struct bsu_arena *arena)
{
	if (!arena->adopted.pages)
		return;
	memset(arena->adopted.page, 0, arena->adopted.pages / 8);
	memset(arena->adopted.leaf, 0, arena->adopted.pages * PAGE_LEAVES / 8);
}

bool bsu_arena_is_adopted_table(const struct bsu_arena *arena, uint32_t index)
{
	return index && index - 1 < arena->adopted.pages;
}

bool bsu_arena_is_adopted_leaf(const struct bsu_arena *arena, uint32_t index)
{
	return index && index != BSU_LEAF_ZERO && (index - 1) / PAGE_LEAVES < arena->adopted.pages;
}

static bool test_and_set(uint64_t *bits, uint32_t at)
{
	bool was = bits[at / 64] >> (at % 64) & 1;

	bits[at / 64] |= 1ull << (at % 64);
	return was;
}

static bool any_leaf(const struct bsu_arena *arena, uint32_t page)
{
	return arena->adopted.leaf[page * PAGE_LEAVES / 64] >> (page * PAGE_LEAVES % 64) & ((1u << PAGE_LEAVES) - 1);
}

bool bsu_arena_use_table(struct bsu_arena *arena, uint32_t index)
{
	return test_and_set(arena->adopted.page, index - 1) || any_leaf(arena, index - 1);
}

/* A page is a table or has leaves, never both. */
bool bsu_arena_use_leaf(struct bsu_arena *arena, uint32_t index)
{
	uint32_t page = (index - 1) / PAGE_LEAVES;

	return test_and_set(arena->adopted.leaf, index - 1) || arena->adopted.page[page / 64] >> (page % 64) & 1;
}

/* Page @page of the adopted ones is free where no map uses it. */
void bsu_arena_free_unused(struct bsu_arena *arena, uint32_t page)
{
	bool leaves = any_leaf(arena, page);

	if (arena->adopted.page[page / 64] >> (page % 64) & 1)
		return;
	if (!leaves) {
		bsu_arena_put_table(arena, page + 1);
		return;
	}
	for (uint32_t leaf = page * PAGE_LEAVES; leaf < (page + 1) * PAGE_LEAVES; leaf++)
		if (!(arena->adopted.leaf[leaf / 64] >> (leaf % 64) & 1))
			bsu_arena_put_leaf(arena, leaf + 1);
}

int bsu_arena_add(struct bsu_arena *arena, void *memory)
{
	int ret = 0;

	pthread_mutex_lock(&arena->lock);
	if (arena->portions == BSU_ARENA_PORTIONS) {
		ret = -ENOSPC;
	} else {
		atomic_store_explicit(&arena->portion[arena->portions++], memory, memory_order_release);
		arena->pages += PORTION_PAGES;
		atomic_fetch_add_explicit(&arena->free_bytes, BSU_ARENA_PORTION, memory_order_relaxed);
	}
	pthread_mutex_unlock(&arena->lock);
	return ret;
}

size_t bsu_arena_free_bytes(const struct bsu_arena *arena)
{
	return atomic_load_explicit(&arena->free_bytes, memory_order_relaxed);
}

size_t bsu_arena_bytes(const struct bsu_arena *arena)
{
	return (size_t)arena->pages * BSU_MAP_PAGE;
}

static char *page_at(const struct bsu_arena *arena, uint32_t page)
{
	char *portion = atomic_load_explicit(&arena->portion[page / PORTION_PAGES], memory_order_acquire);

	return portion + (size_t)(page % PORTION_PAGES) * BSU_MAP_PAGE;
}

struct bsu_table *bsu_arena_table(const struct bsu_arena *arena, uint32_t index)
{
	return (struct bsu_table *)page_at(arena, index - 1);
}

struct bsu_leaf *bsu_arena_leaf(const struct bsu_arena *arena, uint32_t index)
{
	if (index == BSU_LEAF_ZERO)
		return &zero_leaf;
	return (struct bsu_leaf *)(page_at(arena, (index - 1) / PAGE_LEAVES)) + (index - 1) % PAGE_LEAVES;
}

/* arena.lock held; index of a zeroed page plus one, 0 when there is none. */
static uint32_t take_page(struct bsu_arena *arena)
{
	uint32_t index = arena->free_page;

	if (index) {
		uint32_t *page = (uint32_t *)page_at(arena, index - 1);

		arena->free_page = *page;
		memset(page, 0, BSU_MAP_PAGE);
		return index;
	}
	if (arena->next_page == arena->pages)
		return 0;
	return ++arena->next_page;
}

uint32_t bsu_arena_new_table(struct bsu_arena *arena)
{
	uint32_t index;

	pthread_mutex_lock(&arena->lock);
	index = take_page(arena);
	if (index)
		atomic_fetch_sub_explicit(&arena->free_bytes, BSU_MAP_PAGE, memory_order_relaxed);
	pthread_mutex_unlock(&arena->lock);
	return index;
}

uint32_t bsu_arena_new_leaf(struct bsu_arena *arena)
{
	uint32_t index;

	pthread_mutex_lock(&arena->lock);
	index = arena->free_leaf;
	if (index) {
		struct bsu_leaf *leaf = bsu_arena_leaf(arena, index);

		arena->free_leaf = *(uint32_t *)leaf;
		memset(leaf, 0, sizeof(*leaf));
		goto out;
	}
	if (!arena->leaves_left) {
		uint32_t page = take_page(arena);

		if (!page)
			goto out;
		arena->leaf_page = page - 1;
		arena->leaves_left = PAGE_LEAVES;
	}
	index = arena->leaf_page * PAGE_LEAVES + (uint32_t)(PAGE_LEAVES - arena->leaves_left) + 1;
	arena->leaves_left--;
out:
	if (index)
		atomic_fetch_sub_explicit(&arena->free_bytes, sizeof(struct bsu_leaf), memory_order_relaxed);
	pthread_mutex_unlock(&arena->lock);
	return index;
}

void bsu_arena_put_table(struct bsu_arena *arena, uint32_t index)
{
	pthread_mutex_lock(&arena->lock);
	*(uint32_t *)bsu_arena_table(arena, index) = arena->free_page;
	arena->free_page = index;
	atomic_fetch_add_explicit(&arena->free_bytes, BSU_MAP_PAGE, memory_order_relaxed);
	pthread_mutex_unlock(&arena->lock);
}

void bsu_arena_put_leaf(struct bsu_arena *arena, uint32_t index)
{
	if (index == BSU_LEAF_ZERO)
		return;
	pthread_mutex_lock(&arena->lock);
	*(uint32_t *)bsu_arena_leaf(arena, index) = arena->free_leaf;
	arena->free_leaf = index;
	atomic_fetch_add_explicit(&arena->free_bytes, sizeof(struct bsu_leaf), memory_order_relaxed);
	pthread_mutex_unlock(&arena->lock);
}
