// SPDX-License-Identifier: GPL-2.0-only
/*
 * The ioctls of a region's file: copy in, check, hand on, copy out.
 * No lock is held here.
 */
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <linux/mman.h>
#include <linux/uaccess.h>
#include <linux/user_namespace.h>
#include "mshare.h"

/* A range of whole pages inside the region. */
static int check_range(struct mshare_region *r, u64 offset, u64 size)
{
	u64 end;

	if (!size || !PAGE_ALIGNED(offset | size) || check_add_overflow(offset, size, &end) ||
	    end > mshare_size(r))
		return -EINVAL;
	return 0;
}

static int check_prot(u32 prot)
{
	if (prot & PROT_EXEC)
		return -EPERM;
	return prot == PROT_READ || prot == (PROT_READ | PROT_WRITE) ? 0 : -EINVAL;
}

/*
 * Content whose pages live in the page cache. Others may share or change the
 * host's page tables by themselves (hugetlb), or map what has no struct page
 * behind it (devices, DAX). Any user can be the server of a FUSE file, and by
 * not answering hold the lock of a host mm that a fault or an mmap has taken.
 * An overlay can only be judged by the file below it, which its mmap brings to
 * light: that mmap must not be a user's FUSE, so the overlay has to be root's.
 */
bool mshare_file_fits(struct file *file, bool overlay)
{
	struct inode *inode = file_inode(file);

	if (!S_ISREG(inode->i_mode) || IS_DAX(inode) || mshare_is_region(file))
		return false;
	switch (inode->i_sb->s_magic) {
	case TMPFS_MAGIC:
		return true;
	case HUGETLBFS_MAGIC:
	case FUSE_SUPER_MAGIC:
		return false;
	case OVERLAYFS_SUPER_MAGIC:
		return overlay && inode->i_sb->s_user_ns == &init_user_ns;
	default:
		return file->f_mapping->a_ops->read_folio;
	}
}

static long create_mapping(struct mshare_region *r, void __user *arg)
{
	const u32 known = MAP_TYPE | MAP_FIXED | MAP_ANONYMOUS | MAP_NORESERVE |
			  MAP_LOCKED;
	struct mshare_create req;
	struct file *file;
	u64 end;
	int err;

	if (copy_from_user(&req, arg, sizeof(req)))
		return -EFAULT;
	err = check_range(r, req.region_offset, req.size) ?: check_prot(req.prot);
	if (err)
		return err;
	if ((req.flags & MAP_TYPE) != MAP_SHARED || !(req.flags & MAP_FIXED) ||
	    req.flags & ~known)
		return -EINVAL;
	if (req.flags & MAP_ANONYMOUS)
		return req.offset ? -EINVAL : mshare_layout_map(r, NULL, &req);

	if (req.flags & MAP_LOCKED)
		return -EOPNOTSUPP;	/* others could take pages out of the file */
	if (!PAGE_ALIGNED(req.offset) || check_add_overflow(req.offset, req.size, &end) ||
	    end > MAX_LFS_FILESIZE)
		return -EINVAL;
	file = fget(req.fd);
	if (!file)
		return -EBADF;
	if (!(file->f_mode & FMODE_READ) ||
	    ((req.prot & PROT_WRITE) && !(file->f_mode & FMODE_WRITE)))
		err = -EACCES;
	else if (!mshare_file_fits(file, true))
		err = -EOPNOTSUPP;
	else
		err = mshare_layout_map(r, file, &req);
	fput(file);
	return err;
}

static long unmap(struct mshare_region *r, void __user *arg)
{
	struct mshare_unmap req;

	if (copy_from_user(&req, arg, sizeof(req)))
		return -EFAULT;
	return check_range(r, req.region_offset, req.size) ?: mshare_layout_unmap(r, &req);
}

static long protect(struct mshare_region *r, void __user *arg)
{
	struct mshare_protect req;

	if (copy_from_user(&req, arg, sizeof(req)))
		return -EFAULT;
	if (req.reserved)
		return -EINVAL;
	return check_range(r, req.region_offset, req.size) ?: check_prot(req.prot) ?:
	       mshare_layout_protect(r, &req);
}

static long info(struct mshare_region *r, void __user *arg)
{
	struct mshare_info out = { .alignment = SLOT_SIZE };
	u32 room;

	if (copy_from_user(&room, arg, sizeof(room)))
		return -EFAULT;
	if (room < offsetofend(struct mshare_info, region_size))
		return -EINVAL;
	out.size = min_t(u32, room, sizeof(out));
	out.region_size = mshare_size(r);
	out.attachments = atomic_read(&r->nr_windows);
	out.grafts = atomic64_read(&r->grafts);
	out.ungrafts = atomic64_read(&r->ungrafts);
	out.faults = atomic64_read(&r->faults);
	out.flushes = atomic64_read(&r->flushes);
	out.layout_changes = atomic64_read(&r->changes);
	out.flags = READ_ONCE(r->kind) == MSHARE_LOCKED ? MSHARE_INFO_LOCKED : 0;
	out.locked_bytes = (u64)atomic64_read(&r->locked) << PAGE_SHIFT;
	if (out.region_size)
		out.pagetable_bytes = mm_pgtables_bytes(r->mm);
	out.resident_bytes = mshare_region_resident(r, true, &out.mapped_bytes, &out.mapped_end);
	return copy_to_user(arg, &out, out.size) ? -EFAULT : 0;
}

long mshare_ioctl(struct file *file, unsigned int cmd, unsigned long arg)
{
	struct mshare_region *r = file_inode(file)->i_private;
	void __user *user = (void __user *)arg;

	switch (cmd) {
	case MSHAREFS_CREATE_MAPPING:
	case MSHAREFS_UNMAP:
	case MSHAREFS_PROTECT:
		if (!(file->f_mode & FMODE_WRITE))
			return -EACCES;
		if (r->source)
			return -EPERM;	/* others rely on what is in it */
	}
	switch (cmd) {
	case MSHAREFS_CREATE_MAPPING:
		return create_mapping(r, user);
	case MSHAREFS_UNMAP:
		return unmap(r, user);
	case MSHAREFS_PROTECT:
		return protect(r, user);
	}
	/* the size in the number is the caller's, older or newer than ours */
	if (_IOC_TYPE(cmd) == 'x' && _IOC_NR(cmd) == _IOC_NR(MSHAREFS_INFO) &&
	    _IOC_DIR(cmd) == (_IOC_READ | _IOC_WRITE))
		return info(r, user);
	return -ENOTTY;
}
