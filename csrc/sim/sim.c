/* SPDX-License-Identifier: MIT */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "private.h"

void bsu_sim_violated(struct bsu_sim *sim, const char *what, uint32_t queue, uint64_t at)
{
	if (!*sim->violation)
		snprintf(sim->violation, sizeof(sim->violation), "%s (queue %u, byte or tag %llu)", what, queue,
			 (unsigned long long)at);
}

static void sim_submit(void *ctx, struct bsu_io *io)
{
	struct sim_queue *queue = ctx;
	struct bsu_sim *sim = queue->sim;
	struct sim_request *request = bsu_sim_request_of(queue, io);
	const char *wrong = bsu_watch_submit(queue->queue, io, request ? &request->rq : NULL);
	struct sim_io *entry = calloc(1, sizeof(*entry));

	if (!entry)
		abort();
	if (wrong)
		bsu_sim_violated(sim, wrong, queue->index, io->offset);
	entry->io = io;
	entry->id = ++sim->next_id;
	entry->queue = queue->index;
	if (sim->last)
		sim->last->next = entry;
	else
		sim->first = entry;
	sim->last = entry;
}

static void sim_complete(void *ctx, struct bsu_request *rq, int res)
{
	struct sim_queue *queue = ctx;
	struct bsu_sim *sim = queue->sim;
	struct sim_request *request = (struct sim_request *)rq;
	struct sim_result *result = calloc(1, sizeof(*result));

	if (!result)
		abort();
	if (!request->taken)
		bsu_sim_violated(sim, "a request was completed twice", queue->index, rq->tag);
	result->result = (struct bsu_sim_result) {
		.id = request->id,
		.res = res,
		.queue = queue->index,
		.data_error = request->data_error,
	};
	request->taken = false;
	if (sim->last_result)
		sim->last_result->next = result;
	else
		sim->result = result;
	sim->last_result = result;
}

static int data_error(struct sim_queue *queue, struct sim_request *request)
{
	int ret = queue->sim->data_error;

	queue->sim->data_error = 0;
	if (ret)
		request->data_error = ret;
	return ret;
}

static int sim_copy_from(void *ctx, struct bsu_request *rq, uint64_t offset, void *to, size_t length)
{
	struct sim_request *request = (struct sim_request *)rq;
	int ret = data_error(ctx, request);

	if (!ret)
		memcpy(to, request->data + offset, length);
	return ret;
}

static int sim_copy_to(void *ctx, struct bsu_request *rq, uint64_t offset, const void *from, size_t length)
{
	struct sim_request *request = (struct sim_request *)rq;
	int ret = data_error(ctx, request);

	if (!ret)
		memcpy(request->data + offset, from, length);
	return ret;
}

static void sim_wake(void *ctx)
{
	((struct sim_queue *)ctx)->woken = true;
}

static void sim_notify(void *ctx)
{
	((struct sim_queue *)ctx)->sim->notified++;
}

static void sim_later(void *ctx, uint64_t when)
{
	struct sim_queue *queue = ctx;

	if (!queue->later || when < queue->later)
		queue->later = when;
}

static uint64_t sim_now(void *ctx)
{
	return ((struct sim_queue *)ctx)->sim->now;
}

static const struct bsu_queue_ops sim_ops = {
	.submit = sim_submit,
	.complete = sim_complete,
	.copy_from_request = sim_copy_from,
	.copy_to_request = sim_copy_to,
	.wake = sim_wake,
	.notify = sim_notify,
	.now = sim_now,
	.later = sim_later,
};

struct bsu_sim *bsu_sim_new(void)
{
	struct bsu_sim *sim = calloc(1, sizeof(*sim));

	if (sim)
		sim->now = 1;
	return sim;
}

static void free_queue(struct sim_queue *queue)
{
	free(queue->request);
	free(queue);
}

void bsu_sim_free(struct bsu_sim *sim)
{
	struct sim_result *result;
	struct sim_io *entry;

	if (!sim)
		return;
	while ((entry = sim->first)) {
		sim->first = entry->next;
		free(entry);
	}
	while ((result = sim->result)) {
		sim->result = result->next;
		free(result);
	}
	for (unsigned int i = 0; i < sim->queues; i++)
		if (sim->queue[i])
			free_queue(sim->queue[i]);
	for (unsigned int i = 0; i < sim->threads; i++) {
		bsu_pool_free(sim->thread[i].pool);
		free(sim->thread[i].memory);
	}
	for (unsigned int i = 0; i < sim->files; i++) {
		free(sim->file[i]->data);
		free(sim->file[i]);
	}
	free(sim);
}

int bsu_sim_add_file(struct bsu_sim *sim, uint64_t bytes)
{
	struct bsu_file *file;

	if (sim->files == MAX_FILES)
		return -ENOSPC;
	file = calloc(1, sizeof(*file));
	if (!file)
		return -ENOMEM;
	file->data = calloc(1, bytes);
	if (!file->data) {
		free(file);
		return -ENOMEM;
	}
	file->bytes = bytes;
	file->index = sim->files;
	sim->file[sim->files] = file;
	return (int)sim->files++;
}

struct bsu_file *bsu_sim_file(struct bsu_sim *sim, unsigned int file)
{
	return file < sim->files ? sim->file[file] : NULL;
}

void *bsu_sim_data(struct bsu_sim *sim, unsigned int file)
{
	return file < sim->files ? sim->file[file]->data : NULL;
}

int bsu_sim_add_thread(struct bsu_sim *sim, size_t pool_bytes, void *unstored, void *memory)
{
	struct sim_thread *thread = &sim->thread[sim->threads];

	if (sim->threads == MAX_THREADS)
		return -ENOSPC;
	thread->memory = memory ? NULL : aligned_alloc(BSU_POOL_PAGE, pool_bytes);
	if (!memory)
		memory = thread->memory;
	thread->pool = memory ? bsu_pool_new(memory, pool_bytes, unstored) : NULL;
	if (!thread->pool) {
		free(thread->memory);
		return -EINVAL;
	}
	return (int)sim->threads++;
}

size_t bsu_sim_pool_used(struct bsu_sim *sim, unsigned int thread)
{
	return thread < sim->threads ? bsu_pool_used(sim->thread[thread].pool) : 0;
}

int bsu_sim_add_queue(struct bsu_sim *sim, unsigned int thread, struct bsu_device *device, struct bsu_image *image,
		      unsigned int depth, bool zero_copy)
{
	struct bsu_queue_config config = {
		.device = device, .image = image, .ops = &sim_ops, .depth = depth, .zero_copy = zero_copy,
	};
	struct sim_queue *queue;
	int err = -ENOMEM;

	if (sim->queues == MAX_QUEUES || thread >= sim->threads)
		return -ENOSPC;
	queue = calloc(1, sizeof(*queue));
	if (!queue)
		return -ENOMEM;
	queue->sim = sim;
	queue->index = sim->queues;
	queue->depth = depth;
	queue->request = calloc(depth, sizeof(*queue->request));
	if (!queue->request)
		goto err;
	config.pool = sim->thread[thread].pool;
	config.ctx = queue;
	queue->queue = bsu_queue_new(&config, &err);
	if (!queue->queue)
		goto err;
	sim->queue[sim->queues] = queue;
	return (int)sim->queues++;
err:
	free_queue(queue);
	return err;
}

int bsu_sim_del_queue(struct bsu_sim *sim, unsigned int index)
{
	int ret;

	if (index >= sim->queues || !sim->queue[index])
		return -ENOENT;
	ret = bsu_queue_free(sim->queue[index]->queue);
	if (ret)
		return ret;
	free_queue(sim->queue[index]);
	sim->queue[index] = NULL;
	return 0;
}

struct bsu_queue *bsu_sim_queue(struct bsu_sim *sim, unsigned int queue)
{
	return queue < sim->queues && sim->queue[queue] ? sim->queue[queue]->queue : NULL;
}

int64_t bsu_sim_request(struct bsu_sim *sim, unsigned int index, uint8_t op, uint8_t flags, uint64_t start,
			uint64_t length, void *data)
{
	struct sim_queue *queue = index < sim->queues ? sim->queue[index] : NULL;
	struct sim_request *request = NULL;
	uint64_t id;

	if (!queue)
		return -ENOENT;
	for (unsigned int tag = 0; tag < queue->depth && !request; tag++)
		if (!queue->request[tag].taken)
			request = &queue->request[tag];
	if (!request)
		return -EBUSY;
	id = ++sim->next_id;
	request->id = id;
	request->data = data;
	request->data_error = 0;
	request->taken = true;
	request->rq = (struct bsu_request) {
		.start = start,
		.length = length,
		.tag = (uint32_t)(request - queue->request),
		.op = op,
		.flags = flags,
	};
	bsu_queue_request(queue->queue, &request->rq);
	return (int64_t)id;
}

unsigned int bsu_sim_results(struct bsu_sim *sim, struct bsu_sim_result *out, unsigned int max)
{
	unsigned int count = 0;

	while (count < max && sim->result) {
		struct sim_result *result = sim->result;

		out[count++] = result->result;
		sim->result = result->next;
		if (!sim->result)
			sim->last_result = NULL;
		free(result);
	}
	return count;
}

bool bsu_sim_woken(struct bsu_sim *sim, unsigned int queue)
{
	return queue < sim->queues && sim->queue[queue] && sim->queue[queue]->woken;
}

void bsu_sim_run_queue(struct bsu_sim *sim, unsigned int queue)
{
	if (!bsu_sim_woken(sim, queue))
		return;
	sim->queue[queue]->woken = false;
	bsu_queue_run(sim->queue[queue]->queue);
}

void bsu_sim_run(struct bsu_sim *sim)
{
	bool again = true;

	while (again) {
		again = false;
		for (unsigned int i = 0; i < sim->queues; i++) {
			again = again || bsu_sim_woken(sim, i);
			bsu_sim_run_queue(sim, i);
		}
	}
}

void bsu_sim_pass(struct bsu_sim *sim, uint64_t ns)
{
	sim->now += ns;
	for (unsigned int i = 0; i < sim->queues; i++) {
		struct sim_queue *queue = sim->queue[i];

		if (!queue || !queue->later || queue->later > sim->now)
			continue;
		queue->later = 0;
		queue->woken = true;
	}
}

void bsu_sim_tick(struct bsu_sim *sim, uint64_t ns)
{
	bsu_sim_pass(sim, ns);
	for (unsigned int i = 0; i < sim->queues; i++)
		if (sim->queue[i])
			bsu_queue_tick(sim->queue[i]->queue);
}

unsigned int bsu_sim_notified(struct bsu_sim *sim)
{
	unsigned int notified = sim->notified;

	sim->notified = 0;
	return notified;
}

void bsu_sim_fail_data(struct bsu_sim *sim, int err)
{
	sim->data_error = err;
}

const char *bsu_sim_violation(struct bsu_sim *sim)
{
	return sim->violation;
}

int bsu_sim_set_mutant(int mutant)
{
#ifdef BSU_MUTANTS
	bsu_mutant = mutant;
	return 0;
#else
	return mutant ? -ENOTSUP : 0;
#endif
}
