// SPDX-License-Identifier: GPL-2.0-only
/*
 * Windows: a guest's mapping of a region, from mmap to close.
 *
 * Locks: all but ->fault and ->get_policy run with the guest's mmap_lock held for
 * write, or in exit; ->close also for read, when munmap has taken the mapping out and
 * then let readers in. The notifier is registered under it, as is the walk that
 * grafts; a window joins its region's list and its guest's list before.
 */
#include <linux/mman.h>
#include <linux/slab.h>
#include "compat.h"
#include "mshare.h"

static struct mempolicy *policy;

static void window_free(struct kref *ref)
{
	struct mshare_window *win = container_of(ref, struct mshare_window, ref);

	mmu_notifier_put(&win->guest->mn);
	kvfree(win);
}

void mshare_window_put(struct mshare_window *win)
{
	kref_put(&win->ref, window_free);
}

static struct mshare_window *window_new(struct vm_area_struct *vma, struct mshare_region *r,
					unsigned long host, bool moving)
{
	unsigned long slots = (vma->vm_end - vma->vm_start) >> SLOT_SHIFT;
	struct mshare_window *win;
	struct mshare_guest *guest;

	win = kvzalloc(struct_size(win, slot, slots), GFP_KERNEL_ACCOUNT);
	if (!win)
		return ERR_PTR(-ENOMEM);
	guest = mshare_guest_get(vma->vm_mm);
	if (IS_ERR(guest)) {
		kvfree(win);
		return ERR_CAST(guest);
	}
	kref_init(&win->ref);
	win->region = r;
	win->guest = guest;
	win->vma = vma;
	win->start = vma->vm_start;
	win->end = vma->vm_end;
	win->host = host;
	win->closing = moving;

	atomic_inc(&r->nr_windows);
	spin_lock(&r->lock);
	win->frozen = r->frozen;
	win->pass = r->pass;
	list_add_tail(&win->of_region, &r->windows);
	spin_unlock(&r->lock);
	spin_lock(&guest->lock);
	list_add(&win->of_guest, &guest->windows);
	spin_unlock(&guest->lock);
	vma->vm_private_data = win;
	mshare_set_ops(win);
	return win;
}

/* Before anything is freed: some error paths of mmap close first and unmap then. */
static void window_close(struct vm_area_struct *vma)
{
	struct mshare_window *win = vma->vm_private_data;
	bool changed;

	if (!win)
		return;
	spin_lock(&win->guest->lock);
	changed = mshare_ungraft(win, win->start, win->end, true);
	list_del(&win->of_guest);
	spin_unlock(&win->guest->lock);
	if (changed)
		mshare_flush_guest(mshare_mm(win));
	spin_lock(&win->region->lock);
	list_del(&win->of_region);
	spin_unlock(&win->region->lock);
	atomic_dec(&win->region->nr_windows);
	WRITE_ONCE(win->vma, NULL);	/* a thaw may look, which the lock for read lets in */
	mshare_window_put(win);
}

/* Build the upper levels. Only in front of a slot that nothing can be grafted to yet. */
static int make_upper(struct mshare_window *win)
{
	unsigned long addr;
	int err = 0;

	for (addr = win->start; addr < win->end && !err; addr += SLOT_SIZE)
		if (!mshare_pudp(mshare_mm(win), addr))
			err = mshare_make_tables(mshare_mm(win), addr);
	return err;
}

/* All tables of a window that is in place. Without its upper levels it is none. */
static int build(struct mshare_window *win)
{
	int err = make_upper(win);

	if (err)
		return err;
	mshare_host_tables(win);
	mshare_graft_all(win, true);
	return 0;
}

/*
 * A copy of a window: by fork, in a new mm, grafted at once; or by mremap, in
 * the same, where the kernel moves the tables next and ->mremap grafts after.
 */
static void window_open(struct vm_area_struct *vma)
{
	struct mshare_window *from = vma->vm_private_data, *win;
	bool moving;

	if (!from)
		return;
	moving = vma->vm_mm == mshare_mm(from);
	vma->vm_private_data = NULL;
	if ((vma->vm_start | vma->vm_end) & ~SLOT_MASK)
		return;
	win = window_new(vma, from->region, from->host, moving);
	if (!IS_ERR(win) && !moving)
		build(win);
}

static int window_mremap(struct vm_area_struct *vma)
{
	struct mshare_window *win = vma->vm_private_data;

	if (!win)
		return -ENOMEM;
	spin_lock(&win->guest->lock);
	WRITE_ONCE(win->closing, false);
	spin_unlock(&win->guest->lock);
	build(win);
	return 0;
}

static int window_split(struct vm_area_struct *vma, unsigned long addr)
{
	return -EINVAL;
}

static int window_mprotect(struct vm_area_struct *vma, unsigned long start, unsigned long end,
			   unsigned long flags)
{
	return -EINVAL;
}

/*
 * Windows have a policy, which does not say that pages follow their users: without
 * one the NUMA scanner goes by the task's, and has the window taken apart to look.
 */
static struct mempolicy *window_policy(MSHARE_POLICY_ARGS)
{
	return policy;
}

int mshare_attach_init(void)
{
	policy = kzalloc(sizeof(*policy), GFP_KERNEL);
	if (!policy)
		return -ENOMEM;
	atomic_set(&policy->refcnt, 1);
	policy->mode = MPOL_LOCAL;
	return 0;
}

/* No window is left. Who still holds it, in get_mempolicy(), only counts it down. */
void mshare_attach_exit(void)
{
	if (atomic_read(&policy->refcnt) == 1)
		kfree(policy);
}

/* May come under the VMA's lock alone, which the host's fault cannot do with. */
static vm_fault_t window_huge(struct vm_fault *vmf, MSHARE_HUGE_ARG)
{
	if (mshare_vma_locked(vmf->flags)) {
		mshare_fault_unlock(vmf);
		return VM_FAULT_RETRY;
	}
	return mshare_fault(vmf);
}

#define WINDOW_OPS			\
	.open = window_open,		\
	.close = window_close,		\
	.may_split = window_split,	\
	.mremap = window_mremap,	\
	.mprotect = window_mprotect,	\
	.get_policy = window_policy,	\
	.fault = mshare_fault,		\
	.huge_fault = window_huge

static const struct vm_operations_struct window_ops = { WINDOW_OPS };

/*
 * The kernel takes ->page_mkwrite as the sign of a file that tracks dirty pages
 * and refuses long-term pins for writing, so it is there only where needed.
 */
static const struct vm_operations_struct window_notify_ops = {
	WINDOW_OPS,
	.page_mkwrite = mshare_mkwrite,
	.pfn_mkwrite = mshare_mkwrite,
};

/* Guest's mmap_lock, and the VMA's lock if it is in the tree, held for write. */
void mshare_set_ops(struct mshare_window *win)
{
	win->vma->vm_ops = READ_ONCE(win->region->write_notify) ? &window_notify_ops : &window_ops;
}

int mshare_mmap(struct file *file, struct vm_area_struct *vma)
{
	struct mshare_region *r = file_inode(file)->i_private;
	unsigned long size = mshare_size(r);
	unsigned long len = vma->vm_end - vma->vm_start;
	unsigned long offset = vma->vm_pgoff << PAGE_SHIFT;
	struct mshare_window *win;
	int err;

	if (!(vma->vm_flags & VM_MAYSHARE) || !(vma->vm_flags & (VM_READ | VM_WRITE)))
		return -EINVAL;
	if (vma->vm_flags & VM_EXEC)
		return -EPERM;
	if ((vma->vm_start | len | offset) & ~SLOT_MASK)
		return -EINVAL;
	if (!size || vma->vm_pgoff > size >> PAGE_SHIFT || len > size - offset)
		return -EINVAL;
	if (!mshare_may_attach(r))
		return -EOPNOTSUPP;
	/*
	 * VM_DONTEXPAND keeps away what works on the tables of ordinary mappings:
	 * mlock, KSM, khugepaged, merging, userfaultfd.
	 */
	mshare_flags_mod(vma, VM_DONTEXPAND | VM_DONTDUMP,
			 VM_MAYEXEC | (vma->vm_flags & VM_WRITE ? 0 : VM_MAYWRITE));
	vma->vm_private_data = NULL;
	offset += vma->vm_flags & VM_WRITE ? MSHARE_RW : MSHARE_RO;
	win = window_new(vma, r, offset, false);
	if (IS_ERR(win))
		return PTR_ERR(win);
	err = build(win);
	if (err)
		window_close(vma);
	return err;
}

unsigned long mshare_get_unmapped_area(struct file *file, unsigned long addr, unsigned long len,
				       unsigned long pgoff, unsigned long flags)
{
	unsigned long found;

	/* refused here, mmap has not taken out yet what is there, nor mremap the grafts */
	if (flags & MAP_FIXED && (addr | len) & ~SLOT_MASK)
		return -EINVAL;
	if (flags & MAP_FIXED)
		return mshare_search(file, addr, len, flags);
	if (len > TASK_SIZE - SLOT_SIZE)
		return -ENOMEM;
	if (addr) {
		addr = round_up(addr, SLOT_SIZE);
		found = mshare_search(NULL, addr, len, flags);
		if (found == addr)
			return addr;
	}
	found = mshare_search(NULL, 0, len + SLOT_SIZE - PAGE_SIZE, flags);
	return IS_ERR_VALUE(found) ? found : round_up(found, SLOT_SIZE);
}
