/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Differences between kernels, one shim per feature. No other file tests a
 * kernel version.
 */
#ifndef _MSHARE_COMPAT_H
#define _MSHARE_COMPAT_H

#include <linux/fs.h>
#include <linux/mnt_idmapping.h>
#include <linux/user_namespace.h>
#include <linux/mempolicy.h>
#include <linux/mm.h>
#include <linux/mmu_notifier.h>
#include <linux/rmap.h>
#include <linux/userfaultfd_k.h>
#include <linux/version.h>

#define MSHARE_SINCE(major, minor) (KERNEL_VERSION(major, minor, 0) <= LINUX_VERSION_CODE)

/* 6.12: whether every table page has its own lock is a configuration symbol */
#if MSHARE_SINCE(6, 12)
#define MSHARE_SPLIT_LOCKS	(IS_ENABLED(CONFIG_SPLIT_PTE_PTLOCKS) && \
				 IS_ENABLED(CONFIG_SPLIT_PMD_PTLOCKS))
#else
#define MSHARE_SPLIT_LOCKS	(USE_SPLIT_PTE_PTLOCKS && USE_SPLIT_PMD_PTLOCKS)
#endif

/* 6.3: file-system calls take an idmapping instead of a user namespace */
#if MSHARE_SINCE(6, 3)
#define mshare_idmap mnt_idmap
#define mshare_no_idmap nop_mnt_idmap
#else
#define mshare_idmap user_namespace
#define mshare_no_idmap init_user_ns
#endif

/* 6.3, 6.6: generic_fillattr() takes an idmapping, then the request mask too */
static inline void mshare_fillattr(struct mshare_idmap *idmap, u32 mask, struct inode *inode,
				   struct kstat *stat)
{
#if MSHARE_SINCE(6, 6)
	generic_fillattr(idmap, mask, inode, stat);
#else
	generic_fillattr(idmap, inode, stat);
#endif
}

/* 6.7: inode times are reached through helpers only */
static inline void mshare_inode_times(struct inode *inode, bool fresh)
{
#if MSHARE_SINCE(6, 7)
	if (fresh)
		simple_inode_init_ts(inode);
	else
		inode_set_mtime_to_ts(inode, inode_set_ctime_current(inode));
#else
	inode->i_mtime = current_time(inode);
	inode->i_ctime = inode->i_mtime;
	if (fresh)
		inode->i_atime = inode->i_mtime;
#endif
}

/* 6.3: the flags of a mapping are changed through helpers only */
static inline void mshare_flags_mod(struct vm_area_struct *vma, unsigned long set,
				    unsigned long clear)
{
#if MSHARE_SINCE(6, 3)
	vm_flags_mod(vma, set, clear);
#else
	vma->vm_flags = (vma->vm_flags & ~clear) | set;
#endif
}

/* 6.4: mappings have a lock each, and a fault may hold that instead of mmap_lock */
static inline void mshare_vma_start_write(struct vm_area_struct *vma)
{
#if MSHARE_SINCE(6, 4)
	vma_start_write(vma);
#endif
}

static inline bool mshare_vma_locked(unsigned int flags)
{
#if MSHARE_SINCE(6, 4)
	return flags & FAULT_FLAG_VMA_LOCK;
#else
	return false;
#endif
}

static inline void mshare_fault_unlock(struct vm_fault *vmf)
{
#if MSHARE_SINCE(6, 4)
	release_fault_lock(vmf);
#else
	mmap_read_unlock(vmf->vma->vm_mm);
#endif
}

/* 6.6: ->huge_fault() takes an order instead of an enum */
#if MSHARE_SINCE(6, 6)
#define MSHARE_HUGE_ARG unsigned int order
#else
#define MSHARE_HUGE_ARG enum page_entry_size size
#endif

/* 6.6: ->invalidate_range() became ->arch_invalidate_secondary_tlbs() */
#if MSHARE_SINCE(6, 6)
#define mshare_op_flush arch_invalidate_secondary_tlbs
#else
#define mshare_op_flush invalidate_range
#endif

/* 6.7: ->get_policy() also fills the interleave index */
#if MSHARE_SINCE(6, 7)
#define MSHARE_POLICY_ARGS struct vm_area_struct *vma, unsigned long addr, pgoff_t *ilx
#else
#define MSHARE_POLICY_ARGS struct vm_area_struct *vma, unsigned long addr
#endif

/* 6.10: the search for free addresses is no longer a pointer in the mm */
#if MSHARE_SINCE(6, 10)
static inline unsigned long mshare_search(struct file *file, unsigned long addr, unsigned long len,
					  unsigned long flags)
{
	return mm_get_unmapped_area(current->mm, file, addr, len, 0, flags);
}

static inline void mshare_init_search(struct mm_struct *mm)
{
}
#else
static inline unsigned long mshare_search(struct file *file, unsigned long addr, unsigned long len,
					  unsigned long flags)
{
	return current->mm->get_unmapped_area(file, addr, len, 0, flags);
}

/* only ever asked with MAP_FIXED */
static inline unsigned long mshare_fixed_area(struct file *file, unsigned long addr,
					      unsigned long len, unsigned long pgoff,
					      unsigned long flags)
{
	return addr;
}

static inline void mshare_init_search(struct mm_struct *mm)
{
	mm->get_unmapped_area = mshare_fixed_area;
}
#endif

/*
 * 6.7: userfaultfd write-protects any mapping, and makes tables for it below a
 * guest's PUD entry, where the host's or the blank ones may be. Updates of 6.12
 * except special mappings, which windows are.
 */
static inline bool mshare_userfaultfd_keeps_out(void)
{
#if MSHARE_SINCE(6, 7) && defined(CONFIG_USERFAULTFD)
	struct vm_area_struct vma = { .vm_flags = VM_DONTEXPAND };

	return !vma_can_userfault(&vma, VM_UFFD_WP, true);
#else
	return true;
#endif
}

/*
 * 6.5: page-table walkers that hold only the guest's lock survive the collapse
 * of the host's PTE pages into a huge page, because those are freed by RCU.
 * Before, nothing protects such a walker, so the collapse must not happen:
 * khugepaged leaves a mapping alone that has an anon_vma. The dummy is never locked
 * nor walked, because the mapping's anon_vma_chain stays empty.
 */
#if MSHARE_SINCE(6, 5)
static inline void mshare_forbid_collapse(struct vm_area_struct *vma, bool forbid)
{
}
#else
extern struct anon_vma mshare_no_collapse;

static inline void mshare_forbid_collapse(struct vm_area_struct *vma, bool forbid)
{
	WRITE_ONCE(vma->anon_vma, forbid ? &mshare_no_collapse : NULL);
}

#define MSHARE_NEED_NO_COLLAPSE
#endif

#endif
