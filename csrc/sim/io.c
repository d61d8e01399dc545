/* SPDX-License-Identifier: MIT */
/* The I/O that the core has submitted: shown to the test, moved and completed when it says so. */
#include <stdlib.h>
#include <string.h>

#include "private.h"

struct sim_request *bsu_sim_request_of(const struct sim_queue *queue, struct bsu_io *io)
{
	bool data = io->op == BSU_OP_READ || io->op == BSU_OP_WRITE;

	if (queue->queue->image || data)
		return (struct sim_request *)io->rq;
	return (struct sim_request *)container_of(io, struct bsu_request, io);
}

unsigned int bsu_sim_started(struct bsu_sim *sim, struct bsu_sim_io *out, unsigned int max)
{
	unsigned int count = 0;

	for (struct sim_io *entry = sim->first; entry && count < max; entry = entry->next) {
		struct bsu_io *io = entry->io;
		struct sim_request *request = bsu_sim_request_of(sim->queue[entry->queue], io);

		if (entry->reported)
			continue;
		entry->reported = true;
		out[count] = (struct bsu_sim_io) {
			.id = entry->id,
			.request = request ? request->id : 0,
			.offset = io->offset,
			.length = io->length,
			.file = io->file->index,
			.queue = entry->queue,
			.op = io->op,
			.flags = io->flags,
			.again = io->retries || io->length != io->total,
		};
		if (!request) {
			struct bsu_copy *copy = container_of(io, struct bsu_copy, io);

			out[count].unit = copy->unit;
			out[count].units = copy->count;
		} else if (sim->queue[entry->queue]->queue->image && io->op == BSU_OP_WRITE) {
			struct bsu_segment *segment = container_of(io, struct bsu_segment, io);

			out[count].unit = segment->start >> segment->queue->dev->unit_shift;
			out[count].units = segment->units;
		}
		count++;
	}
	return count;
}

static char *memory_of(const struct bsu_io *io)
{
	if (io->op != BSU_OP_READ && io->op != BSU_OP_WRITE)
		return NULL;
	return io->buf ? io->buf : ((struct sim_request *)io->rq)->data + io->rq_offset;
}

static void move_data(struct bsu_sim *sim, struct sim_io *entry, uint64_t length)
{
	struct bsu_io *io = entry->io;
	char *memory = memory_of(io), *at = io->file->data + io->offset;

	if (io->op == BSU_OP_FLUSH || entry->applied)
		return;
	if (io->offset > io->file->bytes || length > io->file->bytes - io->offset) {
		bsu_sim_violated(sim, "I/O beyond the end of a file", entry->queue, io->offset);
		return;
	}
	if (io->op == BSU_OP_READ)
		memcpy(memory, at, length);
	else if (io->op == BSU_OP_WRITE)
		memcpy(at, memory, length);
	else
		memset(at, 0, length);
}

static struct sim_io *find(struct bsu_sim *sim, uint64_t id)
{
	struct sim_io *entry = sim->first;

	while (entry && entry->id != id)
		entry = entry->next;
	return entry;
}

int bsu_sim_apply(struct bsu_sim *sim, uint64_t id)
{
	struct sim_io *entry = find(sim, id);

	if (!entry)
		return -ENOENT;
	if (entry->applied)
		return -EALREADY;
	move_data(sim, entry, entry->io->length);
	entry->applied = true;
	return 0;
}

const void *bsu_sim_memory(struct bsu_sim *sim, uint64_t id)
{
	struct sim_io *entry = find(sim, id);

	return entry ? memory_of(entry->io) : NULL;
}

static void unlink_io(struct bsu_sim *sim, struct sim_io *entry)
{
	struct sim_io *prev = NULL;

	for (struct sim_io *at = sim->first; at != entry; at = at->next)
		prev = at;
	if (prev)
		prev->next = entry->next;
	else
		sim->first = entry->next;
	if (sim->last == entry)
		sim->last = prev;
}

int bsu_sim_complete(struct bsu_sim *sim, uint64_t id, int res)
{
	struct sim_io *entry = find(sim, id);
	bool counts;

	if (!entry)
		return -ENOENT;
	counts = entry->io->op == BSU_OP_READ || entry->io->op == BSU_OP_WRITE;
	if (res == INT32_MAX || (res >= 0 && !counts)) {
		move_data(sim, entry, entry->io->length);
		res = counts ? (int)entry->io->length : 0;
	} else if (res > 0) {
		move_data(sim, entry, min_u64((uint64_t)res, entry->io->length));
	}
	unlink_io(sim, entry);
	bsu_queue_io_done(sim->queue[entry->queue]->queue, entry->io, res);
	free(entry);
	return 0;
}
