/* SPDX-License-Identifier: MIT */
/*
 * Preloaded: the n-th call of the engine that asks for memory, a descriptor, a
 * thread or a ring fails. Only calls from the code range given count, so that
 * the interpreter, libc and everybody else go on as usual.
 */
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/mman.h>

#define CALLER __builtin_return_address(0)
/* What the call would have been without us. */
#define REAL_OF(library, name)						\
	({								\
		static __typeof__(&name) real;				\
									\
		if (!real)						\
			*(void **)&real = dlsym(library, #name);	\
		real;							\
	})
#define REAL(name) REAL_OF(RTLD_NEXT, name)
/* It came with the engine, and is not among the libraries that all see. */
#define LIBURING dlopen("liburing.so.2", RTLD_LAZY | RTLD_NOLOAD)

static uintptr_t first, end;
static _Atomic unsigned int seen, failing;
static _Atomic long held;

/* Calls from [@code, @code + @length) count from now on. */
void watch_calls(uintptr_t code, uintptr_t length)
{
	first = code;
	end = code + length;
}

/* The @number-th call from now on fails, counted from 1; 0: none. */
void fail_call(unsigned int number)
{
	seen = 0;
	failing = number;
}

unsigned int calls_seen(void)
{
	return seen;
}

/* Pieces of memory that were asked for and not given back. */
long pieces_held(void)
{
	return held;
}

static bool counts(const void *caller)
{
	return (uintptr_t)caller >= first && (uintptr_t)caller < end;
}

static bool fails(const void *caller)
{
	return counts(caller) && atomic_fetch_add(&seen, 1) + 1 == failing;
}

static void *piece(void *memory, const void *caller)
{
	if (memory && memory != MAP_FAILED && counts(caller))
		held++;
	return memory;
}

void *calloc(size_t count, size_t bytes)
{
	if (fails(CALLER)) {
		errno = ENOMEM;
		return NULL;
	}
	return piece(REAL(calloc)(count, bytes), CALLER);
}

void *malloc(size_t bytes)
{
	if (fails(CALLER)) {
		errno = ENOMEM;
		return NULL;
	}
	return piece(REAL(malloc)(bytes), CALLER);
}

void free(void *memory)
{
	if (memory && counts(CALLER))
		held--;
	REAL(free)(memory);
}

void *mmap(void *at, size_t length, int protection, int flags, int fd, off_t offset)
{
	if (fails(CALLER)) {
		errno = ENOMEM;
		return MAP_FAILED;
	}
	return piece(REAL(mmap)(at, length, protection, flags, fd, offset), CALLER);
}

int munmap(void *at, size_t length)
{
	if (counts(CALLER))
		held--;
	return REAL(munmap)(at, length);
}

int eventfd(unsigned int value, int flags)
{
	if (fails(CALLER)) {
		errno = EMFILE;
		return -1;
	}
	return REAL(eventfd)(value, flags);
}

int fcntl(int fd, int command, ...)
{
	va_list arguments;
	void *argument;

	va_start(arguments, command);
	argument = va_arg(arguments, void *);
	va_end(arguments);
	if (command == F_DUPFD_CLOEXEC && fails(CALLER)) {
		errno = EMFILE;
		return -1;
	}
	return REAL(fcntl)(fd, command, argument);
}

int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*run)(void *), void *argument)
{
	if (fails(CALLER))
		return EAGAIN;
	return REAL(pthread_create)(thread, attributes, run, argument);
}

/* liburing's, by their shape: all give 0 or more, or a negative errno. */
#define RING_CALL(name)									\
	int name(void *, void *, void *, void *, void *, void *);			\
	int name(void *a, void *b, void *c, void *d, void *e, void *f)			\
	{										\
		if (fails(CALLER))							\
			return -ENOMEM;							\
		return REAL_OF(LIBURING, name)(a, b, c, d, e, f);			\
	}

RING_CALL(io_uring_queue_init_params)
RING_CALL(io_uring_register_buffers_sparse)
RING_CALL(io_uring_register_buffers_update_tag)
RING_CALL(io_uring_register_eventfd)
RING_CALL(io_uring_register_files)
RING_CALL(io_uring_register_files_sparse)
RING_CALL(io_uring_register_files_update)
RING_CALL(io_uring_register_ring_fd)
