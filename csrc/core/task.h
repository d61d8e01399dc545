/* SPDX-License-Identifier: MIT */
/* Lists of tasks, and where a task is handed to the queue that it belongs to. */
#ifndef BSU_TASK_H
#define BSU_TASK_H

#include "core.h"

struct bsu_tasks {
	struct bsu_task *first;
	struct bsu_task *last;
};

void bsu_tasks_push(struct bsu_tasks *list, struct bsu_task *task);
struct bsu_task *bsu_tasks_pop(struct bsu_tasks *list);
bool bsu_tasks_remove(struct bsu_tasks *list, struct bsu_task *task);
/* Let @task run on its own queue; @self is the queue we are on, or NULL. */
void bsu_task_ready(struct bsu_queue *self, struct bsu_task *task);

#endif
