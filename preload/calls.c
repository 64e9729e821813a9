// SPDX-License-Identifier: MIT
/*
 * The calls of the C library that make and change mappings, for a program that
 * knows nothing of the module. Each is the system call, with nothing of its own
 * in between on x86-64, so that is what is made: looking up the library's own
 * function could call malloc, which may be what is calling here.
 *
 * The program's call comes first, so its errors and limits are the kernel's own.
 * Only if it has made a large shared mapping is that looked at through a window.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/ioctl.h>
#include <linux/kvm.h>
#include <linux/userfaultfd.h>
#include <stdarg.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/shm.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "window.h"

#define EXPORT __attribute__((visibility("default")))
#define SPARSE (64UL << 30)

/* A window has tables for all of its length, a mapping for what is in use. */
static bool sparse(size_t length, int fd)
{
	struct stat found;

	return length > SPARSE && !syscall(SYS_fstat, fd, &found) &&
	       length / 16 > (size_t)found.st_size;
}

static const char *not_sharable(void *address, size_t length, int prot, int flags, int fd,
				off_t offset)
{
	const int known = MAP_TYPE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_POPULATE;

	if (flags & MAP_HUGETLB)
		return "huge pages";
	if (address)
		return "mapped at an address of the program's choice";
	if (flags & ~known)
		return "mapped with flags that windows do not know";
	if (prot != PROT_READ && prot != (PROT_READ | PROT_WRITE))
		return "mapped neither for reading nor for reading and writing";
	if (flags & MAP_ANONYMOUS)
		return NULL;
	if (offset)
		return "mapped from an offset on";
	if (sparse(length, fd))
		return "much longer than the file";
	return NULL;
}

EXPORT void *mmap(void *address, size_t length, int prot, int flags, int fd, off_t offset)
{
	const char *what = flags & MAP_ANONYMOUS ? "anonymous memory" : "a file", *why;
	bool wanted = (flags & MAP_TYPE) == MAP_SHARED && mshare_wanted(length);
	int populate = 0, saved;
	void *found;

	if ((flags & MAP_FIXED) && !mshare_revert(address, length, "mmap over it"))
		return MAP_FAILED;
	if (wanted) {
		why = not_sharable(address, length, prot, flags, fd, offset);
		if (why) {
			mshare_say_plain(length, what, why);
			wanted = false;
		} else {
			/* later, and then through the window */
			populate = flags & MAP_POPULATE;
		}
	}
	found = (void *)syscall(SYS_mmap, address, length, prot, flags & ~populate, fd, offset);
	if (!wanted || found == MAP_FAILED)
		return found;
	found = mshare_share(found, length, prot, false, what);
	if (populate) {
		saved = errno;
		syscall(SYS_madvise, found, length, MADV_POPULATE_READ);
		errno = saved;
	}
	return found;
}

EXPORT void *mmap64(void *address, size_t length, int prot, int flags, int fd, off64_t offset)
	__attribute__((alias("mmap")));

EXPORT int munmap(void *address, size_t length)
{
	if (length && mshare_unmap(address, length))
		return 0;
	if (!mshare_revert(address, length, "munmap of a part"))
		return -1;
	return syscall(SYS_munmap, address, length);
}

EXPORT void *mremap(void *address, size_t length, size_t wanted, int flags, ...)
{
	void *target = NULL;
	va_list arguments;

	if (flags & (MREMAP_FIXED | MREMAP_DONTUNMAP)) {
		va_start(arguments, flags);
		target = va_arg(arguments, void *);
		va_end(arguments);
	}
	if (!mshare_revert(address, length ? length : 1, "mremap") ||
	    ((flags & MREMAP_FIXED) && !mshare_revert(target, wanted, "mremap over it")))
		return MAP_FAILED;
	return (void *)syscall(SYS_mremap, address, length, wanted, flags, target);
}

EXPORT int mprotect(void *address, size_t length, int prot)
{
	if (!mshare_revert(address, length, "mprotect"))
		return -1;
	return syscall(SYS_mprotect, address, length, prot);
}

EXPORT int pkey_mprotect(void *address, size_t length, int prot, int key)
{
	if (!mshare_revert(address, length, "pkey_mprotect"))
		return -1;
	return syscall(SYS_pkey_mprotect, address, length, prot, key);
}

EXPORT int madvise(void *address, size_t length, int advice)
{
	bool all = false;
	int result;

	if (!mshare_touches(address, length))
		return syscall(SYS_madvise, address, length, advice);
	switch (advice) {
	case MADV_DONTNEED:
	case MADV_COLD:
	case MADV_PAGEOUT:
	case MADV_POPULATE_READ:
	case MADV_POPULATE_WRITE:
		return syscall(SYS_madvise, address, length, advice);
	case MADV_NORMAL:
	case MADV_RANDOM:
	case MADV_SEQUENTIAL:
	case MADV_DONTDUMP:
	case MADV_DODUMP:
		/* about the mapping, which this would cut in two where it is of a part */
		all = true;
		/* fall through */
	case MADV_WILLNEED:
	case MADV_REMOVE:
		/* about the file */
		if (mshare_on_plain(SYS_madvise, address, length, advice, all, &result))
			return result;
	}
	if (!mshare_revert(address, length, all ? "madvise of a part" : "madvise"))
		return -1;
	return syscall(SYS_madvise, address, length, advice);
}

/* glibc makes the system call by itself. Its DONTNEED does nothing. */
EXPORT int posix_madvise(void *address, size_t length, int advice)
{
	int saved = errno, result = 0;

	if (advice != POSIX_MADV_DONTNEED && madvise(address, length, advice))
		result = errno;
	errno = saved;
	return result;
}

/* In memory is what is in the file's page cache, which a window does not look at. */
EXPORT int mincore(void *address, size_t length, unsigned char *in_memory)
{
	int result;

	if (mshare_touches(address, length) &&
	    mshare_on_plain(SYS_mincore, address, length, (long)in_memory, false, &result))
		return result;
	return syscall(SYS_mincore, address, length, in_memory);
}

/*
 * A window for reading writes nothing, and an error of the disk is told once for each
 * open file: the program's own has its own. Once more if another thread has moved that
 * meanwhile. (No point of cancellation, as glibc's is.)
 */
EXPORT int msync(void *address, size_t length, int flags)
{
	void *plain;
	int result;

	if (!mshare_touches(address, length))
		return syscall(SYS_msync, address, length, flags);
	do {
		plain = mshare_plain(address, length);
		if (!plain && !mshare_revert(address, length, "msync"))
			return -1;
		result = syscall(SYS_msync, plain ? plain : address, length, flags);
	} while (plain && mshare_plain(address, length) != plain);
	return result;
}

EXPORT int mlock(const void *address, size_t length)
{
	if (!mshare_revert(address, length, "mlock"))
		return -1;
	return syscall(SYS_mlock, address, length);
}

EXPORT int mlock2(const void *address, size_t length, unsigned int flags)
{
	if (!mshare_revert(address, length, "mlock2"))
		return -1;
	return syscall(SYS_mlock2, address, length, flags);
}

EXPORT int mlockall(int flags)
{
	bool before = mshare_stop(MSHARE_LOCKS, true);
	int result = -1;

	if (mshare_revert(NULL, SIZE_MAX, "mlockall"))
		result = syscall(SYS_mlockall, flags);
	mshare_stop(MSHARE_LOCKS, result ? before : flags & MCL_FUTURE);
	return result;
}

EXPORT int munlockall(void)
{
	mshare_stop(MSHARE_LOCKS, false);
	return syscall(SYS_munlockall);
}

EXPORT int remap_file_pages(void *address, size_t length, int prot, size_t page, int flags)
{
	if (!mshare_revert(address, length, "remap_file_pages"))
		return -1;
	return syscall(SYS_remap_file_pages, address, length, prot, page, flags);
}

EXPORT long mbind(void *address, unsigned long length, int mode, const unsigned long *nodes,
		  unsigned long count, unsigned int flags)
{
	if (!mshare_revert(address, length, "mbind"))
		return -1;
	return syscall(SYS_mbind, address, length, mode, nodes, count, flags);
}

/*
 * KVM, userfaultfd, and devices with page tables of their own (GPUs, RDMA on demand)
 * rely on being told of changes in the program's page tables, which those of a region
 * are not. Of the devices' calls all count: which of them it is depends on the driver.
 */
static bool watches(unsigned int request)
{
	switch (_IOC_TYPE(request)) {
	case 'K':	/* amdkfd; those of the console have no size */
		return _IOC_SIZE(request);
	case 'd':	/* a DRM driver's own */
		return _IOC_NR(request) >= 0x40;
	case 'F':	/* NVIDIA's own */
		return _IOC_NR(request) >= 200;
	case 0x1b:	/* RDMA */
		return true;
	}
	return request == KVM_CREATE_VM || request == (unsigned int)UFFDIO_API;
}

EXPORT int ioctl(int fd, unsigned long request, ...)
{
	va_list arguments;
	void *argument;

	va_start(arguments, request);
	argument = va_arg(arguments, void *);
	va_end(arguments);
	if (watches(request)) {
		mshare_stop(MSHARE_WATCHES, true);
		if (!mshare_revert(NULL, SIZE_MAX, "KVM, userfaultfd or a device"))
			return -1;
	}
	return syscall(SYS_ioctl, fd, request, argument);
}

static size_t segment_size(int id)
{
	struct shmid_ds found;
	int saved = errno;
	size_t size = syscall(SYS_shmctl, id, IPC_STAT, &found) ? 0 : found.shm_segsz;

	errno = saved;
	return size;
}

EXPORT void *shmat(int id, const void *address, int flags)
{
	const char *what = "a System V segment";
	int prot = flags & SHM_RDONLY ? PROT_READ : PROT_READ | PROT_WRITE;
	void *found;
	size_t size;

	if (address && (flags & SHM_REMAP) &&
	    !mshare_revert(address, segment_size(id), "shmat over it"))
		return (void *)-1;
	found = (void *)syscall(SYS_shmat, id, address, flags);
	if (found == (void *)-1)
		return found;
	size = segment_size(id);
	if (!mshare_wanted(size))
		return found;
	if (address || flags & ~SHM_RDONLY) {
		mshare_say_plain(size, what, "attached with an address or flags of its own");
		return found;
	}
	return mshare_share(found, size, prot, true, what);
}

/* The kernel takes a munmap() of all of a segment as a detach. */
EXPORT int shmdt(const void *address)
{
	if (mshare_unmap(address, 0))
		return 0;
	if (!mshare_revert(address, 1, "shmdt"))
		return -1;
	return syscall(SYS_shmdt, address);
}
