/* SPDX-License-Identifier: MIT */
/*
 * The same I/O without the engine, by the least code that does it: the floor
 * that a device sets, for one I/O a request and for a first overwrite.
 *
 *   plain    origin I/O
 *   serial   read origin -> write storage -> write origin
 *   early    read origin -> write origin
 *                       \-> write storage, which nobody waits for
 */
#include <errno.h>
#include <liburing.h>
#include <stdlib.h>

#include "driver.h"
#include "io/file.h"

enum step {
	READ = 0,
	STORE,
	WRITE,
	STORE_BESIDE,
	STEPS,
};

struct chain {
	struct chain *next;
	char *old;			/* what is preserved */
	char *buf;			/* what the request brings */
	uint64_t at, place, begun;
	unsigned int out;
	bool ended;
};

struct floor {
	const struct options *options;
	struct result *result;
	struct io_uring ring;
	struct bsu_file *origin, *storage;
	struct chain *free;		/* twice the depth: storage writes of ended requests are under way */
	struct chain *chains;
	uint64_t made, ended;
};

static void put(struct floor *floor, struct chain *chain, enum step step)
{
	struct io_uring_sqe *sqe = io_uring_get_sqe(&floor->ring);
	const struct options *options = floor->options;
	bool plain_write = options->by == BY_PLAIN && options->write;

	must(sqe ? 0 : -ENOSPC, "ring");
	if (step == STORE || step == STORE_BESIDE)
		io_uring_prep_write(sqe, floor->storage->fd, chain->old, options->length, chain->place);
	else if (step == WRITE || plain_write)
		io_uring_prep_write(sqe, floor->origin->fd, chain->buf, options->length, chain->at);
	else
		io_uring_prep_read(sqe, floor->origin->fd, chain->old, options->length, chain->at);
	sqe->user_data = (uint64_t)(chain - floor->chains) * STEPS + step;
	chain->out++;
}

static void make(struct floor *floor)
{
	const struct options *options = floor->options;

	while (floor->made < options->requests && floor->made - floor->ended < options->depth && floor->free) {
		struct chain *chain = floor->free;

		floor->free = chain->next;
		chain->ended = false;
		chain->place = floor->made % (options->area / options->length) * options->length;
		chain->at = place_of(options, floor->made++);
		chain->begun = options->timed ? now_ns() : 0;
		put(floor, chain, READ);
	}
}

static void request_ended(struct floor *floor, struct chain *chain)
{
	chain->ended = true;
	floor->ended++;
	if (floor->options->timed)
		times_add(&floor->result->times, now_ns() - chain->begun);
}

static void io_ended(struct floor *floor, const struct io_uring_cqe *cqe)
{
	struct chain *chain = &floor->chains[cqe->user_data / STEPS];
	enum step step = (enum step)(cqe->user_data % STEPS);
	enum by by = floor->options->by;

	must(cqe->res, "I/O");
	must((uint32_t)cqe->res == floor->options->length ? 0 : -EIO, "short I/O");
	chain->out--;
	if (step == READ && by == BY_SERIAL) {
		put(floor, chain, STORE);
	} else if (step == READ && by == BY_EARLY) {
		put(floor, chain, WRITE);
		put(floor, chain, STORE_BESIDE);
	} else if (step == STORE) {
		put(floor, chain, WRITE);
	} else if (step != STORE_BESIDE) {
		request_ended(floor, chain);
	}
	if (!chain->out && chain->ended) {
		chain->next = floor->free;
		floor->free = chain;
	}
}

void without_engine(const struct options *options, struct result *result)
{
	struct floor floor = { .options = options, .result = result };
	unsigned int chains = options->depth * 2;
	char *memory = new_memory((uint64_t)chains * 2 * options->length);
	unsigned int head, count, out = 0;
	struct io_uring_cqe *cqe;

	must(io_uring_queue_init(chains * 2, &floor.ring, IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN |
				 IORING_SETUP_COOP_TASKRUN), "ring");
	floor.origin = file_open(options->origin, false);
	floor.storage = options->by == BY_PLAIN ? NULL : file_open(options->storage, true);
	floor.chains = calloc(chains, sizeof(*floor.chains));
	must(floor.chains ? 0 : -ENOMEM, "memory");
	for (unsigned int i = 0; i < chains; i++) {
		floor.chains[i].old = memory + (uint64_t)i * 2 * options->length;
		floor.chains[i].buf = floor.chains[i].old + options->length;
		floor.chains[i].next = floor.free;
		floor.free = &floor.chains[i];
	}
	result_begin(result);
	/* The last storage writes belong to it. */
	for (make(&floor); floor.ended < options->requests || out; make(&floor)) {
		must(io_uring_submit_and_wait(&floor.ring, 1), "submit");
		count = 0;
		io_uring_for_each_cqe(&floor.ring, head, cqe) {
			io_ended(&floor, cqe);
			count++;
		}
		io_uring_cq_advance(&floor.ring, count);
		out = 0;
		for (unsigned int i = 0; i < chains; i++)
			out += floor.chains[i].out;
	}
	result_end(result);
	io_uring_queue_exit(&floor.ring);
}
