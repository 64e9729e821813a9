// SPDX-License-Identifier: GPL-2.0-only
/*
 * PROTECT: change the rights of the writable view. The read-only view has none
 * to take away. The kernel exports no mprotect for another mm. A mapping that
 * lies in the range as a whole, on small pages, is changed where it is. Of any
 * other the part in the range is mapped anew over itself; the content stays in
 * its file, and the first access of each page finds it there.
 *
 * Locks: as in layout.c; inside the host's mmap_lock the file's i_mmap_rwsem. Every
 * guest is drained and flushed before, so no TLB holds an entry of the tables that
 * change here.
 */
#include <linux/file.h>
#include <linux/mman.h>
#include <linux/sched/mm.h>
#include <linux/swap.h>
#include <linux/swapops.h>
#include "compat.h"
#include "mshare.h"

/* One mapping, or the part of it that lies in the range. */
struct piece {
	struct file *file;
	unsigned long addr, len, offset, prot;
};

/* The page-table lock is held. A page on the move must not come back writable. */
static int readonly_pte(pte_t *ptep, unsigned long addr, void *mm)
{
	pte_t pte = *ptep;
	swp_entry_t entry;

	if (pte_present(pte)) {
		if (pte_write(pte))
			ptep_set_wrprotect(mm, addr, ptep);
	} else if (!pte_none(pte)) {
		entry = pte_to_swp_entry(pte);
		if (is_writable_migration_entry(entry)) {
			entry = make_readable_migration_entry(swp_offset(entry));
			set_pte_at(mm, addr, ptep, swp_entry_to_pte(entry));
		}
	}
	return 0;
}

/*
 * Collapse by others who map the file may empty an entry here without the host's
 * mmap_lock, and the walk does not bear that. So part by part under the file's lock,
 * which they need.
 */
static int make_readonly(struct mm_struct *mm, struct vm_area_struct *vma)
{
	struct address_space *mapping = vma->vm_file->f_mapping;
	unsigned long addr, next;
	int err = 0;

	for (addr = vma->vm_start; addr < vma->vm_end && !err; addr = next) {
		next = pud_addr_end(addr, vma->vm_end);
		i_mmap_lock_write(mapping);
		err = apply_to_existing_page_range(mm, addr, next - addr, readonly_pte, mm);
		i_mmap_unlock_write(mapping);
		cond_resched();
	}
	return err;
}

static bool has_huge(struct mm_struct *mm, struct vm_area_struct *vma)
{
	unsigned long addr, next;
	pud_t *pudp;
	pmd_t pmd;

	for (addr = vma->vm_start; addr < vma->vm_end; addr = next) {
		next = pud_addr_end(addr, vma->vm_end);
		pudp = mshare_pudp(mm, addr);
		if (!pudp || pud_none(*pudp))
			continue;
		next = pmd_addr_end(addr, vma->vm_end);
		pmd = READ_ONCE(*pmd_offset(pudp, addr));
		if (!pmd_none(pmd) && pmd_bad(pmd))
			return true;
	}
	return false;
}

/* Host's mmap_lock held for write. -EAGAIN: it must be mapped anew. */
static int change_in_place(struct mm_struct *mm, struct vm_area_struct *vma, unsigned long prot)
{
	if (has_huge(mm, vma) || (!(prot & PROT_WRITE) && make_readonly(mm, vma)))
		return -EAGAIN;
	if (prot & PROT_WRITE)
		mshare_flags_mod(vma, VM_WRITE, 0);
	else
		mshare_flags_mod(vma, 0, VM_WRITE);
	/* private rights: an entry becomes writable in a write fault only, as files need it */
	vma->vm_page_prot = vm_get_page_prot(vma->vm_flags & ~VM_SHARED);
	return 0;
}

/*
 * Find the next mapping and change it in place if that can be done. Returns its
 * state: 0 done, -EAGAIN to be mapped anew, -ENOENT at the end of the range. The
 * file comes with a reference.
 */
static int next_piece(struct mm_struct *mm, unsigned long addr, unsigned long end,
		      unsigned long prot, struct piece *p)
{
	struct vm_area_struct *vma;
	int err = -ENOENT;

	mmap_write_lock(mm);
	vma = find_vma_intersection(mm, addr, end);
	if (vma) {
		p->addr = max(addr, vma->vm_start);
		p->len = min(end, vma->vm_end) - p->addr;
		p->offset = (vma->vm_pgoff << PAGE_SHIFT) + (p->addr - vma->vm_start);
		p->prot = PROT_READ | (vma->vm_flags & VM_WRITE ? PROT_WRITE : 0);
		p->file = get_file(vma->vm_file);
		if (p->prot == prot)
			err = 0;
		else if ((prot & PROT_WRITE) && !(vma->vm_flags & VM_MAYWRITE))
			err = -EACCES;
		else if (p->len == vma->vm_end - vma->vm_start)
			err = change_in_place(mm, vma, prot);
		else
			err = -EAGAIN;
	}
	mmap_write_unlock(mm);
	return err;
}

static int remap(const struct piece *p, unsigned long prot)
{
	return mshare_host_map(p->file, p->addr, p->len, prot, 0, p->offset);
}

/* Like mprotect, an error leaves what came before it changed. */
static int do_protect(struct mshare_region *r, void *data)
{
	const struct mshare_protect *req = data;
	unsigned long addr = MSHARE_RW + req->region_offset;
	unsigned long end = addr + req->size;
	struct mem_cgroup *memcg;
	struct piece p;
	int err = 0;

	mshare_settle(r, false);
	while (!err) {
		err = next_piece(r->mm, addr, end, req->prot, &p);
		if (err == -ENOENT)
			break;
		if (err == -EAGAIN) {
			err = remap(&p, req->prot);
			if (err) {
				/* charged to nobody: no limit is in the way back */
				memcg = set_active_memcg(NULL);
				remap(&p, p.prot);
				set_active_memcg(memcg);
			}
		}
		fput(p.file);
		addr = p.addr + p.len;
	}
	mshare_settle(r, true);
	return err == -ENOENT ? 0 : err;
}

int mshare_layout_protect(struct mshare_region *r, const struct mshare_protect *req)
{
	return mshare_layout(r, MSHAREFS_PROTECT, !(req->prot & PROT_WRITE), do_protect,
			     (void *)req, req->region_offset, req->size);
}
