/* SPDX-License-Identifier: MIT */
/*
 * The ring to /dev/ublk-control. Commands may take long (START_DEV waits for a
 * server, STOP_DEV for its I/O), so each has a limit. A command that is past
 * its limit is cancelled; where the kernel cannot do that, it stays in a slot
 * of its own, with its own copy of the data, until its completion comes.
 */
#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "io.h"
#include "ublk_abi.h"

/* Commands at once: the current one, and late ones that the kernel still has. */
#define CONTROL_SLOTS		16
#define CANCEL_GRACE_NS		200000000ull
#define CLOSE_GRACE_NS		1000000000ull

/* user_data: a slot number, or this for the cancelling request itself. */
#define CANCEL_USER_DATA	UINT64_MAX

struct control_slot {
	void *data;			/* what the kernel reads and writes */
	int result;
	bool busy;
	bool ended;
};

struct bsu_control {
	struct io_uring ring;
	int fd;
	struct control_slot slots[CONTROL_SLOTS];
};

static uint64_t now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000ull + (uint64_t)ts.tv_nsec;
}

struct bsu_control *bsu_control_open(int *err)
{
	struct io_uring_params params = { .flags = IORING_SETUP_SQE128 };
	struct bsu_control *control;
	int ret;

	control = calloc(1, sizeof(*control));
	if (!control) {
		*err = -ENOMEM;
		return NULL;
	}
	control->fd = open("/dev/ublk-control", O_RDWR | O_CLOEXEC);
	if (control->fd < 0) {
		ret = -errno;
		goto err_free;
	}
	/* every slot may have a cancelling request beside its command */
	ret = io_uring_queue_init_params(2 * CONTROL_SLOTS, &control->ring, &params);
	if (ret < 0)
		goto err_close;
	/* a child shares the descriptor until its exec, not the memory */
	io_uring_ring_dontfork(&control->ring);
	*err = 0;
	return control;

err_close:
	close(control->fd);
err_free:
	free(control);
	*err = ret;
	return NULL;
}

static void slot_free(struct control_slot *slot)
{
	free(slot->data);
	memset(slot, 0, sizeof(*slot));
}

static void reap(struct bsu_control *control)
{
	struct io_uring_cqe *cqe;

	while (!io_uring_peek_cqe(&control->ring, &cqe)) {
		if (cqe->user_data < CONTROL_SLOTS) {
			struct control_slot *slot = &control->slots[cqe->user_data];

			slot->result = cqe->res;
			slot->ended = true;
		}
		io_uring_cqe_seen(&control->ring, cqe);
	}
}

/* 0 once the slot's command has ended, -ETIME at the deadline. */
static int wait_ended(struct bsu_control *control, struct control_slot *slot, uint64_t deadline)
{
	for (;;) {
		struct __kernel_timespec left;
		struct io_uring_cqe *cqe;
		uint64_t now;
		int ret;

		reap(control);
		if (slot->ended)
			return 0;
		now = now_ns();
		if (now >= deadline)
			return -ETIME;
		left.tv_sec = (long long)((deadline - now) / 1000000000ull);
		left.tv_nsec = (long long)((deadline - now) % 1000000000ull);
		ret = io_uring_wait_cqe_timeout(&control->ring, &cqe, &left);
		if (ret < 0 && ret != -ETIME && ret != -EINTR && ret != -EAGAIN)
			return ret;
	}
}

static int submit(struct bsu_control *control)
{
	int ret;

	do {
		ret = io_uring_submit(&control->ring);
	} while (ret == -EINTR || ret == -EAGAIN);
	return ret < 0 ? ret : 0;
}

static struct io_uring_sqe *get_sqe(struct bsu_control *control)
{
	struct io_uring_sqe *sqe = io_uring_get_sqe(&control->ring);

	/* liburing clears the first half only */
	if (sqe)
		memset(sqe, 0, 2 * sizeof(*sqe));
	return sqe;
}

static void cancel(struct bsu_control *control, const struct control_slot *slot)
{
	struct io_uring_sqe *sqe = get_sqe(control);

	if (!sqe)
		return;
	sqe->opcode = IORING_OP_ASYNC_CANCEL;
	sqe->fd = -1;
	sqe->addr = (uint64_t)(slot - control->slots);
	sqe->user_data = CANCEL_USER_DATA;
	submit(control);
}

void bsu_control_close(struct bsu_control *control)
{
	uint64_t deadline;
	unsigned int i;

	if (!control)
		return;
	deadline = now_ns() + CLOSE_GRACE_NS;
	reap(control);
	for (i = 0; i < CONTROL_SLOTS; i++)
		if (control->slots[i].busy && !control->slots[i].ended)
			cancel(control, &control->slots[i]);
	for (i = 0; i < CONTROL_SLOTS; i++) {
		struct control_slot *slot = &control->slots[i];

		/*
		 * A kernel worker that is still at a command may write to its
		 * data even after the ring is gone: that memory is given up.
		 */
		if (slot->busy && !wait_ended(control, slot, deadline))
			slot_free(slot);
	}
	io_uring_queue_exit(&control->ring);
	close(control->fd);
	free(control);
}

static struct control_slot *take_slot(struct bsu_control *control)
{
	struct control_slot *found = NULL;
	unsigned int i;

	reap(control);
	for (i = 0; i < CONTROL_SLOTS; i++) {
		struct control_slot *slot = &control->slots[i];

		if (slot->busy && slot->ended)
			slot_free(slot);
		if (!slot->busy && !found)
			found = slot;
	}
	return found;
}

int bsu_control_command(struct bsu_control *control, uint32_t command, uint32_t dev_id, uint16_t queue_id,
			void *buf, uint16_t len, uint64_t data, unsigned int timeout_ms)
{
	struct ublksrv_ctrl_cmd cmd = {
		.dev_id = dev_id,
		.queue_id = queue_id,
		.len = len,
		.data = { data },
	};
	struct control_slot *slot;
	struct io_uring_sqe *sqe;
	int ret;

	slot = take_slot(control);
	if (!slot)
		return -EBUSY;
	if (len) {
		slot->data = malloc(len);
		if (!slot->data)
			return -ENOMEM;
		memcpy(slot->data, buf, len);
		cmd.addr = (uintptr_t)slot->data;
	}
	sqe = get_sqe(control);
	if (!sqe) {
		slot_free(slot);
		return -EBUSY;
	}
	sqe->opcode = IORING_OP_URING_CMD;
	sqe->fd = control->fd;
	sqe->cmd_op = command;
	sqe->user_data = (uint64_t)(slot - control->slots);
	memcpy(sqe->cmd, &cmd, sizeof(cmd));
	slot->busy = true;

	/*
	 * An entry that could not be submitted stays queued and would go out
	 * with the next one: the slot is kept for it.
	 */
	ret = submit(control);
	if (ret < 0)
		return ret;

	ret = wait_ended(control, slot, now_ns() + timeout_ms * 1000000ull);
	if (ret == -ETIME) {
		cancel(control, slot);
		ret = wait_ended(control, slot, now_ns() + CANCEL_GRACE_NS);
		if (!ret && (slot->result == -ECANCELED || slot->result == -EINTR))
			slot->result = -ETIME;
	}
	if (ret < 0)
		return ret;

	ret = slot->result;
	if (ret >= 0 && len)
		memcpy(buf, slot->data, len);
	slot_free(slot);
	return ret;
}
