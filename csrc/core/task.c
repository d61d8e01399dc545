/* SPDX-License-Identifier: MIT */
/* Lists of tasks, and the way of a task to the queue it belongs to. */
#include "internal.h"

void bsu_tasks_push(struct bsu_tasks *list, struct bsu_task *task)
{
	task->next = NULL;
	if (list->last)
		list->last->next = task;
	else
		list->first = task;
	list->last = task;
}

struct bsu_task *bsu_tasks_pop(struct bsu_tasks *list)
{
	struct bsu_task *task = list->first;

	if (!task)
		return NULL;
	list->first = task->next;
	if (!list->first)
		list->last = NULL;
	task->next = NULL;
	return task;
}

bool bsu_tasks_remove(struct bsu_tasks *list, struct bsu_task *task)
{
	struct bsu_task *prev = NULL, *at;

	for (at = list->first; at && at != task; at = at->next)
		prev = at;
	if (!at)
		return false;
	if (prev)
		prev->next = at->next;
	else
		list->first = at->next;
	if (list->last == at)
		list->last = prev;
	at->next = NULL;
	return true;
}

void bsu_task_ready(struct bsu_queue *self, struct bsu_task *task)
{
	struct bsu_queue *queue = task->queue;
	struct bsu_task *head;

	if (queue == self) {
		bsu_tasks_push(&queue->ready, task);
		return;
	}
	/* It may run the task and be idle at once, but is not freed before we have left. */
	atomic_fetch_add_explicit(&queue->visitors, 1, memory_order_relaxed);
	head = atomic_load_explicit(&queue->inbox, memory_order_relaxed);
	do {
		task->next = head;
	} while (!atomic_compare_exchange_weak_explicit(&queue->inbox, &head, task,
							 memory_order_release, memory_order_relaxed));
	/* Somebody who found it filled before us has woken the thread already. */
	if (!head)
		queue->ops->wake(queue->ctx);
	atomic_fetch_sub_explicit(&queue->visitors, 1, memory_order_release);
}
