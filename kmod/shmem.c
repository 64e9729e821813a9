// SPDX-License-Identifier: GPL-2.0-only
/*
 * Shared memory as content: the region's own anonymous files, and who pays.
 *
 * tmpfs charges a new page to the owner of the mm whose mapping asks for it.
 * The host mm has none, so the root group would pay. A page that is not in
 * memory is therefore fetched in the name of the guest's mm, before the host's
 * fault looks for it and finds it.
 *
 * Locks: the guest's and the host's mmap_lock are held for read; none taken.
 */
#include <linux/magic.h>
#include <linux/pagemap.h>
#include <linux/shmem_fs.h>
#include "mshare.h"

static bool is_shmem(struct file *file)
{
	return file_inode(file)->i_sb->s_magic == TMPFS_MAGIC;
}

/*
 * The mapping shown to tmpfs is a copy that differs in its mm. No retry: tmpfs
 * would give up the lock of that mm, and the host's is the one held.
 */
static vm_fault_t fetch(struct vm_area_struct *host, unsigned long addr, struct mm_struct *guest,
			bool write)
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
	ret = host->vm_ops->fault(&vmf);
	if (ret & VM_FAULT_ERROR)
		return ret & VM_FAULT_ERROR;
	if (ret & VM_FAULT_LOCKED) {
		unlock_page(vmf.page);
		put_page(vmf.page);
	}
	return 0;
}

/* Returns VM_FAULT_ERROR bits only. */
vm_fault_t mshare_shmem_charge(struct vm_area_struct *host, unsigned long addr,
			       struct mm_struct *guest, bool write)
{
	void *entry;

	if (!is_shmem(host->vm_file))
		return 0;
	entry = xa_load(&host->vm_file->f_mapping->i_pages, linear_page_index(host, addr));
	return entry && !xa_is_value(entry) ? 0 : fetch(host, addr, guest, write);
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

bool mshare_shmem_owned(struct mshare_region *r, struct file *file)
{
	return is_shmem(file) && file->private_data == r;
}
