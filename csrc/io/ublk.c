/* SPDX-License-Identifier: MIT */
/*
 * The ublk transport: one queue of a ublk device on a queue thread.
 *
 *                 fetch accepted          tag comes back
 *   ARMING ----------------------> ARMED ----------------> STOPPING
 *      | refused                                              | all back,
 *      v                                                      v nothing out
 *   FAILED (freed by the thread when its tags are back)      DONE
 *
 * A tag is with the kernel (fetched), with us (a request), or back for good
 * (-ENODEV). Everything here but the functions of io.h runs in the queue's
 * thread; fetch and commit must come from the same thread and ring.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "process.h"
#include "thread.h"
#include "ublk_abi.h"

#define NO_SLOTS (-1)

enum {
	ARMING = 0,
	FAILED = -1,
};

struct ublk_tag {
	struct bsu_request rq;
	int result;
	bool fetched;			/* once; from then on every command commits */
};

struct bsu_ublk {
	struct bsu_transport transport;
	int fd;
	uint16_t queue_id;
	uint16_t depth;
	bool zero_copy;			/* the core may use the pages of requests */
	bool registers;			/* the kernel registers them as fixed buffers */
	int first_slot;			/* fixed buffer of tag 0 */
	int barrier;
	const char *descs;
	size_t descs_bytes;
	uint32_t desc_size;

	_Atomic int status;
	int error;			/* why arming failed */
	unsigned int live;		/* tags that are not back for good */
	bool asked_all;			/* every fetch is in the ring, up to this: */
	unsigned int asked_tail;

	/* tags whose next command waits for room in the ring, a ring of its own */
	uint16_t *commit;
	unsigned int first_commit, commits;
	struct ublk_tag *tag;
};

static struct bsu_ublk *of_transport(struct bsu_transport *transport)
{
	return (struct bsu_ublk *)((char *)transport - offsetof(struct bsu_ublk, transport));
}

/* ---- data of requests: the copy way ---- */

static off_t user_copy_offset(const struct bsu_ublk *ublk, uint32_t tag, uint64_t offset)
{
	return (off_t)(UBLKSRV_IO_BUF_OFFSET + ((uint64_t)ublk->queue_id << UBLK_QID_OFF |
						(uint64_t)tag << UBLK_TAG_OFF | offset));
}

static int ublk_copy_from_request(void *ctx, struct bsu_request *rq, uint64_t offset, void *to, size_t length)
{
	const struct bsu_ublk *ublk = of_transport(ctx);

	for (size_t done = 0; done < length;) {
		ssize_t res = pread(ublk->fd, (char *)to + done, length - done,
				    user_copy_offset(ublk, rq->tag, offset + done));

		if (res < 0 && errno == EINTR)
			continue;
		if (res <= 0)
			return res ? -errno : -EIO;
		done += (size_t)res;
	}
	return 0;
}

static int ublk_copy_to_request(void *ctx, struct bsu_request *rq, uint64_t offset, const void *from, size_t length)
{
	const struct bsu_ublk *ublk = of_transport(ctx);

	for (size_t done = 0; done < length;) {
		ssize_t res = pwrite(ublk->fd, (const char *)from + done, length - done,
				     user_copy_offset(ublk, rq->tag, offset + done));

		if (res < 0 && errno == EINTR)
			continue;
		if (res <= 0)
			return res ? -errno : -EIO;
		done += (size_t)res;
	}
	return 0;
}

static int ublk_locate(struct bsu_transport *transport, const struct bsu_request *rq, uint64_t offset, uint64_t *addr)
{
	*addr = offset;
	return of_transport(transport)->first_slot + (int)rq->tag;
}

/* ---- fetch and commit ---- */

static void push_commit(struct bsu_ublk *ublk, uint32_t tag, int result)
{
	ublk->transport.thread->any_command = true;
	ublk->tag[tag].result = result;
	ublk->commit[(ublk->first_commit + ublk->commits++) % ublk->depth] = (uint16_t)tag;
}

static void ublk_complete(void *ctx, struct bsu_request *rq, int res)
{
	struct bsu_ublk *ublk = of_transport(ctx);

	/* The kernel ends the whole request with success on most short results. */
	if (res >= 0 && (rq->op == BSU_OP_READ || rq->op == BSU_OP_WRITE) && (uint64_t)res != rq->length)
		res = -EIO;
	ublk->transport.out--;
	push_commit(ublk, rq->tag, res);
}

static bool put_command(struct bsu_ublk *ublk, struct io_uring *ring, uint16_t tag)
{
	struct io_uring_sqe *sqe = io_uring_get_sqe(ring);
	struct ublksrv_io_cmd command = {
		.q_id = ublk->queue_id,
		.tag = tag,
		.result = ublk->tag[tag].result,
	};

	if (!sqe)
		return false;
	io_uring_prep_rw(IORING_OP_URING_CMD, sqe, ublk->fd, NULL, 0, 0);
	sqe->cmd_op = ublk->tag[tag].fetched ? UBLK_U_IO_COMMIT_AND_FETCH_REQ : UBLK_U_IO_FETCH_REQ;
	if (ublk->registers) {
		/* The slot is filled before the fetch ends and emptied by the commit. */
		struct ublk_auto_buf_reg reg = {
			.index = (uint16_t)(ublk->first_slot + tag),
			.flags = UBLK_AUTO_BUF_REG_FALLBACK,
		};

		sqe->addr = ublk_auto_buf_reg_to_sqe_addr(&reg);
	}
	memcpy(sqe->cmd, &command, sizeof(command));
	sqe->user_data = bsu_tag_command(ublk->transport.index, tag);
	ublk->tag[tag].fetched = true;
	return true;
}

static bool ublk_flush(struct bsu_transport *transport, struct io_uring *ring)
{
	struct bsu_ublk *ublk = of_transport(transport);

	while (ublk->commits) {
		if (!put_command(ublk, ring, ublk->commit[ublk->first_commit]))
			return false;
		ublk->first_commit = (ublk->first_commit + 1) % ublk->depth;
		ublk->commits--;
	}
	if (ublk->status == ARMING && !ublk->asked_all) {
		/* A refused fetch is known as soon as it was submitted: look again then. */
		ublk->asked_all = true;
		ublk->asked_tail = ring->sq.sqe_tail;
		bsu_transport_wake(transport);
	}
	return true;
}

static bool known_op(uint8_t op)
{
	return op == BSU_OP_READ || op == BSU_OP_WRITE || op == BSU_OP_FLUSH || op == BSU_OP_DISCARD ||
	       op == BSU_OP_WRITE_ZEROES;
}

static void request_arrived(struct bsu_ublk *ublk, uint16_t tag)
{
	const struct ublksrv_io_desc *desc = (const void *)(ublk->descs + (size_t)tag * ublk->desc_size);
	struct bsu_request *rq = &ublk->tag[tag].rq;
	/* Flags are bits of the whole word, the low eight bits of it are the op. */
	uint32_t word = desc->op_flags;

	rq->op = word & 0xff;
	rq->flags = 0;
	if (word & UBLK_IO_F_FUA)
		rq->flags |= BSU_FUA;
	if (word & UBLK_IO_F_NOUNMAP)
		rq->flags |= BSU_NOUNMAP;
	if (!ublk->zero_copy || word & UBLK_IO_F_NEED_REG_BUF)
		rq->flags |= BSU_NEED_COPY;
	rq->start = desc->start_sector << 9;
	rq->length = rq->op == BSU_OP_FLUSH ? 0 : (uint64_t)desc->nr_sectors << 9;
	rq->tag = tag;
	if (known_op(rq->op))
		bsu_transport_request(&ublk->transport, rq);
	else
		push_commit(ublk, tag, -EOPNOTSUPP);
}

/* ---- states ---- */

static int set_status(struct bsu_ublk *ublk, int status)
{
	atomic_store(&ublk->status, status);
	bsu_notify();
	return status;
}

static void release_tables(struct bsu_ublk *ublk)
{
	struct bsu_thread *thread = ublk->transport.thread;

	bsu_thread_detach(thread, &ublk->transport);
	bsu_thread_barrier_clear(thread, ublk->barrier);
	if (ublk->first_slot != NO_SLOTS)
		bsu_thread_give_slots(thread, (unsigned int)ublk->first_slot, ublk->depth);
}

static void ublk_free(struct bsu_ublk *ublk)
{
	munmap((void *)ublk->descs, ublk->descs_bytes);
	close(ublk->fd);
	free(ublk->tag);
	free(ublk->commit);
	free(ublk);
}

/* True when it is gone. */
static bool settle(struct bsu_ublk *ublk)
{
	if (ublk->live || !bsu_transport_idle(&ublk->transport))
		return false;
	if (ublk->transport.orphan) {
		release_tables(ublk);
		bsu_transport_exit(&ublk->transport);
		ublk_free(ublk);
		return true;
	}
	if (ublk->status == BSU_UBLK_STOPPING)
		set_status(ublk, BSU_UBLK_DONE);
	return false;
}

static void ublk_command_done(struct bsu_transport *transport, uint16_t tag, int res)
{
	struct bsu_ublk *ublk = of_transport(transport);

	if (res == UBLK_IO_RES_OK) {
		request_arrived(ublk, tag);
		return;
	}
	ublk->live--;
	if (!ublk->error)
		ublk->error = res < 0 ? res : -EIO;
	if (ublk->status == BSU_UBLK_ARMED)
		set_status(ublk, BSU_UBLK_STOPPING);
	/* Not from here: the transport may go away with it. */
	if (!ublk->live)
		bsu_transport_wake(transport);
}

static void ublk_run(struct bsu_transport *transport)
{
	struct bsu_ublk *ublk = of_transport(transport);

	if (transport->port.py)
		bsu_py_run(transport);
	if (ublk->status == ARMING && ublk->asked_all) {
		if ((int)(*transport->thread->origin.uring.sq.khead - ublk->asked_tail) >= 0) {
			set_status(ublk, ublk->error ? FAILED : BSU_UBLK_ARMED);
		} else {
			ublk->asked_all = false;
			transport->thread->any_command = true;
		}
	}
	settle(ublk);
}

static void ublk_tick(struct bsu_transport *transport)
{
	/* A queue may become idle without a word, when late I/O ends. */
	settle(of_transport(transport));
}

static const struct bsu_transport_kind ublk_kind = {
	.run = ublk_run,
	.flush = ublk_flush,
	.command_done = ublk_command_done,
	.tick = ublk_tick,
	.locate = ublk_locate,
};

static const struct bsu_queue_ops ublk_ops = {
	.submit = bsu_transport_submit,
	.complete = ublk_complete,
	.copy_from_request = ublk_copy_from_request,
	.copy_to_request = ublk_copy_to_request,
	.wake = bsu_transport_wake_op,
	.notify = bsu_transport_notify,
	.now = bsu_transport_now,
	.later = bsu_transport_later,
};

/* ---- start and finish ---- */

static int ublk_attach(struct bsu_thread *thread, void *arg)
{
	struct bsu_ublk *ublk = arg;
	int ret;

	if (ublk->registers) {
		ret = bsu_thread_take_slots(thread, ublk->depth);
		if (ret < 0)
			return ret;
		ublk->first_slot = ret;
	}
	ret = bsu_thread_barrier_set(thread, ublk->fd);
	if (ret < 0)
		goto out_slots;
	ublk->barrier = ret;
	ret = bsu_thread_attach(thread, &ublk->transport);
	if (ret)
		goto out_barrier;
	for (unsigned int tag = 0; tag < ublk->depth; tag++)
		push_commit(ublk, tag, 0);
	ublk->live = ublk->depth;
	return 0;

out_barrier:
	bsu_thread_barrier_clear(thread, ublk->barrier);
out_slots:
	if (ublk->first_slot != NO_SLOTS)
		bsu_thread_give_slots(thread, (unsigned int)ublk->first_slot, ublk->depth);
	return ret;
}

struct arming {
	struct bsu_ublk *ublk;
	int error;
};

/* Repeated until it has an outcome. After an error the transport is left to the thread. */
static int ublk_armed(struct bsu_thread *thread, void *arg)
{
	struct arming *arming = arg;
	struct bsu_ublk *ublk = arming->ublk;

	(void)thread;
	if (ublk->status == ARMING)
		return -EBUSY;
	if (ublk->status == FAILED) {
		arming->error = ublk->error;
		ublk->transport.orphan = true;
		bsu_transport_wake(&ublk->transport);
	}
	return 0;
}

static int ublk_detach(struct bsu_thread *thread, void *arg)
{
	struct bsu_ublk *ublk = arg;

	(void)thread;
	settle(ublk);
	if (ublk->status != BSU_UBLK_DONE)
		return -EBUSY;
	release_tables(ublk);
	return 0;
}

static int map_descs(struct bsu_ublk *ublk)
{
	size_t page = (size_t)sysconf(_SC_PAGESIZE);
	size_t stride = (UBLK_MAX_QUEUE_DEPTH * (size_t)ublk->desc_size + page - 1) / page * page;
	void *descs;

	ublk->descs_bytes = (ublk->depth * (size_t)ublk->desc_size + page - 1) / page * page;
	descs = mmap(NULL, ublk->descs_bytes, PROT_READ, MAP_SHARED | MAP_POPULATE, ublk->fd,
		     (off_t)(UBLKSRV_CMD_BUF_OFFSET + ublk->queue_id * stride));
	if (descs == MAP_FAILED)
		return -errno;
	/* A child that has not yet called exec would hold the device by it. */
	madvise(descs, ublk->descs_bytes, MADV_DONTFORK);
	ublk->descs = descs;
	return 0;
}

static int config_check(const struct bsu_ublk_config *config)
{
	if (!config->depth || config->depth > UBLK_MAX_QUEUE_DEPTH ||
	    config->desc_size < sizeof(struct ublksrv_io_desc) || config->desc_size % 8)
		return -EINVAL;
	/* Without it there is no way to the bytes of a request. */
	if (!(config->flags & UBLK_F_USER_COPY) || (config->zero_copy && !(config->flags & UBLK_F_AUTO_BUF_REG)))
		return -EOPNOTSUPP;
	return 0;
}

struct bsu_ublk *bsu_ublk_start(struct bsu_thread *thread, const struct bsu_ublk_config *config, int *err)
{
	const struct bsu_target target = { config->device, config->image, config->py };
	struct arming arming = { 0 };
	struct bsu_ublk *ublk;

	*err = config_check(config);
	if (*err)
		return NULL;
	*err = -ENOMEM;
	ublk = calloc(1, sizeof(*ublk));
	if (!ublk)
		return NULL;
	ublk->transport.kind = &ublk_kind;
	ublk->transport.ops = &ublk_ops;
	ublk->queue_id = config->queue_id;
	ublk->depth = config->depth;
	ublk->desc_size = config->desc_size;
	ublk->zero_copy = config->zero_copy && !config->py;
	ublk->registers = config->flags & UBLK_F_AUTO_BUF_REG;
	ublk->first_slot = NO_SLOTS;
	ublk->tag = calloc(ublk->depth, sizeof(*ublk->tag));
	ublk->commit = calloc(ublk->depth, sizeof(*ublk->commit));
	if (!ublk->tag || !ublk->commit)
		goto out_free;
	ublk->fd = fcntl(config->char_fd, F_DUPFD_CLOEXEC, 0);
	if (ublk->fd < 0) {
		*err = -errno;
		goto out_free;
	}
	*err = map_descs(ublk);
	if (*err)
		goto out_close;
	*err = bsu_transport_init(&ublk->transport, thread, &target, ublk->depth, ublk->zero_copy);
	if (*err)
		goto out_unmap;
	*err = bsu_thread_call(thread, ublk_attach, ublk);
	if (*err)
		goto out_exit;
	/* The thread answers after each pass of its loop: no limit is needed. */
	arming.ublk = ublk;
	bsu_thread_call_until(thread, ublk_armed, &arming, UINT32_MAX);
	*err = arming.error;
	return *err ? NULL : ublk;

out_exit:
	bsu_transport_exit(&ublk->transport);
out_unmap:
	munmap((void *)ublk->descs, ublk->descs_bytes);
out_close:
	close(ublk->fd);
out_free:
	free(ublk->tag);
	free(ublk->commit);
	free(ublk);
	return NULL;
}

enum bsu_ublk_status bsu_ublk_status(const struct bsu_ublk *ublk)
{
	return (enum bsu_ublk_status)atomic_load(&ublk->status);
}

int bsu_ublk_finish(struct bsu_ublk *ublk, unsigned int timeout_ms)
{
	int ret = bsu_thread_call_until(ublk->transport.thread, ublk_detach, ublk, timeout_ms);

	if (ret)
		return ret;
	bsu_transport_exit(&ublk->transport);
	ublk_free(ublk);
	return 0;
}

void bsu_ublk_counters(struct bsu_ublk *ublk, struct bsu_queue_counters *out)
{
	bsu_transport_counters(&ublk->transport, out);
}
