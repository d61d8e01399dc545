/* SPDX-License-Identifier: MIT */
/*
 * A scripted executor: the core on byte arrays, where the test decides when
 * each I/O takes effect, when it completes and with which result, and when a
 * queue that was woken runs. One thread, one clock that only moves when told to.
 */
#ifndef BSU_SIM_H
#define BSU_SIM_H

#include "../core/core.h"

struct bsu_sim;

/* An I/O the core has submitted. */
struct bsu_sim_io {
	uint64_t id;		/* never used again */
	uint64_t request;	/* it serves; 0 for a copy */
	uint64_t offset;
	uint64_t length;
	uint64_t unit;		/* of a copy or a write to an image: what it stores */
	uint32_t units;
	uint32_t file;		/* index of bsu_sim_add_file() */
	uint32_t queue;		/* index of bsu_sim_add_queue() */
	uint8_t op;
	uint8_t flags;
	uint8_t again;		/* goes on after a short count, or repeats */
	uint8_t pad;
};

struct bsu_sim_result {
	uint64_t id;		/* of the request */
	int32_t res;
	uint32_t queue;
	int32_t data_error;	/* of bsu_sim_fail_data(), if it was this request's */
	uint32_t pad;
};

struct bsu_sim *bsu_sim_new(void);
void bsu_sim_free(struct bsu_sim *sim);

/* A file of @bytes zeroes; its index. */
int bsu_sim_add_file(struct bsu_sim *sim, uint64_t bytes);
struct bsu_file *bsu_sim_file(struct bsu_sim *sim, unsigned int file);
void *bsu_sim_data(struct bsu_sim *sim, unsigned int file);

/*
 * A pool that queues share, as those of one thread do; its index. @unstored, @memory: see bsu_pool_new(); NULL, NULL:
 * nothing is released early.
 */
int bsu_sim_add_thread(struct bsu_sim *sim, size_t pool_bytes, void *unstored, void *memory);
size_t bsu_sim_pool_used(struct bsu_sim *sim, unsigned int thread);

/* A queue of @device or @image (the other NULL); its index. */
int bsu_sim_add_queue(struct bsu_sim *sim, unsigned int thread, struct bsu_device *device, struct bsu_image *image,
		      unsigned int depth, bool zero_copy);
/* -EBUSY while it is not idle. */
int bsu_sim_del_queue(struct bsu_sim *sim, unsigned int queue);
struct bsu_queue *bsu_sim_queue(struct bsu_sim *sim, unsigned int queue);

/*
 * Starts a request; @data (@length bytes for READ and WRITE) belongs to the
 * request until it is in bsu_sim_results(). Returns its id, -EBUSY when all
 * tags of the queue are taken.
 */
int64_t bsu_sim_request(struct bsu_sim *sim, unsigned int queue, uint8_t op, uint8_t flags, uint64_t start,
			uint64_t length, void *data);
/* Requests completed since the last call. */
unsigned int bsu_sim_results(struct bsu_sim *sim, struct bsu_sim_result *out, unsigned int max);

/* I/O submitted since the last call and not completed, oldest first. */
unsigned int bsu_sim_started(struct bsu_sim *sim, struct bsu_sim_io *out, unsigned int max);
/* The data of an I/O move now, its completion comes later. -ENOENT, -EALREADY. */
int bsu_sim_apply(struct bsu_sim *sim, uint64_t id);
/*
 * Completes an I/O. @res < 0: that error, data not moved unless applied before;
 * INT32_MAX: all of it; else a short count, of which the data move.
 */
int bsu_sim_complete(struct bsu_sim *sim, uint64_t id, int res);
/* Where the data of an outstanding READ or WRITE are or go to in memory; NULL for others. */
const void *bsu_sim_memory(struct bsu_sim *sim, uint64_t id);
/* The next copy of data to or from a request fails. */
void bsu_sim_fail_data(struct bsu_sim *sim, int err);

/* Whether a queue was woken; it runs only when told to. */
bool bsu_sim_woken(struct bsu_sim *sim, unsigned int queue);
void bsu_sim_run_queue(struct bsu_sim *sim, unsigned int queue);
/* All that were woken, until none is. */
void bsu_sim_run(struct bsu_sim *sim);
void bsu_sim_tick(struct bsu_sim *sim, uint64_t ns);
/* Moves the clock between two ticks: queues that asked for a time that has come are woken. */
void bsu_sim_pass(struct bsu_sim *sim, uint64_t ns);
/* ops->notify() calls since the last time asked. */
unsigned int bsu_sim_notified(struct bsu_sim *sim);

/* The first rule that the core broke, see watch.c; empty if none. */
const char *bsu_sim_violation(struct bsu_sim *sim);
/* What the map of the image has for @unit, see state.h; the same of what was written to it. */
uint32_t bsu_sim_slot(const struct bsu_image *image, uint64_t unit);
uint32_t bsu_sim_written_slot(const struct bsu_image *image, uint64_t unit);
/* Whether a place is given out at the moment. */
bool bsu_sim_place_used(const struct bsu_storage *storage, uint32_t place);
/*
 * The first unit from @from on for which the image, read at this moment, would
 * not give @expected (the whole device); -ENOENT when there is none.
 */
int64_t bsu_sim_first_wrong(const struct bsu_image *image, const void *expected, uint64_t from);

/* Keeps others from adding tables and leaves to the map of what was preserved, until it is unlocked. */
void bsu_sim_lock_map(struct bsu_image *image);
void bsu_sim_unlock_map(struct bsu_image *image);

/* Takes all free pages of map memory but @leave; until given back, they are gone. */
struct bsu_sim_held *bsu_sim_hold_map(struct bsu_arena *arena, unsigned int leave);
/* Gives pages back; how many are still held. */
unsigned int bsu_sim_give_map(struct bsu_sim_held *held, unsigned int pages);
void bsu_sim_free_held(struct bsu_sim_held *held);

/*
 * The process dies: its simulator with all queues, and one by one the rest of
 * what it had. Shared memory is not touched. Storages, arenas and sweeps are
 * freed as always: that does not touch it either.
 */
void bsu_sim_kill(struct bsu_sim *sim);
/* Puts what a dead process had released early at its place; so many units. See bsu_storage_unstored(). */
unsigned int bsu_sim_store_unstored(const struct bsu_storage *storage, const void *unstored, const void *buffers, size_t bytes);
void bsu_sim_kill_device(struct bsu_device *dev);
void bsu_sim_kill_image(struct bsu_image *image);
/* Puts back what a map had for @unit: a death before that was published. Then there is but the death. */
void bsu_sim_unpublish(struct bsu_image *image, bool written, uint64_t unit, uint32_t slot);

/* Whole pages. */
struct bsu_sim_region {
	void *memory;
	size_t bytes;
};

/*
 * This process ends with @status as soon as it is about to change some of these
 * for the @number-th time, from 0; no instruction is done by halves. It has one
 * thread. -ENOTSUP where the processor does not let a process count that.
 */
int bsu_sim_exit_at_change(const struct bsu_sim_region *memory, unsigned int count, uint64_t number, int status);

/* Seeded bugs: -ENOTSUP unless built with BSU_MUTANTS. */
int bsu_sim_set_mutant(int mutant);

#endif
