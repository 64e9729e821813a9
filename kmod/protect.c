// SPDX-License-Identifier: GPL-2.0-only
/*
 * PROTECT: change the rights of the writable view. The read-only view has none
 * to take away. The kernel exports no mprotect for another mm, so each mapping
 * in the range is mapped anew over itself; the content stays in its file and
 * the first access of each page finds it there.
 *
 * Locks: as in layout.c.
 */
#include <linux/file.h>
#include <linux/mman.h>
#include "compat.h"
#include "mshare.h"
#include "trace.h"

/* One mapping, or the part of it that lies in the range. */
struct piece {
	struct file *file;
	unsigned long addr, len, offset, prot;
};

/* False at the end of the range. The file is returned with a reference. */
static bool next_piece(struct mm_struct *mm, unsigned long addr, unsigned long end,
		       struct piece *p)
{
	struct vm_area_struct *vma;

	mmap_read_lock(mm);
	vma = find_vma_intersection(mm, addr, end);
	if (vma) {
		p->addr = max(addr, vma->vm_start);
		p->len = min(end, vma->vm_end) - p->addr;
		p->offset = (vma->vm_pgoff << PAGE_SHIFT) + (p->addr - vma->vm_start);
		p->prot = PROT_READ | (vma->vm_flags & VM_WRITE ? PROT_WRITE : 0);
		p->file = get_file(vma->vm_file);
	}
	mmap_read_unlock(mm);
	return vma;
}

static int remap(const struct piece *p, unsigned long prot)
{
	unsigned long addr = vm_mmap(p->file, p->addr, p->len, prot, MAP_SHARED | MAP_FIXED,
				     p->offset);

	return IS_ERR_VALUE(addr) ? addr : 0;
}

/* Like mprotect, an error leaves what came before it changed. */
static int do_protect(struct mshare_region *r, void *data)
{
	const struct mshare_protect *req = data;
	unsigned long addr = MSHARE_RW + req->region_offset;
	unsigned long end = addr + req->size;
	struct piece p;
	int err = 0;

	mshare_settle(r, false);
	while (!err && next_piece(r->mm, addr, end, &p)) {
		if (p.prot != req->prot) {
			err = remap(&p, req->prot);
			if (err)
				remap(&p, p.prot);
		}
		fput(p.file);
		addr = p.addr + p.len;
	}
	mshare_settle(r, true);
	return err;
}

int mshare_layout_protect(struct mshare_region *r, const struct mshare_protect *req)
{
	if (!(req->prot & PROT_WRITE))
		WRITE_ONCE(r->write_notify, true);
	return mshare_layout(r, MSHAREFS_PROTECT, do_protect, (void *)req, req->region_offset,
			     req->size);
}
