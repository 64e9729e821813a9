// SPDX-License-Identifier: GPL-2.0-only
/*
 * Layout changes: the one path that frees page tables of a host mm.
 *
 * freeze   For each guest: its mmap_lock and the VMA's lock for write, so that
 *          no walker is inside; take the host's tables out; flush its TLBs, which
 *          also waits for walkers without a lock; unlock. From then on its faults
 *          wait; those that can without the lock do so from the beginning. Windows
 *          that appear meanwhile are born frozen.
 * change   On a kernel worker, in the host mm.
 * thaw     Wake the waiting faults, then graft every guest again.
 *
 * Locks: region->layout throughout; guests' mmap_locks one at a time and never
 * while the host's is held. A killed caller stops waiting for a guest and undoes
 * the freeze. So does one that has to wait long, and starts over when it has not.
 */
#include <linux/fs.h>
#include <linux/sched.h>
#include "compat.h"
#include "mshare.h"
#include "trace.h"

#define PATIENCE	(HZ / 2)
#define MOST_PATIENCE	(4UL * HZ)	/* less than wait_for_thaw() has */
#define PAUSE		(HZ / 50)

/* region->lock held. Those of this pass are at the end of the list. */
static void mark(struct mshare_window *win)
{
	win->pass = win->region->pass;
	list_move_tail(&win->of_region, &win->region->windows);
}

/* A window that this pass has not seen, with a reference; NULL at the end. */
static struct mshare_window *next_window(struct mshare_region *r)
{
	struct mshare_window *win;

	spin_lock(&r->lock);
	win = list_first_entry_or_null(&r->windows, struct mshare_window, of_region);
	if (win && win->pass != r->pass) {
		mark(win);
		kref_get(&win->ref);
	} else {
		win = NULL;
	}
	spin_unlock(&r->lock);
	return win;
}

/*
 * All of the guest's windows onto the region in one hold of its mmap_lock, which
 * this pass then never asks for again: a fault that waits may keep it.
 *
 * Flushed before the lock is given up: a window that is unmapped next has nothing
 * of the host's left to take out, so nobody else would.
 */
static void drain(struct mshare_guest *guest, struct mshare_region *r)
{
	struct mshare_window *win;
	bool changed = false;

	/* the list only changes under the guest's mmap_lock, which is held */
	list_for_each_entry(win, &guest->windows, of_guest) {
		if (win->region != r)
			continue;
		if (!guest->dead) {
			mshare_vma_start_write(win->vma);
			mshare_set_ops(win);
		}
		spin_lock(&guest->lock);
		WRITE_ONCE(win->frozen, true);
		if (!mshare_planted(FREED_TABLE))
			changed |= mshare_ungraft(win, win->start, win->end, false);
		spin_unlock(&guest->lock);
		spin_lock(&r->lock);
		mark(win);
		spin_unlock(&r->lock);
	}
	if (changed && !mshare_planted(NO_FREEZE_FLUSH))
		mshare_flush_guest(guest->mn.mm);
}

static void release(struct mshare_region *r)
{
	struct mshare_window *win;

	spin_lock(&r->lock);
	WRITE_ONCE(r->frozen, false);
	r->pass++;
	list_for_each_entry(win, &r->windows, of_region)
		WRITE_ONCE(win->frozen, false);
	spin_unlock(&r->lock);
	wake_up_all(&r->thaw);
}

/*
 * One guest's lock is not to be had, for as long as its user likes. The others
 * need not wait for it: let them go, and begin anew when it is.
 */
void mshare_lose_patience(struct work_struct *work)
{
	release(container_of(to_delayed_work(work), struct mshare_region, patience));
}

static void thaw(struct mshare_region *r)
{
	struct mshare_window *win;
	int err = 0;

	release(r);
	/* when killed, the first fault of each slot does the rest */
	while (!err && (win = next_window(r))) {
		/* waits are here: who exits needs the lock below while all notifiers wait for it */
		mshare_host_tables(win);
		err = mmap_read_lock_killable(mshare_mm(win));
		if (!err) {
			if (READ_ONCE(win->vma))
				mshare_graft_all(win, false);
			mmap_read_unlock(mshare_mm(win));
		}
		mshare_window_put(win);
	}
}

static void begin(struct mshare_region *r)
{
	spin_lock(&r->lock);
	WRITE_ONCE(r->frozen, true);
	r->pass++;
	spin_unlock(&r->lock);
}

static int freeze(struct mshare_region *r)
{
	unsigned long patience = PATIENCE;
	struct mshare_window *win;
	int err;

	begin(r);
	while ((win = next_window(r))) {
		if (mshare_planted(LOCK_ORDER))
			mmap_read_lock(r->mm);
		schedule_delayed_work(&r->patience, patience);
		err = mmap_write_lock_killable(mshare_mm(win));
		/* from here on nobody but this thread changes r->frozen */
		cancel_delayed_work_sync(&r->patience);
		if (mshare_planted(LOCK_ORDER))
			mmap_read_unlock(r->mm);
		if (!err) {
			if (!r->frozen) {
				/* who waited has been woken, and may not have run yet */
				schedule_timeout_killable(PAUSE);
				/* anew, with this one, which is at hand; and with more patience */
				begin(r);
				patience = min(2 * patience, MOST_PATIENCE);
			}
			if (win->vma)
				drain(win->guest, r);
			mmap_write_unlock(mshare_mm(win));
		}
		mshare_window_put(win);
		if (err) {
			thaw(r);
			return err;
		}
	}
	return 0;
}

/*
 * Freeze, run fn in the host mm, thaw. Caller holds region->layout. What is refused
 * with nobody frozen costs nobody anything, and notify is for good.
 */
int mshare_change(struct mshare_region *r, unsigned int op, bool notify,
		  int (*fn)(struct mshare_region *r, void *arg), void *arg, u64 offset, u64 size)
{
	int err = mshare_keeps(r, offset, size) ? -EBUSY : 0;

	if (!err && notify)
		WRITE_ONCE(r->write_notify, true);
	err = err ?: freeze(r);
	if (!err) {
		/* again: now no window can appear and hand on a page */
		if (mshare_keeps(r, offset, size)) {
			err = -EBUSY;
		} else {
			err = mshare_host_run(r, r->mm, fn, arg);
			atomic64_inc(&r->changes);
		}
		thaw(r);
	}
	trace_mshare_layout(r, op, offset, size, err);
	return err;
}

int mshare_layout(struct mshare_region *r, unsigned int op, bool notify,
		  int (*fn)(struct mshare_region *r, void *arg), void *arg, u64 offset, u64 size)
{
	int err = mutex_lock_killable(&r->layout);

	if (err)
		return err;
	err = mshare_change(r, op, notify, fn, arg, offset, size);
	mutex_unlock(&r->layout);
	return err;
}

/* Before a change: as the kernel's own mappings. After it: as a region needs them. */
void mshare_settle(struct mshare_region *r, bool done)
{
	unsigned long addr = MSHARE_RW, end = MSHARE_RO + r->size;
	struct vm_area_struct *vma;

	mmap_write_lock(r->mm);
	for (; (vma = find_vma_intersection(r->mm, addr, end)); addr = vma->vm_end) {
		mshare_forbid_collapse(vma, done);
		if (done && mshare_shmem_owned(r, vma->vm_file) && !(vma->vm_flags & VM_HUGEPAGE))
			mshare_flags_mod(vma, VM_HUGEPAGE, VM_NOHUGEPAGE);
	}
	mmap_write_unlock(r->mm);
}
