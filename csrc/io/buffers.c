/* SPDX-License-Identifier: MIT */
/*
 * Memory of a thread's pool. Its second half, from which the difference storage
 * is written, may lie in a file that outlives the process:
 *
 *   file:    entries (struct bsu_unstored) | second half
 *   memory:  first half, anonymous | second half
 */
#include <errno.h>
#include <sys/mman.h>

#include "thread.h"

size_t bsu_thread_buffers_bytes(size_t pool_bytes)
{
	if (!pool_bytes)
		pool_bytes = BSU_THREAD_POOL;
	return bsu_pool_unstored_bytes(pool_bytes) + pool_bytes / 2;
}

static int map_shared(struct bsu_thread *thread)
{
	size_t half = thread->config.pool_bytes / 2, entries = bsu_pool_unstored_bytes(thread->config.pool_bytes);
	off_t offset = (off_t)thread->config.buffers_offset;
	int fd = thread->config.buffers_fd, flags = MAP_SHARED | MAP_POPULATE;
	void *unstored;

	unstored = mmap(NULL, entries, PROT_READ | PROT_WRITE, flags, fd, offset);
	if (unstored == MAP_FAILED)
		return -errno;
	/* One range of addresses, so that the rings know it as one buffer. */
	if (mmap((char *)thread->memory + half, half, PROT_READ | PROT_WRITE, flags | MAP_FIXED, fd,
		 offset + (off_t)entries) == MAP_FAILED) {
		int ret = -errno;

		munmap(unstored, entries);
		return ret;
	}
	thread->unstored = unstored;
	return 0;
}

int bsu_thread_map_memory(struct bsu_thread *thread)
{
	int ret;

	thread->memory = mmap(NULL, thread->config.pool_bytes, PROT_READ | PROT_WRITE,
			      MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	if (thread->memory == MAP_FAILED)
		return -ENOMEM;
	if (thread->config.buffers_fd < 0)
		return 0;
	ret = map_shared(thread);
	if (ret)
		munmap(thread->memory, thread->config.pool_bytes);
	return ret;
}

void bsu_thread_unmap_memory(struct bsu_thread *thread)
{
	munmap(thread->memory, thread->config.pool_bytes);
	if (thread->unstored)
		munmap(thread->unstored, bsu_pool_unstored_bytes(thread->config.pool_bytes));
}
