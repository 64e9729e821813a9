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
#include <poll.h>
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
	_Atomic uintptr_t plain;	/* as long as the window; set before start */
	size_t length;			/* whole pages */
	bool segment;
} table[WINDOWS];

static _Atomic unsigned int used;	/* entries from here on were never in use */
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static sigset_t at_fork;		/* the signals of the thread that forks; under the lock */
/* how many forks deep this thread is: then the lock is its own, also in handlers of others */
static __thread unsigned int forking __attribute__((tls_model("initial-exec")));
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

	/* of this thread; by this name also in a C library before 2.32 */
	sigfillset(&all);
	sigprocmask(SIG_BLOCK, &all, old);
	if (!forking)
		pthread_mutex_lock(&mutex);
}

static void unlock(const sigset_t *old)
{
	if (!forking)
		pthread_mutex_unlock(&mutex);
	sigprocmask(SIG_SETMASK, old, NULL);
}

static void before_fork(void)
{
	sigset_t old;

	if (!forking) {
		lock(&old);
		at_fork = old;
	}
	forking++;
}

static void after_fork(void)
{
	sigset_t old;

	if (--forking)
		return;
	old = at_fork;
	unlock(&old);
}

/* A child does not inherit MCL_FUTURE. */
static void in_child(void)
{
	mshare_stop(MSHARE_LOCKS, false);
	after_fork();
}

/* Not those of the C library, which have a newer version than the programs' own may have. */
static int status(int fd, struct stat *found)
{
	return syscall(SYS_fstat, fd, found);
}

static size_t number(const char *text)
{
	size_t found = 0;

	for (; *text >= '0' && *text <= '9' && found < SIZE_MAX / 16; text++)
		found = found * 10 + *text - '0';
	return *text ? 0 : found;
}

static const char *reason(void)
{
	switch (errno) {
	case EACCES:
	case EPERM:
		return "no permission";
	case EMFILE:
	case ENFILE:
		return "out of descriptors";
	case ENOMEM:
	case ENOSPC:
		return "out of memory or address space";
	case EOPNOTSUPP:
		return "it can't be shared";
	case ENOENT:
		return "the module is not there";
	}
	return "the module refuses it";
}

__attribute__((constructor)) static void start(void)
{
	const char *folder = getenv("MSHARE_MSHAREFS_DIR");
	const char *size = getenv("MSHARE_RUN_MIN");
	const char *talk = getenv("MSHARE_RUN_VERBOSE");
	int length = snprintf(control, sizeof(control), "%s/mshare_info",
			      folder && *folder ? folder : "/sys/fs/mshare");

	least = size ? number(size) : 0;
	verbose = talk && *talk == '1' && !status(STDERR_FILENO, &errors);
	if (least && length < (int)sizeof(control) &&
	    !pthread_atfork(before_fork, after_fork, in_child))
		ready = true;
}

/*
 * A daemon may have opened something else as descriptor 2. Who reads it may not, or
 * no longer: the program is neither to wait for that nor to die of it.
 */
static void say(const char *verb, size_t length, const char *what, const char *why)
{
	struct pollfd out = { .fd = STDERR_FILENO, .events = POLLOUT };
	bool large = length >= 1 << 20;
	char text[512];
	struct stat now;
	int saved = errno, size;

	if (verbose && !status(STDERR_FILENO, &now) && now.st_dev == errors.st_dev &&
	    now.st_ino == errors.st_ino && syscall(SYS_poll, &out, 1, 0) == 1 &&
	    out.revents == POLLOUT) {
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

bool mshare_stop(unsigned int reason, bool stop)
{
	unsigned int before = stop ? atomic_fetch_or(&stopped, reason) :
				     atomic_fetch_and(&stopped, ~reason);

	return before & reason;
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
		*why = reason();
		return -1;
	}
	region = syscall(SYS_ioctl, fd, MSHAREFS_OPEN_MAPPING, &request);
	if (region < 0)
		*why = reason();
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
		*why = reason();
	syscall(SYS_close, region);
	if (start == MAP_FAILED)
		return MAP_FAILED;
	/* as long as the window, so that it can take its place in one step */
	wide = (void *)syscall(SYS_mremap, plain, whole, size, MREMAP_MAYMOVE);
	if (wide == MAP_FAILED) {
		*why = reason();
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
	const char *why = stopped & MSHARE_WATCHES ? "the program uses KVM, userfaultfd or a device" :
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

/* The window, or the plain mapping, which a program that walks its own maps can find. */
static bool overlaps(const struct window *win, uintptr_t start, uintptr_t end)
{
	uintptr_t at = win->start, size = win->end - at, plain = win->plain;

	return at && ((start < at + size && end > at) || (start < plain + size && end > plain));
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

/* The lock is held. The plain counterpart of a range within one window, or 0. */
static uintptr_t counterpart(const void *address, size_t length)
{
	uintptr_t at = (uintptr_t)address, into;
	struct window *win = find(NULL, address, length);

	if (!win || at < win->start)
		return 0;
	into = at - win->start;
	return into <= win->length && length <= win->length - into ? win->plain + into : 0;
}

void *mshare_plain(const void *address, size_t length)
{
	uintptr_t plain;
	sigset_t old;

	lock(&old);
	plain = counterpart(address, length);
	unlock(&old);
	return (void *)plain;
}

bool mshare_on_plain(long call, const void *address, size_t length, long argument, bool all,
		     int *result)
{
	struct window *win;
	uintptr_t plain;
	sigset_t old;

	lock(&old);
	win = find(NULL, address, length);
	plain = counterpart(address, length);
	if (plain && all) {
		/* also of what the program did not map, so that it stays in one piece */
		if (round_up(length, PAGE) == win->length)
			length = win->end - win->start;
		else
			plain = 0;
	}
	if (plain)
		*result = syscall(call, plain, length, argument);
	unlock(&old);
	return plain;
}

/*
 * One call, in which the kernel takes the window away and moves the plain mapping
 * to its place, under one lock: other threads that look there wait. That takes a
 * plain mapping in one piece; see above.
 */
static bool revert(struct window *win, const char *why)
{
	uintptr_t start = win->start, rest = start + win->length;
	size_t size = win->end - start;
	int saved = errno, failed;

	if (syscall(SYS_mremap, win->plain, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, start) < 0) {
		failed = errno;
		/* no memory: the window may have gone by then, and the address is anybody's */
		if (syscall(SYS_msync, start, PAGE, MS_ASYNC) < 0)
			win->start = 0;
		errno = failed;
		return false;
	}
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
