// SPDX-License-Identifier: GPL-2.0-only
/*
 * Faults of guests, passed on to the host mm.
 *
 * Locks: the guest's mmap_lock is held for read by the caller; inside it the
 * host's is taken for read. The fault may belong to another process than the
 * one that runs, or to none: everything is found through the VMA.
 *
 * The retry flags go on to the host's fault. When that gives up its lock and
 * asks for a retry, the guest's lock is given up too, so the caller sees what it
 * sees for any other mapping. With RETRY_NOWAIT both stay held.
 */
#include <linux/file.h>
#include <linux/sched.h>
#include "compat.h"
#include "mshare.h"
#include "trace.h"

#define PASSED_ON (FAULT_FLAG_WRITE | FAULT_FLAG_ALLOW_RETRY | FAULT_FLAG_RETRY_NOWAIT | \
		   FAULT_FLAG_KILLABLE | FAULT_FLAG_TRIED | FAULT_FLAG_INTERRUPTIBLE)

static bool may_unlock(const struct vm_fault *vmf)
{
	return (vmf->flags & FAULT_FLAG_ALLOW_RETRY) && !(vmf->flags & FAULT_FLAG_RETRY_NOWAIT);
}

/*
 * A layout change goes on. Wait without the mmap_lock where the caller allows it.
 * Where it does not, the change can still need this lock: for another window of the
 * mm, when this one was born frozen, or, with two regions changed at once, through
 * two such callers. In the first case it loses patience. The limit is for the
 * second, and for a change that takes long; it is above MOST_PATIENCE.
 */
static vm_fault_t wait_for_thaw(struct vm_fault *vmf)
{
	struct mshare_window *win = vmf->vma->vm_private_data;
	struct mshare_region *r = win->region;
	struct file *file;

	if (!(vmf->flags & FAULT_FLAG_ALLOW_RETRY))
		return wait_event_timeout(r->thaw, !READ_ONCE(win->frozen), 10 * HZ) ?
			VM_FAULT_NOPAGE : VM_FAULT_SIGBUS;
	if (vmf->flags & FAULT_FLAG_RETRY_NOWAIT)
		return VM_FAULT_RETRY;
	/* the window may go while the lock is not held, the region may not */
	file = get_file(vmf->vma->vm_file);
	mshare_fault_unlock(vmf);
	if (vmf->flags & FAULT_FLAG_KILLABLE)
		wait_event_killable(r->thaw, !READ_ONCE(r->frozen));
	else
		wait_event(r->thaw, !READ_ONCE(r->frozen));
	fput(file);
	return VM_FAULT_RETRY;
}

/* The caller's own fault is counted too: one fault counts once. */
static vm_fault_t host_fault(struct vm_area_struct *vma, unsigned long addr, unsigned int flags)
{
	unsigned long min_flt = current->min_flt, maj_flt = current->maj_flt;
	vm_fault_t ret;

	/* without a retry the host's lock must come back held, killed or not */
	if (!(flags & FAULT_FLAG_ALLOW_RETRY))
		flags &= ~FAULT_FLAG_KILLABLE;
	ret = handle_mm_fault(vma, addr, (flags & PASSED_ON) | FAULT_FLAG_REMOTE, NULL);
	current->min_flt = min_flt;
	current->maj_flt = maj_flt;
	return ret;
}

static vm_fault_t forward(struct vm_fault *vmf, unsigned long host)
{
	struct mshare_window *win = vmf->vma->vm_private_data;
	struct mm_struct *mm = win->region->mm;
	unsigned long i = (host - win->host) >> SLOT_SHIFT;
	struct vm_area_struct *vma;
	struct page *page;
	vm_fault_t ret;
	pud_t *pudp;

	if ((vmf->flags & FAULT_FLAG_KILLABLE) && may_unlock(vmf)) {
		if (mmap_read_lock_killable(mm)) {
			mshare_fault_unlock(vmf);
			return VM_FAULT_RETRY;
		}
	} else {
		mmap_read_lock(mm);
	}
	/* the caller has checked the guest's VMA; this is the other half */
	vma = find_vma(mm, host);
	if (!vma || vma->vm_start > host || !(vma->vm_flags & VM_READ) ||
	    ((vmf->flags & FAULT_FLAG_WRITE) && !(vma->vm_flags & VM_WRITE))) {
		mmap_read_unlock(mm);
		return VM_FAULT_SIGSEGV;
	}
	ret = mshare_shmem_charge(vma, host, vmf->vma->vm_mm, vmf->flags & FAULT_FLAG_WRITE, &page);
	if (!(ret & VM_FAULT_ERROR))
		ret |= host_fault(vma, host, vmf->flags);
	if (page)
		put_page(page);
	if (ret & VM_FAULT_RETRY) {
		if (may_unlock(vmf))
			mshare_fault_unlock(vmf);
		else
			mmap_read_unlock(mm);
		return ret;
	}
	/* done, but the host's lock is gone */
	if (ret & VM_FAULT_COMPLETED)
		return VM_FAULT_NOPAGE | (ret & VM_FAULT_MAJOR);
	if (!(ret & VM_FAULT_ERROR)) {
		pudp = mshare_pudp(mm, host);
		if (mshare_graft(win, i, READ_ONCE(*pudp)))
			mshare_flush_guest(vmf->vma->vm_mm);
		ret = VM_FAULT_NOPAGE | (ret & VM_FAULT_MAJOR);
	}
	mmap_read_unlock(mm);
	return ret;
}

/* ->fault, ->huge_fault: the mmap_lock is held. */
vm_fault_t mshare_fault(struct vm_fault *vmf)
{
	struct mshare_window *win = vmf->vma->vm_private_data;
	unsigned long addr = vmf->address, host;
	struct mshare_region *r;
	unsigned int flags = vmf->flags;
	vm_fault_t ret;

	/* fork or mremap found no memory for the window */
	if (!win)
		return VM_FAULT_SIGBUS;
	r = win->region;
	/* not drained yet: wait all the same, so that the change gets all locks soon */
	if (READ_ONCE(win->frozen) || (may_unlock(vmf) && READ_ONCE(r->frozen)))
		return wait_for_thaw(vmf);
	if (unlikely(READ_ONCE(win->closing))) {
		/* an mremap that failed half-way: the mapping is still in use */
		spin_lock(&win->guest->lock);
		WRITE_ONCE(win->closing, false);
		spin_unlock(&win->guest->lock);
	}
	host = win->host + (addr - win->start);
	atomic64_inc(&r->faults);
	ret = forward(vmf, host);
	/* after a retry win is no longer ours to look at */
	trace_mshare_fault(r, addr, host, flags, (__force unsigned int)ret);
	return ret;
}

/*
 * ->page_mkwrite, ->pfn_mkwrite: the kernel would make the host's entry
 * writable by the guest's rights alone. The flags hold no retry here. While
 * frozen let the access fault again: it then comes through ->fault.
 */
vm_fault_t mshare_mkwrite(struct vm_fault *vmf)
{
	struct mshare_window *win = vmf->vma->vm_private_data;

	if (win && READ_ONCE(win->frozen))
		return VM_FAULT_NOPAGE;
	return mshare_fault(vmf);
}
