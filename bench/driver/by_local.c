/* SPDX-License-Identifier: MIT */
/* Requests of this thread, through the local transport to the queue's. */
#include "driver.h"
#include "local_load.h"

#define LIMIT_MS 60000

struct timed_places {
	const struct options *options;
	struct result *result;
};

static uint64_t place(const void *arg, uint64_t number)
{
	return place_of(((const struct timed_places *)arg)->options, number);
}

static void ended(void *arg, uint64_t ns)
{
	times_add(&((struct timed_places *)arg)->result->times, ns);
}

void by_local(struct disk *disk, const struct options *options, struct result *result)
{
	const struct bsu_local_config config = {
		.depth = options->depth,
		.zero_copy = !options->copy_way,
		.device = options->target == TARGET_IMAGE ? NULL : disk->device,
		.image = options->target == TARGET_IMAGE ? disk->oldest : NULL,
	};
	struct timed_places arg = { options, result };
	struct local_load load = {
		.submit = bsu_local_submit,
		.wait = bsu_local_wait,
		.op = options->write ? BSU_OP_WRITE : BSU_OP_READ,
		.depth = options->depth,
		.length = options->length,
		.requests = options->requests,
		.memory = new_memory((uint64_t)options->depth * options->length),
		.place = place,
		.ended = options->timed ? ended : NULL,
		.arg = &arg,
	};
	int err = 0;

	load.local = bsu_local_start(disk->thread, &config, &err);
	must(err, "local queue");
	result_begin(result);
	must(local_load_run(&load), "request");
	result_end(result);
	bsu_local_counters(load.local, &result->counters);
	must(bsu_local_finish(load.local, LIMIT_MS), "end");
}
