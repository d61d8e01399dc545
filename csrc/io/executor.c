/* SPDX-License-Identifier: MIT */
/*
 * How a struct bsu_io is carried out by io_uring.
 *
 *   READ, WRITE    from and to fixed buffers: the pool, or the pages of a ublk
 *                  request; FUA is RWF_DSYNC
 *   FLUSH          fdatasync
 *   DISCARD        a block device's own command, from a worker thread where it is
 *                  refused otherwise; or a hole in a file
 *   WRITE_ZEROES   fallocate, in the first of these forms that is supported:
 *                  hole (not with NOUNMAP) -> zeroed range -> plain writes
 *
 * Which form an I/O has come to and how far it is stands in io->cookie.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <sys/ioctl.h>

#include "file.h"
#include "thread.h"

/* Since Linux 6.12; liburing has a helper from 2.8 on. */
#define BSU_CMD_DISCARD _IO(0x12, 0)

#define ZEROES (256u << 10)
#define SECTOR 512u

static const char zeroes[ZEROES] __attribute__((aligned(4096)));

enum form {
	FORM_FIRST = 0,
	FORM_ZERO_RANGE,
	FORM_ZERO_WRITE,
	FORM_SYNC,
	FORM_BLOCKING,
};

/* cookie: transport index plus one, form, sectors written */

#define NO_TRANSPORT 0u

static uint64_t cookie_make(unsigned int transport, enum form form, uint64_t sectors)
{
	return (uint64_t)transport | (uint64_t)form << 16 | sectors << 24;
}

static unsigned int cookie_transport(uint64_t cookie)
{
	return cookie & 0xffff;
}

static enum form cookie_form(uint64_t cookie)
{
	return (enum form)(cookie >> 16 & 0xff);
}

static uint64_t cookie_sectors(uint64_t cookie)
{
	return cookie >> 24;
}

_Static_assert(BSU_THREAD_TRANSPORTS < 0xffff, "index plus one fits the cookie");

static struct bsu_transport *io_transport(struct bsu_thread *thread, const struct bsu_io *io)
{
	unsigned int index = cookie_transport(io->cookie);

	return index == NO_TRANSPORT ? NULL : thread->transport[index - 1];
}

static void prep_data(struct bsu_thread *thread, struct bsu_ring *ring, struct io_uring_sqe *sqe, struct bsu_io *io)
{
	uint64_t addr = (uint64_t)(uintptr_t)io->buf;
	bool write = io->op == BSU_OP_WRITE;
	char *pool = thread->memory;
	int slot = -1;

	if (!io->buf) {
		struct bsu_transport *transport = io_transport(thread, io);

		slot = transport->kind->locate(transport, io->rq, io->rq_offset, &addr);
		/* Request pages are in the origin ring's table only: let it fail. */
		if (slot >= 0 && ring == &thread->storage)
			slot = UINT16_MAX;
	} else if (ring->fixed_pool && (char *)io->buf >= pool && (char *)io->buf < pool + thread->config.pool_bytes) {
		slot = (int)ring->pool_slot;
	}
	if (slot >= 0)
		io_uring_prep_rw(write ? IORING_OP_WRITE_FIXED : IORING_OP_READ_FIXED, sqe, io->file->fd, NULL,
				 (unsigned int)io->length, io->offset);
	else
		io_uring_prep_rw(write ? IORING_OP_WRITE : IORING_OP_READ, sqe, io->file->fd, NULL,
				 (unsigned int)io->length, io->offset);
	/* In a ublk request's pages an address counts from 0. */
	sqe->addr = addr;
	if (slot >= 0)
		sqe->buf_index = (uint16_t)slot;
	if (write && io->flags & BSU_FUA)
		sqe->rw_flags = RWF_DSYNC;
}

static void prep_discard(struct io_uring_sqe *sqe, struct bsu_io *io)
{
	if (!io->file->is_device) {
		io_uring_prep_fallocate(sqe, io->file->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
					(off_t)io->offset, (off_t)io->length);
		return;
	}
	io_uring_prep_rw(IORING_OP_URING_CMD, sqe, io->file->fd, NULL, 0, 0);
	sqe->cmd_op = BSU_CMD_DISCARD;
	sqe->addr = io->offset;
	sqe->addr3 = io->length;
	if (cookie_form(io->cookie) == FORM_BLOCKING)
		sqe->flags |= IOSQE_ASYNC;
}

static void prep_zeroes(struct io_uring_sqe *sqe, struct bsu_io *io)
{
	enum form form = cookie_form(io->cookie);
	uint64_t done = cookie_sectors(io->cookie) * SECTOR;
	int mode = FALLOC_FL_KEEP_SIZE;

	if (form == FORM_ZERO_WRITE) {
		uint64_t left = io->length - done;

		io_uring_prep_write(sqe, io->file->fd, zeroes, left < ZEROES ? (unsigned int)left : ZEROES,
				    io->offset + done);
		return;
	}
	if (form == FORM_ZERO_RANGE || io->flags & BSU_NOUNMAP)
		mode |= FALLOC_FL_ZERO_RANGE;
	else
		mode |= FALLOC_FL_PUNCH_HOLE;
	io_uring_prep_fallocate(sqe, io->file->fd, mode, (off_t)io->offset, (off_t)io->length);
}

static bool io_prepare(struct bsu_thread *thread, struct bsu_ring *ring, struct bsu_io *io)
{
	struct io_uring_sqe *sqe = io_uring_get_sqe(&ring->uring);

	if (!sqe)
		return false;
	if (cookie_form(io->cookie) == FORM_SYNC || io->op == BSU_OP_FLUSH)
		io_uring_prep_fsync(sqe, io->file->fd, IORING_FSYNC_DATASYNC);
	else if (io->op == BSU_OP_DISCARD)
		prep_discard(sqe, io);
	else if (io->op == BSU_OP_WRITE_ZEROES)
		prep_zeroes(sqe, io);
	else
		prep_data(thread, ring, sqe, io);
	sqe->user_data = bsu_tag_io(io);
	return true;
}

static void io_put(struct bsu_thread *thread, struct bsu_ring *ring, struct bsu_io *io)
{
	/* First come, first served: nothing overtakes what waits already. */
	if (!ring->first && io_prepare(thread, ring, io))
		return;
	io->next = NULL;
	if (ring->first)
		ring->last->next = io;
	else
		ring->first = io;
	ring->last = io;
}

void bsu_io_start(struct bsu_thread *thread, struct bsu_transport *transport, struct bsu_io *io)
{
	struct bsu_ring *ring = io->file->is_storage ? &thread->storage : &thread->origin;

	io->cookie = cookie_make(transport ? transport->index + 1 : NO_TRANSPORT, FORM_FIRST, 0);
	ring->out++;
	io_put(thread, ring, io);
}

bool bsu_ring_flush(struct bsu_thread *thread, struct bsu_ring *ring)
{
	struct bsu_io *io;

	while ((io = ring->first)) {
		if (!io_prepare(thread, ring, io))
			return false;
		ring->first = io->next;
	}
	return true;
}

static bool unsupported(int res)
{
	return res == -EOPNOTSUPP || res == -ENOSYS;
}

/*
 * A disk that cannot say at once whether it would have to wait, as many of the
 * device mapper's, refuses what must not wait: then a worker thread waits.
 */
static bool discard_goes_on(struct bsu_io *io, int res)
{
	if (!unsupported(res) || !io->file->is_device || cookie_form(io->cookie) != FORM_FIRST)
		return false;
	io->cookie = cookie_make(cookie_transport(io->cookie), FORM_BLOCKING, 0);
	return true;
}

/* Sets the cookie to what comes next; false when the I/O has ended, with *res. */
static bool zeroes_go_on(struct bsu_io *io, int *res)
{
	enum form form = cookie_form(io->cookie);
	unsigned int transport = cookie_transport(io->cookie);
	uint64_t sectors = cookie_sectors(io->cookie);

	if (form == FORM_FIRST && !(io->flags & BSU_NOUNMAP) && unsupported(*res)) {
		io->cookie = cookie_make(transport, FORM_ZERO_RANGE, 0);
		return true;
	}
	if (form < FORM_ZERO_WRITE && unsupported(*res)) {
		io->cookie = cookie_make(transport, FORM_ZERO_WRITE, 0);
		return true;
	}
	if (form == FORM_ZERO_WRITE && *res >= 0) {
		sectors += (unsigned int)*res / SECTOR;
		if ((unsigned int)*res < SECTOR) {
			*res = -EIO;
			return false;
		}
		if (sectors * SECTOR < io->length) {
			io->cookie = cookie_make(transport, FORM_ZERO_WRITE, sectors);
			return true;
		}
	}
	if (*res < 0)
		return false;
	*res = 0;
	if (form == FORM_SYNC || !(io->flags & BSU_FUA))
		return false;
	io->cookie = cookie_make(transport, FORM_SYNC, 0);
	return true;
}

void bsu_io_ended(struct bsu_thread *thread, struct bsu_ring *ring, struct bsu_io *io, int res)
{
	struct bsu_transport *transport;

	if ((io->op == BSU_OP_WRITE_ZEROES && zeroes_go_on(io, &res)) ||
	    (io->op == BSU_OP_DISCARD && discard_goes_on(io, res))) {
		io_put(thread, ring, io);
		return;
	}
	ring->out--;
	transport = io_transport(thread, io);
	if (transport)
		bsu_queue_io_done(transport->queue, io, res);
	else
		io->done(io, res);
}
