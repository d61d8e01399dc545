/* SPDX-License-Identifier: MIT */
/*
 * Storing what dead threads had released early. It is done on the storage ring
 * of a thread, as all storage I/O is: nobody sleeps in the kernel for a storage
 * that does not answer, so a death ends this process at once even then, and the
 * ring's lock tells when the last of it has landed.
 */
#include <errno.h>
#include <stdlib.h>

#include "thread.h"

struct store {
	struct bsu_io io;
	struct bsu_storing *storing;
};

struct bsu_storing {
	struct bsu_thread *thread;
	uint32_t unit;
	unsigned int count;
	_Atomic unsigned int left;
	_Atomic int error;
	struct store store[];
};

/* Calls @found for each unit; returns how many there are. */
static unsigned int each_unit(const struct bsu_storage *storage, const char *buffers, size_t bytes,
			      void (*found)(struct bsu_storing *storing, struct bsu_file *file, uint64_t offset, const void *data),
			      struct bsu_storing *storing)
{
	size_t part = bsu_thread_buffers_bytes(0), entries = bsu_pool_unstored_bytes(BSU_THREAD_POOL);
	unsigned int count = 0;
	struct bsu_file *file;
	uint64_t offset, at;
	const void *data;

	for (const char *end = buffers + bytes / part * part; buffers < end; buffers += part) {
		at = 0;
		while (bsu_storage_unstored(storage, buffers, buffers + entries, part - entries, &at, &file, &offset, &data)) {
			if (found)
				found(storing, file, offset, data);
			count++;
		}
	}
	return count;
}

static void store_done(struct bsu_io *io, int res)
{
	struct store *store = (struct store *)((char *)io - offsetof(struct store, io));
	struct bsu_storing *storing = store->storing;

	if (res == -EAGAIN || res == -EINTR || (res > 0 && (uint64_t)res < io->length)) {
		uint64_t done = res > 0 ? (uint64_t)res : 0;

		io->offset += done;
		io->length -= done;
		io->buf = (char *)io->buf + done;
		bsu_io_start(storing->thread, NULL, io);
		return;
	}
	if (res <= 0)
		atomic_store(&storing->error, res ? res : -EIO);
	atomic_fetch_sub(&storing->left, 1);
}

static void add(struct bsu_storing *storing, struct bsu_file *file, uint64_t offset, const void *data)
{
	struct store *store = &storing->store[storing->left++];

	store->storing = storing;
	store->io = (struct bsu_io) {
		.file = file,
		.offset = offset,
		.length = storing->unit,
		.buf = (void *)data,
		.op = BSU_OP_WRITE,
		.done = store_done,
	};
}

static int begin(struct bsu_thread *thread, void *arg)
{
	struct bsu_storing *storing = arg;

	for (unsigned int i = 0; i < storing->count; i++)
		bsu_io_start(thread, NULL, &storing->store[i].io);
	return 0;
}

struct bsu_storing *bsu_storing_start(struct bsu_thread *thread, const struct bsu_storage *storage, const void *buffers,
				      size_t bytes, int *err)
{
	/* Nobody changes what is counted here: its places are in quarantine. */
	unsigned int count = each_unit(storage, buffers, bytes, NULL, NULL);
	struct bsu_storing *storing = calloc(1, sizeof(*storing) + count * sizeof(storing->store[0]));

	*err = -ENOMEM;
	if (!storing)
		return NULL;
	storing->thread = thread;
	storing->count = count;
	storing->unit = bsu_storage_unit(storage);
	each_unit(storage, buffers, bytes, add, storing);
	*err = bsu_thread_call(thread, begin, storing);
	if (!*err)
		return storing;
	free(storing);
	return NULL;
}

int bsu_storing_result(const struct bsu_storing *storing)
{
	int error;

	if (atomic_load(&storing->left))
		return -EBUSY;
	error = atomic_load(&storing->error);
	return error == -EBUSY ? -EIO : error;
}

int bsu_storing_free(struct bsu_storing *storing)
{
	if (atomic_load(&storing->left))
		return -EBUSY;
	free(storing);
	return 0;
}
