// SPDX-License-Identifier: GPL-2.0-only
/*
 * CREATE_MAPPING and UNMAP: what a layout change does in the host mm, and to the
 * files whose parts it takes out.
 *
 * A file is tried in an mm of its own before. Memory to be locked is brought in
 * before, and memory taken out is given back after: with nobody frozen.
 *
 * Locks: as in layout.c. What runs in the host mm takes its mmap_lock by itself.
 */
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/falloc.h>
#include <linux/kthread.h>
#include <linux/mman.h>
#include <linux/pagemap.h>
#include <linux/sched/mm.h>
#include <linux/slab.h>
#include "mshare.h"

/* What a change takes out of files. */
struct parts {
	struct mshare_region *r;
	struct list_head list;
};

struct part {
	struct list_head list;
	struct file *file;
	loff_t pos, len;
};

/* Charged to nobody: it is the way out of a group that is full. */
static int remember(struct file *file, loff_t pos, loff_t len, void *data)
{
	struct parts *parts = data;
	struct part *part;

	part = kmalloc(sizeof(*part), GFP_KERNEL);
	if (!part)
		return -ENOMEM;
	*part = (struct part) { .file = get_file(file), .pos = pos, .len = len };
	list_add_tail(&part->list, &parts->list);
	return 0;
}

/*
 * Give back the memory of the region's own, which is not mapped any more. Other parts of
 * the same file may be, so the last fput is not enough. Nobody waits for it: it comes
 * after the thaw. A file of others is let go here, by the caller: with the last fput on
 * the worker it would be closed some time after the call.
 */
static void let_go(struct parts *parts, bool taken_out)
{
	struct part *part, *next;

	list_for_each_entry_safe(part, next, &parts->list, list) {
		if (taken_out && mshare_shmem_owned(parts->r, part->file))
			vfs_fallocate(part->file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
				      part->pos, part->len);
		fput(part->file);
		kfree(part);
	}
}

struct map_args {
	const struct mshare_create *req;
	struct file *file;
	unsigned long offset;		/* in the file */
	bool write_notify;
	struct mshare_pinning *pinning;	/* NULL: pages may move */
	struct parts parts;		/* what was there */
	bool taken_out;			/* and whether it has gone */
};

static int map_at(struct map_args *args, unsigned long view, unsigned long prot)
{
	return mshare_host_map(args->file, view + args->req->region_offset, args->req->size, prot,
			       args->req->flags & MAP_NORESERVE, args->offset);
}

/*
 * Try the mapping in an mm that goes at once, whatever comes of it, and look at
 * what the file system made of it.
 */
static int try_map(struct mshare_region *unused, void *data)
{
	struct map_args *args = data;
	struct mm_struct *mm = mshare_host_mm();
	struct vm_area_struct *vma;
	int err;

	if (!mm)
		return -ENOMEM;
	kthread_use_mm(mm);
	err = map_at(args, MSHARE_RW, args->req->prot);
	if (!err) {
		mmap_read_lock(mm);
		vma = find_vma(mm, MSHARE_RW);
		/* overlayfs has put the file below in place of its own */
		if (!vma->vm_ops || !vma->vm_ops->fault || !(vma->vm_flags & VM_MAYSHARE) ||
		    vma->vm_flags & (VM_IO | VM_PFNMAP | VM_MIXEDMAP | VM_HUGETLB) ||
		    !mshare_file_fits(vma->vm_file, false))
			err = -EOPNOTSUPP;
		else
			args->write_notify = !(vma->vm_flags & VM_WRITE) ||
					     vma->vm_ops->page_mkwrite || vma->vm_ops->pfn_mkwrite;
		mmap_read_unlock(mm);
	}
	kthread_unuse_mm(mm);
	mmput(mm);
	return err;
}

/* On behalf of the caller, who then maps what is the same file in a region already. */
int mshare_layout_try(struct file *file, const struct mshare_create *req)
{
	struct map_args args = { .req = req, .file = file, .offset = req->offset };

	return mshare_host_run(NULL, NULL, try_map, &args);
}

/* What has begun is finished: it is charged to nobody, so no limit of a group is in its way. */
static int finish_unmap(unsigned long addr, unsigned long size)
{
	struct mem_cgroup *old = set_active_memcg(NULL);
	int err = vm_munmap(addr, size);

	set_active_memcg(old);
	return err;
}

/*
 * Both views or none. The read-only one goes last, and until it has gone all that was
 * there stays, and stays pinned.
 */
static int unmap_views(struct mshare_region *r, u64 offset, u64 size)
{
	int err = finish_unmap(MSHARE_RW + offset, size);

	/* new content that is not pinned: no virtual machine may come to rely on it */
	if (err)
		WRITE_ONCE(r->kind, MSHARE_MOVABLE);
	return err ?: finish_unmap(MSHARE_RO + offset, size);
}

/* The kernel replaces a range as a whole, leaves it as it was, or leaves a hole. */
static int map_views(struct mshare_region *r, struct map_args *args)
{
	unsigned long rw = MSHARE_RW + args->req->region_offset;
	int err = map_at(args, MSHARE_RW, args->req->prot);
	bool kept = false;

	if (err) {
		mmap_read_lock(r->mm);
		kept = find_vma_intersection(r->mm, rw, rw + args->req->size);
		mmap_read_unlock(r->mm);
	}
	if (kept)
		return err;
	err = err ?: map_at(args, MSHARE_RO, PROT_READ);
	args->taken_out = !err || !unmap_views(r, args->req->region_offset, args->req->size);
	if (args->taken_out)
		mshare_unpin(r, args->req->region_offset, args->req->size);
	return err;
}

static int do_map(struct mshare_region *r, void *data)
{
	struct map_args *args = data;
	u64 offset = args->req->region_offset, size = args->req->size;
	int err = mshare_each_file(r, MSHARE_RO + offset, size, remember, &args->parts);

	if (err)
		return err;
	mshare_settle(r, false);
	err = map_views(r, args);
	if (!err && args->pinning) {
		err = mshare_pin(r, args->pinning, offset, size);
		if (err) {
			mshare_unpin(r, offset, size);
			unmap_views(r, offset, size);
		}
	}
	mshare_settle(r, true);
	return err;
}

/* region->layout is held. */
static int map_tried(struct mshare_region *r, struct map_args *args)
{
	enum mshare_kind kind = args->pinning ? MSHARE_LOCKED : MSHARE_MOVABLE;
	int err;

	if (r->kind != MSHARE_EMPTY && r->kind != kind)
		return -EINVAL;
	if (args->pinning) {
		if (mshare_keeps(r, args->req->region_offset, args->req->size))
			return -EBUSY;
		err = mshare_shmem_fill(args->file, args->offset, args->req->size);
		if (err)
			return err;
	}
	err = mshare_change(r, MSHAREFS_CREATE_MAPPING, args->write_notify, do_map, args,
			    args->req->region_offset, args->req->size);
	if (!err)
		WRITE_ONCE(r->kind, kind);
	return err;
}

/* Caller has checked the request. */
int mshare_layout_map(struct mshare_region *r, struct file *file, const struct mshare_create *req)
{
	struct map_args args = {
		.req = req, .file = file, .offset = req->offset,
		.parts = { r, LIST_HEAD_INIT(args.parts.list) },
	};
	struct mshare_pinning pinning;
	int err = 0;

	if (req->flags & MAP_ANONYMOUS) {
		/* a huge page needs the file offset and the address in step */
		args.offset = req->region_offset & ~PMD_MASK;
		args.file = mshare_shmem_file(r, req->size + args.offset,
					      req->flags & MAP_NORESERVE ? VM_NORESERVE : 0);
		if (IS_ERR(args.file))
			return PTR_ERR(args.file);
	}
	if (req->flags & MAP_LOCKED) {
		err = mshare_pin_account(&pinning, req->size);
		if (err)
			goto out;
		args.pinning = &pinning;
		mapping_set_unevictable(args.file->f_mapping);
	}
	if (req->flags & MAP_ANONYMOUS)
		args.write_notify = !(req->prot & PROT_WRITE);
	else
		err = mshare_host_run(NULL, NULL, try_map, &args);
	err = err ?: mutex_lock_killable(&r->layout);
	if (!err) {
		err = map_tried(r, &args);
		mutex_unlock(&r->layout);
	}
	let_go(&args.parts, args.taken_out);
	if (args.pinning)
		mshare_pin_done(&pinning);
out:
	if (req->flags & MAP_ANONYMOUS)
		fput(args.file);
	return err;
}

struct unmap_args {
	const struct mshare_unmap *req;
	struct parts parts;
};

static int do_unmap(struct mshare_region *r, void *data)
{
	struct unmap_args *args = data;
	u64 offset = args->req->region_offset, size = args->req->size;
	int err = mshare_each_file(r, MSHARE_RO + offset, size, remember, &args->parts);

	if (err)
		return err;
	mshare_settle(r, false);
	err = vm_munmap(MSHARE_RW + offset, size) ?: finish_unmap(MSHARE_RO + offset, size);
	if (!err)
		mshare_unpin(r, offset, size);
	mshare_settle(r, true);
	return err;
}

int mshare_layout_unmap(struct mshare_region *r, const struct mshare_unmap *req)
{
	struct unmap_args args = {
		.req = req,
		.parts = { r, LIST_HEAD_INIT(args.parts.list) },
	};
	int err = mshare_layout(r, MSHAREFS_UNMAP, false, do_unmap, &args, req->region_offset,
				req->size);

	let_go(&args.parts, !err);
	return err;
}
