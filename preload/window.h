/* SPDX-License-Identifier: MIT */
/*
 * The windows of this process: shared mappings that the program looks at through
 * a region of the module. Of each there is the program's own mapping as well,
 * untouched and so without page tables, at another address. It holds what the
 * kernel counts for the program, and takes the window's place for any call that
 * a window does not allow.
 *
 * No function here calls malloc or changes errno, unless it says so.
 */
#ifndef MSHARE_WINDOW_H
#define MSHARE_WINDOW_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Whether a mapping of that size is worth a window, and may get one. */
bool mshare_wanted(size_t length);

/*
 * Where the program is to find what it has just mapped: at plain, or through a
 * window. segment: by shmat().
 */
void *mshare_share(void *plain, size_t length, int prot, bool segment, const char *what);

/* Say why a mapping of that size stays as it is; only with --verbose. */
void mshare_say_plain(size_t length, const char *what, const char *why);

/* Whether a window, or a plain mapping that belongs to one, overlaps the range. No lock. */
bool mshare_touches(const void *address, size_t length);

/*
 * Put the program's own mappings in the place of all windows that overlap the
 * range, each in one step. False, with errno: that failed, and this window is as it
 * was, or gone where the kernel had no memory.
 */
bool mshare_revert(const void *address, size_t length, const char *why);

/*
 * Make madvise() or mincore() on the same place in the program's own mapping, if
 * the range lies in one window as a whole, or with all if it is all of one. False:
 * it does not. Sets errno as the call.
 */
bool mshare_on_plain(long call, const void *address, size_t length, long argument, bool all,
		     int *result);

/* Where that place is, for a call that takes long. Another thread may unmap it. */
void *mshare_plain(const void *address, size_t length);

/*
 * Unmap the window that starts there, and the program's own mapping with it. With a
 * length only if that is the window's; without, if it is a segment's. False: it is not.
 */
bool mshare_unmap(const void *address, size_t length);

/* As long as one of these holds, what is newly mapped stays as it is. */
#define MSHARE_LOCKS	1	/* new mappings are locked in memory */
#define MSHARE_WATCHES	2	/* something watches the program's page tables */
bool mshare_stop(unsigned int reason, bool stop);	/* whether it held before */

#endif
