/* SPDX-License-Identifier: MIT */
/* A filtered device with its snapshots, all in memory of this process. */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "driver.h"
#include "io/file.h"

#define UNIT 4096u
#define TRACKING_BLOCK 65536u
#define PORTIONS 4
#define SPARE (64u << 20)

static uint64_t bitmap_bytes(uint64_t size)
{
	uint64_t bytes = size / TRACKING_BLOCK / 8 + 1;

	return (bytes + UNIT - 1) / UNIT * UNIT;
}

/* As bsu_file_new(), which refuses what is no disk: /dev/zero ends each I/O at once. */
struct bsu_file *file_open(const char *path, bool storage)
{
	struct bsu_file *file = calloc(1, sizeof(*file));
	int fd = open(path, O_RDWR | O_DIRECT | O_CLOEXEC);

	if (fd < 0 && errno == EINVAL)
		fd = open(path, O_RDWR | O_CLOEXEC);
	must(file ? 0 : -ENOMEM, path);
	must(fd < 0 ? -errno : 0, path);
	file->fd = fd;
	file->is_storage = storage;
	return file;
}

/* What stands for a file that outlives the process. */
static int buffers_new(void)
{
	int fd = memfd_create("buffers", MFD_CLOEXEC);

	must(fd < 0 ? -errno : 0, "buffers");
	must(-posix_fallocate(fd, 0, (off_t)bsu_thread_buffers_bytes(0)), "buffers");
	return fd;
}

void disk_make(struct disk *disk, const struct options *options)
{
	const struct bsu_thread_config thread = { .cpu = options->cpu, .lock_fd = -1, .buffers_fd = buffers_new() };
	struct bsu_device_config config = {
		.size = options->area, .block = 512, .unit = UNIT,
	};
	int err = 0;

	disk->thread = bsu_thread_start(&thread, &err);
	must(err, "thread");
	close(thread.buffers_fd);
	if (options->target != TARGET_NULL) {
		disk->origin = file_open(options->origin, false);
		config.origin = disk->origin;
		config.tracking_block = TRACKING_BLOCK;
		config.bitmap = new_memory(bitmap_bytes(options->area));
		config.swallowed = new_memory(bitmap_bytes(options->area));
	}
	disk->device = bsu_device_new(&config, &err);
	must(err, "device");
}

static struct bsu_image *take(struct disk *disk, const struct bsu_image_config *config, uint64_t size)
{
	void *bitmap = new_memory(bitmap_bytes(size));
	uint64_t gate_ns, writes_ns;
	struct bsu_image *image;
	unsigned int late;
	int err = 0;

	image = bsu_image_new(config, &err);
	must(err, "image");
	must(bsu_prepare_take(disk->device, image), "prepare");
	must(bsu_switch_all(&disk->device, &bitmap, 1, 2000, NULL, &gate_ns, &writes_ns, &late), "switch");
	must(bsu_switch_settle(disk->device, 2000), "settle");
	return image;
}

void disk_hold(struct disk *disk, const struct options *options)
{
	struct bsu_storage_config storage = { .unit = UNIT };
	struct bsu_image_config image = { .device = disk->device };
	uint64_t room = options->area + SPARE;
	size_t state = bsu_image_state_bytes(options->area, UNIT);
	int err = 0;

	if (!options->held)
		return;
	storage.state = new_memory((bsu_storage_state_bytes() + UNIT - 1) / UNIT * UNIT);
	image.storage = bsu_storage_new(&storage, &err);
	must(err, "storage");
	disk->store = file_open(options->storage, true);
	must(bsu_storage_add_area(image.storage, disk->store, 0, room,
				  new_memory(bsu_storage_records_bytes(image.storage, room))), "area");
	image.arena = bsu_arena_new();
	for (int i = 0; i < PORTIONS; i++)
		must(bsu_arena_add(image.arena, new_memory(BSU_ARENA_PORTION)), "map memory");
	for (image.serial = 1; image.serial <= options->held; image.serial++) {
		image.state = new_memory(state);
		if (image.serial == 1)
			disk->oldest = take(disk, &image, options->area);
		else
			take(disk, &image, options->area);
	}
}
