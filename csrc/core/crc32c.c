/* SPDX-License-Identifier: MIT */
/* CRC-32C (Castagnoli), by instruction where the processor has one. */
#include "core.h"

#define POLYNOMIAL 0x82f63b78u	/* reflected */

static uint32_t table[8][256];

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

__attribute__((target("sse4.2"))) static uint32_t by_instruction(uint32_t crc, const unsigned char *at, size_t length)
{
	uint64_t wide = crc;

	for (; length >= 8; at += 8, length -= 8) {
		uint64_t word;

		memcpy(&word, at, 8);
		wide = _mm_crc32_u64(wide, word);
	}
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
