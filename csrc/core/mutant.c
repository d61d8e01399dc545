/* SPDX-License-Identifier: MIT */
#include "mutant.h"

#ifdef BSU_MUTANTS
int bsu_mutant;
#else
typedef int bsu_no_mutants;
#endif
