/* SPDX-License-Identifier: MIT */
#include <errno.h>
#include <stdlib.h>
#include <time.h>

#include "local_load.h"

#define LIMIT_MS 60000

static uint64_t now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

struct request {
	int tag;
	uint64_t begun;
};

/* The oldest is waited for, then followed by the next. */
static int turn(const struct local_load *load, struct request *requests, uint64_t number)
{
	unsigned int slot = (unsigned int)(number % load->depth);
	struct request *request = &requests[slot];
	int ret;

	if (number >= load->depth) {
		ret = load->wait(load->local, request->tag, LIMIT_MS);
		if (ret < 0)
			return ret;
		if (load->ended)
			load->ended(load->arg, now_ns() - request->begun);
	}
	if (number >= load->requests)
		return 0;
	request->begun = load->ended ? now_ns() : 0;
	request->tag = load->submit(load->local, load->op, 0, load->place ? load->place(load->arg, number) : 0,
				    load->length, load->memory + slot * load->length);
	return request->tag < 0 ? request->tag : 0;
}

int local_load_run(const struct local_load *load)
{
	struct request *requests = calloc(load->depth, sizeof(*requests));
	int ret = requests ? 0 : -ENOMEM;

	for (uint64_t number = 0; !ret && number < load->requests + load->depth; number++)
		ret = turn(load, requests, number);
	free(requests);
	return ret;
}
