/* SPDX-License-Identifier: MIT */
/*
 * Who preserves which units at the moment: claims, hashed by storage and leaf.
 * They are private memory, all calls are made with device.lock held. Whoever
 * holds a claim waits for I/O only, never for another claim: a request first
 * ends its own copies and only then waits for somebody else's.
 */
#include "internal.h"

static struct bsu_claim **bucket(struct bsu_device *dev, const struct bsu_storage *storage, uint64_t leaf)
{
	uint64_t hash = leaf * 0x9e3779b97f4a7c15ull ^ (uintptr_t)storage >> 6;

	return &dev->claim[hash % BSU_CLAIM_BUCKETS];
}

uint64_t bsu_claimed(struct bsu_device *dev, const struct bsu_storage *storage, uint64_t leaf, uint64_t mask, struct bsu_claim **conflict)
{
	uint64_t claimed = 0;

	if (MUTANT(BSU_MUTANT_IGNORE_CLAIMS))
		return 0;
	for (struct bsu_claim *claim = *bucket(dev, storage, leaf); claim; claim = claim->next) {
		if (claim->storage != storage || claim->leaf != leaf || !(claim->mask & mask))
			continue;
		claimed |= claim->mask & mask;
		if (!*conflict)
			*conflict = claim;
	}
	return claimed;
}

void bsu_claim_add(struct bsu_device *dev, struct bsu_claim *claim)
{
	struct bsu_claim **at = bucket(dev, claim->storage, claim->leaf);

	claim->waiters = (struct bsu_tasks) { 0 };
	claim->next = *at;
	*at = claim;
}

void bsu_claim_wake(struct bsu_claim *claim, struct bsu_tasks *woken)
{
	struct bsu_task *task;

	while ((task = bsu_tasks_pop(&claim->waiters)))
		if (!MUTANT(BSU_MUTANT_LOSE_WAITER))
			bsu_tasks_push(woken, task);
}

void bsu_claim_remove(struct bsu_device *dev, struct bsu_claim *claim, struct bsu_tasks *woken)
{
	struct bsu_claim **at = bucket(dev, claim->storage, claim->leaf);

	while (*at != claim)
		at = &(*at)->next;
	*at = claim->next;
	bsu_claim_wake(claim, woken);
}

const struct bsu_copy *bsu_claim_copy(struct bsu_device *dev, const struct bsu_storage *storage, uint64_t unit, uint32_t slot)
{
	uint64_t leaf = unit / BSU_LEAF_UNITS;

	for (struct bsu_claim *claim = *bucket(dev, storage, leaf); claim; claim = claim->next)
		if (claim->early && claim->storage == storage && claim->leaf == leaf &&
		    claim->mask >> (unit % BSU_LEAF_UNITS) & 1 && slot - 1 == claim->early->place + (unit - claim->early->unit))
			return claim->early;
	return NULL;
}
