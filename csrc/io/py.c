/* SPDX-License-Identifier: MIT */
/*
 * Targets written in Python. Requests of all queues that serve the target
 * share its slots, each with a buffer:
 *
 *   FREE -> FILLING -> READY -> TAKEN -> COMMITTED -> FREE
 *            (queue)   (ring)  (Python)   (queue)
 *
 * Queue threads never wait for Python: a request that finds no free slot is
 * put into one list, first come, first served, and gets the slot of one that
 * ends. Data is copied by the queue's own thread, in FILLING and COMMITTED.
 * py->lock guards states and lists, and is held for a few instructions only.
 */
#include <errno.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "thread.h"

enum slot_state {
	FREE = 0,
	FILLING,
	READY,
	TAKEN,
	COMMITTED,
};

struct slot {
	enum slot_state state;
	struct bsu_transport *transport;
	struct bsu_request *rq;
	int32_t result;
	uint32_t next;			/* slot plus one, in whichever list it is */
};

/* A request without a slot; one for each tag of a port. */
struct bsu_py_wait {
	struct bsu_py_wait *next;
	struct bsu_transport *transport;
	struct bsu_request *rq;
};

struct bsu_py {
	pthread_mutex_t lock;
	unsigned int slots;
	size_t max_bytes;		/* of a buffer */
	char *memory;
	int event_fd;			/* readable while the ready list is not empty */
	bool closed;
	struct bsu_transport *ports;
	struct bsu_py_wait *first_wait, *last_wait;
	uint32_t free;
	uint32_t first_ready, last_ready;
	struct slot slot[];
};

/* ---- the queue's side ---- */

int bsu_py_join(struct bsu_py *py, struct bsu_transport *transport, unsigned int depth)
{
	struct bsu_py_port *port = &transport->port;
	int ret = 0;

	port->wait = calloc(depth, sizeof(*port->wait));
	if (!port->wait)
		return -ENOMEM;
	pthread_mutex_lock(&py->lock);
	if (py->closed)
		ret = -ESHUTDOWN;
	else {
		port->py = py;
		port->next = py->ports;
		py->ports = transport;
	}
	pthread_mutex_unlock(&py->lock);
	if (ret)
		free(port->wait);
	return ret;
}

void bsu_py_leave(struct bsu_transport *transport)
{
	struct bsu_py *py = transport->port.py;
	struct bsu_transport **link;

	pthread_mutex_lock(&py->lock);
	for (link = &py->ports; *link != transport; link = &(*link)->port.next)
		;
	*link = transport->port.next;
	pthread_mutex_unlock(&py->lock);
	free(transport->port.wait);
}

static bool has_data(const struct bsu_request *rq)
{
	return rq->op == BSU_OP_READ || rq->op == BSU_OP_WRITE;
}

static void *buffer_of(struct bsu_py *py, const struct slot *slot)
{
	return py->memory + (size_t)(slot - py->slot) * py->max_bytes;
}

/* Lock held: takes a slot out of whatever list it was in, for @rq. */
static void assign(struct slot *slot, struct bsu_transport *transport, struct bsu_request *rq)
{
	slot->state = FILLING;
	slot->transport = transport;
	slot->rq = rq;
}

/* Lock held: the queue's thread is to look at @slot in one of its lists. */
static void hand_to_queue(struct bsu_py *py, struct slot *slot, uint32_t *list)
{
	slot->next = *list;
	*list = (uint32_t)(slot - py->slot) + 1;
	if (!slot->next)
		bsu_transport_wake(slot->transport);
}

/* Lock held. */
static void free_slot(struct bsu_py *py, struct slot *slot)
{
	struct bsu_py_wait *wait = py->first_wait;

	if (wait) {
		py->first_wait = wait->next;
		assign(slot, wait->transport, wait->rq);
		hand_to_queue(py, slot, &slot->transport->port.granted);
		return;
	}
	slot->state = FREE;
	slot->next = py->free;
	py->free = (uint32_t)(slot - py->slot) + 1;
}

static void set_readable(struct bsu_py *py, bool readable)
{
	uint64_t count = 1;

	/* Non-blocking; each is called once for a change, so neither can fail. */
	if ((readable ? write(py->event_fd, &count, sizeof(count)) : read(py->event_fd, &count, sizeof(count))) < 0)
		return;
}

/* Lock held. */
static void make_ready(struct bsu_py *py, struct slot *slot)
{
	uint32_t number = (uint32_t)(slot - py->slot) + 1;

	slot->state = READY;
	slot->next = 0;
	if (py->first_ready)
		py->slot[py->last_ready - 1].next = number;
	else
		py->first_ready = number;
	py->last_ready = number;
	if (py->first_ready == number)
		set_readable(py, true);
}

/* Gets the data of a write into the slot's buffer and shows it to Python. */
static void fill(struct bsu_py *py, struct slot *slot)
{
	struct bsu_transport *transport = slot->transport;
	struct bsu_request *rq = slot->rq;
	int ret = 0;

	if (has_data(rq) && rq->length > py->max_bytes)
		ret = -EINVAL;
	else if (rq->op == BSU_OP_WRITE)
		ret = transport->ops->copy_from_request(transport, rq, 0, buffer_of(py, slot),
							(size_t)rq->length);
	pthread_mutex_lock(&py->lock);
	if (!ret && py->closed)
		ret = -EIO;
	if (ret)
		free_slot(py, slot);
	else
		make_ready(py, slot);
	pthread_mutex_unlock(&py->lock);
	if (ret)
		transport->ops->complete(transport, rq, ret);
}

void bsu_py_accept(struct bsu_transport *transport, struct bsu_request *rq)
{
	struct bsu_py *py = transport->port.py;
	struct bsu_py_wait *wait = &transport->port.wait[rq->tag];
	struct slot *slot = NULL;
	bool closed;

	pthread_mutex_lock(&py->lock);
	closed = py->closed;
	if (!closed && py->free) {
		slot = &py->slot[py->free - 1];
		py->free = slot->next;
		assign(slot, transport, rq);
	} else if (!closed) {
		*wait = (struct bsu_py_wait){ .transport = transport, .rq = rq };
		if (py->first_wait)
			py->last_wait->next = wait;
		else
			py->first_wait = wait;
		py->last_wait = wait;
	}
	pthread_mutex_unlock(&py->lock);
	if (slot)
		fill(py, slot);
	else if (closed)
		transport->ops->complete(transport, rq, -EIO);
}

/* Takes the data of a read out of the slot's buffer and ends the request. */
static void finish(struct bsu_py *py, struct slot *slot)
{
	struct bsu_transport *transport = slot->transport;
	struct bsu_request *rq = slot->rq;
	int ret = slot->result < 0 ? slot->result : 0;

	if (!ret && rq->op == BSU_OP_READ)
		ret = transport->ops->copy_to_request(transport, rq, 0, buffer_of(py, slot),
						      (size_t)rq->length);
	if (!ret && has_data(rq))
		ret = (int)rq->length;
	pthread_mutex_lock(&py->lock);
	free_slot(py, slot);
	pthread_mutex_unlock(&py->lock);
	transport->ops->complete(transport, rq, ret);
}

void bsu_py_run(struct bsu_transport *transport)
{
	struct bsu_py_port *port = &transport->port;
	struct bsu_py *py = port->py;
	struct bsu_py_wait *refused;
	uint32_t granted, done;

	pthread_mutex_lock(&py->lock);
	granted = port->granted;
	done = port->done;
	refused = port->refused;
	port->granted = port->done = 0;
	port->refused = NULL;
	pthread_mutex_unlock(&py->lock);
	while (granted) {
		struct slot *slot = &py->slot[granted - 1];

		granted = slot->next;
		fill(py, slot);
	}
	while (done) {
		struct slot *slot = &py->slot[done - 1];

		done = slot->next;
		finish(py, slot);
	}
	while (refused) {
		struct bsu_py_wait *wait = refused;

		refused = wait->next;
		transport->ops->complete(transport, wait->rq, -EIO);
	}
}

/* ---- Python's side ---- */

struct bsu_py *bsu_py_new(void *memory, unsigned int slots, size_t max_bytes, int *err)
{
	struct bsu_py *py;

	*err = -EINVAL;
	if (!slots || slots > 65536 || !max_bytes || max_bytes > 32u << 20)
		return NULL;
	*err = -ENOMEM;
	py = calloc(1, sizeof(*py) + slots * sizeof(py->slot[0]));
	if (!py)
		return NULL;
	py->slots = slots;
	py->max_bytes = max_bytes;
	py->memory = memory;
	py->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (py->event_fd < 0) {
		*err = -errno;
		free(py);
		return NULL;
	}
	pthread_mutex_init(&py->lock, NULL);
	for (unsigned int i = slots; i--;)
		free_slot(py, &py->slot[i]);
	*err = 0;
	return py;
}

int bsu_py_free(struct bsu_py *py)
{
	bool used;

	pthread_mutex_lock(&py->lock);
	used = py->ports;
	pthread_mutex_unlock(&py->lock);
	if (used)
		return -EBUSY;
	close(py->event_fd);
	pthread_mutex_destroy(&py->lock);
	free(py);
	return 0;
}

int bsu_py_event_fd(const struct bsu_py *py)
{
	return py->event_fd;
}

int bsu_py_take(struct bsu_py *py, struct bsu_py_request *out, unsigned int max)
{
	unsigned int count = 0;

	pthread_mutex_lock(&py->lock);
	if (py->closed) {
		pthread_mutex_unlock(&py->lock);
		return -ESHUTDOWN;
	}
	for (; py->first_ready && count < max; count++) {
		struct slot *slot = &py->slot[py->first_ready - 1];

		out[count] = (struct bsu_py_request){
			.slot = py->first_ready - 1,
			.op = slot->rq->op,
			.flags = slot->rq->flags & (BSU_FUA | BSU_NOUNMAP),
			.start = slot->rq->start,
			.length = slot->rq->length,
		};
		slot->state = TAKEN;
		py->first_ready = slot->next;
	}
	if (count && !py->first_ready)
		set_readable(py, false);
	pthread_mutex_unlock(&py->lock);
	return (int)count;
}

/* Lock held. */
static void commit(struct bsu_py *py, struct slot *slot, int32_t result)
{
	slot->state = COMMITTED;
	slot->result = result;
	hand_to_queue(py, slot, &slot->transport->port.done);
}

int bsu_py_commit(struct bsu_py *py, const uint32_t *slots, const int32_t *results, unsigned int count)
{
	int ret = 0;

	pthread_mutex_lock(&py->lock);
	for (unsigned int i = 0; i < count; i++) {
		if (slots[i] < py->slots && py->slot[slots[i]].state == TAKEN)
			commit(py, &py->slot[slots[i]], results[i]);
		else
			ret = -EINVAL;
	}
	pthread_mutex_unlock(&py->lock);
	return ret;
}

void bsu_py_close(struct bsu_py *py)
{
	struct bsu_py_wait *wait, *next;

	pthread_mutex_lock(&py->lock);
	/* It stays readable from now on: whoever waits for requests finds out. */
	if (!py->closed && !py->first_ready)
		set_readable(py, true);
	py->closed = true;
	py->first_ready = 0;
	for (wait = py->first_wait; wait; wait = next) {
		struct bsu_py_port *port = &wait->transport->port;

		next = wait->next;
		wait->next = port->refused;
		port->refused = wait;
		bsu_transport_wake(wait->transport);
	}
	py->first_wait = NULL;
	for (unsigned int i = 0; i < py->slots; i++)
		if (py->slot[i].state == READY || py->slot[i].state == TAKEN)
			commit(py, &py->slot[i], -EIO);
	pthread_mutex_unlock(&py->lock);
}
