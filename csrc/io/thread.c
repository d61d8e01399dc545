/* SPDX-License-Identifier: MIT */
/* Queue threads: start, the loop, stop. */
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "thread.h"

#define NS_PER_S 1000000000ull

enum {
	DEFAULT_ENTRIES = 256,
	DEFAULT_SLOTS = 1024,
	MAX_SLOTS = 16384,		/* of a ring's buffer table */
	CQES_PER_SQE = 16,
	MAX_CQES = 32768,
	AWAKE_PASSES = 8,
};

/* ---- rings ---- */

static int ring_init(struct bsu_thread *thread, struct bsu_ring *ring, unsigned int slots, unsigned int flags)
{
	unsigned int cqes = thread->config.entries * CQES_PER_SQE;
	struct io_uring_params params = {
		.flags = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_COOP_TASKRUN | IORING_SETUP_SUBMIT_ALL |
			 IORING_SETUP_CQSIZE | flags,
		.cq_entries = cqes < MAX_CQES ? cqes : MAX_CQES,
	};
	struct iovec pool = { .iov_base = thread->memory, .iov_len = thread->config.pool_bytes };
	__u64 tag = 0;
	int ret;

	ret = io_uring_queue_init_params(thread->config.entries, &ring->uring, &params);
	if (ret)
		return ret;
	/* A forked child must not hold the ring, nor what its tables hold. */
	io_uring_ring_dontfork(&ring->uring);
	/* Spares each system call a look-up; not needed. */
	io_uring_register_ring_fd(&ring->uring);

	ret = io_uring_register_buffers_sparse(&ring->uring, slots + 1);
	if (ret) {
		io_uring_queue_exit(&ring->uring);
		return ret;
	}
	/* A pool that may not be locked (RLIMIT_MEMLOCK) is used by plain reads and writes. */
	ret = io_uring_register_buffers_update_tag(&ring->uring, slots, &pool, &tag, 1);
	ring->fixed_pool = ret == 1;
	ring->pool_slot = slots;
	return 0;
}

static int rings_init(struct bsu_thread *thread)
{
	int ret;

	ret = ring_init(thread, &thread->origin, thread->config.slots, IORING_SETUP_DEFER_TASKRUN);
	if (ret)
		return ret;
	ret = io_uring_register_files_sparse(&thread->origin.uring, BSU_THREAD_FILES);
	if (ret)
		goto out_origin;
	/* Not deferred: what has ended is there after any entry to the kernel, so no sleep is followed by one to get it. */
	ret = ring_init(thread, &thread->storage, 0, 0);
	if (ret)
		goto out_origin;
	if (thread->config.lock_fd >= 0) {
		ret = io_uring_register_files(&thread->storage.uring, &thread->config.lock_fd, 1);
		if (ret)
			goto out_storage;
	}
	ret = io_uring_register_eventfd(&thread->storage.uring, thread->wake_fd);
	if (ret)
		goto out_storage;
	io_uring_cq_eventfd_toggle(&thread->storage.uring, false);
	return 0;

out_storage:
	io_uring_queue_exit(&thread->storage.uring);
out_origin:
	io_uring_queue_exit(&thread->origin.uring);
	return ret;
}

static void rings_exit(struct bsu_thread *thread)
{
	/* The kernel takes rings apart later; the files are to be let go now. */
	io_uring_unregister_files(&thread->origin.uring);
	if (thread->config.lock_fd >= 0)
		io_uring_unregister_files(&thread->storage.uring);
	io_uring_queue_exit(&thread->storage.uring);
	io_uring_queue_exit(&thread->origin.uring);
}

/* ---- the loop ---- */

static void arm_wake(struct bsu_thread *thread)
{
	struct io_uring_sqe *sqe;

	if (thread->wake_armed)
		return;
	sqe = io_uring_get_sqe(&thread->origin.uring);
	if (!sqe)
		return;
	io_uring_prep_read(sqe, thread->wake_fd, &thread->wake_count, sizeof(thread->wake_count), 0);
	sqe->user_data = BSU_TAG_WAKE;
	thread->wake_armed = true;
}

/* A second that the kernel counts spares each pass a look at the clock, and each sleep a timer of its own. */
static void arm_tick(struct bsu_thread *thread)
{
	static struct __kernel_timespec period = { .tv_sec = 1 };
	struct io_uring_sqe *sqe;

	if (thread->tick_armed)
		return;
	sqe = io_uring_get_sqe(&thread->origin.uring);
	if (!sqe)
		return;
	io_uring_prep_timeout(sqe, &period, 0, 0);
	sqe->user_data = BSU_TAG_TICK;
	thread->tick_armed = true;
}

static void answer_messages(struct bsu_thread *thread)
{
	struct bsu_message *message, *next;

	/* Looked at first, here and below: an exchange that finds nothing costs as much as one that does. */
	if (!atomic_load(&thread->any_message) || !atomic_exchange(&thread->any_message, false))
		return;
	pthread_mutex_lock(&thread->lock);
	message = thread->messages;
	thread->messages = NULL;
	pthread_mutex_unlock(&thread->lock);
	for (; message; message = next) {
		/* The memory is the caller's again once it is answered. */
		next = message->next;
		message->result = message->run(thread, message->arg);
		pthread_mutex_lock(&thread->lock);
		message->answered = true;
		pthread_cond_broadcast(&thread->answered);
		pthread_mutex_unlock(&thread->lock);
	}
}

/*
 * Runs what was woken, and what that wakes. Not for ever: requests that end at
 * once and come again must not keep the rings and messages waiting.
 */
static void run_awake(struct bsu_thread *thread)
{
	for (unsigned int pass = 0; pass < AWAKE_PASSES; pass++) {
		if (!atomic_load(&thread->any_awake) || !atomic_exchange(&thread->any_awake, false))
			return;
		for (unsigned int i = 0; i < thread->top; i++) {
			struct bsu_transport *transport = thread->transport[i];

			if (!transport || !atomic_load(&transport->awake) ||
			    !atomic_exchange(&transport->awake, false))
				continue;
			if (transport->queue)
				bsu_queue_run(transport->queue);
			transport->kind->run(transport);
		}
	}
}

/* Fills the rings; false when they were too small for all there is. */
static bool flush(struct bsu_thread *thread)
{
	bool all = true;

	arm_wake(thread);
	arm_tick(thread);
	if (thread->any_command) {
		for (unsigned int i = 0; i < thread->top; i++)
			if (thread->transport[i])
				all &= thread->transport[i]->kind->flush(thread->transport[i], &thread->origin.uring);
		thread->any_command = !all;
	}
	all &= thread->wake_armed && thread->tick_armed;
	all &= bsu_ring_flush(thread, &thread->origin);
	all &= bsu_ring_flush(thread, &thread->storage);
	return all;
}

/*
 * True when there is nothing to do before the origin ring's next completion.
 * Who has something for us, a worker thread of the storage ring too, says what
 * first and then looks whether we sleep; we say that we sleep, then look.
 */
static bool falls_asleep(struct bsu_thread *thread)
{
	struct io_uring *storage = &thread->storage.uring;

	atomic_store(&thread->asleep, true);
	if (thread->storage.out) {
		io_uring_cq_eventfd_toggle(storage, true);
		atomic_thread_fence(memory_order_seq_cst);
		if (io_uring_cq_ready(storage) || io_uring_cq_has_overflow(storage))
			return false;
	}
	return !atomic_load(&thread->any_awake) && !atomic_load(&thread->any_message);
}

static void submit_and_wait(struct bsu_thread *thread, bool wait)
{
	struct io_uring *ring = &thread->origin.uring;
	struct __kernel_timespec ts = { 0 };
	struct io_uring_cqe *cqe;
	int ret;

	if (wait && thread->next_run) {
		uint64_t now = bsu_thread_now(thread);
		uint64_t left = thread->next_run > now ? thread->next_run - now : 0;

		ts.tv_sec = (long long)(left / NS_PER_S);
		ts.tv_nsec = (long long)(left % NS_PER_S);
		wait = left;
	}
	if (!wait || !falls_asleep(thread))
		ret = io_uring_submit_and_get_events(ring);
	else if (thread->next_run)
		ret = io_uring_submit_and_wait_timeout(ring, &cqe, 1, &ts, NULL);
	else
		/* Not for ever: it only waits when all was submitted, the next tick too. */
		ret = io_uring_submit_and_wait(ring, 1);
	thread->now = 0;
	if (wait) {
		/* Seen late, it costs a wake-up for nothing. */
		atomic_store_explicit(&thread->asleep, false, memory_order_relaxed);
		io_uring_cq_eventfd_toggle(&thread->storage.uring, false);
	}
	/* No memory for requests: give the kernel a moment, then try again. */
	if (ret == -EAGAIN && io_uring_sq_ready(ring)) {
		ts = (struct __kernel_timespec){ .tv_nsec = 1000000 };
		io_uring_wait_cqe_timeout(ring, &cqe, &ts);
	}
}

static void completion(struct bsu_thread *thread, struct bsu_ring *ring, const struct io_uring_cqe *cqe)
{
	struct bsu_transport *transport;
	uint64_t data = cqe->user_data;
	int res = cqe->res;

	switch (data & BSU_TAG_MASK) {
	case BSU_TAG_IO:
		bsu_io_ended(thread, ring, bsu_tagged_io(data), res);
		break;
	case BSU_TAG_COMMAND:
		transport = thread->transport[bsu_tagged_transport(data)];
		transport->kind->command_done(transport, bsu_tagged_tag(data), res);
		break;
	case BSU_TAG_WAKE:
		thread->wake_armed = false;
		break;
	case BSU_TAG_TICK:
		thread->tick_armed = false;
		thread->tick_due = true;
		break;
	}
}

/* How many there were. */
static unsigned int reap(struct bsu_thread *thread, struct bsu_ring *ring)
{
	struct io_uring_cqe *cqe;
	unsigned int head, count = 0;

	io_uring_for_each_cqe(&ring->uring, head, cqe) {
		completion(thread, ring, cqe);
		count++;
	}
	if (count)
		io_uring_cq_advance(&ring->uring, count);
	return count;
}

/* True when I/O of it has ended. */
static bool serve_storage(struct bsu_thread *thread)
{
	struct bsu_ring *ring = &thread->storage;

	if (io_uring_sq_ready(&ring->uring) || io_uring_cq_has_overflow(&ring->uring)) {
		io_uring_submit_and_get_events(&ring->uring);
		thread->now = 0;
	}
	return reap(thread, ring);
}

static void run_at_time(struct bsu_thread *thread)
{
	if (!thread->next_run || bsu_thread_now(thread) < thread->next_run)
		return;
	thread->next_run = 0;
	for (unsigned int i = 0; i < thread->top; i++)
		if (thread->transport[i] && thread->transport[i]->queue)
			bsu_queue_run(thread->transport[i]->queue);
}

static void tick(struct bsu_thread *thread)
{
	if (!thread->tick_due)
		return;
	thread->tick_due = false;
	/* A thread that was stopped for long must not give up what has ended. */
	serve_storage(thread);
	for (unsigned int i = 0; i < thread->top; i++) {
		struct bsu_transport *transport = thread->transport[i];

		if (!transport)
			continue;
		if (transport->queue)
			bsu_queue_tick(transport->queue);
		transport->kind->tick(transport);
	}
}

static void loop(struct bsu_thread *thread)
{
	while (!thread->quit) {
		bool all;

		answer_messages(thread);
		run_awake(thread);
		all = flush(thread);
		/* Completions of the storage ring may have left more to submit. */
		if (serve_storage(thread))
			all = flush(thread);
		all = all && !io_uring_sq_ready(&thread->storage.uring);
		submit_and_wait(thread, all && !thread->quit);
		reap(thread, &thread->origin);
		run_at_time(thread);
		tick(thread);
	}
}

/* ---- start and stop ---- */

static int thread_prepare(struct bsu_thread *thread)
{
	cpu_set_t cpus;
	char name[16];
	int ret;

	snprintf(name, sizeof(name), "bsu-q%u", thread->name % 10000);
	pthread_setname_np(pthread_self(), name);
	if (thread->config.io_flusher) {
		ret = bsu_set_io_flusher();
		if (ret)
			return ret;
	}
	if (thread->config.cpu >= 0) {
		CPU_ZERO(&cpus);
		CPU_SET((unsigned int)thread->config.cpu, &cpus);
		if (sched_setaffinity(0, sizeof(cpus), &cpus))
			return -errno;
	}
	return rings_init(thread);
}

static void *thread_main(void *arg)
{
	struct bsu_thread *thread = arg;
	int ret = thread_prepare(thread);

	pthread_mutex_lock(&thread->lock);
	thread->started = ret ? ret : 1;
	pthread_cond_broadcast(&thread->answered);
	pthread_mutex_unlock(&thread->lock);
	if (ret)
		return NULL;
	loop(thread);
	rings_exit(thread);
	return NULL;
}

static int config_fill(struct bsu_thread_config *config)
{
	if (!config->pool_bytes)
		config->pool_bytes = BSU_THREAD_POOL;
	if (!config->entries)
		config->entries = DEFAULT_ENTRIES;
	if (!config->slots)
		config->slots = DEFAULT_SLOTS;
	if (config->pool_bytes % BSU_POOL_PAGE || config->slots >= MAX_SLOTS || config->cpu >= CPU_SETSIZE ||
	    config->entries < 4 || config->entries > 4096)
		return -EINVAL;
	return 0;
}

static int create(struct bsu_thread *thread)
{
	sigset_t all, old;
	int ret;

	/* The thread inherits it: signals are for the control thread. */
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	ret = pthread_create(&thread->pthread, NULL, thread_main, thread);
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	if (ret)
		return -ret;

	pthread_mutex_lock(&thread->lock);
	while (!thread->started)
		pthread_cond_wait(&thread->answered, &thread->lock);
	ret = thread->started;
	pthread_mutex_unlock(&thread->lock);
	if (ret < 0)
		pthread_join(thread->pthread, NULL);
	return ret < 0 ? ret : 0;
}

struct bsu_thread *bsu_thread_start(const struct bsu_thread_config *config, int *err)
{
	static _Atomic unsigned int names;
	struct bsu_thread *thread = calloc(1, sizeof(*thread));

	*err = -ENOMEM;
	if (!thread)
		return NULL;
	thread->config = *config;
	*err = config_fill(&thread->config);
	if (*err)
		goto out_free;
	thread->name = atomic_fetch_add(&names, 1);
	pthread_mutex_init(&thread->lock, NULL);
	pthread_cond_init(&thread->answered, NULL);

	*err = -ENOMEM;
	thread->slots = calloc(thread->config.slots / 64 + 1, sizeof(*thread->slots));
	if (!thread->slots)
		goto out_lock;
	*err = bsu_thread_map_memory(thread);
	if (*err)
		goto out_slots;
	*err = -ENOMEM;
	thread->pool = bsu_pool_new(thread->memory, thread->config.pool_bytes, thread->unstored);
	if (!thread->pool)
		goto out_memory;
	/* Blocking, so that the ring's read of it waits instead of failing. */
	thread->wake_fd = eventfd(0, EFD_CLOEXEC);
	if (thread->wake_fd < 0) {
		*err = -errno;
		goto out_pool;
	}
	*err = create(thread);
	if (!*err)
		return thread;

	close(thread->wake_fd);
out_pool:
	bsu_pool_free(thread->pool);
out_memory:
	bsu_thread_unmap_memory(thread);
out_slots:
	free(thread->slots);
out_lock:
	pthread_cond_destroy(&thread->answered);
	pthread_mutex_destroy(&thread->lock);
out_free:
	free(thread);
	return NULL;
}

static int quit(struct bsu_thread *thread, void *arg)
{
	(void)arg;
	if (thread->origin.out || thread->storage.out || thread->top)
		return -EBUSY;
	thread->quit = true;
	return 0;
}

static int serves(struct bsu_thread *thread, void *arg)
{
	(void)arg;
	for (unsigned int i = 0; i < thread->top; i++)
		if (thread->transport[i] && !thread->transport[i]->orphan)
			return -EBUSY;
	return 0;
}

int bsu_thread_stop(struct bsu_thread *thread, unsigned int timeout_ms)
{
	int ret;

	ret = bsu_thread_call(thread, serves, NULL);
	if (ret)
		return ret;
	ret = bsu_thread_call_until(thread, quit, NULL, timeout_ms);
	if (ret)
		return ret;
	pthread_join(thread->pthread, NULL);
	close(thread->wake_fd);
	bsu_pool_free(thread->pool);
	bsu_thread_unmap_memory(thread);
	free(thread->slots);
	pthread_cond_destroy(&thread->answered);
	pthread_mutex_destroy(&thread->lock);
	free(thread);
	return 0;
}
