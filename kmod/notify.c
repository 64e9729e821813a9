// SPDX-License-Identifier: GPL-2.0-only
/*
 * Both notifiers. On a guest mm: take the host's tables out before the kernel
 * zaps, frees or moves anything in a window. On the host mm: flush the guests'
 * TLBs whenever the host's page tables change.
 *
 * Locks: the guest's callbacks take guest->lock, and ->release the guest's
 * mmap_lock. The host's callback runs under page-table locks and takes none.
 */
#include <linux/slab.h>
#include "compat.h"
#include "mshare.h"
#include "trace.h"

/*
 * Unmapping and moving are the two operations that free or move the tables
 * themselves. Both have walkers locked out. The OOM reaper says the same, but
 * holds the mmap_lock for read only; it is the caller that may not block.
 */
static bool tables_go(const struct mmu_notifier_range *range)
{
	return range->event == MMU_NOTIFY_UNMAP && mmu_notifier_range_blockable(range);
}

static int guest_start(struct mmu_notifier *mn, const struct mmu_notifier_range *range)
{
	struct mshare_guest *guest = container_of(mn, struct mshare_guest, mn);
	bool own = tables_go(range), changed = false;
	struct mshare_window *win;

	spin_lock(&guest->lock);
	list_for_each_entry(win, &guest->windows, of_guest) {
		if (range->end <= win->start || range->start >= win->end)
			continue;
		win->invalidating++;
		if (own)
			win->closing = true;
		changed |= mshare_ungraft(win, range->start, range->end, own);
	}
	spin_unlock(&guest->lock);
	if (changed)
		mshare_flush_guest(mn->mm);
	return 0;
}

/* Nothing is grafted here: after an unmap the tables are freed next. A fault does it. */
static void guest_end(struct mmu_notifier *mn, const struct mmu_notifier_range *range)
{
	struct mshare_guest *guest = container_of(mn, struct mshare_guest, mn);
	struct mshare_window *win;

	spin_lock(&guest->lock);
	list_for_each_entry(win, &guest->windows, of_guest) {
		if (range->end <= win->start || range->start >= win->end)
			continue;
		if (win->invalidating)
			win->invalidating--;
	}
	spin_unlock(&guest->lock);
}

/* The mmap_lock keeps the OOM reaper out, the one walker an exiting mm still has. */
static void guest_release(struct mmu_notifier *mn, struct mm_struct *mm)
{
	struct mshare_guest *guest = container_of(mn, struct mshare_guest, mn);
	struct mshare_window *win;
	bool changed = false;

	mmap_write_lock(mm);
	spin_lock(&guest->lock);
	guest->dead = true;
	list_for_each_entry(win, &guest->windows, of_guest)
		changed |= mshare_ungraft(win, win->start, win->end, true);
	spin_unlock(&guest->lock);
	if (changed)
		mshare_flush_guest(mm);
	mmap_write_unlock(mm);
}

static struct mmu_notifier *guest_alloc(struct mm_struct *mm)
{
	struct mshare_guest *guest = kzalloc(sizeof(*guest), GFP_KERNEL_ACCOUNT);

	if (!guest)
		return ERR_PTR(-ENOMEM);
	spin_lock_init(&guest->lock);
	INIT_LIST_HEAD(&guest->windows);
	return &guest->mn;
}

static void guest_free(struct mmu_notifier *mn)
{
	kfree(container_of(mn, struct mshare_guest, mn));
}

const struct mmu_notifier_ops mshare_guest_ops = {
	.invalidate_range_start = guest_start,
	.invalidate_range_end = guest_end,
	.release = guest_release,
	.alloc_notifier = guest_alloc,
	.free_notifier = guest_free,
};

/*
 * The host's entries have changed already. A window that is counted only after
 * this read is grafted later still and cannot have loaded an old entry.
 */
static void host_flush(struct mmu_notifier *mn, struct mm_struct *mm, unsigned long start,
		       unsigned long end)
{
	struct mshare_region *r = container_of(mn, struct mshare_region, mn);

	smp_mb();
	if (!atomic_read(&r->nr_windows))
		return;
	atomic64_inc(&r->flushes);
	trace_mshare_flush(r, start, end);
	mshare_flush_all();
}

const struct mmu_notifier_ops mshare_host_ops = {
	.mshare_op_flush = host_flush,
};
