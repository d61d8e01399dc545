/* SPDX-License-Identifier: MIT */
/*
 * Buffer memory of one thread, in pages. It has two halves, one for what waits
 * for the origin only and one for what waits for the difference storage: a
 * storage that never answers must not keep buffers from the origin's requests.
 * In each half, whoever finds too little waits, first come, first served, so
 * that a large request is not starved by small ones. Memory is only ever held
 * across I/O, never across a wait for something else: so waiting always ends.
 *
 * An owner, say a storage, holds three quarters at most of what others leave, so
 * that one which is silent does not stop the rest.
 */
#include <stdlib.h>

#include "internal.h"

#define OWNERS 64u		/* that are told apart; more are not limited */

struct share {
	const void *owner;
	uint32_t pages;			/* 0: free entry */
};

struct half {
	char *memory;
	uint32_t pages;
	uint32_t used;
	uint32_t hint;			/* where the search begins */
	struct bsu_tasks waiters;
	uint64_t *map;			/* bit set: page is handed out */
	struct share share[OWNERS];
};

struct bsu_pool {
	struct half half[2];
	uint64_t map[];
};

struct bsu_pool *bsu_pool_new(void *memory, size_t bytes)
{
	size_t pages = bytes / BSU_POOL_PAGE / 2, words = (pages + 63) / 64;
	struct bsu_pool *pool;

	if (!pages || pages > UINT32_MAX || bytes % (2 * BSU_POOL_PAGE))
		return NULL;
	pool = calloc(1, sizeof(*pool) + 2 * words * sizeof(uint64_t));
	if (!pool)
		return NULL;
	for (unsigned int kind = 0; kind < 2; kind++)
		pool->half[kind] = (struct half) {
			.memory = (char *)memory + kind * pages * BSU_POOL_PAGE,
			.pages = (uint32_t)pages,
			.map = pool->map + kind * words,
		};
	return pool;
}

void bsu_pool_free(struct bsu_pool *pool)
{
	free(pool);
}

size_t bsu_pool_used(const struct bsu_pool *pool)
{
	return (size_t)(pool->half[0].used + pool->half[1].used) * BSU_POOL_PAGE;
}

size_t bsu_pool_largest(const struct bsu_pool *pool)
{
	return (size_t)pool->half[0].pages * BSU_POOL_PAGE;
}

static bool page_used(const struct half *half, uint32_t page)
{
	return half->map[page / 64] >> (page % 64) & 1;
}

static uint32_t pages_of(size_t bytes)
{
	return (uint32_t)((bytes + BSU_POOL_PAGE - 1) / BSU_POOL_PAGE);
}

/* First fit from @from on for @want pages; half->pages if there is none. */
static uint32_t find(const struct half *half, uint32_t from, uint32_t want)
{
	uint32_t run = 0;

	for (uint32_t page = from; page < half->pages; page++) {
		if (page % 64 == 0 && half->map[page / 64] == ~0ull) {
			page += 63;
			run = 0;
			continue;
		}
		run = page_used(half, page) ? 0 : run + 1;
		if (run == want)
			return page + 1 - want;
	}
	return half->pages;
}

static void *take(struct half *half, size_t bytes)
{
	uint32_t want = pages_of(bytes), at;

	if (want > half->pages - half->used)
		return NULL;
	at = find(half, half->hint, want);
	if (at == half->pages)
		at = find(half, 0, want);
	if (at == half->pages)
		return NULL;
	for (uint32_t page = at; page < at + want; page++)
		half->map[page / 64] |= 1ull << (page % 64);
	half->used += want;
	half->hint = at + want < half->pages ? at + want : 0;
	return half->memory + (size_t)at * BSU_POOL_PAGE;
}

/* The share of @owner, or a free one; NULL when all are in use by others. */
static struct share *share_of(struct half *half, const void *owner)
{
	struct share *unused = NULL;

	for (unsigned int i = 0; i < OWNERS; i++) {
		if (half->share[i].pages && half->share[i].owner == owner)
			return &half->share[i];
		if (!half->share[i].pages && !unused)
			unused = &half->share[i];
	}
	return unused;
}

static bool may_take(struct half *half, const void *owner, uint32_t want)
{
	const struct share *share = owner ? share_of(half, owner) : NULL;
	uint32_t others;

	if (!share || !share->pages || MUTANT(BSU_MUTANT_ONE_TAKES_ALL))
		return true;
	others = half->used - share->pages;
	return share->pages + want <= (half->pages - others) / 4 * 3;
}

static void count_pages(struct half *half, const void *owner, int64_t pages)
{
	struct share *share = owner ? share_of(half, owner) : NULL;

	/* What was handed out when there was no share for it is not counted when it comes back. */
	if (!share || (!share->pages && pages < 0))
		return;
	share->owner = owner;
	share->pages = pages < 0 && share->pages < -pages ? 0 : (uint32_t)(share->pages + pages);
}

/* Whether somebody waits whom a later request must not overtake. */
static bool has_turn(struct half *half, const void *owner)
{
	for (const struct bsu_task *task = half->waiters.first; task; task = task->next)
		if (task->owner == owner || may_take(half, task->owner, pages_of(task->want)))
			return true;
	return false;
}

static void *take_for(struct half *half, const void *owner, size_t bytes)
{
	void *memory = take(half, bytes);

	if (memory)
		count_pages(half, owner, pages_of(bytes));
	return memory;
}

void *bsu_pool_get(struct bsu_pool *pool, enum bsu_pool_kind kind, const void *owner, size_t bytes, struct bsu_task *task)
{
	struct half *half = &pool->half[kind];
	void *memory = NULL;

	if (may_take(half, owner, pages_of(bytes)) && !(half->waiters.first && has_turn(half, owner)))
		memory = take_for(half, owner, bytes);
	if (!memory) {
		task->want = bytes;
		task->owner = owner;
		task->grant = NULL;
		bsu_tasks_push(&half->waiters, task);
	}
	return memory;
}

static void grant_waiters(struct half *half, struct bsu_queue *self)
{
	struct bsu_task *task, *next;

	for (task = half->waiters.first; task; task = next) {
		next = task->next;
		if (!may_take(half, task->owner, pages_of(task->want)))
			continue;
		task->grant = take_for(half, task->owner, task->want);
		if (!task->grant)
			break;
		bsu_tasks_remove(&half->waiters, task);
		bsu_task_ready(self, task);
	}
}

static struct half *half_of(struct bsu_pool *pool, const void *memory)
{
	return &pool->half[(const char *)memory >= pool->half[1].memory];
}

void bsu_pool_put(struct bsu_pool *pool, struct bsu_queue *self, const void *owner, void *memory, size_t bytes)
{
	struct half *half = half_of(pool, memory);
	uint32_t at = (uint32_t)((size_t)((char *)memory - half->memory) / BSU_POOL_PAGE);
	uint32_t count = pages_of(bytes);

	for (uint32_t page = at; page < at + count; page++)
		half->map[page / 64] &= ~(1ull << (page % 64));
	half->used -= count;
	count_pages(half, owner, -(int64_t)count);
	grant_waiters(half, self);
}

bool bsu_pool_forget(struct bsu_pool *pool, struct bsu_task *task)
{
	for (unsigned int kind = 0; kind < 2; kind++) {
		struct half *half = &pool->half[kind];

		if (bsu_tasks_remove(&half->waiters, task)) {
			grant_waiters(half, NULL);
			return true;
		}
	}
	return false;
}
