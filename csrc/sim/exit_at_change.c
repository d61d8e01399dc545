/* SPDX-License-Identifier: MIT */
/*
 * Death between any two changes of memory that outlives the process: the memory
 * is read-only, so that each change is a fault. Unless it is the last one, the
 * memory is writable for this one instruction, which the trap flag ends.
 */
#include <errno.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include "private.h"

#ifdef __x86_64__

#define MAX_REGIONS 256
#define TRAP_FLAG 0x100

static struct bsu_sim_region region[MAX_REGIONS];
static unsigned int regions;
static uint64_t left;
static int exit_status;

static bool protect(int protection)
{
	for (unsigned int i = 0; i < regions; i++)
		if (mprotect(region[i].memory, region[i].bytes, protection))
			return false;
	return true;
}

static bool is_ours(const char *address)
{
	for (unsigned int i = 0; i < regions; i++)
		if (address >= (char *)region[i].memory && address < (char *)region[i].memory + region[i].bytes)
			return true;
	return false;
}

static void on_change(int sig, siginfo_t *info, void *context)
{
	ucontext_t *uc = context;

	if (!is_ours(info->si_addr)) {
		/* A fault of its own: it comes again. */
		signal(sig, SIG_DFL);
		return;
	}
	if (!left--)
		_exit(exit_status);
	protect(PROT_READ | PROT_WRITE);
	uc->uc_mcontext.gregs[REG_EFL] |= TRAP_FLAG;
}

static void on_changed(int sig, siginfo_t *info, void *context)
{
	ucontext_t *uc = context;

	(void)sig;
	(void)info;
	uc->uc_mcontext.gregs[REG_EFL] &= ~TRAP_FLAG;
	protect(PROT_READ);
}

int bsu_sim_exit_at_change(const struct bsu_sim_region *memory, unsigned int count, uint64_t number, int status)
{
	struct sigaction change = { .sa_sigaction = on_change, .sa_flags = SA_SIGINFO };
	struct sigaction changed = { .sa_sigaction = on_changed, .sa_flags = SA_SIGINFO };

	if (count > MAX_REGIONS)
		return -ENOSPC;
	for (unsigned int i = 0; i < count; i++)
		region[i] = memory[i];
	regions = count;
	left = number;
	exit_status = status;
	if (sigaction(SIGSEGV, &change, NULL) || sigaction(SIGTRAP, &changed, NULL) || !protect(PROT_READ))
		return -errno;
	return 0;
}

#else

int bsu_sim_exit_at_change(const struct bsu_sim_region *memory, unsigned int count, uint64_t number, int status)
{
	(void)memory;
	(void)count;
	(void)number;
	(void)status;
	return -ENOTSUP;
}

#endif
