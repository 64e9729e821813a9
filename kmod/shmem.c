// SPDX-License-Identifier: GPL-2.0-only
/*
 * Shared memory as content: the region's own anonymous files, and who pays.
 *
 * tmpfs charges a new page to the owner of the mm whose mapping asks for it.
 * The host mm has none, so the root group would pay. A page that is not in
 * memory is therefore fetched in the name of the guest's mm, and the host's own
 * fault takes what is there and never asks tmpfs for a page.
 *
 * Locks: in faults the guest's and the host's mmap_lock are held for read, and
 * the page's lock is taken. Adopting takes the host's mmap_lock for write, before
 * anybody can touch what was mapped.
 */
#include <linux/magic.h>
#include <linux/pagemap.h>
#include <linux/sched/signal.h>
#include <linux/shmem_fs.h>
#include "mshare.h"

static bool is_shmem(struct file *file)
{
	return file_inode(file)->i_sb->s_magic == TMPFS_MAGIC;
}

/* With a reference, and locked if it is asked for. NULL: tmpfs has to make it whole first. */
static struct page *find(struct address_space *mapping, pgoff_t index, bool lock)
{
	struct page *page = lock ? find_lock_page(mapping, index) : find_get_page(mapping, index);

	if (!page || PageUptodate(page))
		return page;
	if (lock)
		unlock_page(page);
	put_page(page);
	return NULL;
}

/*
 * What was fetched may be gone again, by a hole in the file. A guest comes back and
 * has it fetched again. Who is in the host mm itself pins what no hole can be made in.
 */
static vm_fault_t fault_present(struct vm_fault *vmf)
{
	struct address_space *mapping = vmf->vma->vm_file->f_mapping;
	struct page *page = find(mapping, vmf->pgoff, true);

	if (!page)
		return vmf->flags & FAULT_FLAG_REMOTE ? VM_FAULT_NOPAGE : VM_FAULT_SIGBUS;
	/* the page's lock keeps truncation, which has set the size before, from having passed */
	if (vmf->pgoff >= DIV_ROUND_UP(i_size_read(mapping->host), PAGE_SIZE)) {
		unlock_page(page);
		put_page(page);
		return VM_FAULT_SIGBUS;
	}
	vmf->page = page;
	return VM_FAULT_LOCKED;
}

/*
 * By these the kernel does not know a mapping of a file without a name: of large
 * pages only those of PMD size are then mapped at once. They are the module's, as
 * no mapping of the host mm outlives the region: nobody else is a user of the mm.
 */
static const struct vm_operations_struct host_ops = {
	.fault = fault_present,
	.map_pages = filemap_map_pages,
};

/* Mappings of the host mm that were just made. Those of tmpfs remember its operations. */
void mshare_shmem_adopt(struct mm_struct *mm, unsigned long addr, unsigned long size)
{
	unsigned long end = addr + size;
	struct vm_area_struct *vma;

	mmap_write_lock(mm);
	for (; (vma = find_vma_intersection(mm, addr, end)); addr = vma->vm_end) {
		if (!is_shmem(vma->vm_file) || vma->vm_ops == &host_ops)
			continue;
		vma->vm_private_data = (void *)vma->vm_ops;
		vma->vm_ops = &host_ops;
	}
	mmap_write_unlock(mm);
}

/*
 * The mapping shown to tmpfs is a copy that differs in its mm, and has operations
 * of tmpfs. No retry: tmpfs would give up the lock of that mm, and the host's is
 * the one held.
 */
static vm_fault_t fetch(struct vm_area_struct *host, unsigned long addr, struct mm_struct *guest,
			bool write, struct page **page)
{
	struct vm_area_struct vma = *host;
	struct vm_fault vmf = {
		.vma = &vma,
		.gfp_mask = mapping_gfp_mask(host->vm_file->f_mapping) | __GFP_FS | __GFP_IO,
		.pgoff = linear_page_index(host, addr),
		.address = addr,
		.real_address = addr,
		.flags = write ? FAULT_FLAG_WRITE : 0,
	};
	vm_fault_t ret;

	vma.vm_mm = guest;
	vma.vm_ops = host->vm_private_data;
	ret = vma.vm_ops->fault(&vmf);
	if (ret & VM_FAULT_LOCKED) {
		unlock_page(vmf.page);
		*page = vmf.page;
	}
	return ret & (VM_FAULT_ERROR | VM_FAULT_MAJOR);
}

/*
 * Returns VM_FAULT_ERROR and VM_FAULT_MAJOR bits only. The page, or NULL, comes with a
 * reference, by which reclaim leaves it alone until it is mapped.
 */
vm_fault_t mshare_shmem_charge(struct vm_area_struct *host, unsigned long addr,
			       struct mm_struct *guest, bool write, struct page **page)
{
	*page = NULL;
	if (!is_shmem(host->vm_file))
		return 0;
	*page = find(host->vm_file->f_mapping, linear_page_index(host, addr), false);
	return *page ? 0 : fetch(host, addr, guest, write, page);
}

/* A file of the region's own: nobody else can open it, so private_data is ours to mark it. */
struct file *mshare_shmem_file(struct mshare_region *r, unsigned long size, unsigned long flags)
{
	struct file *file = shmem_file_setup("mshare", size, flags);

	if (!IS_ERR(file))
		file->private_data = r;
	else if (PTR_ERR(file) == -ENOSPC)
		file = ERR_PTR(-ENOMEM);	/* no inode: there is no disk to be full */
	return file;
}

/*
 * Bring all of it in, in the caller's name, whose group pays. Where the group has no
 * more the caller is told: to kill another of it for this would be wrong. The pages
 * are going to be pinned, so none of the movable ones; and dirty, so that nobody
 * drops them before.
 */
int mshare_shmem_fill(struct file *file, u64 offset, u64 size)
{
	const gfp_t gfp = GFP_HIGHUSER | __GFP_RETRY_MAYFAIL | __GFP_NOWARN;
	pgoff_t index = offset >> PAGE_SHIFT, end = (offset + size) >> PAGE_SHIFT;
	struct page *page;

	for (; index < end; index++) {
		if (fatal_signal_pending(current))
			return -EINTR;
		page = shmem_read_mapping_page_gfp(file->f_mapping, index, gfp);
		if (IS_ERR(page))
			return PTR_ERR(page) == -ENOSPC ? -ENOMEM : PTR_ERR(page);
		lock_page(page);
		set_page_dirty(page);
		unlock_page(page);
		put_page(page);
		cond_resched();
	}
	return 0;
}

bool mshare_shmem_owned(struct mshare_region *r, struct file *file)
{
	return is_shmem(file) && file->private_data == r;
}
