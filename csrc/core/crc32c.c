/* SPDX-License-Identifier: MIT */
/*
 * CRC-32C (Castagnoli), by instruction where the processor has one. It takes a
 * step each clock but has its result three later, so three streams run side by
 * side: they are joined by moving one over as many zero bytes as follow it.
 */
#include "core.h"

#define POLYNOMIAL 0x82f63b78u	/* reflected */

#define STREAM 1360u			/* bytes; three of them and a little are 4 KiB */

static uint32_t table[8][256];
static uint32_t over_one[4][256], over_two[4][256];	/* streams of zeroes */

static uint32_t after_zeroes(uint32_t crc, unsigned int bytes)
{
	while (bytes--)
		crc = crc >> 8 ^ table[0][crc & 0xff];
	return crc;
}

static void make_over(uint32_t over[4][256], unsigned int bytes)
{
	for (unsigned int part = 0; part < 4; part++)
		for (uint32_t bit = 1; bit < 256; bit <<= 1) {
			uint32_t moved = after_zeroes(bit << (8 * part), bytes);

			/* It is linear: each value is the sum of its bits. */
			for (uint32_t low = 0; low < bit; low++)
				over[part][bit + low] = moved ^ over[part][low];
		}
}

__attribute__((constructor)) static void make_table(void)
{
	for (uint32_t byte = 0; byte < 256; byte++) {
		uint32_t crc = byte;

		for (int bit = 0; bit < 8; bit++)
			crc = crc >> 1 ^ (crc & 1 ? POLYNOMIAL : 0);
		table[0][byte] = crc;
	}
	for (int slice = 1; slice < 8; slice++)
		for (int byte = 0; byte < 256; byte++)
			table[slice][byte] = table[slice - 1][byte] >> 8 ^ table[0][table[slice - 1][byte] & 0xff];
	make_over(over_one, STREAM);
	make_over(over_two, 2 * STREAM);
}

static uint32_t by_table(uint32_t crc, const unsigned char *at, size_t length)
{
	while (length >= 8) {
		uint32_t low = (uint32_t)at[0] | (uint32_t)at[1] << 8 | (uint32_t)at[2] << 16 | (uint32_t)at[3] << 24;

		low ^= crc;
		crc = table[7][low & 0xff] ^ table[6][low >> 8 & 0xff] ^ table[5][low >> 16 & 0xff] ^
		      table[4][low >> 24] ^ table[3][at[4]] ^ table[2][at[5]] ^ table[1][at[6]] ^ table[0][at[7]];
		at += 8;
		length -= 8;
	}
	while (length--)
		crc = crc >> 8 ^ table[0][(crc ^ *at++) & 0xff];
	return crc;
}

#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

static uint32_t move(uint32_t crc, uint32_t over[4][256])
{
	return over[0][crc & 0xff] ^ over[1][crc >> 8 & 0xff] ^ over[2][crc >> 16 & 0xff] ^ over[3][crc >> 24];
}

static uint64_t word_at(const unsigned char *at)
{
	uint64_t word;

	memcpy(&word, at, 8);
	return word;
}

__attribute__((target("sse4.2"))) static uint32_t by_streams(uint32_t crc, const unsigned char *at)
{
	uint64_t first = crc, second = 0, third = 0;

#pragma GCC unroll 5
	for (unsigned int i = 0; i < STREAM; i += 8) {
		first = _mm_crc32_u64(first, word_at(at + i));
		second = _mm_crc32_u64(second, word_at(at + STREAM + i));
		third = _mm_crc32_u64(third, word_at(at + 2 * STREAM + i));
	}
	return move((uint32_t)first, over_two) ^ move((uint32_t)second, over_one) ^ (uint32_t)third;
}

__attribute__((target("sse4.2"))) static uint32_t by_instruction(uint32_t crc, const unsigned char *at, size_t length)
{
	uint64_t wide;

	for (; length >= 3 * STREAM; at += 3 * STREAM, length -= 3 * STREAM)
		crc = by_streams(crc, at);
	wide = crc;
	for (; length >= 8; at += 8, length -= 8)
		wide = _mm_crc32_u64(wide, word_at(at));
	crc = (uint32_t)wide;
	while (length--)
		crc = _mm_crc32_u8(crc, *at++);
	return crc;
}

static bool has_instruction(void)
{
	return __builtin_cpu_supports("sse4.2");
}
#else
static uint32_t by_instruction(uint32_t crc, const unsigned char *at, size_t length)
{
	return by_table(crc, at, length);
}

static bool has_instruction(void)
{
	return false;
}
#endif

uint32_t bsu_crc32c(uint32_t crc, const void *data, size_t length)
{
	crc = ~crc;
	crc = has_instruction() ? by_instruction(crc, data, length) : by_table(crc, data, length);
	return ~crc;
}
