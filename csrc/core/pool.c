/* SPDX-License-Identifier: MIT */
/*
 * Buffer memory of one thread, in pages. It has two halves, one for what waits
 * for the origin only and one for what waits for the difference storage: a
 * storage that never answers must not keep buffers from the origin's requests.
 * In each half, whoever finds too little waits, first come, first served, so
 * that a large request is not starved by small ones. Memory is only ever held
 * across I/O, never across a wait for something else: so waiting always ends.
 *
 * A half has four regions. What an owner, say a storage, holds lies in three of
 * them at most (or is one piece), so that one which is silent leaves others a
 * region in one piece.
 */
#include <stdlib.h>

#include "internal.h"

#define OWNERS 64u		/* that are told apart; more are not limited */
#define REGIONS 4u

struct share {
	const void *owner;
	uint32_t pages;			/* 0: not in use */
	uint32_t in[REGIONS];
	uint32_t refused;		/* in that pass through the waiters */
};

struct half {
	char *memory;
	uint32_t pages;
	uint32_t used;
	uint32_t hint;			/* where the search begins */
	struct bsu_tasks waiters;
	uint32_t pass;
	uint64_t *map;			/* bit set: page is handed out */
	struct share share[OWNERS];
};

struct bsu_pool {
	struct half half[2];
	struct bsu_unstored *unstored;	/* for each page of the second half, or NULL */
	uint64_t map[];
};

size_t bsu_pool_unstored_bytes(size_t bytes)
{
	size_t entries = bytes / BSU_POOL_PAGE / 2 * sizeof(struct bsu_unstored);

	return (entries + BSU_POOL_PAGE - 1) / BSU_POOL_PAGE * BSU_POOL_PAGE;
}

struct bsu_pool *bsu_pool_new(void *memory, size_t bytes, void *unstored)
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
	pool->unstored = unstored;
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

/* The share of @owner, or one that is not in use; NULL when all are in use by others. */
static struct share *share_of(struct half *half, const void *owner)
{
	struct share *unused = NULL;

	for (unsigned int i = 0; i < OWNERS; i++) {
		struct share *share = &half->share[i];

		if (share->owner == owner)
			return share;
		if (!share->pages && !unused)
			unused = share;
		if (!share->owner)
			break;
	}
	return unused;
}

static uint32_t region_pages(const struct half *half)
{
	return (half->pages + REGIONS - 1) / REGIONS;
}

static unsigned int regions_in_use(const struct share *share)
{
	unsigned int count = 0;

	for (unsigned int region = 0; region < REGIONS; region++)
		count += share->in[region] != 0;
	return count;
}

/* Whether @share, which has something already, may have these pages too. */
static bool may_have(const struct half *half, const struct share *share, uint32_t first, uint32_t want)
{
	uint32_t from = first / region_pages(half), to = (first + want - 1) / region_pages(half);
	unsigned int count = regions_in_use(share);

	for (uint32_t region = from; region <= to; region++)
		count += !share->in[region];
	return count < REGIONS;
}

/*
 * First fit from @from on for @want pages that @share may have, NULL: any;
 * half->pages if there is none.
 */
static uint32_t find(const struct half *half, const struct share *share, uint32_t from, uint32_t want)
{
	bool full = share && regions_in_use(share) == REGIONS - 1;
	uint32_t size = region_pages(half), edge = from / size * size, run = 0;

	for (uint32_t page = from; page < half->pages; page++) {
		if (full && page >= edge) {
			bool other = !share->in[page / size];

			edge = (page / size + 1) * size;
			if (other) {
				page = edge - 1;
				run = 0;
				continue;
			}
		}
		if (page % 64 == 0 && half->map[page / 64] == ~0ull) {
			page += 63;
			run = 0;
			continue;
		}
		run = page_used(half, page) ? 0 : run + 1;
		if (run < want)
			continue;
		if (!share || may_have(half, share, page + 1 - want, want))
			return page + 1 - want;
		run = want - 1;
	}
	return half->pages;
}

static uint32_t find_any(const struct half *half, const struct share *share, uint32_t want)
{
	uint32_t at;

	if (want > half->pages - half->used)
		return half->pages;
	at = find(half, share, half->hint, want);
	return at == half->pages ? find(half, share, 0, want) : at;
}

static void count_pages(struct half *half, const void *owner, uint32_t first, uint32_t count, bool given)
{
	struct share *share = owner ? share_of(half, owner) : NULL;
	uint32_t size = region_pages(half), end = first + count;

	/* What was handed out when there was no share for it is not counted when it comes back. */
	if (!share || (!given && (share->owner != owner || !share->pages)))
		return;
	share->owner = owner;
	while (first < end) {
		uint32_t stop = (uint32_t)min_u64(end, (uint64_t)(first / size + 1) * size), pages = stop - first;
		uint32_t *in = &share->in[first / size];

		if (!given)
			pages = (uint32_t)min_u64(pages, *in);
		*in += given ? pages : -pages;
		share->pages += given ? pages : -pages;
		first = stop;
	}
}

/* The share that limits @owner; NULL: nothing does, or it has nothing yet. */
static const struct share *limit_of(struct half *half, const void *owner)
{
	const struct share *share = owner ? share_of(half, owner) : NULL;

	return share && share->owner == owner && share->pages && !MUTANT(BSU_MUTANT_ONE_TAKES_ALL) ? share : NULL;
}

static void *take(struct half *half, const void *owner, size_t bytes)
{
	uint32_t want = pages_of(bytes), at = find_any(half, limit_of(half, owner), want);

	if (at == half->pages)
		return NULL;
	for (uint32_t page = at; page < at + want; page++)
		half->map[page / 64] |= 1ull << (page % 64);
	half->used += want;
	half->hint = at + want < half->pages ? at + want : 0;
	count_pages(half, owner, at, want, true);
	return half->memory + (size_t)at * BSU_POOL_PAGE;
}

/* Whether a waiter lacks nothing but the right to take more. */
static bool has_its_share(struct half *half, const struct bsu_task *task)
{
	return task->owner && find_any(half, NULL, pages_of(task->want)) != half->pages;
}

/* Whether @task is the first of its owner in this pass: nobody overtakes within an owner. */
static bool first_of_owner(struct half *half, const struct bsu_task *task)
{
	struct share *share = task->owner ? share_of(half, task->owner) : NULL;

	if (!share || share->owner != task->owner)
		return true;
	if (share->refused == half->pass)
		return false;
	share->refused = half->pass;
	return true;
}

/* Whether somebody waits whom a later request must not overtake. */
static bool has_turn(struct half *half, const void *owner)
{
	half->pass++;
	for (const struct bsu_task *task = half->waiters.first; task; task = task->next)
		if (task->owner == owner || (first_of_owner(half, task) && !has_its_share(half, task)))
			return true;
	return false;
}

void *bsu_pool_get(struct bsu_pool *pool, enum bsu_pool_kind kind, const void *owner, size_t bytes, struct bsu_task *task)
{
	struct half *half = &pool->half[kind];
	void *memory = half->waiters.first && has_turn(half, owner) ? NULL : take(half, owner, bytes);

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
	struct share *share;

	half->pass++;
	for (task = half->waiters.first; task; task = next) {
		next = task->next;
		share = task->owner ? share_of(half, task->owner) : NULL;
		if (share && share->owner == task->owner && share->refused == half->pass)
			continue;
		task->grant = take(half, task->owner, task->want);
		if (task->grant) {
			bsu_tasks_remove(&half->waiters, task);
			bsu_task_ready(self, task);
			continue;
		}
		if (!has_its_share(half, task))
			break;
		if (share && share->owner == task->owner)
			share->refused = half->pass;
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
	count_pages(half, owner, at, count, false);
	grant_waiters(half, self);
}

struct bsu_unstored *bsu_pool_unstored(const struct bsu_pool *pool, const void *memory)
{
	const struct half *half = &pool->half[BSU_POOL_STORAGE];

	return pool->unstored ? &pool->unstored[(size_t)((const char *)memory - half->memory) / BSU_POOL_PAGE] : NULL;
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
