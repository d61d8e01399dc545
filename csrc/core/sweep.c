/* SPDX-License-Identifier: MIT */
/*
 * What a former process left, checked in portions while the devices are served
 * again: maps against records, records against maps; then what neither holds is
 * free. New places and new map memory come from elsewhere meanwhile, so only
 * the slots of adopted tables and the records below the former high-water mark
 * are looked at.
 *
 *   SLOTS (of each table of each image) -> RECORDS (of each area) -> PAGES -> DONE
 */
#include <stdlib.h>
#include <string.h>

#include "arena.h"
#include "internal.h"

#define RECORDS_SLICE 16384u
#define PAGES_SLICE 1024u

enum phase {
	SLOTS = 0,
	RECORDS,
	PAGES,
	DONE,
};

struct bsu_sweep {
	struct bsu_arena *arena;
	uint32_t *lost;
	unsigned int nr_lost;
	struct bsu_image **image;
	unsigned int nr_images;
	struct bsu_storage **storage;
	unsigned int nr_storages;
	enum phase phase;
	unsigned int at;	/* image or storage */
	bool written;		/* which of its maps */
	uint64_t entry;		/* directory entry, or area */
	uint64_t found;		/* slots of that map */
	uint64_t exempt;	/* those of them that are */
	uint32_t place;		/* of the area; or page */
};

struct bsu_sweep *bsu_sweep_new(struct bsu_arena *arena, const uint32_t *lost, unsigned int nr_lost, int *err)
{
	struct bsu_sweep *sweep = calloc(1, sizeof(*sweep));

	*err = -ENOMEM;
	if (!sweep)
		return NULL;
	sweep->lost = calloc(nr_lost ? nr_lost : 1, sizeof(*lost));
	if (!sweep->lost) {
		free(sweep);
		return NULL;
	}
	if (nr_lost)
		memcpy(sweep->lost, lost, nr_lost * sizeof(*lost));
	sweep->nr_lost = nr_lost;
	sweep->arena = arena;
	/* Of an image that could not be adopted nothing is in use. */
	bsu_arena_use_nothing(arena);
	*err = 0;
	return sweep;
}

void bsu_sweep_free(struct bsu_sweep *sweep)
{
	if (!sweep)
		return;
	free(sweep->lost);
	free(sweep->image);
	free(sweep->storage);
	free(sweep);
}

int bsu_sweep_add_image(struct bsu_sweep *sweep, struct bsu_image *image)
{
	struct bsu_image **grown = realloc(sweep->image, (sweep->nr_images + 1) * sizeof(*grown));

	if (!grown)
		return -ENOMEM;
	sweep->image = grown;
	grown[sweep->nr_images++] = image;
	return 0;
}

int bsu_sweep_add_storage(struct bsu_sweep *sweep, struct bsu_storage *storage)
{
	struct bsu_storage **grown = realloc(sweep->storage, (sweep->nr_storages + 1) * sizeof(*grown));

	if (!grown)
		return -ENOMEM;
	sweep->storage = grown;
	/* Areas that are added from now on were never used before. */
	storage->adopted = (uint32_t)min_u64(storage->adopted, atomic_load(&storage->state->capacity));
	for (unsigned int at = 0; at < atomic_load(&storage->nr_areas); at++) {
		struct bsu_area *area = &storage->area[at];

		if (area->adopted && !area->kept)
			area->kept = calloc((area->adopted + 63) / 64, sizeof(*area->kept));
		if (area->adopted && !area->kept)
			return -ENOMEM;
	}
	grown[sweep->nr_storages++] = storage;
	return 0;
}

/* What is older in the chain may read through its map. */
static void break_upto(const struct bsu_image *image)
{
	const struct bsu_chain *chain = bsu_view_chain(atomic_load(&image->dev->view), image->storage);

	for (unsigned int k = 0; chain && k < chain->nr_images; k++) {
		if (!MUTANT(BSU_MUTANT_BREAK_ONE) || chain->image[k] == image)
			bsu_image_break(chain->image[k], BSU_IMAGE_CORRUPTED, EBADMSG);
		if (chain->image[k] == image)
			break;
	}
}

/* Whose the lost data were cannot be told. */
static void break_all(const struct bsu_sweep *sweep, const struct bsu_storage *storage)
{
	for (unsigned int i = 0; i < sweep->nr_images; i++)
		if (sweep->image[i]->storage == storage)
			bsu_image_break(sweep->image[i], BSU_IMAGE_CORRUPTED, EBADMSG);
}

static bool is_kept(const struct bsu_area *area, uint32_t at)
{
	return area->kept[at / 64] >> (at % 64) & 1;
}

/* Returns true when something else names the place already. */
static bool keep(struct bsu_area *area, uint32_t at)
{
	bool kept;

	if (at >= area->adopted)
		return false;
	kept = is_kept(area, at);
	area->kept[at / 64] |= 1ull << (at % 64);
	return kept;
}

static struct bsu_image *find_image(const struct bsu_sweep *sweep, uint32_t serial)
{
	for (unsigned int i = 0; i < sweep->nr_images; i++)
		if (sweep->image[i]->serial == serial)
			return sweep->image[i];
	return NULL;
}

/* What was written to an image is its own; what was preserved may have been handed over, within the device. */
static bool is_owner(const struct bsu_sweep *sweep, const struct bsu_record *record, const struct bsu_image *image, bool written)
{
	uint32_t serial = (uint32_t)(record->owner >> BSU_OWNER_SERIAL_SHIFT);
	const struct bsu_image *owner;

	if (!(record->owner & BSU_OWNER_WRITTEN) == written)
		return false;
	if (written || serial == image->serial)
		return serial == image->serial || MUTANT(BSU_MUTANT_SERIAL_UNCHECKED);
	owner = find_image(sweep, serial);
	return !owner || owner->dev == image->dev;
}

/* A hand-over was broken off: an older image had been given the place, and this one, which goes, had not yet let it go. */
static bool is_handed_over(const struct bsu_image *image, bool written, uint64_t unit, uint32_t slot)
{
	const struct bsu_chain *chain = bsu_view_chain(atomic_load(&image->dev->view), image->storage);

	if (written || bsu_image_status(image, NULL) != BSU_IMAGE_GONE)
		return MUTANT(BSU_MUTANT_NAMED_TWICE);
	for (unsigned int k = 0; chain && k < chain->nr_images && chain->image[k] != image; k++)
		if (bsu_map_get(&chain->image[k]->map, unit) == slot)
			return true;
	return MUTANT(BSU_MUTANT_NAMED_TWICE);
}

/* Whether @slot names a place that holds @unit; then it is kept. */
static bool slot_fits(const struct bsu_sweep *sweep, const struct bsu_image *image, uint32_t slot, uint64_t unit, bool written)
{
	struct bsu_storage *storage = image->storage;
	struct bsu_area *area;
	const struct bsu_record *record;
	uint32_t at;

	if (slot - 1 >= atomic_load_explicit(&storage->state->capacity, memory_order_acquire))
		return false;
	area = (struct bsu_area *)bsu_storage_area(storage, slot - 1);
	at = slot - 1 - area->first;
	if (at >= area->adopted && !bsu_storage_is_given(storage, slot - 1))
		return false;
	record = &area->records[at];
	if (!MUTANT(BSU_MUTANT_SWEEP_TRUSTS_SLOTS) &&
	    (!bsu_record_is_whole(record) || bsu_record_unit(record) != unit || !is_owner(sweep, record, image, written)))
		return false;
	return !keep(area, at) || is_handed_over(image, written, unit, slot);
}

/* A slot that was published meanwhile fits as well; one that does not fit is nobody's work. */
static void check_slot(const struct bsu_sweep *sweep, struct bsu_image *image, bool written, uint64_t unit,
		       _Atomic uint32_t *where)
{
	uint32_t slot = atomic_load_explicit(where, memory_order_acquire);

	if (slot == BSU_SLOT_EMPTY || slot == BSU_SLOT_BAD || slot == BSU_SLOT_ZERO)
		return;
	if (slot_fits(sweep, image, slot, unit, written))
		return;
	if (MUTANT(BSU_MUTANT_BAD_UNBROKEN))
		;
	else if (written)
		bsu_image_break(image, BSU_IMAGE_CORRUPTED, EBADMSG);
	else
		break_upto(image);
	/* After that: who finds it bad finds the image broken. */
	atomic_store(where, BSU_SLOT_BAD);
}

static void check_leaf(struct bsu_sweep *sweep, struct bsu_image *image, bool written, uint64_t unit, struct bsu_leaf *leaf)
{
	for (unsigned int i = 0; i < BSU_LEAF_UNITS; i++) {
		uint32_t slot = atomic_load_explicit(&leaf->slot[i], memory_order_relaxed);

		check_slot(sweep, image, written, unit + i, &leaf->slot[i]);
		if (slot == BSU_SLOT_ZERO && !written)
			sweep->exempt++;
		else
			sweep->found += slot != BSU_SLOT_EMPTY;
	}
}

static void check_table(struct bsu_sweep *sweep, struct bsu_image *image, bool written, uint64_t entry)
{
	const struct bsu_map *map = written ? &image->written : &image->map;
	uint32_t index = atomic_load_explicit(&map->directory[entry], memory_order_acquire);
	struct bsu_table *table;

	/* What two maps have in common has been gone through with the older one. */
	if (!bsu_arena_is_adopted_table(map->arena, index) || bsu_arena_use_table(map->arena, index))
		return;
	table = bsu_arena_table(map->arena, index);
	for (unsigned int at = 0; at < BSU_TABLE_LEAVES; at++) {
		uint32_t leaf = atomic_load_explicit(&table->leaf[at], memory_order_acquire);
		uint64_t unit = (entry * BSU_TABLE_LEAVES + at) * BSU_LEAF_UNITS;

		if (leaf == BSU_LEAF_ZERO)
			sweep->exempt += BSU_LEAF_UNITS;
		else if (bsu_arena_is_adopted_leaf(map->arena, leaf) && !bsu_arena_use_leaf(map->arena, leaf))
			check_leaf(sweep, image, written, unit, bsu_arena_leaf(map->arena, leaf));
	}
}

/* Zeroes and what could not be read have no records: that they are all there is known by their number. */
static void check_number(const struct bsu_sweep *sweep, struct bsu_image *image)
{
	bool written = sweep->written;

	if (bsu_image_status(image, NULL) != BSU_IMAGE_ACTIVE ||
	    (sweep->found >= (written ? image->least_written : image->least_preserved) &&
	     (written || sweep->exempt >= image->least_exempt)))
		return;
	if (written)
		bsu_image_break(image, BSU_IMAGE_CORRUPTED, EBADMSG);
	else
		break_upto(image);
}

static void step_slots(struct bsu_sweep *sweep)
{
	struct bsu_image *image;

	if (sweep->at == sweep->nr_images) {
		sweep->phase = RECORDS;
		sweep->at = 0;
		sweep->entry = 0;
		return;
	}
	image = sweep->image[sweep->at];
	check_table(sweep, image, sweep->written, sweep->entry);
	if (++sweep->entry < image->map.entries)
		return;
	check_number(sweep, image);
	sweep->found = sweep->exempt = 0;
	sweep->entry = 0;
	sweep->at += sweep->written;
	sweep->written = !sweep->written;
}

static bool is_lost(const struct bsu_sweep *sweep, uint32_t serial)
{
	for (unsigned int i = 0; i < sweep->nr_lost; i++)
		if (sweep->lost[i] == serial)
			return true;
	return false;
}

/* The record was complete, so was the place; publishing was to come. */
static bool publish(struct bsu_map *map, struct bsu_area *area, uint32_t at, uint64_t unit, _Atomic uint64_t *count)
{
	if (MUTANT(BSU_MUTANT_NO_ROLL_FORWARD))
		return true;
	if (bsu_map_reserve(map, unit, 1))
		return false;
	if (MUTANT(BSU_MUTANT_ROLL_FORWARD_OVER))
		bsu_map_publish(map, unit, BSU_SLOT_EMPTY);
	if (bsu_map_publish_first(map, unit, area->first + at + 1)) {
		if (!MUTANT(BSU_MUTANT_ROLLED_FORWARD_FREE))
			keep(area, at);
		atomic_fetch_add_explicit(count, 1, memory_order_release);
	}
	return true;
}

/* Another place holds the unit: the copy was begun again, of the same old data. */
static bool is_copied_again(const struct bsu_storage *storage, uint32_t slot, const struct bsu_record *record)
{
	const struct bsu_area *area = bsu_storage_area(storage, slot - 1);

	return area->records[slot - 1 - area->first].data_crc == record->data_crc;
}

/* The older image of its chain that an image that goes had handed over to has the unit, or ends before it, or there is none. */
static bool heir_has(const struct bsu_image *image, uint64_t unit)
{
	const struct bsu_chain *chain = bsu_view_chain(atomic_load(&image->dev->view), image->storage);

	for (unsigned int k = 0; chain && k < chain->nr_images; k++)
		if (chain->image[k] == image)
			return !k || unit / BSU_TABLE_UNITS >= chain->image[k - 1]->map.entries ||
			       bsu_map_get(&chain->image[k - 1]->map, unit) != BSU_SLOT_EMPTY;
	return false;
}

/* A release that was broken off had taken a table out of its map, and not cleared the records of all the places. */
static bool had_let_go(const struct bsu_image *image, uint64_t unit, bool written)
{
	return bsu_image_status(image, NULL) == BSU_IMAGE_GONE &&
	       atomic_load(&image->state->releasing) == unit / BSU_TABLE_UNITS + 1 && (written || heir_has(image, unit));
}

/* Whoever it was, had got the place from an image that has long gone. */
static bool was_being_released(const struct bsu_sweep *sweep, const struct bsu_storage *storage, uint64_t unit)
{
	for (unsigned int i = 0; i < sweep->nr_images && !MUTANT(BSU_MUTANT_RELEASE_IS_LOSS); i++)
		if (sweep->image[i]->storage == storage && had_let_go(sweep->image[i], unit, false))
			return true;
	return false;
}

/* A complete record that no slot names. */
static void check_record(struct bsu_sweep *sweep, struct bsu_storage *storage, struct bsu_area *area, uint32_t at)
{
	const struct bsu_record *record = &area->records[at];
	uint32_t serial = (uint32_t)(record->owner >> BSU_OWNER_SERIAL_SHIFT), slot;
	uint64_t unit = bsu_record_unit(record);
	struct bsu_image *image = find_image(sweep, serial);
	bool written = record->owner & BSU_OWNER_WRITTEN;
	bool fits = true;

	if (!image && (is_lost(sweep, serial) || was_being_released(sweep, storage, unit)))
		return;
	if (!image || image->storage != storage || unit >= bsu_image_units(image)) {
		break_all(sweep, storage);
		return;
	}
	if (had_let_go(image, unit, written))
		return;
	if (written) {
		if ((bsu_map_get(&image->written, unit) == BSU_SLOT_EMPTY || MUTANT(BSU_MUTANT_ROLL_FORWARD_OVER)) &&
		    !publish(&image->written, area, at, unit, &image->state->written))
			bsu_image_break(image, BSU_IMAGE_CORRUPTED, ENOMEM);
		return;
	}
	slot = bsu_map_get(&image->map, unit);
	if (slot == BSU_SLOT_EMPTY)
		fits = publish(&image->map, area, at, unit, &image->state->preserved);
	else if (bsu_slot_is_place(slot))
		fits = is_copied_again(storage, slot, record);
	else
		fits = slot == BSU_SLOT_BAD;
	if (!fits)
		break_upto(image);
}

static void step_records(struct bsu_sweep *sweep)
{
	struct bsu_storage *storage;
	struct bsu_area *area;
	uint32_t end;

	if (sweep->at == sweep->nr_storages) {
		sweep->phase = PAGES;
		sweep->place = 0;
		return;
	}
	storage = sweep->storage[sweep->at];
	if (sweep->entry == atomic_load(&storage->nr_areas)) {
		sweep->entry = 0;
		sweep->at++;
		return;
	}
	area = &storage->area[sweep->entry];
	end = (uint32_t)min_u64(area->adopted, (uint64_t)sweep->place + RECORDS_SLICE);
	for (; sweep->place < end; sweep->place++) {
		if (is_kept(area, sweep->place) || !bsu_record_is_whole(&area->records[sweep->place]) ||
		    MUTANT(BSU_MUTANT_SWEEP_TRUSTS_RECORDS))
			continue;
		check_record(sweep, storage, area, sweep->place);
		/* Should this process die before the quarantine ends, its successor may not know any more whose it was. */
		if (!is_kept(area, sweep->place))
			bsu_storage_forget(storage, area, sweep->place);
	}
	if (end == area->adopted) {
		sweep->place = 0;
		sweep->entry++;
	}
}

static void step_pages(struct bsu_sweep *sweep)
{
	struct bsu_arena *arena = sweep->arena;
	uint32_t pages = arena->adopted.pages;
	uint32_t end = (uint32_t)min_u64(pages, (uint64_t)sweep->place + PAGES_SLICE);

	/* The first pages are free last, and used first: so the last portions get empty. */
	for (; sweep->place < end; sweep->place++)
		bsu_arena_free_unused(arena, pages - 1 - sweep->place);
	if (end == pages) {
		bsu_arena_end_adopted(arena);
		sweep->phase = DONE;
	}
}

int bsu_sweep_step(struct bsu_sweep *sweep)
{
	switch (sweep->phase) {
	case SLOTS:
		step_slots(sweep);
		break;
	case RECORDS:
		step_records(sweep);
		break;
	case PAGES:
		step_pages(sweep);
		break;
	case DONE:
		break;
	}
	return sweep->phase != DONE;
}
