/* SPDX-License-Identifier: MIT */
/*
 * Layout of the state that outlives a process: files of a tmpfs, mapped shared
 * by the io process (which writes) and the control process (which reads).
 * All memory is allocated and zeroed before it is mapped. Offsets and indices,
 * never pointers.
 */
#ifndef BSU_STATE_H
#define BSU_STATE_H

#include <stdatomic.h>
#include <stdint.h>

#define BSU_STATE_VERSION 4u
#define BSU_STORAGE_MAGIC 0x53555342u	/* "BSUS" */
#define BSU_IMAGE_MAGIC 0x49555342u	/* "BSUI" */

/*
 * What a leaf holds for a unit. A place is stored plus one, so that zeroed
 * memory means "not preserved".
 */
#define BSU_SLOT_EMPTY 0u
#define BSU_SLOT_BAD 0xffffffffu	/* the origin could not be read there */
#define BSU_SLOT_ZERO 0xfffffffcu	/* two bits from BAD; zeroes: written to the image, or exempt from preserving */
#define BSU_PLACES_MAX 0xfffffff0u

/*
 * The two-level map: directory entry (256 MiB of device at 4 KiB units) ->
 * table page of 1024 leaf indices -> leaf of 64 slots (256 KiB of device).
 * Directory and table entries are arena indices plus one; 0 means absent.
 * BSU_LEAF_ZERO stands for a leaf whose slots are all BSU_SLOT_ZERO.
 */
#define BSU_LEAF_UNITS 64u
#define BSU_TABLE_LEAVES 1024u
#define BSU_TABLE_UNITS (BSU_LEAF_UNITS * BSU_TABLE_LEAVES)
#define BSU_LEAF_ZERO 0xffffffffu

struct bsu_leaf {
	_Atomic uint32_t slot[BSU_LEAF_UNITS];
};

struct bsu_table {
	_Atomic uint32_t leaf[BSU_TABLE_LEAVES];
};

_Static_assert(sizeof(struct bsu_leaf) == 256, "16 leaves fill a map page");
_Static_assert(sizeof(struct bsu_table) == 4096, "a table fills a map page");

/*
 * What a place holds; complete before the place is published, and cleared when
 * it is given back: so after a death maps can be checked against records.
 * @owner: serial of the image in the upper 24 bits, then one bit for what was
 * written to the image itself, then the unit. @check covers the rest.
 */
#define BSU_OWNER_UNIT_BITS 39
#define BSU_OWNER_WRITTEN (1ull << BSU_OWNER_UNIT_BITS)
#define BSU_OWNER_SERIAL_SHIFT (BSU_OWNER_UNIT_BITS + 1)

struct bsu_record {
	uint64_t owner;
	uint32_t data_crc;
	uint32_t check;
};

_Static_assert(sizeof(struct bsu_record) == 16, "0.4 % of the preserved bytes");

#define BSU_AREAS_MAX 4096u

struct bsu_storage_state {
	uint32_t magic;
	uint32_t version;
	uint32_t unit;
	uint32_t areas;
	_Atomic uint64_t high_water;	/* no place from here on was ever given out */
	_Atomic uint64_t capacity;	/* places */
	_Atomic uint64_t used;		/* places given out at the moment */
	_Atomic uint32_t full;		/* a copy found no room */
	_Atomic uint32_t waiting;	/* requests that wait for room */
	_Atomic uint64_t high_water_again;	/* the same: were it lower, places in use would be given out */
	uint32_t pad[2];
	_Atomic uint32_t area_used[BSU_AREAS_MAX];
};

_Static_assert(sizeof(struct bsu_storage_state) == 64 + 4 * BSU_AREAS_MAX, "shared with the control process");

/*
 * Units that were released early: their data is in a buffer, and may not yet be
 * at their places. There is an entry for each page of a thread's buffers that
 * the difference storage is written from; that of the first page of a buffer
 * tells what it holds. @units is set before the records of the places are, and
 * cleared when the storage write has ended.
 */
struct bsu_unstored {
	uint64_t storage;		/* its number */
	uint32_t place;
	_Atomic uint32_t units;		/* 0: the data is nowhere else needed */
};

_Static_assert(sizeof(struct bsu_unstored) == 16, "256 entries fill a page");

#define BSU_IMAGE_HEADER 4096u

struct bsu_image_state {
	uint32_t magic;
	uint32_t version;
	uint64_t size;
	uint32_t unit;
	uint32_t serial;
	_Atomic uint32_t status;	/* enum bsu_image_status */
	_Atomic int32_t error;		/* errno, positive, 0 while active */
	_Atomic uint64_t preserved;	/* units; here and below never more than there are: counted afterwards */
	uint64_t directory_entries;
	_Atomic uint64_t written;	/* units that were written to the image itself */
	_Atomic uint32_t releasing;	/* directory entry plus one, the places of which are being given back; 0: none yet */
	_Atomic uint32_t exempt;	/* units, or more than that counts */
	/*
	 * From BSU_IMAGE_HEADER on: _Atomic uint32_t directory[] of the map of what
	 * was preserved, then that of the map of what was written to the image.
	 */
};

_Static_assert(sizeof(struct bsu_image_state) == 64, "shared with the control process");

#endif
