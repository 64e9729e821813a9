/* SPDX-License-Identifier: (GPL-2.0-only WITH Linux-syscall-note) OR MIT */
/*
 * The calls a program makes on a region's file in msharefs.
 *
 * Every field has a fixed width and means the same to a 32-bit caller.
 * Offsets and sizes are bytes. Offsets in a region start at 0.
 */
#ifndef _UAPI_MSHARE_H
#define _UAPI_MSHARE_H

#include <linux/ioctl.h>
#include <linux/types.h>

/*
 * Put memory into the region, in place of whatever is mapped there.
 * The region's file must be open for writing.
 */
struct mshare_create {
	__u64 region_offset;	/* where in the region; a multiple of the page size */
	__u64 size;		/* how much; a multiple of the page size */
	__u64 offset;		/* where in the file; 0 with MAP_ANONYMOUS */
	__u32 prot;		/* PROT_READ, or PROT_READ | PROT_WRITE */
	__u32 flags;		/* MAP_SHARED | MAP_FIXED | any of ANONYMOUS, NORESERVE, LOCKED */
	__u32 fd;		/* the file; ignored with MAP_ANONYMOUS */
	__u32 __pad;		/* not read */
};

/* Take memory out of the region. A hole gives SIGSEGV. */
struct mshare_unmap {
	__u64 region_offset;	/* a multiple of the page size */
	__u64 size;		/* a multiple of the page size */
};

/*
 * Change what every writable attachment may do with a range. When the call
 * returns, no process holds a right that was taken away. Holes are skipped.
 */
struct mshare_protect {
	__u64 region_offset;	/* a multiple of the page size */
	__u64 size;		/* a multiple of the page size */
	__u32 prot;		/* PROT_READ, or PROT_READ | PROT_WRITE */
	__u32 reserved;		/* must be 0 */
};

/*
 * Numbers of one region. The caller sets size to what it has room for; the
 * kernel fills that much at most and sets size to what it filled. Fields are
 * only ever added at the end, so both older and newer callers work.
 * Counters start at 0 when the region is created and never go back.
 */
struct mshare_info {
	__u32 size;		/* in: room; out: bytes filled; at least 16 */
	__u32 flags;		/* MSHARE_INFO_LOCKED */
	__u64 region_size;	/* size of the region; 0 until it is set */
	__u64 alignment;	/* of sizes, addresses and offsets of attachments */
	__u64 attachments;	/* windows that exist now, in all processes */
	__u64 grafts;		/* counter: slots put into a process */
	__u64 ungrafts;		/* counter: slots taken out of a process */
	__u64 faults;		/* counter: faults passed on to the host mm */
	__u64 flushes;		/* counter: TLB flushes for changes in the host mm */
	__u64 layout_changes;	/* counter: maps, unmaps and protects */
	__u64 pagetable_bytes;	/* the one set of page tables, now */
	__u64 resident_bytes;	/* content in memory, now */
	__u64 mapped_bytes;	/* part of the region that is not a hole, now */
	__u64 mapped_end;	/* end of the last mapping, now */
	__u64 locked_bytes;	/* content that never moves, now */
	__u64 reserved[2];	/* 0 */
};

/*
 * Get the region of a file: the one that all who ask for this file share. The
 * call is made on mshare_info. It returns a new descriptor, with FD_CLOEXEC.
 */
struct mshare_file {
	__u32 fd;		/* the file, open for reading, or for both */
	__u32 access;		/* O_RDONLY or O_RDWR */
};

/*
 * The same with a mapping in place of a descriptor: for shared memory that has
 * none, anonymous or System V's.
 */
struct mshare_mapping {
	__u64 address;		/* anywhere in a shared mapping of the caller's */
	__u32 access;		/* O_RDONLY or O_RDWR */
	__u32 reserved;		/* must be 0 */
};

/* All content of the region is in memory and stays where it is. */
#define MSHARE_INFO_LOCKED	1

#define MSHAREFS_CREATE_MAPPING	_IOW('x', 0, struct mshare_create)
#define MSHAREFS_UNMAP		_IOW('x', 1, struct mshare_unmap)
#define MSHAREFS_PROTECT	_IOW('x', 2, struct mshare_protect)
#define MSHAREFS_INFO		_IOWR('x', 3, struct mshare_info)
#define MSHAREFS_OPEN_FILE	_IOW('x', 4, struct mshare_file)
#define MSHAREFS_OPEN_MAPPING	_IOW('x', 5, struct mshare_mapping)

#endif /* _UAPI_MSHARE_H */
