/* SPDX-License-Identifier: MIT */
#ifndef BSU_FILE_H
#define BSU_FILE_H

#include "io.h"

struct bsu_file {
	int fd;
	bool is_device;
	bool is_storage;	/* its I/O goes to the storage rings */
};

#endif
