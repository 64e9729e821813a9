// SPDX-License-Identifier: MIT
/*
 * Random calls on regions and windows, by processes and threads that share them.
 *
 * fuzz SEED CALLS FOLDER [ROUND]
 *
 * Works in rounds: a few processes start, each makes its calls in FOLDER of msharefs and in an
 * arena of slots at fixed addresses, and ends. Then no window may be left on any region, and all
 * names are removed. Every value drawn depends on SEED, the round, the process and the thread and
 * on nothing else; ROUND runs that one alone. The order in which threads meet is the kernel's.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <linux/futex.h>
#include <linux/ioctl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include "../../kmod/mshare_uapi.h"

#define PAGE	4096UL
#define HUGE	(2UL << 20)
#define SLOT	(1UL << 30)
#define ARENA	(1UL << 45)	/* nothing else is below 1 << 46 */
enum { SLOTS = 10, WORKERS = 4, THREADS = 2, BATCH = 1000, FDS = 40, FIRST_FD = 20, SECONDS = 180,
       PROGRESS = 50000 };
enum { ERRNOS = 134, MAX_KINDS = 64 };

static struct shared {
	_Atomic unsigned int count[MAX_KINDS][ERRNOS];
	_Atomic unsigned long nanoseconds[MAX_KINDS];
	_Atomic unsigned long longest[MAX_KINDS];
	_Atomic unsigned long calls;
	_Atomic int pids[WORKERS];
} *shared;
static const char *folder;
static int mail[2];		/* a pair of sockets all processes share */
static char *low;		/* memory a 32-bit call can point to */

/* ---- drawing ---- */

static __thread uint64_t state;

static uint64_t draw(void)
{
	uint64_t z = (state += 0x9e3779b97f4a7c15);

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
	z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
	return z ^ (z >> 31);
}

static uint64_t below(uint64_t limit)
{
	return draw() % limit;
}

/* One of the values; the first gives the type. */
#define FIRST(first, ...) first
#define PICK(...) ({ __typeof__(FIRST(__VA_ARGS__, 0) + 0) pool_[] = { __VA_ARGS__ }; \
		     pool_[below(sizeof(pool_) / sizeof(*pool_))]; })

/* What is wrong in an interesting way. */
static uint64_t odd(void)
{
	return PICK(0UL, 1UL, PAGE - 1, PAGE, PAGE + 1, SLOT - 1, SLOT - PAGE, SLOT + 1, SLOT + PAGE,
		    32UL << 40, (32UL << 40) + SLOT, (1UL << 47) - PAGE, 1UL << 47, 1UL << 63,
		    (1UL << 63) - PAGE, (1UL << 63) - 1, -PAGE, -SLOT, -1UL, 0xffff888000000000UL,
		    0xffffffff81000000UL, 1UL << 32, (1UL << 32) - 1);
}

/* Mostly the value; sometimes just beside it, or something else. */
static uint64_t about(uint64_t value)
{
	switch (below(24)) {
	case 0: return odd();
	case 1: return value + PICK(1UL, -1UL, PAGE, -PAGE, SLOT, -SLOT);
	default: return value;
	}
}

static uint64_t in_region(void)
{
	return about(PICK(0UL, 0UL, PAGE, HUGE, HUGE - PAGE, SLOT / 2, SLOT - HUGE, SLOT - PAGE,
			  SLOT, 2 * SLOT - PAGE));
}

static uint64_t amount(void)
{
	return about(PICK(PAGE, 2 * PAGE, 16 * PAGE, 511 * PAGE, HUGE, 2 * HUGE, SLOT / 512));
}

static uint64_t slots(void)
{
	return about(SLOT * PICK(1UL, 1UL, 1UL, 2UL, 3UL));
}

static char *slot(void)
{
	return (char *)(ARENA + SLOT * below(SLOTS));
}

static char *address(void)
{
	return (char *)about((uint64_t)slot());
}

/* A place that may be in a window with content. */
static char *place(void)
{
	return (char *)about((uint64_t)slot() + PICK(0UL, 0UL, PAGE, HUGE, SLOT - PAGE));
}

static int fd_number(void)
{
	return below(64) ? FIRST_FD + (int)below(FDS) : PICK(-1, 1000000, AT_FDCWD);
}

/* Two may be in use at once. */
static const char *path(int which)
{
	static __thread char texts[2][400];
	char *text = texts[which];

	switch (below(48)) {
	case 0: return folder;
	case 1: return (char *)odd();
	case 2: snprintf(text, 400, "%s/%0300d", folder, 0); return text;
	case 3: snprintf(text, 400, "%s/../mshare_info", folder); return text;
	case 4: return "";
	}
	if (below(4))
		snprintf(text, 400, "%s/r%d", folder, (int)below(6));
	else
		snprintf(text, 400, "%s/d%d%s", folder, (int)below(2), PICK("", "/r0", "/r1"));
	return text;
}

static int result(long value)
{
	return value == -1 ? errno : 0;
}

/* ---- memory that may not be there ---- */

static __thread sigjmp_buf back;
static __thread volatile bool guarded;

static void on_fault(int number)
{
	if (guarded)
		siglongjmp(back, number);
	signal(number, SIG_DFL);
}

/* 0, or EFAULT for either signal. */
static int store(char *to, const void *from, size_t size)
{
	int err = EFAULT;

	if (!sigsetjmp(back, 1)) {
		guarded = true;
		memcpy(to, from, size);
		err = 0;
	}
	guarded = false;
	return err;
}

static int load(char *from)
{
	int err = EFAULT;

	if (!sigsetjmp(back, 1)) {
		guarded = true;
		*(volatile char *)from;
		err = 0;
	}
	guarded = false;
	return err;
}

static int touch(void)
{
	char *to = place();

	return below(2) ? store(to, "word", 4) : load(to);
}

/* ---- descriptors ---- */

static __thread int next_fd;

/* Put a new descriptor in the place of another: the next while there is a first time for each. */
static int keep(int fd)
{
	int err = result(fd);

	if (fd >= 0) {
		dup2(fd, FIRST_FD + (next_fd < FDS ? next_fd : (int)below(FDS)));
		close(fd);
	}
	return err;
}

static int open_name(void)
{
	int flags = PICK(O_RDWR, O_RDWR, O_RDWR, O_RDONLY, O_WRONLY, 3);

	if (below(3))
		flags |= O_CREAT;
	if (!below(8))
		flags |= PICK(O_EXCL, O_TRUNC, O_APPEND, O_PATH, O_DIRECTORY, O_NOFOLLOW, O_DIRECT,
			      O_SYNC, O_TMPFILE, O_NOATIME);
	return keep(open(path(0), flags, PICK(0600, 0600, 0644, 0400, 0, 07777)));
}

static int make_region(void)
{
	int fd = below(2) ? open(folder, O_TMPFILE | O_RDWR, 0600) :
			    open(path(0), O_CREAT | O_RDWR, 0600);
	struct mshare_create req = { .size = below(200) ? PICK(PAGE, HUGE, 2 * HUGE) : SLOT, .prot = 3,
				     .flags = MAP_SHARED | MAP_FIXED | MAP_ANONYMOUS };

	if (fd >= 0 && !ftruncate(fd, SLOT * PICK(1, 2, 3)))
		ioctl(fd, MSHAREFS_CREATE_MAPPING, &req);
	return keep(fd);
}

static int open_other(void)
{
	int pair[2] = { -1, -1 }, fd;

	switch (below(14)) {
	case 0: return keep(open(folder, O_RDONLY | O_DIRECTORY));
	case 1: return keep(open("/dev/zero", O_RDWR));
	case 2: return keep(open("/proc/self/maps", O_RDONLY));
	case 3: return keep(open("/proc/self/mem", O_RDONLY));
	case 4: return keep(open("/proc/version", O_RDONLY));
	case 5: return keep(epoll_create1(0));
	case 6: return keep(eventfd(0, EFD_NONBLOCK));
	case 7: return keep(memfd_create("huge", MFD_HUGETLB));
	case 8: return keep(open("/etc/passwd", O_RDONLY));
	case 9: return keep(open("/usr/bin/env", O_PATH));
	case 10: return keep(open("/dev/shm", O_TMPFILE | O_RDWR, 0600));
	case 11:
		fd = pipe2(pair, O_NONBLOCK);
		close(pair[1]);
		return fd ? errno : keep(pair[0]);
	case 12: return keep(open("/var/tmp", O_TMPFILE | O_RDWR, 0600));
	}
	fd = memfd_create("plain", MFD_ALLOW_SEALING);
	if (ftruncate(fd, PICK(0, 1, PAGE, HUGE)) || below(2))
		fcntl(fd, F_ADD_SEALS, PICK(F_SEAL_WRITE, F_SEAL_FUTURE_WRITE, F_SEAL_SHRINK));
	return keep(fd);
}

static int set_size(void)
{
	int fd = fd_number();
	struct statfs fs = { 0 };

	switch (below(4)) {
	case 0:
		/* of other files it would take memory */
		fstatfs(fd, &fs);
		return result(fallocate(fd, PICK(0, 0, 1, 2, 3, 16), about(0),
					fs.f_type == 0x6d736872 ? slots() : PAGE));
	case 1: return result(truncate(path(0), slots()));
	default: return result(ftruncate(fd, slots()));
	}
}

static int duplicate(void)
{
	switch (below(8)) {
	case 0: return result(close(FIRST_FD + (int)below(FDS)));
	case 1: return result(fcntl(fd_number(), F_ADD_SEALS, PICK(2, 4, 8, 16)));
	case 2: return result(fcntl(fd_number(), F_SETFL, PICK(0, O_APPEND, O_NONBLOCK, O_DIRECT)));
	default: return keep(dup(fd_number()));
	}
}

static int send_descriptor(void)
{
	union { struct cmsghdr head; char room[CMSG_SPACE(sizeof(int))]; } control = { 0 };
	struct iovec data = { "x", 1 };
	struct msghdr message = { .msg_iov = &data, .msg_iovlen = 1, .msg_control = &control,
				  .msg_controllen = sizeof(control) };
	int fd = fd_number(), err;
	char byte;

	if (below(2)) {
		control.head = (struct cmsghdr){ .cmsg_len = CMSG_LEN(sizeof(int)),
						 .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS };
		memcpy(CMSG_DATA(&control.head), &fd, sizeof(fd));
		return result(sendmsg(mail[0], &message, MSG_DONTWAIT));
	}
	data.iov_base = &byte;
	err = result(recvmsg(mail[1], &message, MSG_DONTWAIT));
	if (err || message.msg_controllen < CMSG_LEN(sizeof(int)))
		return err;
	memcpy(&fd, CMSG_DATA(&control.head), sizeof(fd));
	return keep(fd);
}

/* ---- names ---- */

static int names(void)
{
	struct statfs fs;
	struct stat st;
	char text[64];

	snprintf(text, sizeof(text), "/proc/self/fd/%d", fd_number());
	switch (below(12)) {
	case 0: return result(link(path(0), path(1)));
	case 1: return result(linkat(AT_FDCWD, text, AT_FDCWD, path(0), AT_SYMLINK_FOLLOW));
	case 2: return result(syscall(SYS_renameat2, AT_FDCWD, path(0), AT_FDCWD, path(1),
				      PICK(0, 1, 2, 3, 4)));
	case 3: return result(mkdir(path(0), 0700));
	case 4: return result(rmdir(path(0)));
	case 5: return result(chmod(path(0), PICK(0600, 0600, 0700, 0, 0444)));
	case 6: return result(stat(path(0), &st));
	case 7: return result(fstat(fd_number(), &st));
	case 8: return result(statfs(path(0), &fs));
	case 9: return result(symlink(text, path(0)));
	case 10: return keep(open(text, PICK(O_RDONLY, O_RDWR) | O_NONBLOCK));
	default: return result(unlink(path(0)));
	}
}

/* ---- ioctls ---- */

/* Through the 32-bit entry, which takes 32 bits of each argument. */
static long ioctl32(int fd, unsigned int number, void *argument)
{
	long ret;

	__asm__ volatile("int $0x80" : "=a"(ret)
			 : "a"(54), "b"(fd), "c"(number), "d"((uint32_t)(uintptr_t)argument)
			 : "memory", "r8", "r9", "r10", "r11");
	if (ret >= 0)
		return ret;
	errno = (int)-ret;
	return -1;
}

/* The structure where the kernel has to look for it: here, in a window, in low memory, nowhere. */
static int call(unsigned int number, void *structure, size_t size)
{
	void *argument = structure;

	switch (below(16)) {
	case 0:
		argument = place();
		store(argument, structure, size);
		break;
	case 1:
		argument = (void *)odd();
		break;
	case 2:
	case 3:
		if (store(low, structure, size))
			return EFAULT;
		return result(ioctl32(fd_number(), number, low));
	}
	return result(ioctl(fd_number(), number, argument));
}

static int create_mapping(void)
{
	struct mshare_create req = {
		.region_offset = in_region(),
		.size = below(32) ? amount() : slots(),
		.offset = below(4) ? 0 : in_region(),
		.prot = PICK(1, 3, 3, 3, 3, 3, 3, 0, 2, 4, 5, 7, 8, -1),
		.flags = MAP_SHARED | MAP_FIXED,
		.fd = fd_number(),
		.__pad = draw(),
	};

	if (below(2)) {
		req.flags |= MAP_ANONYMOUS;
		req.offset = about(0);
	}
	if (!below(8))
		req.flags ^= PICK(MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_NORESERVE, MAP_LOCKED,
				  MAP_POPULATE, MAP_HUGETLB, MAP_GROWSDOWN, 1 << (int)below(32));
	return call(MSHAREFS_CREATE_MAPPING, &req, sizeof(req));
}

static int unmap(void)
{
	struct mshare_unmap req = { in_region(), below(4) ? amount() : slots() };

	return call(MSHAREFS_UNMAP, &req, sizeof(req));
}

static int protect(void)
{
	struct mshare_protect req = { in_region(), below(4) ? amount() : slots(),
				      PICK(1, 1, 3, 3, 0, 4, -1), below(32) ? 0 : draw() };

	return call(MSHAREFS_PROTECT, &req, sizeof(req));
}

static int info(void)
{
	struct mshare_info req = { .size = about(sizeof(req)) };

	return call(MSHAREFS_INFO, &req, sizeof(req));
}

/* The region of a file, or of what is mapped somewhere; whoever asks for the same gets the same. */
static int region_of(void)
{
	struct mshare_file file = {
		.fd = fd_number(),
		.access = PICK(O_RDWR, O_RDWR, O_RDONLY, O_WRONLY, 3, -1),
	};
	struct mshare_mapping mapping = {
		.address = below(8) ? (uintptr_t)place() : odd(),
		.access = file.access,
		.reserved = below(32) ? 0 : draw(),
	};
	char control[400];
	int fd, err;

	snprintf(control, sizeof(control), "%s/../mshare_info", folder);
	fd = open(control, O_RDONLY);
	if (fd < 0)
		return errno;
	if (below(2))
		err = keep(ioctl(fd, MSHAREFS_OPEN_FILE, &file));
	else
		err = keep(ioctl(fd, MSHAREFS_OPEN_MAPPING, &mapping));
	close(fd);
	return err;
}

/* A wrong number, size or direction; calls of other files. */
static int odd_ioctl(void)
{
	unsigned int number = _IOC(below(4), PICK('x', 'x', 'x', 'f', 'X', 0), below(6),
				   PICK(0, 4, 15, 16, 24, 40, 127, 128, 16383));
	uint64_t words[2048] = { below(2) ? 16 : 0 };

	return call(below(4) ? number : PICK(0x541bu, 0x5421u, 0x5450u, 0x6601u, 0x40086602u, 2u,
					     0xc020660bu, 0x5879u), words, sizeof(words));
}

/* ---- mappings ---- */

static int map(void)
{
	int flags = MAP_SHARED, protection = PICK(PROT_READ, 3, 3, 3);
	char *at = below(4) ? slot() : address();
	uint64_t size = slots(), offset = about(SLOT * below(2));

	if (below(8))
		flags |= MAP_FIXED;
	if (!below(8))
		flags ^= PICK(MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_FIXED_NOREPLACE, MAP_32BIT,
			      MAP_ANONYMOUS, MAP_GROWSDOWN, MAP_LOCKED, MAP_NORESERVE, MAP_SYNC,
			      MAP_HUGETLB, MAP_STACK, MAP_DENYWRITE, 3);
	if (!below(128))
		flags |= MAP_POPULATE;
	if (!below(8))
		protection = PICK(0, 2, 4, 5, 7, 8, 0x01000000);
	if (!below(8))
		flags = PICK(MAP_PRIVATE, MAP_SHARED) | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE;
	return result((long)mmap(at, size, protection, flags, fd_number(), offset));
}

static int unmap_window(void)
{
	return result(munmap(below(4) ? slot() : address(), slots()));
}

static int remap(void)
{
	return result((long)mremap(slot(), slots(), slots(), PICK(0, 1, 3, 3, 3, 3, 5, 7, 8),
				   below(4) ? slot() : address()));
}

static int change_mapping(void)
{
	int protection = PICK(0, 1, 2, 3, 4, 7, 0x01000000, 0x02000000);

	switch (below(8)) {
	case 0: return result(syscall(SYS_pkey_mprotect, place(), amount(), protection,
				      PICK(-1, 0, 1)));
	case 1:
		/* this brings in all there is, a window's as well as a gigabyte of other memory */
		return result(syscall(SYS_remap_file_pages, place(),
				      below(16) ? about(16 * PAGE) : slots(), 0, below(4), 0));
	case 2: return result(prctl(PR_SET_VMA, PR_SET_VMA_ANON_NAME, slot(), slots(), "name"));
	case 3: return below(16) ? 0 : result(syscall(462 /* mseal */, slot(), slots(), 0));
	case 4: return result(msync(place(), slots(), PICK(1, 2, 4, 6, 8)));
	default: return result(mprotect(place(), below(2) ? amount() : slots(), protection));
	}
}

static int advise(void)
{
	int advice = below(16) ? PICK(0, 1, 2, 3, 4, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20,
				      21, 25, 102, 103) : PICK(22, 23, 24, 100, 101);
	uint64_t size = below(2) ? amount() : slots();
	char *at = place();
	struct iovec where = { at, size };
	int fd, err;

	/* these bring in all they can */
	if (advice == 22 || advice == 23)
		where.iov_len = size = about(16 * PAGE);
	if (below(4))
		return result(madvise(at, size, advice));
	fd = syscall(SYS_pidfd_open, shared->pids[below(WORKERS)], 0);
	err = result(syscall(SYS_process_madvise, fd, &where, 1, advice, 0));
	close(fd);
	return err;
}

static int lock(void)
{
	switch (below(3)) {
	case 0: return result(munlock(place(), slots()));
	case 1: return result(syscall(SYS_mlock2, place(), amount(), PICK(0, 1, 2)));
	default: return result(mlock(place(), amount()));
	}
}

static int look(void)
{
	char text[64], room[PAGE];
	static const char *const files[] = { "smaps", "maps", "numa_maps", "smaps_rollup", "pagemap" };
	int status[2], nodes[2] = { 0, (int)below(2) };
	void *pages[2] = { place(), place() };
	unsigned long mask = PICK(0, 1, 2, -1);
	int fd, err;

	switch (below(5)) {
	case 0: return result(mincore(place(), amount(), (unsigned char *)room));
	case 1: return result(syscall(SYS_move_pages, 0, 2, pages, below(2) ? nodes : NULL, status,
				      PICK(0, 2, 4)));
	case 2: return result(syscall(SYS_mbind, place(), below(2) ? amount() : slots(),
				      PICK(0, 1, 2, 3, 4, 5, 0x8002), &mask, 8, PICK(0, 1, 2, 3)));
	case 3:
		fd = open("/proc/self/clear_refs", O_WRONLY);
		err = result(write(fd, PICK("1", "3", "4", "5"), 1));
		close(fd);
		return err;
	}
	snprintf(text, sizeof(text), "/proc/%d/%s", shared->pids[below(WORKERS)],
		 files[below(sizeof(files) / sizeof(*files))]);
	fd = open(text, O_RDONLY);
	err = result(fd);
	for (int i = 0; i < 4 && !err; i++)
		err = result(pread(fd, room, sizeof(room),
				   strstr(text, "pagemap") ? (off_t)((uintptr_t)slot() / PAGE * 8) :
				   i * (off_t)sizeof(room)));
	close(fd);
	return err;
}

static int user_faults(void)
{
	int fd = syscall(SYS_userfaultfd, O_NONBLOCK | PICK(1 /* user mode only */, 1, 0));
	struct uffdio_api api = { .api = UFFD_API,
				  .features = PICK(0UL, 1UL << 15 /* WP_ASYNC */, 1UL << 15, draw()) };
	struct uffdio_register range = { .range = { (uintptr_t)place(), slots() },
					 .mode = PICK(1, 2, 2, 3, 4, 7) };
	struct uffdio_writeprotect writes = { .range = range.range, .mode = PICK(0, 1, 2) };
	/* PAGEMAP_SCAN of 6.7, which asks for write protection too */
	uint64_t scan[12] = { sizeof(scan), PICK(0, 1, 3), range.range.start,
			      range.range.start + range.range.len, 0, 0, 0, 0, 0, 0, 1, 1 };
	int err, map;

	if (fd < 0)
		return errno;
	ioctl(fd, UFFDIO_API, &api);
	err = result(ioctl(fd, UFFDIO_REGISTER, &range));
	ioctl(fd, UFFDIO_WRITEPROTECT, &writes);
	map = open("/proc/self/pagemap", O_RDONLY);
	ioctl(map, _IOC(3, 'f', 16, sizeof(scan)), scan);
	close(map);
	close(fd);
	return err;
}

/* The kernel reads and writes memory there. */
static int access_by_kernel(void)
{
	static char own[PAGE];
	struct iovec here = { own, sizeof(own) }, there = { place(), PICK(1UL, PAGE, HUGE) };
	int pid = shared->pids[below(WORKERS)], fd, err, ends[2];

	there.iov_len = there.iov_len > PAGE ? PAGE : there.iov_len;
	switch (below(8)) {
	case 0: return result(process_vm_readv(pid, &here, 1, &there, 1, 0));
	case 1: return result(process_vm_writev(pid, &here, 1, &there, 1, 0));
	case 2: return result(syscall(SYS_futex, there.iov_base, FUTEX_WAKE, 1, NULL, NULL, 0));
	case 3:
		if (pipe2(ends, O_NONBLOCK))
			return errno;
		err = result(vmsplice(ends[1], &there, 1, PICK(0, SPLICE_F_GIFT)));
		close(ends[0]);
		close(ends[1]);
		return err;
	case 4: return result(read(fd_number(), own, 0) | pwrite(fd_number(), own, 0, 0));
	case 5: return result(fsync(fd_number()));
	}
	fd = open(below(2) ? "/dev/zero" : "/etc/passwd", O_RDONLY);
	err = result(readv(fd, &there, 1));
	close(fd);
	return err;
}

/* ---- processes ---- */

typedef int (*kind_fn)(void);
static kind_fn any(void);

static int fork_and_kill(void)
{
	pid_t pid = fork();

	if (pid < 0)
		return errno;
	if (!pid) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		if (!below(16))
			execl("/bin/true", "true", NULL);
		for (int i = 0; i < 10; i++) {
			kind_fn fn = any();

			if (fn != fork_and_kill)
				fn();
		}
		_exit(0);
	}
	if (below(2)) {
		usleep(below(2000));
		kill(pid, SIGKILL);
	}
	return result(waitpid(pid, NULL, 0));
}

static const struct kind {
	const char *name;
	kind_fn fn;
	int weight;
} kinds[] = {
	{ "create_mapping", create_mapping, 12 },
	{ "unmap", unmap, 5 },
	{ "protect", protect, 6 },
	{ "info", info, 4 },
	{ "region_of", region_of, 4 },
	{ "odd_ioctl", odd_ioctl, 4 },
	{ "mmap", map, 16 },
	{ "munmap", unmap_window, 3 },
	{ "mremap", remap, 5 },
	{ "mprotect, msync, ...", change_mapping, 5 },
	{ "madvise", advise, 6 },
	{ "mlock", lock, 2 },
	{ "touch", touch, 16 },
	{ "access_by_kernel", access_by_kernel, 6 },
	{ "mincore, /proc, ...", look, 3 },
	{ "userfaultfd", user_faults, 1 },
	{ "make_region", make_region, 4 },
	{ "open", open_name, 4 },
	{ "open_other", open_other, 3 },
	{ "ftruncate", set_size, 3 },
	{ "link, unlink, ...", names, 5 },
	{ "dup, close", duplicate, 2 },
	{ "sendmsg", send_descriptor, 2 },
	{ "fork", fork_and_kill, 1 },
};
#define KINDS (int)(sizeof(kinds) / sizeof(*kinds))

static int any_number(void)
{
	int total = 0, at = 0, n;

	for (int i = 0; i < KINDS; i++)
		total += kinds[i].weight;
	for (n = (int)below(total); n >= kinds[at].weight; at++)
		n -= kinds[at].weight;
	return at;
}

static kind_fn any(void)
{
	return kinds[any_number()].fn;
}

static uint64_t seed, round_number;

static uint64_t now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000000000UL + time.tv_nsec;
}

static void *calls(void *number)
{
	state = (seed * 1000003 + round_number) * 1000003 + (uintptr_t)number;
	next_fd = FDS;
	for (int i = 0; i < BATCH; i++) {
		uint64_t start = now(), took;
		int at = any_number(), err = kinds[at].fn();

		took = now() - start;
		shared->nanoseconds[at] += took;
		if (took > shared->longest[at])
			shared->longest[at] = took;
		shared->count[at][err < ERRNOS ? err : 0]++;
		shared->calls++;
	}
	return NULL;
}

static void worker(int number)
{
	struct sigaction action = { .sa_handler = on_fault, .sa_flags = SA_NODEFER };
	int killable = open("/proc/self/oom_score_adj", O_WRONLY);
	pthread_t threads[THREADS];

	shared->pids[number] = getpid();
	/* when the group is full one of these is to be killed, not the first process */
	if (write(killable, "0", 1) != 1)
		perror("oom_score_adj");
	close(killable);
	sigaction(SIGSEGV, &action, NULL);
	sigaction(SIGBUS, &action, NULL);
	low = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
	state = (seed * 1000003 + round_number) * 1000003 + 1000 + number;
	for (next_fd = 0; next_fd < FDS; next_fd++)
		next_fd % 4 ? make_region() : open_other();
	for (int i = 0; i < SLOTS; i++)
		mmap((void *)(ARENA + SLOT * i), SLOT, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
		     FIRST_FD + i, 0);
	for (long i = 0; i < THREADS; i++)
		pthread_create(&threads[i], NULL, calls, (void *)(number * THREADS + i));
	for (int i = 0; i < THREADS; i++)
		pthread_join(threads[i], NULL);
	_exit(0);
}

static int ended[ERRNOS];	/* by how processes ended: their status, or 128 and the signal */
static int left;		/* windows and names that ought to be gone */

/* Wait for all processes; false when some are still there after the time limit. */
static bool all_end(void)
{
	time_t limit = time(NULL) + SECONDS;
	int status, pid;

	while ((pid = waitpid(-1, &status, WNOHANG)) >= 0) {
		if (pid)
			ended[WIFSIGNALED(status) ? 100 + WTERMSIG(status) % 33 :
						    WEXITSTATUS(status) % 100]++;
		else if (time(NULL) > limit)
			return false;
		else
			usleep(2000);
	}
	return true;
}

/* Folders may have got modes that shut out their owner. */
static int open_up(const char *name, const struct stat *st, int kind, struct FTW *where)
{
	(void)st, (void)where;
	if (kind == FTW_D || kind == FTW_DNR)
		chmod(name, 0700);
	return 0;
}

static int remove_name(const char *name, const struct stat *st, int kind, struct FTW *where)
{
	struct mshare_info now = { .size = sizeof(now) };
	int fd;

	if (!where->level)
		return 0;
	if (S_ISREG(st->st_mode)) {
		chmod(name, 0600);
		fd = open(name, O_RDONLY);
		if (fd < 0 || ioctl(fd, MSHAREFS_INFO, &now) || now.attachments ||
		    now.grafts != now.ungrafts) {
			printf("%s: %llu windows, %llu grafts, %llu ungrafts, %s\n", name,
			       now.attachments, now.grafts, now.ungrafts, strerror(errno));
			left++;
		}
		close(fd);
	}
	if (remove(name)) {
		perror(name);
		left++;
	}
	(void)kind;
	return 0;
}

static void report(void)
{
	for (int i = 0; i < KINDS; i++) {
		unsigned int total = 0;

		for (int err = 0; err < ERRNOS; err++)
			total += shared->count[i][err];
		printf("%-20s %7u in %5.1f s, one in %4.1f s:", kinds[i].name, total,
		       shared->nanoseconds[i] / 1e9, shared->longest[i] / 1e9);
		for (int err = 0; err < ERRNOS; err++)
			if (shared->count[i][err])
				printf(" %s %u", err ? strerrorname_np(err) : "ok",
				       shared->count[i][err]);
		printf("\n");
	}
	printf("processes:");
	for (int i = 0; i < ERRNOS; i++)
		if (ended[i])
			printf(" %s %d: %d", i < 100 ? "status" : "signal", i % 100, ended[i]);
	printf("\ncalls: %lu\n", shared->calls);
}

int main(int argc, char **argv)
{
	const struct rlimit none = { 0, 0 }, locked = { 1 << 20, 1 << 20 };
	bool one = argc > 4;
	unsigned long wanted, told = 0;

	if (argc < 4)
		return 2;
	seed = strtoull(argv[1], NULL, 0);
	wanted = strtoul(argv[2], NULL, 0);
	folder = argv[3];
	setrlimit(RLIMIT_CORE, &none);
	setrlimit(RLIMIT_MEMLOCK, &locked);
	prctl(PR_SET_CHILD_SUBREAPER, 1);
	setvbuf(stdout, NULL, _IOLBF, 0);
	shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	round_number = one ? strtoull(argv[4], NULL, 0) : 0;
	do {
		socketpair(AF_UNIX, SOCK_DGRAM, 0, mail);
		for (int i = 0; i < WORKERS; i++)
			if (!fork())
				worker(i);
		if (!all_end()) {
			printf("round %lu: processes do not end\n", round_number);
			return 3;
		}
		close(mail[0]);
		close(mail[1]);
		for (int depth = 0; depth < 8; depth++)
			nftw(folder, open_up, 20, FTW_PHYS);
		nftw(folder, remove_name, 20, FTW_DEPTH | FTW_PHYS);
		if (left) {
			printf("round %lu left %d things\n", round_number, left);
			break;
		}
		if (shared->calls / PROGRESS > told) {
			told = shared->calls / PROGRESS;
			fprintf(stderr, "%lu calls\n", shared->calls);
		}
		round_number++;
	} while (!one && shared->calls < wanted);
	report();
	return left ? 4 : 0;
}
