/* SPDX-License-Identifier: MIT */
/*
 * The part of the kernel's ublk interface that is used here, declared by
 * ourselves: build hosts have headers far older than the kernels we run on.
 * Names and values are the kernel's (linux/ublk_cmd.h); include one of the two
 * headers, not both.
 */
#ifndef BSU_UBLK_ABI_H
#define BSU_UBLK_ABI_H

#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/ioctl.h>

/* ---- control commands: uring_cmd on /dev/ublk-control, 128-byte SQE ---- */

struct ublksrv_ctrl_cmd {
	uint32_t dev_id;
	uint16_t queue_id;		/* UINT16_MAX unless the command is for a queue */
	uint16_t len;
	uint64_t addr;
	uint64_t data[1];
	uint16_t dev_path_len;		/* unprivileged devices only */
	uint16_t pad;
	uint32_t reserved;
};

#define UBLK_U_CMD_GET_QUEUE_AFFINITY	_IOR('u', 0x01, struct ublksrv_ctrl_cmd)
#define UBLK_U_CMD_GET_DEV_INFO		_IOR('u', 0x02, struct ublksrv_ctrl_cmd)
#define UBLK_U_CMD_ADD_DEV		_IOWR('u', 0x04, struct ublksrv_ctrl_cmd)
#define UBLK_U_CMD_DEL_DEV		_IOWR('u', 0x05, struct ublksrv_ctrl_cmd)
#define UBLK_U_CMD_START_DEV		_IOWR('u', 0x06, struct ublksrv_ctrl_cmd)
#define UBLK_U_CMD_STOP_DEV		_IOWR('u', 0x07, struct ublksrv_ctrl_cmd)
#define UBLK_U_CMD_SET_PARAMS		_IOWR('u', 0x08, struct ublksrv_ctrl_cmd)
#define UBLK_U_CMD_GET_PARAMS		_IOR('u', 0x09, struct ublksrv_ctrl_cmd)
#define UBLK_U_CMD_START_USER_RECOVERY	_IOWR('u', 0x10, struct ublksrv_ctrl_cmd)
#define UBLK_U_CMD_END_USER_RECOVERY	_IOWR('u', 0x11, struct ublksrv_ctrl_cmd)
#define UBLK_U_CMD_GET_FEATURES		_IOR('u', 0x13, struct ublksrv_ctrl_cmd)
#define UBLK_U_CMD_DEL_DEV_ASYNC	_IOR('u', 0x14, struct ublksrv_ctrl_cmd)
#define UBLK_U_CMD_UPDATE_SIZE		_IOWR('u', 0x15, struct ublksrv_ctrl_cmd)
#define UBLK_U_CMD_QUIESCE_DEV		_IOWR('u', 0x16, struct ublksrv_ctrl_cmd)
#define UBLK_U_CMD_TRY_STOP_DEV		_IOWR('u', 0x17, struct ublksrv_ctrl_cmd)

struct ublksrv_ctrl_dev_info {
	uint16_t nr_hw_queues;
	uint16_t queue_depth;
	uint16_t state;
	uint16_t pad0;
	uint32_t max_io_buf_bytes;
	uint32_t dev_id;
	int32_t ublksrv_pid;
	uint32_t pad1;
	uint64_t flags;
	uint64_t ublksrv_flags;		/* the server's own, the kernel only keeps it */
	uint32_t owner_uid;
	uint32_t owner_gid;
	uint64_t reserved1;
	uint64_t reserved2;
};

#define UBLK_S_DEV_DEAD			0
#define UBLK_S_DEV_LIVE			1
#define UBLK_S_DEV_QUIESCED		2
#define UBLK_S_DEV_FAIL_IO		3

#define UBLK_FEATURES_LEN		8

#define UBLK_F_SUPPORT_ZERO_COPY	(1ULL << 0)
#define UBLK_F_URING_CMD_COMP_IN_TASK	(1ULL << 1)
#define UBLK_F_NEED_GET_DATA		(1ULL << 2)
#define UBLK_F_USER_RECOVERY		(1ULL << 3)
#define UBLK_F_USER_RECOVERY_REISSUE	(1ULL << 4)
#define UBLK_F_UNPRIVILEGED_DEV		(1ULL << 5)
#define UBLK_F_CMD_IOCTL_ENCODE		(1ULL << 6)
#define UBLK_F_USER_COPY		(1ULL << 7)
#define UBLK_F_ZONED			(1ULL << 8)
#define UBLK_F_USER_RECOVERY_FAIL_IO	(1ULL << 9)
#define UBLK_F_UPDATE_SIZE		(1ULL << 10)
#define UBLK_F_AUTO_BUF_REG		(1ULL << 11)
#define UBLK_F_QUIESCE			(1ULL << 12)
#define UBLK_F_PER_IO_DAEMON		(1ULL << 13)
#define UBLK_F_BUF_REG_OFF_DAEMON	(1ULL << 14)
#define UBLK_F_BATCH_IO			(1ULL << 15)
#define UBLK_F_INTEGRITY		(1ULL << 16)
#define UBLK_F_SAFE_STOP_DEV		(1ULL << 17)
#define UBLK_F_NO_AUTO_PART_SCAN	(1ULL << 18)
#define UBLK_F_SHMEM_ZC			(1ULL << 19)
#define UBLK_F_IO_DESC_SIZE		(1ULL << 20)

/* ---- parameters of a device ---- */

#define UBLK_ATTR_READ_ONLY		(1u << 0)
#define UBLK_ATTR_ROTATIONAL		(1u << 1)
#define UBLK_ATTR_VOLATILE_CACHE	(1u << 2)
#define UBLK_ATTR_FUA			(1u << 3)

struct ublk_param_basic {
	uint32_t attrs;
	uint8_t logical_bs_shift;
	uint8_t physical_bs_shift;
	uint8_t io_opt_shift;
	uint8_t io_min_shift;
	uint32_t max_sectors;
	uint32_t chunk_sectors;
	uint64_t dev_sectors;
	uint64_t virt_boundary_mask;
};

struct ublk_param_discard {
	uint32_t discard_alignment;
	uint32_t discard_granularity;
	uint32_t max_discard_sectors;
	uint32_t max_write_zeroes_sectors;
	uint16_t max_discard_segments;
	uint16_t reserved0;
};

struct ublk_param_devt {
	uint32_t char_major;
	uint32_t char_minor;
	uint32_t disk_major;
	uint32_t disk_minor;
};

struct ublk_param_zoned {
	uint32_t max_open_zones;
	uint32_t max_active_zones;
	uint32_t max_zone_append_sectors;
	uint8_t reserved[20];
};

struct ublk_param_dma_align {
	uint32_t alignment;
	uint8_t pad[4];
};

#define UBLK_MIN_SEGMENT_SIZE		4096

struct ublk_param_segment {
	uint64_t seg_boundary_mask;
	uint32_t max_segment_size;
	uint16_t max_segments;
	uint8_t pad[2];
};

struct ublk_param_integrity {
	uint32_t flags;
	uint16_t max_integrity_segments;
	uint8_t interval_exp;
	uint8_t metadata_size;
	uint8_t pi_offset;
	uint8_t csum_type;
	uint8_t tag_size;
	uint8_t pad[5];
};

#define UBLK_PARAM_TYPE_BASIC		(1u << 0)
#define UBLK_PARAM_TYPE_DISCARD		(1u << 1)
#define UBLK_PARAM_TYPE_DEVT		(1u << 2)
#define UBLK_PARAM_TYPE_ZONED		(1u << 3)
#define UBLK_PARAM_TYPE_DMA_ALIGN	(1u << 4)
#define UBLK_PARAM_TYPE_SEGMENT		(1u << 5)
#define UBLK_PARAM_TYPE_INTEGRITY	(1u << 6)

struct ublk_params {
	uint32_t len;
	uint32_t types;
	struct ublk_param_basic basic;
	struct ublk_param_discard discard;
	struct ublk_param_devt devt;
	struct ublk_param_zoned zoned;
	struct ublk_param_dma_align dma;
	struct ublk_param_segment seg;
	struct ublk_param_integrity integrity;
};

/* ---- I/O commands: uring_cmd on /dev/ublkcN ---- */

struct ublksrv_io_cmd {
	uint16_t q_id;
	uint16_t tag;
	int32_t result;			/* of COMMIT: bytes, or a negative errno */
	union {
		uint64_t addr;
		uint64_t zone_append_lba;
	};
};

#define UBLK_U_IO_FETCH_REQ		_IOWR('u', 0x20, struct ublksrv_io_cmd)
#define UBLK_U_IO_COMMIT_AND_FETCH_REQ	_IOWR('u', 0x21, struct ublksrv_io_cmd)
#define UBLK_U_IO_REGISTER_IO_BUF	_IOWR('u', 0x23, struct ublksrv_io_cmd)
#define UBLK_U_IO_UNREGISTER_IO_BUF	_IOWR('u', 0x24, struct ublksrv_io_cmd)

#define UBLK_IO_RES_OK			0
#define UBLK_IO_RES_NEED_GET_DATA	1
#define UBLK_IO_RES_ABORT		(-ENODEV)

#define UBLK_IO_OP_READ			0
#define UBLK_IO_OP_WRITE		1
#define UBLK_IO_OP_FLUSH		2
#define UBLK_IO_OP_DISCARD		3
#define UBLK_IO_OP_WRITE_SAME		4
#define UBLK_IO_OP_WRITE_ZEROES		5

/* Bits of the whole op_flags word, the op being its low 8 bits. */
#define UBLK_IO_F_FAILFAST_DEV		(1u << 8)
#define UBLK_IO_F_FAILFAST_TRANSPORT	(1u << 9)
#define UBLK_IO_F_FAILFAST_DRIVER	(1u << 10)
#define UBLK_IO_F_META			(1u << 11)
#define UBLK_IO_F_FUA			(1u << 13)
#define UBLK_IO_F_NOUNMAP		(1u << 15)
#define UBLK_IO_F_SWAP			(1u << 16)
#define UBLK_IO_F_NEED_REG_BUF		(1u << 17)
#define UBLK_IO_F_INTEGRITY		(1u << 18)
#define UBLK_IO_F_SHMEM_ZC		(1u << 19)

/*
 * One for each tag, in an array shared with the kernel; the distance between
 * two of them may be larger than this struct.
 */
struct ublksrv_io_desc {
	uint32_t op_flags;
	union {
		uint32_t nr_sectors;
		uint32_t nr_zones;
	};
	uint64_t start_sector;
	uint64_t addr;
};

#define UBLK_AUTO_BUF_REG_FALLBACK	(1 << 0)

struct ublk_auto_buf_reg {
	uint16_t index;
	uint8_t flags;
	uint8_t reserved0;
	uint32_t reserved1;
};

/* FETCH and COMMIT carry it in sqe->addr. */
static inline uint64_t ublk_auto_buf_reg_to_sqe_addr(const struct ublk_auto_buf_reg *reg)
{
	return reg->index | (uint64_t)reg->flags << 16 | (uint64_t)reg->reserved0 << 24 |
	       (uint64_t)reg->reserved1 << 32;
}

/* ---- offsets in /dev/ublkcN ---- */

/* mmap: the descriptor array of a queue. */
#define UBLKSRV_CMD_BUF_OFFSET		0
/* pread and pwrite: the data of a request (USER_COPY). */
#define UBLKSRV_IO_BUF_OFFSET		0x80000000

#define UBLK_MAX_QUEUE_DEPTH		4096
#define UBLK_IO_BUF_OFF			0
#define UBLK_IO_BUF_BITS		25
#define UBLK_TAG_OFF			UBLK_IO_BUF_BITS
#define UBLK_TAG_BITS			16
#define UBLK_QID_OFF			(UBLK_TAG_OFF + UBLK_TAG_BITS)
#define UBLK_QID_BITS			12
#define UBLK_MAX_NR_QUEUES		(1U << UBLK_QID_BITS)

/* ---- the layout is the kernel's ---- */

#define BSU_LAYOUT(type, field, offset) \
	_Static_assert(offsetof(struct type, field) == (offset), #type "." #field)

_Static_assert(sizeof(struct ublksrv_ctrl_cmd) == 32, "ublksrv_ctrl_cmd");
BSU_LAYOUT(ublksrv_ctrl_cmd, queue_id, 4);
BSU_LAYOUT(ublksrv_ctrl_cmd, len, 6);
BSU_LAYOUT(ublksrv_ctrl_cmd, addr, 8);
BSU_LAYOUT(ublksrv_ctrl_cmd, data, 16);
BSU_LAYOUT(ublksrv_ctrl_cmd, dev_path_len, 24);

_Static_assert(sizeof(struct ublksrv_ctrl_dev_info) == 64, "ublksrv_ctrl_dev_info");
BSU_LAYOUT(ublksrv_ctrl_dev_info, state, 4);
BSU_LAYOUT(ublksrv_ctrl_dev_info, max_io_buf_bytes, 8);
BSU_LAYOUT(ublksrv_ctrl_dev_info, dev_id, 12);
BSU_LAYOUT(ublksrv_ctrl_dev_info, ublksrv_pid, 16);
BSU_LAYOUT(ublksrv_ctrl_dev_info, flags, 24);
BSU_LAYOUT(ublksrv_ctrl_dev_info, ublksrv_flags, 32);
BSU_LAYOUT(ublksrv_ctrl_dev_info, owner_uid, 40);

_Static_assert(sizeof(struct ublk_param_basic) == 32, "ublk_param_basic");
BSU_LAYOUT(ublk_param_basic, logical_bs_shift, 4);
BSU_LAYOUT(ublk_param_basic, io_opt_shift, 6);
BSU_LAYOUT(ublk_param_basic, io_min_shift, 7);
BSU_LAYOUT(ublk_param_basic, max_sectors, 8);
BSU_LAYOUT(ublk_param_basic, chunk_sectors, 12);
BSU_LAYOUT(ublk_param_basic, dev_sectors, 16);
BSU_LAYOUT(ublk_param_basic, virt_boundary_mask, 24);

_Static_assert(sizeof(struct ublk_param_discard) == 20, "ublk_param_discard");
BSU_LAYOUT(ublk_param_discard, max_write_zeroes_sectors, 12);
BSU_LAYOUT(ublk_param_discard, max_discard_segments, 16);

_Static_assert(sizeof(struct ublk_param_devt) == 16, "ublk_param_devt");
_Static_assert(sizeof(struct ublk_param_zoned) == 32, "ublk_param_zoned");
_Static_assert(sizeof(struct ublk_param_dma_align) == 8, "ublk_param_dma_align");
_Static_assert(sizeof(struct ublk_param_segment) == 16, "ublk_param_segment");
BSU_LAYOUT(ublk_param_segment, max_segments, 12);
_Static_assert(sizeof(struct ublk_param_integrity) == 16, "ublk_param_integrity");

_Static_assert(sizeof(struct ublk_params) == 152, "ublk_params");
BSU_LAYOUT(ublk_params, basic, 8);
BSU_LAYOUT(ublk_params, discard, 40);
BSU_LAYOUT(ublk_params, devt, 60);
BSU_LAYOUT(ublk_params, zoned, 76);
BSU_LAYOUT(ublk_params, dma, 108);
BSU_LAYOUT(ublk_params, seg, 120);
BSU_LAYOUT(ublk_params, integrity, 136);

_Static_assert(sizeof(struct ublksrv_io_cmd) == 16, "ublksrv_io_cmd");
BSU_LAYOUT(ublksrv_io_cmd, tag, 2);
BSU_LAYOUT(ublksrv_io_cmd, result, 4);
BSU_LAYOUT(ublksrv_io_cmd, addr, 8);

_Static_assert(sizeof(struct ublksrv_io_desc) == 24, "ublksrv_io_desc");
BSU_LAYOUT(ublksrv_io_desc, nr_sectors, 4);
BSU_LAYOUT(ublksrv_io_desc, start_sector, 8);
BSU_LAYOUT(ublksrv_io_desc, addr, 16);

_Static_assert(sizeof(struct ublk_auto_buf_reg) == 8, "ublk_auto_buf_reg");
BSU_LAYOUT(ublk_auto_buf_reg, flags, 2);

#undef BSU_LAYOUT

#endif
