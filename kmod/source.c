// SPDX-License-Identifier: GPL-2.0-only
/*
 * Regions of files: who asks with an open file gets the one region whose content
 * is that file. It has no name. It is found by the file's page cache, and goes
 * with its last descriptor and window, as any region without a name.
 *
 * There are two of a file, one for readers and one for writers, as a region has
 * two views. The module fills them and nobody can change what is in them, so
 * whoever asks gets the file and nothing else, and no more than the rights of
 * the descriptor.
 *
 * Locks: none here but mshare_regions_lock, in region.c, around find and publish.
 * Opening the file may take as long as its file system wants, and holds up nobody.
 */
#include <linux/cred.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/mman.h>
#include <linux/module.h>
#include <linux/uaccess.h>
#include "mshare.h"

/*
 * Opened anew, so that what hangs on the caller's open file (flock, O_APPEND)
 * ends with the caller's.
 */
static int fill(struct mshare_region *r, struct file *asked, u32 access)
{
	struct mshare_create req = {
		.size = MSHARE_MAX_SIZE,
		.prot = access == O_RDWR ? PROT_READ | PROT_WRITE : PROT_READ,
		.flags = MAP_SHARED | MAP_FIXED,
	};
	struct file *file = dentry_open(&asked->f_path, access | O_LARGEFILE, current_cred());
	int err;

	if (IS_ERR(file))
		return PTR_ERR(file);
	err = mshare_layout_map(r, file, &req);
	fput(file);
	return err;
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
static struct inode *make(struct super_block *sb, struct file *asked, u32 access)
{
	struct inode *inode = mshare_region_inode(sb), *first;
	struct mshare_region *r;
	int err;

	if (IS_ERR(inode))
		return inode;
	r = inode->i_private;
	err = mshare_region_set_size(r, MSHARE_MAX_SIZE) ?: fill(r, asked, access);
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

static struct file *open_region(struct file *control, struct file *asked, u32 access)
{
	struct super_block *sb = file_inode(control)->i_sb;
	char name[NAME_MAX + 1];
	struct inode *inode;
	struct file *file;

	inode = mshare_region_find(sb, d_real_inode(asked->f_path.dentry)->i_mapping, access) ?:
		make(sb, asked, access);
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

/* A new descriptor, closed by exec. */
long mshare_open_file(struct file *control, void __user *arg)
{
	struct mshare_file req;
	struct file *asked, *file;
	fmode_t mode;
	int fd;

	if (copy_from_user(&req, arg, sizeof(req)))
		return -EFAULT;
	if (req.access != O_RDONLY && req.access != O_RDWR)
		return -EINVAL;
	mode = req.access == O_RDWR ? FMODE_READ | FMODE_WRITE : FMODE_READ;
	asked = fget(req.fd);
	if (!asked)
		return -EBADF;
	fd = -EACCES;
	if ((asked->f_mode & mode) != mode)
		goto out;
	fd = -EOPNOTSUPP;
	if (!mshare_file_fits(asked, true))
		goto out;
	fd = get_unused_fd_flags(O_CLOEXEC);
	if (fd < 0)
		goto out;
	file = open_region(control, asked, req.access);
	if (IS_ERR(file)) {
		put_unused_fd(fd);
		fd = PTR_ERR(file);
		goto out;
	}
	fd_install(fd, file);
out:
	fput(asked);
	return fd;
}
