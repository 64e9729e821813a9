// SPDX-License-Identifier: GPL-2.0-only
/*
 * Regions of files: who asks with an open file, or with a mapping of it, gets the
 * one region whose content is that file. It has no name. It is found by the file's
 * page cache, and goes with its last descriptor and window, as any region without
 * a name.
 *
 * There are two of a file, one for readers and one for writers, as a region has
 * two views. The module fills them and nobody can change what is in them, so
 * whoever asks gets the file and nothing else, and no more than the rights of
 * the descriptor or the mapping.
 *
 * Locks: mshare_regions_lock, in region.c, around find and publish; the caller's
 * own mmap_lock for a look at a mapping. None is held while a file is opened.
 * Opening the file may take as long as its file system wants, and holds up nobody.
 */
#include <linux/cred.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/mman.h>
#include <linux/module.h>
#include <linux/uaccess.h>
#include "mshare.h"

/* Who watches the file is not told of an open and a close that no program made. */
#define QUIETLY		(O_LARGEFILE | __FMODE_NONOTIFY)

static struct mshare_create whole_file(u32 access)
{
	return (struct mshare_create) {
		.size = MSHARE_MAX_SIZE,
		.prot = access == O_RDWR ? PROT_READ | PROT_WRITE : PROT_READ,
		.flags = MAP_SHARED | MAP_FIXED,
	};
}

/* An overlay may have put another file below in the place of the one asked for. */
static struct address_space *content(struct mshare_region *r)
{
	struct address_space *mapping;

	mmap_read_lock(r->mm);
	mapping = find_vma(r->mm, MSHARE_RW)->vm_file->f_mapping;
	mmap_read_unlock(r->mm);
	return mapping;
}

/* With a reference. */
static struct inode *make(struct super_block *sb, struct file *file, u32 access)
{
	struct inode *inode = mshare_region_inode(sb), *first;
	struct mshare_create req = whole_file(access);
	struct mshare_region *r;
	int err;

	if (IS_ERR(inode))
		return inode;
	r = inode->i_private;
	err = mshare_region_set_size(r, MSHARE_MAX_SIZE) ?: mshare_layout_map(r, file, &req);
	if (err) {
		iput(inode);
		return ERR_PTR(err);
	}
	i_size_write(inode, MSHARE_MAX_SIZE);
	first = mshare_region_publish(inode, content(r), access);
	if (first != inode)
		iput(inode);
	return first;
}

/*
 * With a reference. Who comes later is asked what the first one was: a seal, a mark of
 * the file or a security module may keep from him what he has a descriptor for.
 */
static struct inode *find_or_make(struct super_block *sb, struct file *file, u32 access)
{
	struct address_space *source = d_real_inode(file->f_path.dentry)->i_mapping;
	struct inode *inode = mshare_region_find(sb, source, access);
	struct mshare_create req = whole_file(access);
	int err;

	if (!inode)
		return make(sb, file, access);
	err = mshare_layout_try(file, &req);
	if (err) {
		iput(inode);
		return ERR_PTR(err);
	}
	return inode;
}

/*
 * The file is opened anew, so that what hangs on the caller's open file (flock,
 * O_APPEND) ends with the caller's.
 */
static struct file *open_region(struct file *control, struct file *asked, u32 access)
{
	struct file *file = dentry_open(&asked->f_path, access | QUIETLY, current_cred());
	char name[NAME_MAX + 1];
	struct inode *inode;

	if (IS_ERR(file))
		return file;
	inode = find_or_make(file_inode(control)->i_sb, file, access);
	fput(file);
	if (IS_ERR(inode))
		return ERR_CAST(inode);
	snprintf(name, sizeof(name), "%pd", asked->f_path.dentry);
	file = alloc_file_pseudo(inode, control->f_path.mnt, name, access | O_LARGEFILE,
				 fops_get(inode->i_fop));
	if (IS_ERR(file)) {
		fops_put(inode->i_fop);
		iput(inode);
	}
	return file;
}

/*
 * A new descriptor, closed by exec. With source, only if that is the content: an
 * overlay may have put another file in the place of the one that is mapped.
 */
static long new_descriptor(struct file *control, struct file *asked, u32 access,
			   struct address_space *source)
{
	struct mshare_region *r;
	struct file *file;
	int fd;

	if (!mshare_file_fits(asked, true))
		return -EOPNOTSUPP;
	fd = get_unused_fd_flags(O_CLOEXEC);
	if (fd < 0)
		return fd;
	file = open_region(control, asked, access);
	if (IS_ERR(file)) {
		put_unused_fd(fd);
		return PTR_ERR(file);
	}
	r = file_inode(file)->i_private;
	if (source && r->source != source) {
		put_unused_fd(fd);
		fput(file);
		return -EOPNOTSUPP;
	}
	fd_install(fd, file);
	return fd;
}

static bool known(u32 access)
{
	return access == O_RDONLY || access == O_RDWR;
}

long mshare_open_file(struct file *control, void __user *arg)
{
	struct mshare_file req;
	struct file *asked;
	fmode_t mode;
	long fd = -EACCES;

	if (copy_from_user(&req, arg, sizeof(req)))
		return -EFAULT;
	if (!known(req.access))
		return -EINVAL;
	mode = req.access == O_RDWR ? FMODE_READ | FMODE_WRITE : FMODE_READ;
	asked = fget(req.fd);
	if (!asked)
		return -EBADF;
	if ((asked->f_mode & mode) == mode)
		fd = new_descriptor(control, asked, req.access, NULL);
	fput(asked);
	return fd;
}

/*
 * The file of a shared mapping of the caller's, with a reference. The region is
 * of the whole file, so the mapping must be able to reach all of it: the rest of
 * what follows by mremap(), and what comes before by remap_file_pages(), which
 * takes mappings of a file that is open for writing only.
 */
static struct file *mapped_file(unsigned long addr, u32 access)
{
	unsigned long rights = VM_MAYREAD | (access == O_RDWR ? VM_MAYWRITE : 0);
	struct mm_struct *mm = current->mm;
	struct vm_area_struct *vma;
	struct file *file;

	if (mmap_read_lock_killable(mm))
		return ERR_PTR(-EINTR);
	vma = find_vma(mm, addr);
	if (!vma || vma->vm_start > addr)
		file = ERR_PTR(-EFAULT);
	else if (!(vma->vm_flags & VM_MAYSHARE))
		file = ERR_PTR(-EINVAL);
	else if (!vma->vm_file || vma->vm_flags & VM_SPECIAL ||
		 !mshare_file_fits(vma->vm_file, true))
		file = ERR_PTR(-EOPNOTSUPP);
	else if ((vma->vm_flags & rights) != rights ||
		 (vma->vm_pgoff && !(vma->vm_flags & VM_SHARED)))
		file = ERR_PTR(-EACCES);
	else
		file = get_file(vma->vm_file);
	mmap_read_unlock(mm);
	return file;
}

/* What has no descriptor: anonymous shared memory, a segment of System V. */
long mshare_open_mapping(struct file *control, void __user *arg)
{
	struct mshare_mapping req;
	struct file *mapped, *asked;
	long fd;

	if (copy_from_user(&req, arg, sizeof(req)))
		return -EFAULT;
	if (!known(req.access) || req.reserved)
		return -EINVAL;
	mapped = mapped_file(req.address, req.access);
	if (IS_ERR(mapped))
		return PTR_ERR(mapped);
	/* System V's own file is a cover of the one that its path leads to */
	asked = dentry_open(&mapped->f_path, req.access | QUIETLY, current_cred());
	if (IS_ERR(asked)) {
		fd = PTR_ERR(asked);
	} else {
		fd = new_descriptor(control, asked, req.access, mapped->f_mapping);
		fput(asked);
	}
	fput(mapped);
	return fd;
}
