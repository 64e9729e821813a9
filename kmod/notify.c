// SPDX-License-Identifier: GPL-2.0-only
/*
 * Both notifiers. On a guest mm: take the host's tables out before the kernel
 * zaps, frees or moves anything in a window. On the host mm: flush the guests'
 * TLBs whenever the host's page tables change.
 *
 * Locks: the guest's callbacks take guest->lock, and ->release the guest's
 * mmap_lock. The host's callback runs under page-table locks and takes none.
 */
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/wait_bit.h>
#include "compat.h"
#include "mshare.h"
#include "trace.h"

static DEFINE_SPINLOCK(known_lock);	/* innermost; guests that hold our own reference */
static LIST_HEAD(known_guests);
static atomic_t live_guests;		/* made and not freed yet */

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
			WRITE_ONCE(win->closing, true);
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

static void forget(struct mshare_guest *guest)
{
	bool known;

	spin_lock(&known_lock);
	known = !list_empty(&guest->known);
	list_del_init(&guest->known);
	spin_unlock(&known_lock);
	if (known)
		mmu_notifier_put(&guest->mn);
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
	forget(guest);
}

static struct mmu_notifier *guest_alloc(struct mm_struct *mm)
{
	struct mshare_guest *guest = kzalloc(sizeof(*guest), GFP_KERNEL_ACCOUNT);

	if (!guest)
		return ERR_PTR(-ENOMEM);
	spin_lock_init(&guest->lock);
	INIT_LIST_HEAD(&guest->windows);
	INIT_LIST_HEAD(&guest->known);
	atomic_inc(&live_guests);
	return &guest->mn;
}

static void guest_free(struct mmu_notifier *mn)
{
	kfree(container_of(mn, struct mshare_guest, mn));
	if (atomic_dec_and_test(&live_guests))
		wake_up_var(&live_guests);
}

static const struct mmu_notifier_ops guest_ops = {
	.invalidate_range_start = guest_start,
	.invalidate_range_end = guest_end,
	.release = guest_release,
	.alloc_notifier = guest_alloc,
	.free_notifier = guest_free,
};

/*
 * The registration gives up when the task has something to see to, which fork
 * cannot pass on: it would leave a child with a dead window. Signals can be held
 * off. A stop for a tracer, a freeze of the cgroup and a task work cannot: their
 * flags are put away and put back. One that comes meanwhile is put away too.
 */
static struct mmu_notifier *register_guest(struct mm_struct *mm)
{
	bool signal = false, notify = false;
	struct mmu_notifier *mn;
	sigset_t all, old;

	sigfillset(&all);
	sigprocmask(SIG_BLOCK, &all, &old);
	do {
		signal |= test_and_clear_thread_flag(TIF_SIGPENDING);
		notify |= test_and_clear_thread_flag(TIF_NOTIFY_SIGNAL);
		mn = mmu_notifier_get_locked(&guest_ops, mm);
	} while (IS_ERR(mn) && PTR_ERR(mn) == -EINTR);
	if (notify)
		set_thread_flag(TIF_NOTIFY_SIGNAL);
	if (signal)
		set_thread_flag(TIF_SIGPENDING);
	sigprocmask(SIG_SETMASK, &old, NULL);
	return mn;
}

/*
 * The guest of an mm, with a reference; the mmap_lock is held for write. The
 * registration takes every lock of the mm, so it is done once: a reference of
 * our own keeps it until the mm or the module goes.
 */
struct mshare_guest *mshare_guest_get(struct mm_struct *mm)
{
	struct mmu_notifier *mn = register_guest(mm);
	struct mshare_guest *guest;

	if (IS_ERR(mn))
		return ERR_CAST(mn);
	guest = container_of(mn, struct mshare_guest, mn);
	if (list_empty(&guest->known)) {
		/* finds it: no locks, cannot fail */
		mmu_notifier_get_locked(&guest_ops, mm);
		spin_lock(&known_lock);
		list_add(&guest->known, &known_guests);
		spin_unlock(&known_lock);
	}
	return guest;
}

/* No region is left, so no guest has a window or gets one. */
void mshare_guests_forget(void)
{
	struct mshare_guest *guest;

	for (;;) {
		spin_lock(&known_lock);
		guest = list_first_entry_or_null(&known_guests, struct mshare_guest, known);
		if (guest)
			list_del_init(&guest->known);
		spin_unlock(&known_lock);
		if (!guest)
			break;
		mmu_notifier_put(&guest->mn);
	}
	/* they are freed behind a grace period, in which a release may still run */
	mmu_notifier_synchronize();
	/* by callbacks, which may be queued for long; the last may still be about to return */
	wait_var_event(&live_guests, !atomic_read(&live_guests));
	synchronize_rcu();
}

/*
 * The host's entries have changed already. A window that is counted only after
 * this read is grafted later still and cannot have loaded an old entry.
 */
static void host_flush(struct mmu_notifier *mn, struct mm_struct *mm, unsigned long start,
		       unsigned long end)
{
	struct mshare_region *r = container_of(mn, struct mshare_region, mn);

	smp_mb();	/* as said above */
	if (!atomic_read(&r->nr_windows))
		return;
	atomic64_inc(&r->flushes);
	trace_mshare_flush(r, start, end);
	if (!mshare_planted(NO_HOST_FLUSH))
		mshare_flush_all();
}

const struct mmu_notifier_ops mshare_host_ops = {
	.mshare_op_flush = host_flush,
};
