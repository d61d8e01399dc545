/* SPDX-License-Identifier: MIT */
/* What concerns the process as a whole: memory, reclaim, news for the control thread. */
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "io.h"
#include "process.h"

#ifndef PR_SET_IO_FLUSHER
#define PR_SET_IO_FLUSHER 57
#define PR_GET_IO_FLUSHER 58
#endif

static pthread_once_t notify_once = PTHREAD_ONCE_INIT;
static int notify_fd;
static _Atomic int doorbell = -1;

int bsu_lock_memory(void)
{
	return mlockall(MCL_CURRENT | MCL_FUTURE) ? -errno : 0;
}

int bsu_set_io_flusher(void)
{
	return prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) ? -errno : 0;
}

int bsu_get_io_flusher(void)
{
	int res = prctl(PR_GET_IO_FLUSHER, 0, 0, 0, 0);

	return res < 0 ? -errno : res;
}

static void notify_create(void)
{
	notify_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (notify_fd < 0)
		notify_fd = -errno;
}

int bsu_notify_fd(void)
{
	pthread_once(&notify_once, notify_create);
	return notify_fd;
}

void bsu_set_doorbell(int fd)
{
	atomic_store(&doorbell, fd);
}

void bsu_notify(void)
{
	const uint64_t one = 1;
	int bell = atomic_load(&doorbell);

	if (bell >= 0 && write(bell, &one, sizeof(one)) < 0)
		bell = -1;
	/* Fails only when the counter is full, and then it is readable. */
	if (bsu_notify_fd() >= 0 && write(notify_fd, &one, sizeof(one)) < 0)
		return;
}
