/* SPDX-License-Identifier: MIT */
/*
 * The way of a request that changes the origin.
 *
 *   arrives --gate closed--> PARKED --gate opens--+
 *      |                                          |
 *      +--> marks its tracking blocks <-----------+
 *             |
 *             v
 *   +----> looks: which units does a chain lack?
 *   |         |-- none --------------> origin I/O --> ends
 *   |         |-- nobody's ----------> claims and copies them --+
 *   |         |-- somebody else's ---> waits for that claim ----+
 *   |         |-- no copy, no map memory, no room, not its turn:
 *   |         |     waits for it -------------------------------+
 *   +-----------------------------------------------------------+
 *
 * A discard does not copy: where a chain lacks a unit it is swallowed.
 */
#include "internal.h"

struct plan {
	struct bsu_copy *first, *last;
	unsigned int copies;
	struct bsu_claim *conflict;
	enum bsu_wait wait;		/* what lacks first, */
	const struct bsu_chain *chain;	/* for this one */
	uint64_t turn;			/* ns, of BSU_WAIT_TURN */
};

static uint64_t leaf_mask(uint64_t leaf, uint64_t first, uint64_t last)
{
	uint64_t mask = ~0ull;

	if (first / BSU_LEAF_UNITS == leaf)
		mask &= ~0ull << (first % BSU_LEAF_UNITS);
	if (last / BSU_LEAF_UNITS == leaf)
		mask &= ~0ull >> (BSU_LEAF_UNITS - 1 - last % BSU_LEAF_UNITS);
	return mask;
}

/* Units of the leaf that lie on the image. */
static uint64_t on_image(const struct bsu_image *image, uint64_t leaf)
{
	uint64_t units = bsu_image_units(image), first = leaf * BSU_LEAF_UNITS;

	if (first + BSU_LEAF_UNITS <= units)
		return ~0ull;
	return first < units ? ~0ull >> (BSU_LEAF_UNITS - (units - first)) : 0;
}

/* Units of @mask in the leaf that image k lacks. */
static uint64_t lacking(const struct bsu_chain *chain, unsigned int k, uint64_t leaf, uint64_t mask)
{
	uint64_t result = 0;

	mask &= on_image(chain->image[k], leaf);

	for (uint64_t rest = mask; rest; rest &= rest - 1) {
		unsigned int at = (unsigned int)__builtin_ctzll(rest);

		if (bsu_chain_slot(chain, k, leaf * BSU_LEAF_UNITS + at) == BSU_SLOT_EMPTY)
			result |= 1ull << at;
	}
	if (MUTANT(BSU_MUTANT_SKIP_PARTIAL) && result != mask)
		return 0;
	return result;
}

static bool chain_lacks(const struct bsu_chain *chain, uint64_t first, uint64_t last)
{
	int k = bsu_chain_newest(chain);

	if (k < 0)
		return false;
	for (uint64_t leaf = first / BSU_LEAF_UNITS; leaf <= last / BSU_LEAF_UNITS; leaf++)
		if (lacking(chain, (unsigned int)k, leaf, leaf_mask(leaf, first, last)))
			return true;
	return false;
}

static bool view_lacks(const struct bsu_view *view, uint64_t first, uint64_t last)
{
	for (unsigned int c = 0; view && c < view->nr_chains; c++)
		if (chain_lacks(&view->chain[c], first, last))
			return true;
	return false;
}

/* Nothing more is planned for the chain. */
static bool plan_stops(struct plan *plan, enum bsu_wait wait, const struct bsu_chain *chain)
{
	if (!plan->wait) {
		plan->wait = wait;
		plan->chain = chain;
	}
	return true;
}

/* Three quarters of the copies are the most for one storage, which may be silent. */
static bool over_share(const struct bsu_queue *queue, const struct bsu_storage *storage, const struct plan *plan)
{
	unsigned int most = queue->nr_copies / 4 * 3, count = 0;

	if (queue->copies_out < most || MUTANT(BSU_MUTANT_ONE_TAKES_ALL))
		return false;
	for (const struct bsu_copy *copy = queue->oldest; copy; copy = copy->newer)
		count += copy->image->storage == storage;
	for (const struct bsu_copy *copy = plan->first; copy; copy = copy->next)
		count += copy->image->storage == storage;
	return count >= most;
}

/*
 * Copies for a run of units that image k lacks and nobody claims. Returns
 * false when the chain was broken meanwhile and has to be looked at again.
 */
static bool plan_run(struct bsu_queue *queue, struct bsu_request *rq, const struct bsu_chain *chain, unsigned int k,
		     uint64_t unit, uint32_t count, struct plan *plan)
{
	while (count) {
		struct bsu_copy *copy = queue->free_copy;
		uint32_t place, got;
		uint64_t turn;

		/* Nobody waits a second time for a storage that does not answer. */
		if (atomic_load_explicit(&chain->storage->silent, memory_order_relaxed)) {
			bsu_chain_break(queue, chain, unit, BSU_IMAGE_CORRUPTED, ETIMEDOUT);
			return false;
		}
		if (!copy || over_share(queue, chain->storage, plan))
			return plan_stops(plan, BSU_WAIT_COPY, chain);
		if (bsu_map_reserve(&chain->image[k]->map, unit, count))
			return plan_stops(plan, BSU_WAIT_MAP, chain);
		/* Nobody waits for a turn while others wait for the device to come to rest. */
		turn = atomic_load(&queue->dev->gate_closed) ? 0 : bsu_turn(chain->storage, queue);
		if (turn) {
			plan->turn = plan->wait ? plan->turn : turn;
			return plan_stops(plan, BSU_WAIT_TURN, chain);
		}
		got = bsu_storage_give(chain->storage, BSU_FOR_COPY, count, &place);
		if (bsu_storage_got_low(chain->storage))
			queue->ops->notify(queue->ctx);
		if (!got && bsu_room_limit(chain->storage))
			return plan_stops(plan, BSU_WAIT_ROOM, chain);
		if (!got) {
			bsu_chain_break(queue, chain, unit, BSU_IMAGE_OVERFLOWN, ENOSPC);
			return false;
		}
		bsu_turn_taken(chain->storage, queue, (uint64_t)got << queue->dev->unit_shift);
		queue->free_copy = copy->next;
		queue->copies_out++;
		copy->next = NULL;
		bsu_copy_claim(copy, rq, chain->image[k], unit, got, place);
		if (plan->last)
			plan->last->next = copy;
		else
			plan->first = copy;
		plan->last = copy;
		plan->copies++;
		unit += got;
		count -= got;
	}
	return true;
}

/* device.lock held. */
static bool plan_chain(struct bsu_queue *queue, struct bsu_request *rq, const struct bsu_chain *chain, uint64_t first,
		       uint64_t last, struct plan *plan)
{
	int k = bsu_chain_newest(chain);
	uint64_t wanted = 0, begin = first;
	uint32_t run = 0;

	if (k < 0)
		return true;
	for (uint64_t unit = first; unit <= last + 1; unit++) {
		bool want = false;

		if (unit <= last) {
			uint64_t leaf = unit / BSU_LEAF_UNITS;

			if (unit == first || unit % BSU_LEAF_UNITS == 0) {
				wanted = lacking(chain, (unsigned int)k, leaf, leaf_mask(leaf, first, last));
				wanted &= ~bsu_claimed(queue->dev, chain->storage, leaf, wanted, &plan->conflict);
			}
			want = wanted >> (unit % BSU_LEAF_UNITS) & 1;
		}
		if (run && (!want || run == queue->dev->copy_units)) {
			if (!plan_run(queue, rq, chain, (unsigned int)k, begin, run, plan))
				return false;
			if (plan->chain == chain)
				return true;
			run = 0;
		}
		if (want && !run++)
			begin = unit;
	}
	return true;
}

static void break_chain(struct bsu_queue *queue, const struct bsu_chain *chain, uint64_t first, uint64_t last,
			enum bsu_image_status status, int error)
{
	for (uint64_t unit = first; unit <= last; unit++)
		if (chain_lacks(chain, unit, unit))
			bsu_chain_break(queue, chain, unit, status, error);
}

/* Waiting has taken too long: what lacks the units is given up. */
static void break_lacking(struct bsu_queue *queue, const struct bsu_view *view, uint64_t first, uint64_t last, int error)
{
	for (unsigned int c = 0; c < view->nr_chains; c++)
		break_chain(queue, &view->chain[c], first, last, BSU_IMAGE_CORRUPTED, error);
}

static void start_copies(struct bsu_request *rq, struct plan *plan)
{
	struct bsu_copy *copy = plan->first, *next;

	rq->waiting_since = 0;
	rq->pending = plan->copies;
	for (; copy; copy = next) {
		next = copy->next;
		bsu_copy_start(copy);
	}
}

static void wait_for_map(struct bsu_queue *queue, struct bsu_request *rq, const struct bsu_chain *chain, uint64_t first, uint64_t last)
{
	if (bsu_waited(queue, rq, BSU_WAIT_MAP, BSU_MAP_WAIT_NS)) {
		break_chain(queue, chain, first, last, BSU_IMAGE_CORRUPTED, ENOMEM);
		bsu_task_ready(queue, &rq->task);
		return;
	}
	bsu_tasks_push(&queue->map_waiters, &rq->task);
	queue->ops->notify(queue->ctx);
}

/* Copies are under way, and a silent storage may never let go of them. */
static void wait_for_copy(struct bsu_queue *queue, struct bsu_request *rq, const struct bsu_chain *chain, uint64_t first, uint64_t last)
{
	if (bsu_waited(queue, rq, BSU_WAIT_COPY, queue->dev->copy_limit_ns) && !MUTANT(BSU_MUTANT_WAIT_FOR_EVER)) {
		break_chain(queue, chain, first, last, BSU_IMAGE_CORRUPTED, ETIMEDOUT);
		bsu_task_ready(queue, &rq->task);
		return;
	}
	bsu_tasks_push(&queue->copy_waiters, &rq->task);
}

static void wait_for_room(struct bsu_queue *queue, struct bsu_request *rq, const struct bsu_chain *chain, uint64_t first, uint64_t last)
{
	if (bsu_waited(queue, rq, BSU_WAIT_ROOM, bsu_room_limit(chain->storage)) && !MUTANT(BSU_MUTANT_WAIT_FOR_ROOM)) {
		break_chain(queue, chain, first, last, BSU_IMAGE_OVERFLOWN, ENOSPC);
		if (MUTANT(BSU_MUTANT_OVERFLOW_EVERYWHERE))
			break_lacking(queue, atomic_load(&queue->dev->view), first, last, ENOSPC);
	} else if (bsu_room_wait(chain->storage, BSU_FOR_COPY, &rq->task)) {
		queue->ops->notify(queue->ctx);
		return;
	}
	bsu_task_ready(queue, &rq->task);
}

static void wait_for_turn(struct bsu_queue *queue, struct bsu_request *rq, uint64_t turn)
{
	if (!queue->throttled.first || turn < queue->throttled_until) {
		queue->throttled_until = turn;
		if (queue->ops->later)
			queue->ops->later(queue->ctx, turn);
	}
	rq->waiting_since = 0;
	atomic_store(&queue->dev->any_throttled, true);
	if (!MUTANT(BSU_MUTANT_TURN_LOST) || !queue->throttled.first)
		bsu_tasks_push(&queue->throttled, &rq->task);
	/* Whoever closed it before may not have seen us. */
	if (atomic_load(&queue->dev->gate_closed))
		bsu_task_ready(queue, bsu_tasks_pop(&queue->throttled));
}

static void wait_or_again(struct bsu_queue *queue, struct bsu_request *rq, const struct plan *plan, uint64_t first, uint64_t last)
{
	switch (plan->wait) {
	case BSU_WAIT_COPY:
		wait_for_copy(queue, rq, plan->chain, first, last);
		break;
	case BSU_WAIT_MAP:
		wait_for_map(queue, rq, plan->chain, first, last);
		break;
	case BSU_WAIT_ROOM:
		wait_for_room(queue, rq, plan->chain, first, last);
		break;
	case BSU_WAIT_TURN:
		wait_for_turn(queue, rq, plan->turn);
		break;
	default:
		/* published or broken meanwhile */
		bsu_task_ready(queue, &rq->task);
	}
}

void bsu_write_again(struct bsu_task *task)
{
	struct bsu_request *rq = container_of(task, struct bsu_request, task);
	struct bsu_queue *queue = task->queue;
	struct bsu_device *dev = queue->dev;
	const struct bsu_view *view = atomic_load(&dev->view);
	uint64_t first = rq->start >> dev->unit_shift;
	uint64_t last = (rq->start + rq->length - 1) >> dev->unit_shift;
	struct plan plan = { 0 };

	if (MUTANT(BSU_MUTANT_LAST_UNIT) && last > first)
		last--;
	if (MUTANT(BSU_MUTANT_STORE_ERROR_TO_WRITER) && rq->result) {
		bsu_request_end(queue, rq, rq->result);
		return;
	}
	if (MUTANT(BSU_MUTANT_BREAK_AFTER_WRITE) && rq->result) {
		bsu_origin_io(queue, rq);
		break_lacking(queue, view, first, last, -rq->result);
		return;
	}
	if (!view_lacks(view, first, last)) {
		bsu_origin_io(queue, rq);
		return;
	}
	task->run = bsu_write_again;
	pthread_mutex_lock(&dev->lock);
	for (unsigned int c = 0; c < view->nr_chains;)
		if (plan_chain(queue, rq, &view->chain[c], first, last, &plan))
			c++;
	if (!plan.copies && plan.conflict) {
		queue->counters.waits++;
		rq->waiting_since = 0;
		bsu_tasks_push(&plan.conflict->waiters, task);
	}
	pthread_mutex_unlock(&dev->lock);

	if (plan.copies)
		start_copies(rq, &plan);
	else if (!plan.conflict)
		wait_or_again(queue, rq, &plan, first, last);
}

/* Bytes from @start on that are treated alike: sent down, or swallowed. */
static uint64_t discard_run(struct bsu_device *dev, uint64_t start, uint64_t end, bool *through)
{
	const struct bsu_view *view = atomic_load(&dev->view);
	uint64_t unit = start >> dev->unit_shift;
	uint64_t run = ((end - 1) >> dev->unit_shift) + 1 - unit;

	*through = true;
	for (unsigned int c = 0; view && c < view->nr_chains; c++) {
		int k = bsu_chain_newest(&view->chain[c]);
		bool has = true;

		if (k < 0 || MUTANT(BSU_MUTANT_DISCARD_THROUGH))
			continue;
		run = bsu_chain_run(&view->chain[c], (unsigned int)k, unit, run, &has);
		*through = *through && has;
	}
	return min_u64((unit + run) << dev->unit_shift, end) - start;
}

static void discard_done(struct bsu_io *io, int res);

static void discard_step(struct bsu_queue *queue, struct bsu_request *rq)
{
	uint64_t end = rq->start + rq->length;

	while (rq->cursor < end && !rq->result) {
		bool through;
		uint64_t length = discard_run(queue->dev, rq->cursor, end, &through);

		rq->io = (struct bsu_io) {
			.file = queue->dev->origin,
			.offset = rq->cursor,
			.length = length,
			.op = BSU_OP_DISCARD,
			.done = discard_done,
		};
		rq->cursor += length;
		if (through) {
			bsu_submit(queue, &rq->io);
			return;
		}
		bsu_device_swallow(queue->dev, rq->io.offset, length);
	}
	bsu_request_end(queue, rq, rq->result);
}

static void discard_done(struct bsu_io *io, int res)
{
	struct bsu_request *rq = container_of(io, struct bsu_request, io);

	rq->result = res;
	discard_step(io->queue, rq);
}

static void pass_gate(struct bsu_task *task)
{
	struct bsu_request *rq = container_of(task, struct bsu_request, task);
	struct bsu_queue *queue = task->queue;
	struct bsu_device *dev = queue->dev;

	bsu_flight_begin(queue);
	if (atomic_load(&dev->gate_closed) && !MUTANT(BSU_MUTANT_GATE_OPEN_EARLY)) {
		atomic_store(&queue->left, atomic_load_explicit(&queue->left, memory_order_relaxed) + 1);
		queue->counters.parked++;
		task->run = pass_gate;
		bsu_tasks_push(&queue->parked, task);
		return;
	}
	rq->in_gate = true;
	if (!MUTANT(BSU_MUTANT_MARK_BEFORE_GATE) && !MUTANT(BSU_MUTANT_MARK_LATE))
		bsu_device_mark_range(dev, rq->start, rq->length);
	if (rq->op == BSU_OP_DISCARD) {
		queue->counters.discards++;
		discard_step(queue, rq);
		return;
	}
	queue->counters.writes++;
	bsu_device_unswallow(dev, rq->start, rq->length);
	bsu_write_again(task);
}

void bsu_write_request(struct bsu_queue *queue, struct bsu_request *rq)
{
	if (MUTANT(BSU_MUTANT_MARK_BEFORE_GATE))
		bsu_device_mark_range(queue->dev, rq->start, rq->length);
	pass_gate(&rq->task);
}
