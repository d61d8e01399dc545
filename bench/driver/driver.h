/* SPDX-License-Identifier: MIT */
/*
 * A program that lets requests go through the engine as a filtered device's or
 * an image's would, and tells how long they took. Python is not in it, so that
 * instructions and system calls can be counted.
 */
#ifndef DRIVER_H
#define DRIVER_H

#include <stdbool.h>
#include <stdint.h>

#include "io/io.h"

enum target {
	TARGET_NULL = 0,		/* a device without an origin */
	TARGET_DEVICE,
	TARGET_IMAGE,			/* the oldest one */
	TARGET_PYTHON,			/* what Python's side costs is not in it: C takes and commits */
};

enum by {
	BY_QUEUE = 0,			/* the queue's own thread makes the requests, as ublk would */
	BY_LOCAL,			/* another thread does, through the local transport */
	BY_PLAIN,			/* without the engine: the origin's own speed */
	BY_SERIAL,			/* read the origin, write the storage, write the origin */
	BY_EARLY,			/* read the origin, then write both; the request ends with the origin's */
};

struct options {
	const char *origin, *storage;	/* a file, a block device, or /dev/zero */
	uint64_t area;			/* bytes: requests go to the first so many */
	uint32_t length;		/* bytes of a request; area / length is a power of two */
	unsigned int depth;
	uint64_t requests;
	unsigned int held;		/* snapshots */
	enum target target;
	enum by by;
	bool write, in_order, copy_way;
	bool filled;			/* all of the area is overwritten before, under the snapshots */
	bool timed;			/* take the time of each request */
	int cpu;
};

#define TIME_BITS 6

/* Completion times, in steps of 1.6 % or less: two to the power of TIME_BITS for each power of two. */
struct times {
	uint64_t count[64 << TIME_BITS];
};

struct result {
	uint64_t ns, cpu_ns;		/* from begin to end; of all threads together */
	struct times times;
	struct bsu_queue_counters counters;
};

/* Which bytes request @number goes to: each piece of the area once, then again. */
uint64_t place_of(const struct options *options, uint64_t number);
uint64_t now_ns(void);
void result_begin(struct result *result);
void result_end(struct result *result);
void times_add(struct times *times, uint64_t ns);
uint64_t times_percentile(const struct times *times, double share);
/* Page-aligned zeroed memory, or the end of the program. */
void *new_memory(uint64_t bytes);
/* Ends the program with a message when @ret is negative; returns it otherwise. */
int must(int ret, const char *what);

/* ---- counted.c ---- */

/* Valgrind forgets what it has counted; strace sees a getppid(), nobody else makes one. */
void count_from_here(void);
void count_until_here(void);

/* ---- disk.c: what the requests go to ---- */

struct disk {
	struct bsu_thread *thread;
	struct bsu_file *origin, *store;
	struct bsu_device *device;
	struct bsu_image *oldest;
};

/* Neither is taken apart: the program ends. */
void disk_make(struct disk *disk, const struct options *options);
void disk_hold(struct disk *disk, const struct options *options);
struct bsu_file *file_open(const char *path, bool storage);

/* ---- who makes the requests ---- */

void by_queue(struct disk *disk, const struct options *options, struct result *result);
void by_local(struct disk *disk, const struct options *options, struct result *result);
void without_engine(const struct options *options, struct result *result);

#endif
