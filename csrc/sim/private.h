/* SPDX-License-Identifier: MIT */
/* What the files of the simulator share. It looks into the core to watch it. */
#ifndef BSU_SIM_PRIVATE_H
#define BSU_SIM_PRIVATE_H

#include "../core/internal.h"
#include "sim.h"

#define MAX_FILES 1024
#define MAX_THREADS 16
#define MAX_QUEUES 1024

struct bsu_file {
	char *data;
	uint64_t bytes;
	uint32_t index;
};

struct sim_io {
	struct sim_io *next;
	struct bsu_io *io;
	uint64_t id;
	uint32_t queue;
	bool applied;
	bool reported;
};

struct sim_request {
	struct bsu_request rq;
	uint64_t id;
	char *data;
	int data_error;
	bool taken;
};

struct sim_thread {
	struct bsu_pool *pool;
	void *memory;			/* NULL: somebody else's */
};

struct sim_queue {
	struct bsu_sim *sim;
	struct bsu_queue *queue;
	struct sim_request *request;
	unsigned int depth;
	uint32_t index;
	bool woken;
	uint64_t later;			/* it is to be run then; 0: never */
};

struct sim_result {
	struct sim_result *next;
	struct bsu_sim_result result;
};

struct bsu_sim {
	struct bsu_file *file[MAX_FILES];
	unsigned int files;
	struct sim_thread thread[MAX_THREADS];
	unsigned int threads;
	struct sim_queue *queue[MAX_QUEUES];
	unsigned int queues;
	struct sim_io *first, *last;
	struct sim_result *result, *last_result;
	uint64_t next_id;
	uint64_t now;
	unsigned int notified;
	int data_error;
	char violation[160];
};

/* Keeps the first rule that was broken. */
void bsu_sim_violated(struct bsu_sim *sim, const char *what, uint32_t queue, uint64_t at);
/* The request that an I/O of a device's queue or an image's queue serves; NULL for a copy. */
struct sim_request *bsu_sim_request_of(const struct sim_queue *queue, struct bsu_io *io);

/*
 * What must hold at the moment the core submits @io, for @rq or, when that is
 * NULL, for a copy. NULL, or what is wrong.
 */
const char *bsu_watch_submit(const struct bsu_queue *queue, const struct bsu_io *io, const struct bsu_request *rq);

#endif
