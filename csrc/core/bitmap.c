/* SPDX-License-Identifier: MIT */
/*
 * Bit arrays shared with numpy: bit b is bit b % 64 of word b / 64. A bit that
 * is set already is not written again, so that hot blocks do not bounce
 * between processors.
 */
#include "internal.h"

static uint64_t word_mask(uint64_t word, uint64_t first, uint64_t last)
{
	uint64_t mask = ~0ull;

	if (word == first / 64)
		mask &= ~0ull << (first % 64);
	if (word == last / 64)
		mask &= ~0ull >> (63 - last % 64);
	return mask;
}

void bsu_bits_set(_Atomic uint64_t *bits, uint64_t first, uint64_t last)
{
	for (uint64_t word = first / 64; word <= last / 64; word++) {
		uint64_t mask = word_mask(word, first, last);

		if ((atomic_load_explicit(&bits[word], memory_order_relaxed) & mask) != mask)
			atomic_fetch_or_explicit(&bits[word], mask, memory_order_release);
	}
}

void bsu_bits_clear(_Atomic uint64_t *bits, uint64_t first, uint64_t last)
{
	for (uint64_t word = first / 64; word <= last / 64; word++) {
		uint64_t mask = word_mask(word, first, last);

		if (atomic_load_explicit(&bits[word], memory_order_relaxed) & mask)
			atomic_fetch_and_explicit(&bits[word], ~mask, memory_order_release);
	}
}

static uint64_t next_bit(const _Atomic uint64_t *bits, uint64_t from, uint64_t end, uint64_t flip)
{
	while (from < end) {
		uint64_t word = atomic_load_explicit(&bits[from / 64], memory_order_acquire) ^ flip;

		word &= ~0ull << (from % 64);
		if (word)
			return min_u64(from - from % 64 + (uint64_t)__builtin_ctzll(word), end);
		from += 64 - from % 64;
	}
	return end;
}

uint64_t bsu_bits_next(const _Atomic uint64_t *bits, uint64_t from, uint64_t end)
{
	return next_bit(bits, from, end, 0);
}

uint64_t bsu_bits_next_clear(const _Atomic uint64_t *bits, uint64_t from, uint64_t end)
{
	return next_bit(bits, from, end, ~0ull);
}
