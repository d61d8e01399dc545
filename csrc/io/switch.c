/* SPDX-License-Identifier: MIT */
/*
 * One instant for several devices, and what follows a switch. The control
 * thread waits here by short sleeps; queue threads never wait for it.
 */
#include <errno.h>
#include <time.h>

#include "file.h"
#include "thread.h"

#define NS_PER_MS 1000000ull
#define NAP_NS 30000
#define LOOK_NS NS_PER_MS
#define REPLAY_NS (10 * NS_PER_MS)

static uint64_t now_ns(void)
{
	return bsu_transport_now(NULL);
}

static void nap(long ns)
{
	const struct timespec ts = { .tv_nsec = ns };

	nanosleep(&ts, NULL);
}

/* Returns how many of the first devices, in order, are drained. */
static unsigned int wait_drained(struct bsu_device **devices, unsigned int count, uint64_t deadline)
{
	unsigned int done = 0;

	for (;;) {
		while (done < count && bsu_gate_drained(devices[done]))
			done++;
		/* Room does not come while we wait here. */
		if (done == count || now_ns() >= deadline || bsu_device_waits_for_room(devices[done]))
			return done;
		nap(NAP_NS);
	}
}

static void open_gates(struct bsu_device **devices, unsigned int count)
{
	/* Bottom up: a write let through above finds the gate below open. */
	for (unsigned int i = count; i-- > 0;)
		bsu_gate_unlock(devices[i]);
}

/* When all are open: a thread that is woken may take this one's processor. */
static void wake(struct bsu_device **devices, unsigned int count)
{
	for (unsigned int i = 0; i < count; i++)
		bsu_gate_open(devices[i]);
}

/*
 * Closes and drains all gates. All at once is quickest, but where one member
 * is stacked on another, writes that passed the upper gate would be parked at
 * the lower one and never end; @in_turn drains each before the next is closed.
 * On -ETIMEDOUT all gates are open again.
 */
static int close_gates(struct bsu_device **devices, unsigned int count, bool in_turn, uint64_t deadline,
		       unsigned int *late)
{
	unsigned int closed, drained = 0;

	for (closed = 0; closed < count; closed++) {
		bsu_gate_close(devices[closed]);
		if (!in_turn)
			continue;
		if (!wait_drained(&devices[closed], 1, deadline)) {
			closed++;
			goto late;
		}
		drained++;
	}
	if (!in_turn)
		drained = wait_drained(devices, count, deadline);
	if (drained == count)
		return 0;
late:
	*late = drained;
	open_gates(devices, closed);
	wake(devices, closed);
	return -ETIMEDOUT;
}

int bsu_wait_for_room(struct bsu_device **devices, unsigned int count, unsigned int limit_ms, unsigned int *late)
{
	uint64_t deadline = now_ns() + limit_ms * NS_PER_MS;

	for (*late = 0; *late < count; ) {
		if (!bsu_device_waits_for_room(devices[*late])) {
			++*late;
			continue;
		}
		if (now_ns() >= deadline)
			return -EBUSY;
		nap(LOOK_NS);
	}
	return 0;
}

int bsu_switch_all(struct bsu_device **devices, void **bitmaps, unsigned int count, unsigned int limit_ms,
		   uint32_t *commit, uint64_t *gate_ns, uint64_t *writes_ns, unsigned int *late)
{
	uint64_t begin = now_ns(), limit = limit_ms * NS_PER_MS;
	uint64_t deadline = begin + limit;
	int ret;

	*late = 0;
	*gate_ns = *writes_ns = 0;
	if (!count)
		return -EINVAL;
	ret = close_gates(devices, count, false, count > 1 ? begin + limit / 2 : deadline, late);
	if (ret && count > 1) {
		begin = now_ns();
		ret = close_gates(devices, count, true, deadline, late);
	}
	if (ret)
		return ret;

	for (unsigned int i = 0; i < count; i++) {
		uint64_t rested = bsu_gate_rested(devices[i]);

		if (rested > begin + *writes_ns)
			*writes_ns = rested - begin;
		bsu_switch(devices[i], bitmaps[i]);
	}
	/* Whoever finds the record set after a death also finds the switch. */
	if (commit)
		__atomic_store_n(commit, 1, __ATOMIC_RELEASE);
	open_gates(devices, count);
	*gate_ns = now_ns() - begin;
	wake(devices, count);
	return 0;
}

int bsu_resize_within(struct bsu_device *device, uint64_t size, void *bitmap, void *swallowed, unsigned int limit_ms)
{
	unsigned int late;
	int ret = close_gates(&device, 1, true, now_ns() + limit_ms * NS_PER_MS, &late);

	if (ret)
		return ret;
	ret = bsu_device_resize(device, size, bitmap, swallowed);
	bsu_gate_open(device);
	return ret;
}

int bsu_switch_settle(struct bsu_device *device, unsigned int timeout_ms)
{
	uint64_t deadline = now_ns() + timeout_ms * NS_PER_MS;

	for (;;) {
		int ret = bsu_settle(device);

		if (!ret)
			return 0;
		if (now_ns() >= deadline)
			return -ETIMEDOUT;
		if (ret < 0)
			nap(NAP_NS);
	}
}

int bsu_image_release_within(struct bsu_image *image, unsigned int timeout_ms)
{
	uint64_t deadline = now_ns() + timeout_ms * NS_PER_MS;

	for (;;) {
		int ret = bsu_image_release(image);

		if (!ret)
			return 0;
		if (now_ns() >= deadline)
			return -ETIMEDOUT;
		if (ret < 0)
			nap(NAP_NS);
	}
}

int bsu_replay_swallowed(struct bsu_thread *thread, struct bsu_device *device, struct bsu_file *origin, uint64_t slice,
			 unsigned int limit_ms)
{
	uint64_t deadline = now_ns() + limit_ms * NS_PER_MS;
	uint64_t start, length, stop, sent = 0;
	bool more = true;
	unsigned int late;
	int ret, res = 0;

	if (!slice)
		return -EINVAL;
	ret = close_gates(&device, 1, true, deadline, &late);
	if (ret)
		return ret;
	/*
	 * No limit on a trim itself: one that is late must not meet a newer write.
	 * But writers wait, and a scattered list is many trims.
	 */
	stop = now_ns() + REPLAY_NS;
	while (sent < slice && !res && now_ns() < stop) {
		more = bsu_device_next_swallowed(device, slice - sent, &start, &length);
		if (!more)
			break;
		sent += length;
		res = bsu_thread_discard(thread, origin, start, length);
		if (res == -EOPNOTSUPP)
			res = 0;
	}
	bsu_gate_open(device);
	return res ? res : more;
}
