// SPDX-License-Identifier: GPL-2.0-only
/*
 * Layout changes: the one path that frees page tables of a host mm.
 *
 * freeze   For each guest: its mmap_lock and the VMA's lock for write, so that
 *          no walker is inside; take the host's tables out; unlock. From then on
 *          its faults wait. Windows that appear meanwhile are born frozen.
 * flush    All CPUs. The tables are now unreachable and no TLB remembers them.
 * change   On a kernel worker, in the host mm.
 * thaw     Wake the waiting faults, then graft every guest again.
 *
 * Locks: region->layout throughout; guests' mmap_locks one at a time and never
 * while the host's is held. A killed caller stops waiting for a guest and undoes
 * the freeze.
 */
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/falloc.h>
#include <linux/mman.h>
#include <linux/sched/signal.h>
#include "compat.h"
#include "mshare.h"
#include "trace.h"

/* A window that this pass has not seen, with a reference; NULL at the end. */
static struct mshare_window *next_window(struct mshare_region *r)
{
	struct mshare_window *win;

	spin_lock(&r->lock);
	win = list_first_entry_or_null(&r->windows, struct mshare_window, of_region);
	if (win && win->pass != r->pass) {
		win->pass = r->pass;
		list_move_tail(&win->of_region, &r->windows);
		mshare_window_get(win);
	} else {
		win = NULL;
	}
	spin_unlock(&r->lock);
	return win;
}

/*
 * All of the guest's windows onto the region in one hold of its mmap_lock: a
 * fault that waits in one must not keep us from another.
 */
static void drain(struct mshare_guest *guest, struct mshare_region *r)
{
	struct mshare_window *win;

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
			mshare_ungraft(win, win->start, win->end, false);
		spin_unlock(&guest->lock);
	}
}

static void thaw(struct mshare_region *r)
{
	struct mshare_window *win;
	int err = 0;

	spin_lock(&r->lock);
	r->frozen = false;
	r->pass++;
	list_for_each_entry(win, &r->windows, of_region)
		WRITE_ONCE(win->frozen, false);
	spin_unlock(&r->lock);
	wake_up_all(&r->thaw);
	/* when killed, the first fault of each slot does the rest */
	while (!err && (win = next_window(r))) {
		err = mmap_read_lock_killable(mshare_mm(win));
		if (!err) {
			if (win->vma)
				mshare_graft_all(win);
			mmap_read_unlock(mshare_mm(win));
		}
		mshare_window_put(win);
	}
}

static int freeze(struct mshare_region *r)
{
	struct mshare_window *win;
	int err;

	spin_lock(&r->lock);
	r->frozen = true;
	r->pass++;
	spin_unlock(&r->lock);
	while ((win = next_window(r))) {
		if (mshare_planted(LOCK_ORDER))
			mmap_read_lock(r->mm);
		err = mmap_write_lock_killable(mshare_mm(win));
		if (mshare_planted(LOCK_ORDER))
			mmap_read_unlock(r->mm);
		if (!err) {
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
	if (!mshare_planted(NO_FREEZE_FLUSH))
		mshare_flush_all();
	return 0;
}

/* Freeze, flush, run fn in the host mm, thaw. */
int mshare_layout(struct mshare_region *r, unsigned int op,
		  int (*fn)(struct mshare_region *r, void *arg), void *arg, u64 offset, u64 size)
{
	int err = mutex_lock_killable(&r->layout);

	if (err)
		return err;
	err = freeze(r);
	if (!err) {
		err = mshare_host_run(r, fn, arg);
		atomic64_inc(&r->changes);
		thaw(r);
	}
	trace_mshare_layout(r, op, offset, size, err);
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

struct map_args {
	const struct mshare_create *req;
	struct file *file;
	unsigned long offset;		/* in the file */
	bool write_notify;
};

static unsigned long map_at(struct map_args *args, unsigned long addr, unsigned long prot)
{
	unsigned long flags = MAP_SHARED | MAP_FIXED | (args->req->flags & MAP_NORESERVE);

	addr = vm_mmap(args->file, addr + args->req->region_offset, args->req->size, prot, flags,
		       args->offset);
	return IS_ERR_VALUE(addr) ? addr : 0;
}

/* Try the mapping where it does no harm, and look at what the file system made of it. */
static int try_map(struct mshare_region *r, void *data)
{
	struct map_args *args = data;
	struct vm_area_struct *vma;
	int err = map_at(args, MSHARE_STAGE, args->req->prot);

	if (err)
		return err;
	mmap_read_lock(r->mm);
	vma = find_vma(r->mm, MSHARE_STAGE + args->req->region_offset);
	/* overlayfs has put the file below in place of its own */
	if (!vma->vm_ops || !vma->vm_ops->fault || !(vma->vm_flags & VM_MAYSHARE) ||
	    vma->vm_flags & (VM_IO | VM_PFNMAP | VM_MIXEDMAP | VM_HUGETLB) ||
	    !mshare_file_fits(vma->vm_file, false))
		err = -EOPNOTSUPP;
	else
		args->write_notify = !(vma->vm_flags & VM_WRITE) || vma->vm_ops->page_mkwrite ||
				     vma->vm_ops->pfn_mkwrite;
	mmap_read_unlock(r->mm);
	vm_munmap(MSHARE_STAGE + args->req->region_offset, args->req->size);
	return err;
}

/*
 * Give back the memory of the region's own files in a range about to go. Other
 * parts of the same file may stay mapped, so the last fput is not enough.
 */
static int free_piece(struct mshare_region *r, struct file *file, loff_t pos, loff_t len)
{
	if (!mshare_shmem_owned(r, file))
		return 0;
	return vfs_fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, pos, len);
}

static int do_map(struct mshare_region *r, void *data)
{
	struct map_args *args = data;
	int err;

	mshare_settle(r, false);
	mshare_each_file(r, args->req->region_offset, args->req->size, free_piece);
	err = map_at(args, MSHARE_RW, args->req->prot);
	if (!err)
		err = map_at(args, MSHARE_RO, PROT_READ);
	if (err) {
		/* both views or none */
		vm_munmap(MSHARE_RW + args->req->region_offset, args->req->size);
		vm_munmap(MSHARE_RO + args->req->region_offset, args->req->size);
	}
	mshare_settle(r, true);
	return err;
}

/* Caller has checked the request. */
int mshare_layout_map(struct mshare_region *r, struct file *file, const struct mshare_create *req)
{
	struct map_args args = { .req = req, .file = file, .offset = req->offset };
	int err;

	if (req->flags & MAP_ANONYMOUS) {
		/* a huge page needs the file offset and the address in step */
		args.offset = req->region_offset & (HPAGE_PMD_SIZE - 1);
		args.file = mshare_shmem_file(r, req->size + args.offset,
					      req->flags & MAP_NORESERVE ? VM_NORESERVE : 0);
		if (IS_ERR(args.file))
			return PTR_ERR(args.file);
	}
	err = mutex_lock_killable(&r->layout);
	if (!err) {
		err = mshare_host_run(r, try_map, &args);
		mutex_unlock(&r->layout);
	}
	if (!err) {
		if (args.write_notify)
			WRITE_ONCE(r->write_notify, true);
		err = mshare_layout(r, MSHAREFS_CREATE_MAPPING, do_map, &args,
				    req->region_offset, req->size);
	}
	if (req->flags & MAP_ANONYMOUS)
		fput(args.file);
	return err;
}

static int do_unmap(struct mshare_region *r, void *data)
{
	const struct mshare_unmap *req = data;
	int err;

	mshare_settle(r, false);
	err = vm_munmap(MSHARE_RO + req->region_offset, req->size);
	if (!err) {
		mshare_each_file(r, req->region_offset, req->size, free_piece);
		err = vm_munmap(MSHARE_RW + req->region_offset, req->size);
	}
	mshare_settle(r, true);
	return err;
}

int mshare_layout_unmap(struct mshare_region *r, const struct mshare_unmap *req)
{
	return mshare_layout(r, MSHAREFS_UNMAP, do_unmap, (void *)req, req->region_offset,
			     req->size);
}
