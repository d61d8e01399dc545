/* SPDX-License-Identifier: MIT */
/* What a struct bsu_io goes to: a file or a block device, opened by somebody else. */
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "file.h"

struct bsu_file *bsu_file_new(int fd, int *err)
{
	struct bsu_file *file;
	struct stat st;

	*err = -ENOMEM;
	file = calloc(1, sizeof(*file));
	if (!file)
		return NULL;
	file->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
	if (file->fd < 0) {
		*err = -errno;
		goto out_free;
	}
	if (fstat(file->fd, &st)) {
		*err = -errno;
		goto out_close;
	}
	if (!S_ISREG(st.st_mode) && !S_ISBLK(st.st_mode)) {
		*err = -EINVAL;
		goto out_close;
	}
	file->is_device = S_ISBLK(st.st_mode);
	*err = 0;
	return file;

out_close:
	close(file->fd);
out_free:
	free(file);
	return NULL;
}

void bsu_file_free(struct bsu_file *file)
{
	if (!file)
		return;
	close(file->fd);
	free(file);
}

void bsu_file_set_storage(struct bsu_file *file)
{
	file->is_storage = true;
}

/* Granule of O_DIRECT on a regular file; 4096 is right everywhere, if not the best. */
static uint32_t direct_granule(int fd)
{
#ifdef STATX_DIOALIGN
	struct statx stx;

	if (!statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &stx) &&
	    stx.stx_mask & STATX_DIOALIGN && stx.stx_dio_offset_align)
		return stx.stx_dio_offset_align;
#else
	(void)fd;
#endif
	return 4096;
}

int bsu_file_info(const struct bsu_file *file, struct bsu_file_info *out)
{
	int flags = fcntl(file->fd, F_GETFL);
	struct stat st;
	int block;

	if (flags < 0)
		return -errno;
	memset(out, 0, sizeof(*out));
	out->is_device = file->is_device;
	out->direct = flags & O_DIRECT;
	if (file->is_device) {
		if (ioctl(file->fd, BLKGETSIZE64, &out->size) || ioctl(file->fd, BLKSSZGET, &block))
			return -errno;
		out->block = (uint32_t)block;
		return 0;
	}
	if (fstat(file->fd, &st))
		return -errno;
	out->size = (uint64_t)st.st_size;
	out->block = out->direct ? direct_granule(file->fd) : 512;
	return 0;
}
