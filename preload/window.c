// SPDX-License-Identifier: MIT
/*
 * The table of windows, and what is done to one.
 *
 * A window is made, reverted and unmapped with the lock held and signals blocked,
 * so that a handler finds whole states only, and a fork copies no other. Who only
 * wants to know whether an address is in a window reads the table without the
 * lock: a window is entered before the program learns its address, and leaves the
 * table before its address can be used for anything else.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "mshare_uapi.h"
#include "window.h"

#if !defined(__x86_64__) || defined(__ILP32__)
#error "the module is for x86-64"
#endif

#define SLOT	(1UL << 30)
#define PAGE	4096UL
#define WINDOWS	256

static struct window {
	_Atomic uintptr_t start;	/* 0: not in use */
	_Atomic uintptr_t end;		/* whole slots; what the program mapped may end before */
	size_t length;			/* whole pages */
	uintptr_t plain;		/* as long as the window */
	bool segment;
} table[WINDOWS];

static _Atomic unsigned int used;	/* entries from here on were never in use */
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static sigset_t at_fork;		/* the signals of the thread that forks; under the lock */
static _Atomic bool ready;
static _Atomic unsigned int stopped;
static size_t least;
static bool verbose;
static struct stat errors;		/* what standard error was when the program began */
static char control[4096];

static uintptr_t round_up(uintptr_t size, uintptr_t unit)
{
	return (size + unit - 1) & ~(unit - 1);
}

static void lock(sigset_t *old)
{
	sigset_t all;

	sigfillset(&all);
	pthread_sigmask(SIG_BLOCK, &all, old);
	pthread_mutex_lock(&mutex);
}

static void unlock(const sigset_t *old)
{
	pthread_mutex_unlock(&mutex);
	pthread_sigmask(SIG_SETMASK, old, NULL);
}

static void before_fork(void)
{
	sigset_t old;

	lock(&old);
	at_fork = old;
}

static void after_fork(void)
{
	sigset_t old = at_fork;

	unlock(&old);
}

__attribute__((constructor)) static void start(void)
{
	const char *folder = getenv("MSHARE_MSHAREFS_DIR");
	const char *size = getenv("MSHARE_RUN_MIN");
	const char *talk = getenv("MSHARE_RUN_VERBOSE");
	int length = snprintf(control, sizeof(control), "%s/mshare_info",
			      folder && *folder ? folder : "/sys/fs/mshare");

	least = size ? strtoul(size, NULL, 10) : 0;
	verbose = talk && *talk == '1' && !fstat(STDERR_FILENO, &errors);
	if (least && length < (int)sizeof(control) &&
	    !pthread_atfork(before_fork, after_fork, after_fork))
		ready = true;
}

/* A daemon may have opened something else as descriptor 2. */
static void say(const char *verb, size_t length, const char *what, const char *why)
{
	bool large = length >= 1 << 20;
	char text[512];
	struct stat now;
	int saved = errno, size;

	if (verbose && !fstat(STDERR_FILENO, &now) && now.st_dev == errors.st_dev &&
	    now.st_ino == errors.st_ino) {
		size = snprintf(text, sizeof(text), "mshare run: %s (%d): %s: %zu %s of %s%s%s\n",
				program_invocation_short_name, getpid(), verb,
				large ? length >> 20 : length >> 10, large ? "MiB" : "KiB", what,
				*why ? ": " : "", why);
		if (size > 0 && size < (int)sizeof(text))
			syscall(SYS_write, STDERR_FILENO, text, size);
	}
	errno = saved;
}

void mshare_say_plain(size_t length, const char *what, const char *why)
{
	if (ready && length >= least)
		say("not shared", length, what, why);
}

bool mshare_wanted(size_t length)
{
	return ready && length >= least && length <= SIZE_MAX - SLOT;
}

void mshare_stop(unsigned int reason, bool stop)
{
	if (stop)
		stopped |= reason;
	else
		stopped &= ~reason;
}

static struct window *free_entry(void)
{
	for (unsigned int i = 0; i < WINDOWS; i++)
		if (!table[i].start)
			return &table[i];
	return NULL;
}

/* A descriptor, or -1. */
static int open_region(void *plain, int prot, const char **why)
{
	struct mshare_mapping request = {
		.address = (uintptr_t)plain,
		.access = prot & PROT_WRITE ? O_RDWR : O_RDONLY,
	};
	int fd = syscall(SYS_openat, AT_FDCWD, control, O_RDONLY | O_CLOEXEC), region;

	if (fd < 0) {
		*why = "the module is not there";
		return -1;
	}
	region = syscall(SYS_ioctl, fd, MSHAREFS_OPEN_MAPPING, &request);
	if (region < 0)
		*why = strerrordesc_np(errno);
	syscall(SYS_close, fd);
	return region;
}

/* The lock is held. MAP_FAILED: everything is as before, and why says what was in the way. */
static void *make(void *plain, size_t length, int prot, bool segment, const char **why)
{
	size_t whole = round_up(length, PAGE), size = round_up(length, SLOT);
	struct window *win = free_entry();
	void *start, *wide;
	int region;

	*why = "too many mappings";
	if (!win)
		return MAP_FAILED;
	region = open_region(plain, prot, why);
	if (region < 0)
		return MAP_FAILED;
	start = (void *)syscall(SYS_mmap, NULL, size, prot, MAP_SHARED, region, 0L);
	if (start == MAP_FAILED)
		*why = strerrordesc_np(errno);
	syscall(SYS_close, region);
	if (start == MAP_FAILED)
		return MAP_FAILED;
	/* as long as the window, so that it can take its place in one step */
	wide = (void *)syscall(SYS_mremap, plain, whole, size, MREMAP_MAYMOVE);
	if (wide == MAP_FAILED) {
		*why = strerrordesc_np(errno);
		syscall(SYS_munmap, start, size);
		return MAP_FAILED;
	}
	win->length = whole;
	win->plain = (uintptr_t)wide;
	win->segment = segment;
	win->end = (uintptr_t)start + size;
	win->start = (uintptr_t)start;
	if (used < win - table + 1)
		used = win - table + 1;
	return start;
}

void *mshare_share(void *plain, size_t length, int prot, bool segment, const char *what)
{
	const char *why = stopped & MSHARE_WATCHES ? "the program uses KVM or userfaultfd" :
			  "the program locks its memory (mlockall)";
	void *found = MAP_FAILED;
	int saved = errno;
	sigset_t old;

	lock(&old);
	if (!stopped)
		found = make(plain, length, prot, segment, &why);
	if (found == MAP_FAILED)
		say("not shared", length, what, why);
	else
		say("shared", length, what, "");
	unlock(&old);
	errno = saved;
	return found == MAP_FAILED ? plain : found;
}

static bool overlaps(const struct window *win, uintptr_t start, uintptr_t end)
{
	return win->start && start < win->end && end > win->start;
}

/* From one on, if it is not NULL the next after it. */
static struct window *find(struct window *last, const void *address, size_t length)
{
	uintptr_t start = (uintptr_t)address, end = start + length;

	if (!length)
		return NULL;
	if (end < start)
		end = UINTPTR_MAX;
	for (struct window *win = last ? last + 1 : table; win < table + used; win++)
		if (overlaps(win, start, end))
			return win;
	return NULL;
}

bool mshare_touches(const void *address, size_t length)
{
	return find(NULL, address, length);
}

bool mshare_on_plain(long call, const void *address, size_t length, long argument, int *result)
{
	uintptr_t at = (uintptr_t)address;
	struct window *win;
	bool inside;
	sigset_t old;

	lock(&old);
	win = find(NULL, address, length);
	inside = win && at >= win->start && at - win->start <= win->length &&
		 length <= win->length - (at - win->start);
	if (inside)
		*result = syscall(call, win->plain + (at - win->start), length, argument);
	unlock(&old);
	return inside;
}

/*
 * One call, in which the kernel takes the window away and moves the plain mapping
 * to its place, under one lock: other threads that look there wait.
 */
static bool revert(struct window *win, const char *why)
{
	uintptr_t start = win->start, rest = start + win->length;
	size_t size = win->end - start;
	int saved = errno;

	if (syscall(SYS_mremap, win->plain, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, start) < 0)
		return false;
	win->start = 0;
	/* what the program did not map; if there are too many mappings to cut it off it stays */
	if (rest != start + size)
		syscall(SYS_munmap, rest, start + size - rest);
	errno = saved;
	say("no longer shared", win->length, "memory", why);
	return true;
}

bool mshare_revert(const void *address, size_t length, const char *why)
{
	struct window *win = NULL;
	bool done = true;
	sigset_t old;

	/* of all there is also one that another thread is just making */
	if (length != SIZE_MAX && !mshare_touches(address, length))
		return true;
	lock(&old);
	while (done && (win = find(win, address, length)))
		done = revert(win, why);
	unlock(&old);
	return done;
}

bool mshare_unmap(const void *address, size_t length)
{
	bool found = false;
	struct window *win;
	sigset_t old;
	size_t size;

	if (!mshare_touches(address, 1))
		return false;
	lock(&old);
	win = find(NULL, address, 1);
	if (win && win->start == (uintptr_t)address &&
	    (length ? round_up(length, PAGE) == win->length : win->segment)) {
		size = win->end - win->start;
		/* first: then the address may be anybody's */
		win->start = 0;
		syscall(SYS_munmap, address, size);
		syscall(SYS_munmap, win->plain, size);
		found = true;
	}
	unlock(&old);
	return found;
}
