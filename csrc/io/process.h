/* SPDX-License-Identifier: MIT */
#ifndef BSU_PROCESS_H
#define BSU_PROCESS_H

/* Any thread: makes bsu_notify_fd() readable. */
void bsu_notify(void);

#endif
