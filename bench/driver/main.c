/* SPDX-License-Identifier: MIT */
/* driver NAME=VALUE …: one run, its result as JSON. See struct options. */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "driver.h"

#define STEPS (1u << TIME_BITS)

static _Noreturn void end(const char *what, const char *why)
{
	fprintf(stderr, "driver: %s: %s\n", what, why);
	exit(1);
}

int must(int ret, const char *what)
{
	if (ret < 0)
		end(what, strerror(-ret));
	return ret;
}

void *new_memory(uint64_t bytes)
{
	void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);

	must(memory == MAP_FAILED ? -errno : 0, "memory");
	return memory;
}

static uint64_t clock_ns(clockid_t clock)
{
	struct timespec ts;

	clock_gettime(clock, &ts);
	return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

uint64_t now_ns(void)
{
	return clock_ns(CLOCK_MONOTONIC);
}

void result_begin(struct result *result)
{
	result->ns = now_ns();
	result->cpu_ns = clock_ns(CLOCK_PROCESS_CPUTIME_ID);
}

void result_end(struct result *result)
{
	result->ns = now_ns() - result->ns;
	result->cpu_ns = clock_ns(CLOCK_PROCESS_CPUTIME_ID) - result->cpu_ns;
}

/* Steps that can be undone, modulo a power of two: no two numbers meet. */
uint64_t place_of(const struct options *options, uint64_t number)
{
	uint64_t pieces = options->area / options->length, mask = pieces - 1;
	unsigned int half = (unsigned int)__builtin_ctzll(pieces) / 2 + 1;

	number &= mask;
	if (!options->in_order) {
		for (unsigned int i = 0; i < 2; i++) {
			number = number * 0x9e3779b97f4a7c15u & mask;
			number ^= number >> half;
		}
		number = number * 0xbf58476d1ce4e5b9u & mask;
	}
	return number * options->length;
}

void times_add(struct times *times, uint64_t ns)
{
	unsigned int power = 63 - (unsigned int)__builtin_clzll(ns | STEPS);

	if (ns < STEPS)
		times->count[ns]++;
	else
		times->count[power * STEPS + (ns >> (power - TIME_BITS)) % STEPS]++;
}

uint64_t times_percentile(const struct times *times, double share)
{
	uint64_t all = 0, seen = 0;

	for (unsigned int i = 0; i < 64 * STEPS; i++)
		all += times->count[i];
	for (unsigned int i = 0; i < 64 * STEPS; i++) {
		seen += times->count[i];
		if (times->count[i] && (double)seen >= share * (double)all)
			return i < STEPS ? i : (uint64_t)(STEPS + i % STEPS) << (i / STEPS - TIME_BITS);
	}
	return 0;
}

struct word {
	const char *name;
	int value;
};

static const struct word targets[] = {
	{ "null", TARGET_NULL }, { "device", TARGET_DEVICE }, { "image", TARGET_IMAGE },
	{ "python", TARGET_PYTHON }, { 0 },
};
static const struct word makers[] = {
	{ "queue", BY_QUEUE }, { "local", BY_LOCAL }, { "plain", BY_PLAIN }, { "serial", BY_SERIAL },
	{ "early", BY_EARLY }, { 0 },
};
static const struct word ops[] = { { "read", 0 }, { "write", 1 }, { 0 } };
static const struct word orders[] = { { "random", 0 }, { "sequential", 1 }, { 0 } };
static const struct word ways[] = { { "zero", 0 }, { "copy", 1 }, { 0 } };

static int word(const struct word *words, const char *name)
{
	for (; words->name; words++)
		if (!strcmp(words->name, name))
			return words->value;
	end(name, "no such word");
}

static uint64_t number(const char *text)
{
	char *rest;
	uint64_t value = strtoull(text, &rest, 10);

	if (!*text || *rest)
		end(text, "not a number");
	return value;
}

static void option(struct options *options, const char *text)
{
	const char *value = strchr(text, '=');
	size_t length = value ? (size_t)(value - text) : 0;

#define IS(name) (length == sizeof(name) - 1 && !memcmp(text, name, length))
	if (!value++)
		end(text, "NAME=VALUE is wanted");
	if (IS("origin"))
		options->origin = value;
	else if (IS("storage"))
		options->storage = value;
	else if (IS("area"))
		options->area = number(value);
	else if (IS("length"))
		options->length = (uint32_t)number(value);
	else if (IS("depth"))
		options->depth = (unsigned int)number(value);
	else if (IS("requests"))
		options->requests = number(value);
	else if (IS("held"))
		options->held = (unsigned int)number(value);
	else if (IS("filled"))
		options->filled = number(value);
	else if (IS("timed"))
		options->timed = number(value);
	else if (IS("cpu"))
		options->cpu = (int)number(value);
	else if (IS("target"))
		options->target = (enum target)word(targets, value);
	else if (IS("by"))
		options->by = (enum by)word(makers, value);
	else if (IS("op"))
		options->write = word(ops, value);
	else if (IS("order"))
		options->in_order = word(orders, value);
	else if (IS("way"))
		options->copy_way = word(ways, value);
	else
		end(text, "no such option");
#undef IS
}

static void check(const struct options *options)
{
	if (!options->length || options->area % options->length ||
	    __builtin_popcountll(options->area / options->length) != 1)
		end("area", "must be a power of two of requests");
	if (!options->depth || options->depth > 1024)
		end("depth", "must be 1 to 1024");
	if (options->target == TARGET_IMAGE && !options->held)
		end("target=image", "needs held=1 or more");
}

static void show(const struct options *options, const struct result *result)
{
	const struct bsu_queue_counters *counters = &result->counters;

	printf("{\"requests\": %" PRIu64 ", \"ns\": %" PRIu64 ", \"cpu_ns\": %" PRIu64 ", \"p50_ns\": %" PRIu64 ", \"p99_ns\": %" PRIu64,
	       options->requests, result->ns, result->cpu_ns, times_percentile(&result->times, 0.5),
	       times_percentile(&result->times, 0.99));
	printf(", \"copies\": %" PRIu64 ", \"copied\": %" PRIu64 ", \"waits\": %" PRIu64 ", \"rereads\": %" PRIu64 "}\n",
	       counters->copies, counters->copied, counters->waits, counters->rereads);
}

static void fill(struct disk *disk, const struct options *options)
{
	struct options all = *options;
	struct result ignored = { 0 };

	all.target = TARGET_DEVICE;
	all.write = all.in_order = true;
	all.timed = false;
	all.length = options->area < 131072 ? (uint32_t)options->area : 131072;
	all.requests = options->area / all.length;
	all.depth = 8;
	by_queue(disk, &all, &ignored);
}

int main(int argc, char **argv)
{
	struct options options = {
		.origin = "/dev/zero", .storage = "/dev/zero", .area = 1u << 30, .length = 4096, .depth = 1,
		.requests = 1000, .target = TARGET_DEVICE, .cpu = -1,
	};
	static struct result result;
	struct disk disk = { 0 };

	for (int i = 1; i < argc; i++)
		option(&options, argv[i]);
	check(&options);
	if (options.by >= BY_PLAIN) {
		without_engine(&options, &result);
	} else {
		disk_make(&disk, &options);
		disk_hold(&disk, &options);
		if (options.filled)
			fill(&disk, &options);
		count_from_here();
		if (options.by == BY_LOCAL)
			by_local(&disk, &options, &result);
		else
			by_queue(&disk, &options, &result);
		count_until_here();
	}
	show(&options, &result);
	return 0;
}
