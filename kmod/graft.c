// SPDX-License-Identifier: GPL-2.0-only
/*
 * Graft and ungraft: the only code that writes a guest's PUD entries.
 *
 * Who may free what: below a PUD entry in state SLOT_HOST or SLOT_BLANK
 * everything belongs to the host mm, and only a layout change or the end of the
 * region frees it, with all guests drained. The empty PMD page that the kernel
 * made for the guest is parked while the host's is in its place. It is put back
 * before the kernel frees or moves the guest's tables, so that the kernel frees
 * what it counted.
 *
 * An entry goes back to none only while nothing can walk the guest's tables
 * under its mmap_lock: walkers read the entry twice and take none as a table at
 * physical address 0 the second time. With walkers about (madvise, the OOM
 * reaper, a drain) it is pointed at the guest's own page or the blank one.
 *
 * Locks: guest->lock, inside it the guest's page_table_lock.
 */
#include <linux/kcsan-checks.h>
#include <linux/smp.h>
#include <asm/tlbflush.h>
#include "mshare.h"
#include "trace.h"

static int nothing(pte_t *pte, unsigned long addr, void *data)
{
	return 0;
}

/* Also makes a PMD and a PTE page: addr must lie in a mapping that will free them. */
int mshare_make_tables(struct mm_struct *mm, unsigned long addr)
{
	return apply_to_page_range(mm, addr, PAGE_SIZE, nothing, NULL);
}

/* NULL when the levels above do not exist. Another thread's fault may be making them. */
pud_t *mshare_pudp(struct mm_struct *mm, unsigned long addr)
{
	pgd_t *pgdp = pgd_offset(mm, addr);
	pgd_t pgd = READ_ONCE(*pgdp);
	p4d_t p4d;

	if (pgd_none(pgd))
		return NULL;
	p4d = READ_ONCE(*p4d_offset_lockless(pgdp, pgd, addr));
	return p4d_none(p4d) ? NULL : pud_offset(&p4d, addr);
}

/*
 * Walkers hold the guest's mmap_lock or the VMA's lock, read an entry more than once,
 * and plainly. Where they may be about, either table that they find is one for them: a
 * race that is meant, and that KCSAN is not to report as the module's.
 */
static void set_entry(pud_t *pudp, pud_t pud, bool walked)
{
	if (walked)
		kcsan_disable_current();
	set_pud(pudp, pud);
	if (walked)
		kcsan_enable_current();
}

static void flush_cpu(void *unused)
{
	__flush_tlb_all();
}

/*
 * CPUs that run the mm are interrupted. Others find the new generation when they
 * switch to it. The increment orders the cleared entry before the read of the
 * mask, as the one in switch_mm orders the mask before the read of the generation.
 * Once a CPU has taken the interrupt, no lockless walker of the mm is left on it that
 * started before: those run with interrupts off.
 */
void mshare_flush_guest(struct mm_struct *mm)
{
	if (mshare_planted(NO_GUEST_FLUSH))
		return;
	atomic64_inc_return(&mm->context.tlb_gen);
	on_each_cpu_mask(mm_cpumask(mm), flush_cpu, NULL, true);
}

/* Every CPU and every address space in its TLB. */
void mshare_flush_all(void)
{
	on_each_cpu(flush_cpu, NULL, true);
}

/*
 * Caller holds the host's mmap_lock, and the guest's for read at least. Returns true
 * when a flush of the guest must follow: a processor may keep the entry of the empty
 * table that was there.
 */
bool mshare_graft(struct mshare_window *win, unsigned long i, pud_t host)
{
	unsigned long addr = win->start + (i << SLOT_SHIFT);
	struct mm_struct *mm = mshare_mm(win);
	struct mshare_slot *slot = &win->slot[i];
	bool changed = false;

	spin_lock(&win->guest->lock);
	/* a thaw ends frozen under the region's lock, not this one */
	if (win->guest->dead || win->closing || READ_ONCE(win->frozen) || win->invalidating ||
	    slot->state == SLOT_HOST)
		goto out;
	/* looked up here: once closing is seen the tables may be freed */
	slot->pudp = mshare_pudp(mm, addr);
	if (!slot->pudp)
		goto out;
	spin_lock(&mm->page_table_lock);
	changed = !pud_none(*slot->pudp);
	if (slot->state == SLOT_OWN)
		slot->parked = READ_ONCE(*slot->pudp);
	set_entry(slot->pudp, host, true);
	spin_unlock(&mm->page_table_lock);
	slot->state = SLOT_HOST;
	if (mshare_planted(UNLOCKED))
		win->region->grafts.counter++;
	else
		atomic64_inc(&win->region->grafts);
	trace_mshare_graft(win->region, addr, win->host + (i << SLOT_SHIFT));
out:
	spin_unlock(&win->guest->lock);
	return changed;
}

/* Once, for a fault may be filling it. */
static pud_t read_pud(struct mm_struct *mm, unsigned long addr)
{
	pud_t *pudp = mshare_pudp(mm, addr);

	return pudp ? READ_ONCE(*pudp) : __pud(0);
}

/* Whether a slot that has content has no PMD page in the host; or make them all. */
static bool lacking(struct mshare_window *win, bool make)
{
	struct mm_struct *mm = win->region->mm;
	unsigned long i, addr;
	struct vm_area_struct *vma;

	for (i = 0; i < mshare_slots(win); i++) {
		addr = win->host + (i << SLOT_SHIFT);
		vma = find_vma_intersection(mm, addr, addr + SLOT_SIZE);
		if (!vma || !pud_none(read_pud(mm, addr)))
			continue;
		if (!make)
			return true;
		mshare_make_tables(mm, min(vma->vm_end, addr + SLOT_SIZE) - PAGE_SIZE);
		cond_resched();
	}
	return false;
}

/* What fails, for want of memory or because of a kill, is left to the first fault. */
void mshare_host_tables(struct mshare_window *win)
{
	struct mm_struct *mm = win->region->mm;
	bool lacks;

	if (READ_ONCE(win->frozen) || mmap_read_lock_killable(mm))
		return;
	lacks = lacking(win, false);
	mmap_read_unlock(mm);
	/* for write: a fault that puts a huge page there meanwhile must be kept out */
	if (!lacks || mmap_write_lock_killable(mm))
		return;
	lacking(win, true);
	mmap_write_unlock(mm);
}

/*
 * Graft every slot that has content and tables. What fails, because of a notifier
 * range that is open, of a kill, or without wait because the host's lock is taken, is
 * left to the first fault. Caller holds the guest's mmap_lock.
 */
void mshare_graft_all(struct mshare_window *win, bool wait)
{
	struct mm_struct *mm = win->region->mm;
	unsigned long i, addr;
	bool changed = false;
	pud_t pud;

	if (READ_ONCE(win->frozen))
		return;
	if (wait ? mmap_read_lock_killable(mm) : !mmap_read_trylock(mm))
		return;
	for (i = 0; i < mshare_slots(win); i++) {
		addr = win->host + (i << SLOT_SHIFT);
		pud = read_pud(mm, addr);
		if (!pud_none(pud) && find_vma_intersection(mm, addr, addr + SLOT_SIZE))
			changed |= mshare_graft(win, i, pud);
		cond_resched();
	}
	mmap_read_unlock(mm);
	if (changed && !mshare_planted(NO_FREEZE_FLUSH))
		mshare_flush_guest(mshare_mm(win));
}

/*
 * Take the host's tables out of the guest. With own set the entries end as the
 * kernel left them, which needs the guest's mmap_lock held for write or the
 * mapping out of its tree. Returns true when a flush of the guest must follow.
 */
bool mshare_ungraft(struct mshare_window *win, unsigned long start, unsigned long end, bool own)
{
	struct mm_struct *mm = mshare_mm(win);
	bool changed = false;
	unsigned long i;

	lockdep_assert_held(&win->guest->lock);
	start = max(start, win->start) & SLOT_MASK;
	end = min(end, win->end);
	for (i = (start - win->start) >> SLOT_SHIFT; i < mshare_slots(win); i++) {
		unsigned long addr = win->start + (i << SLOT_SHIFT);
		struct mshare_slot *slot = &win->slot[i];
		bool hosted = slot->state == SLOT_HOST;

		if (addr >= end)
			break;
		if (slot->state == SLOT_OWN || (slot->state == SLOT_BLANK && !own))
			continue;
		spin_lock(&mm->page_table_lock);
		if (own || !pud_none(slot->parked)) {
			set_entry(slot->pudp, slot->parked, !own);
			slot->parked = __pud(0);
			slot->state = SLOT_OWN;
		} else {
			set_entry(slot->pudp, win->region->blank, true);
			slot->state = SLOT_BLANK;
		}
		spin_unlock(&mm->page_table_lock);
		if (mshare_planted(SLEEP))
			cond_resched();
		changed = true;
		if (!hosted)
			continue;
		atomic64_inc(&win->region->ungrafts);
		trace_mshare_ungraft(win->region, addr, win->host + (i << SLOT_SHIFT));
	}
	return changed;
}
