/* SPDX-License-Identifier: MIT */
/*
 * Requests of one thread through the local transport. It is also a library of
 * its own, for processes that have the engine already: so the transport's
 * functions are given, and none is linked.
 */
#ifndef LOCAL_LOAD_H
#define LOCAL_LOAD_H

#include <stdbool.h>
#include <stdint.h>

struct bsu_local;

struct local_load {
	int (*submit)(struct bsu_local *local, uint8_t op, uint8_t flags, uint64_t start, uint64_t length, void *buf);
	int (*wait)(struct bsu_local *local, int tag, unsigned int timeout_ms);
	struct bsu_local *local;
	uint8_t op;
	unsigned int depth;
	uint64_t length;
	uint64_t requests;
	char *memory;			/* depth times length bytes */
	/* Where request @number goes to; NULL: the start. */
	uint64_t (*place)(const void *arg, uint64_t number);
	/* How long one has taken; NULL: not wanted. */
	void (*ended)(void *arg, uint64_t ns);
	void *arg;
};

/* Makes all requests, @depth at once. 0 or a negative errno. */
__attribute__((visibility("default"))) int local_load_run(const struct local_load *load);

#endif
