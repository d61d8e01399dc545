/* SPDX-License-Identifier: MIT */
/* What a former process had released early, for whoever stores it now. */
#include "internal.h"

static bool is_held(const struct bsu_storage *storage, uint32_t place, const void *data)
{
	const struct bsu_area *area;
	const struct bsu_record *record;

	if (place >= atomic_load_explicit(&storage->state->capacity, memory_order_acquire))
		return false;
	area = bsu_storage_area(storage, place);
	record = &area->records[place - area->first];
	return bsu_record_is_whole(record) && bsu_record_holds(record, bsu_record_unit(record), data, storage->unit);
}

/*
 * @at: entry and unit of it, in one. A record that does not tell of the data was
 * not complete when the process died: nobody has overwritten its unit.
 */
bool bsu_storage_unstored(const struct bsu_storage *storage, const void *unstored, const void *buffers, size_t bytes,
			  uint64_t *at, struct bsu_file **file, uint64_t *offset, const void **data)
{
	const struct bsu_unstored *entries = unstored;
	uint64_t pages = bytes / BSU_POOL_PAGE;

	for (; *at / BSU_COPY_UNITS < pages; *at += BSU_COPY_UNITS - *at % BSU_COPY_UNITS) {
		const struct bsu_unstored *entry = &entries[*at / BSU_COPY_UNITS];
		uint64_t from = *at / BSU_COPY_UNITS * BSU_POOL_PAGE;
		uint32_t units = atomic_load(&entry->units);

		if (!units || entry->storage != storage->number || units > BSU_COPY_UNITS)
			continue;
		for (uint32_t unit = *at % BSU_COPY_UNITS; unit < units; unit++) {
			const char *here = (const char *)buffers + from + (uint64_t)unit * storage->unit;
			const struct bsu_area *area;

			if (from + (uint64_t)(unit + 1) * storage->unit > bytes)
				break;
			if (!is_held(storage, entry->place + unit, here))
				continue;
			area = bsu_storage_area(storage, entry->place + unit);
			*file = area->file;
			*offset = bsu_storage_offset(storage, area, entry->place + unit);
			*data = here;
			*at += unit + 1 - *at % BSU_COPY_UNITS;
			return true;
		}
	}
	return false;
}
