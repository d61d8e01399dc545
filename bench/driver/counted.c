/* SPDX-License-Identifier: MIT */
/* What this program does for those who count: Valgrind its instructions, strace its system calls. */
#include <liburing.h>
#include <poll.h>
#include <unistd.h>

#include "driver.h"

/* A ring whose thread sleeps in poll() does not always say that it has something. */
#define LOOK_AGAIN_NS 20000000

#if __has_include(<valgrind/callgrind.h>)
#include <valgrind/callgrind.h>
#else
#define RUNNING_ON_VALGRIND 0
#define CALLGRIND_ZERO_STATS
#endif

int __real_io_uring_submit_and_wait(struct io_uring *ring, unsigned int count);
int __wrap_io_uring_submit_and_wait(struct io_uring *ring, unsigned int count);
int __real_io_uring_submit_and_wait_timeout(struct io_uring *ring, struct io_uring_cqe **cqe, unsigned int count,
					    struct __kernel_timespec *ts, sigset_t *mask);
int __wrap_io_uring_submit_and_wait_timeout(struct io_uring *ring, struct io_uring_cqe **cqe, unsigned int count,
					    struct __kernel_timespec *ts, sigset_t *mask);

void count_from_here(void)
{
	CALLGRIND_ZERO_STATS;
	getppid();
}

void count_until_here(void)
{
	getppid();
}

/*
 * Valgrind lets one thread run at a time, and not all versions know that
 * io_uring_enter() may sleep: nobody would ever wake it. So it sleeps in poll()
 * there. The linker puts this in the place of liburing's function (--wrap).
 */
int __wrap_io_uring_submit_and_wait_timeout(struct io_uring *ring, struct io_uring_cqe **cqe, unsigned int count,
					    struct __kernel_timespec *ts, sigset_t *mask)
{
	struct pollfd pollfd = { .fd = ring->ring_fd, .events = POLLIN };
	int ret;

	if (!RUNNING_ON_VALGRIND)
		return __real_io_uring_submit_and_wait_timeout(ring, cqe, count, ts, mask);
	ret = io_uring_submit_and_get_events(ring);
	if (ret < 0 || io_uring_cq_ready(ring))
		return ret;
	poll(&pollfd, 1, ts->tv_sec || ts->tv_nsec > LOOK_AGAIN_NS ? LOOK_AGAIN_NS / 1000000 : 1);
	io_uring_get_events(ring);
	return ret;
}

int __wrap_io_uring_submit_and_wait(struct io_uring *ring, unsigned int count)
{
	struct __kernel_timespec ts = { .tv_nsec = LOOK_AGAIN_NS };
	struct io_uring_cqe *cqe;

	if (!RUNNING_ON_VALGRIND)
		return __real_io_uring_submit_and_wait(ring, count);
	return __wrap_io_uring_submit_and_wait_timeout(ring, &cqe, count, &ts, NULL);
}
