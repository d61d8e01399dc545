/* SPDX-License-Identifier: MIT */
/*
 * Seeded bugs, one at a time, to prove that the tests see them. Compiled only
 * with BSU_MUTANTS; a release has none of this.
 */
#ifndef BSU_MUTANT_H
#define BSU_MUTANT_H

#ifdef BSU_MUTANTS
extern int bsu_mutant;
#define MUTANT(number) (bsu_mutant == (number))
#else
#define MUTANT(number) 0
#endif

enum {
	BSU_MUTANT_NONE = 0,
	BSU_MUTANT_PUBLISH_EARLY = 1,
	BSU_MUTANT_NO_IMAGE_CHECK = 2,
	BSU_MUTANT_MARK_LATE = 3,
	BSU_MUTANT_RANGE_FIRST = 4,
	BSU_MUTANT_RANGE_LAST = 5,
	BSU_MUTANT_LOSE_WAITER = 6,
	BSU_MUTANT_SKIP_PARTIAL = 7,
	BSU_MUTANT_PLACE_TWICE = 8,
	BSU_MUTANT_DROP_FUA = 9,
	BSU_MUTANT_FAILED_UNMARKED = 10,
	BSU_MUTANT_BREAK_AFTER_WRITE = 11,
	BSU_MUTANT_MARK_BEFORE_GATE = 12,
	BSU_MUTANT_IGNORE_CLAIMS = 13,
	BSU_MUTANT_SHORT_IS_FULL = 14,
	BSU_MUTANT_DISCARD_THROUGH = 15,
	BSU_MUTANT_NO_CRC = 16,
	BSU_MUTANT_GATE_OPEN_EARLY = 17,
	BSU_MUTANT_LAST_UNIT = 18,
};

#endif
