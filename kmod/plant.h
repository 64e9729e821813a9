/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Bugs to try the tests and the detectors on, one at a time. Only tests/detectors
 * sets MSHARE_PLANT; in any other build the compiler removes them all.
 */
#ifndef _MSHARE_PLANT_H
#define _MSHARE_PLANT_H

enum mshare_plant {
	PLANT_NOTHING,
	PLANT_FREED_TABLE,	/* a layout change leaves the host's tables in guests */
	PLANT_LOCK_ORDER,	/* a guest's mmap_lock is taken inside the host's */
	PLANT_SLEEP,		/* a call that may sleep, under guest->lock */
	PLANT_UNLOCKED,		/* a counter of the region is written under a guest's lock */
	PLANT_NO_HOST_FLUSH,	/* no flush when the host's entries change */
	PLANT_NO_FREEZE_FLUSH,	/* no flush of a drained guest, nor by the graft that ends it */
	PLANT_NO_GUEST_FLUSH,	/* no flush when a guest is detached */
};

#ifndef MSHARE_PLANT
#define MSHARE_PLANT PLANT_NOTHING
#endif

#define mshare_planted(bug) (PLANT_##bug == MSHARE_PLANT)

#endif
