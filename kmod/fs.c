// SPDX-License-Identifier: GPL-2.0-only
/*
 * msharefs: names, modes and sizes. A regular file is a region; its content is
 * reached by mmap only.
 *
 * Locks: the inode lock covers the setting of a size. A region is freed with its
 * inode, in evict.
 */
#include <linux/fs.h>
#include <linux/fs_context.h>
#include <linux/module.h>
#include <linux/pagemap.h>
#include <linux/statfs.h>
#include "compat.h"
#include "mshare.h"

#define MSHAREFS_MAGIC	0x6d736872	/* "mshr" */

static const struct inode_operations file_iops, dir_iops;

static int sync_part(struct file *file, loff_t pos, loff_t len, void *datasync)
{
	return vfs_fsync_range(file, pos, pos + len - 1, *(int *)datasync);
}

/* fsync and msync: what is written is the mapped files'. */
static int ms_fsync(struct file *file, loff_t start, loff_t end, int datasync)
{
	struct mshare_region *r = file_inode(file)->i_private;
	loff_t size = mshare_size(r);

	end = min(end, size - 1);
	if (start > end)
		return 0;
	return mshare_each_file(r, MSHARE_RW + start, end - start + 1, sync_part, &datasync);
}

static const struct file_operations file_fops;

bool mshare_is_region(struct file *file)
{
	return file_inode(file)->i_sb->s_type == &mshare_fs_type;
}

static struct inode *make_inode(struct mshare_idmap *idmap, struct super_block *sb,
				const struct inode *dir, umode_t mode)
{
	struct inode *inode = new_inode(sb);

	if (!inode)
		return NULL;
	inode->i_ino = get_next_ino();
	inode_init_owner(idmap, inode, dir, mode);
	mshare_inode_times(inode, true);
	if (S_ISDIR(mode)) {
		inode->i_op = &dir_iops;
		inode->i_fop = &simple_dir_operations;
		inc_nlink(inode);
	}
	return inode;
}

static int add_entry(struct inode *dir, struct dentry *dentry, struct inode *inode)
{
	d_instantiate(dentry, inode);
	dget(dentry);	/* the name stays until it is unlinked */
	mshare_inode_times(dir, false);
	return 0;
}

static struct inode *make_region(struct mshare_idmap *idmap, struct inode *dir, umode_t mode)
{
	struct inode *inode = make_inode(idmap, dir->i_sb, dir, S_IFREG | (mode & 07777));

	if (!inode)
		return ERR_PTR(-ENOSPC);
	inode->i_op = &file_iops;
	inode->i_fop = &file_fops;
	inode->i_private = mshare_region_new(dir->i_sb);
	if (!inode->i_private) {
		iput(inode);
		return ERR_PTR(-ENOMEM);
	}
	return inode;
}

/* One that never gets a name, and that nobody opens but by asking for it. */
struct inode *mshare_region_inode(struct super_block *sb)
{
	struct inode *inode = make_region(&mshare_no_idmap, d_inode(sb->s_root), 0);

	if (!IS_ERR(inode))
		clear_nlink(inode);
	return inode;
}

static int ms_create(struct mshare_idmap *idmap, struct inode *dir, struct dentry *dentry,
		     umode_t mode, bool excl)
{
	struct inode *inode = make_region(idmap, dir, mode);

	return IS_ERR(inode) ? PTR_ERR(inode) : add_entry(dir, dentry, inode);
}

/* A region without a name, until linkat() gives it one: whole when it is first seen. */
static int ms_tmpfile(struct mshare_idmap *idmap, struct inode *dir, struct file *file,
		      umode_t mode)
{
	struct inode *inode = make_region(idmap, dir, mode);

	if (!IS_ERR(inode))
		d_tmpfile(file, inode);
	return finish_open_simple(file, PTR_ERR_OR_ZERO(inode));
}

static int ms_mkdir(struct mshare_idmap *idmap, struct inode *dir, struct dentry *dentry,
		    umode_t mode)
{
	struct inode *inode = make_inode(idmap, dir->i_sb, dir, S_IFDIR | (mode & 07777));

	if (!inode)
		return -ENOSPC;
	inc_nlink(dir);
	return add_entry(dir, dentry, inode);
}

static const struct inode_operations dir_iops = {
	.create = ms_create,
	.lookup = simple_lookup,
	.tmpfile = ms_tmpfile,
	.link = simple_link,
	.unlink = simple_unlink,
	.mkdir = ms_mkdir,
	.rmdir = simple_rmdir,
	.rename = simple_rename,
};

static int ms_setattr(struct mshare_idmap *idmap, struct dentry *dentry, struct iattr *attr)
{
	struct inode *inode = d_inode(dentry);
	int err = setattr_prepare(idmap, dentry, attr);

	if (err)
		return err;
	if (attr->ia_valid & ATTR_SIZE) {
		err = mshare_region_set_size(inode->i_private, attr->ia_size);
		if (err)
			return err;
		i_size_write(inode, attr->ia_size);
	}
	setattr_copy(idmap, inode, attr);
	return 0;
}

static int ms_getattr(struct mshare_idmap *idmap, const struct path *path, struct kstat *stat,
		      u32 mask, unsigned int flags)
{
	struct inode *inode = d_inode(path->dentry);

	mshare_fillattr(idmap, mask, inode, stat);
	if (mask & STATX_BLOCKS)
		stat->blocks = mshare_region_resident(inode->i_private, true, NULL, NULL) >> 9;
	return 0;
}

static const struct inode_operations file_iops = {
	.setattr = ms_setattr,
	.getattr = ms_getattr,
};

static long ms_fallocate(struct file *file, int mode, loff_t offset, loff_t len)
{
	struct inode *inode = file_inode(file);
	int err;

	if (mode)
		return -EOPNOTSUPP;
	if (offset)
		return -EINVAL;
	inode_lock(inode);
	err = inode_newsize_ok(inode, len) ?: mshare_region_set_size(inode->i_private, len);
	if (!err)
		i_size_write(inode, len);
	inode_unlock(inode);
	return err;
}

static const struct file_operations file_fops = {
	.owner = THIS_MODULE,
	.mmap = mshare_mmap,
	.get_unmapped_area = mshare_get_unmapped_area,
	.unlocked_ioctl = mshare_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
	.fallocate = ms_fallocate,
	.fsync = ms_fsync,
	.llseek = noop_llseek,
};

static ssize_t alignment_read(struct file *file, char __user *buf, size_t len, loff_t *pos)
{
	char text[24];
	int n = scnprintf(text, sizeof(text), "%lu\n", SLOT_SIZE);

	return simple_read_from_buffer(buf, len, pos, text, n);
}

static long control_ioctl(struct file *file, unsigned int cmd, unsigned long arg)
{
	void __user *user = (void __user *)arg;

	switch (cmd) {
	case MSHAREFS_OPEN_FILE:
		return mshare_open_file(file, user);
	case MSHAREFS_OPEN_MAPPING:
		return mshare_open_mapping(file, user);
	}
	return -ENOTTY;
}

static const struct file_operations control_fops = {
	.owner = THIS_MODULE,
	.read = alignment_read,
	.unlocked_ioctl = control_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
	.llseek = default_llseek,
};

static void ms_evict(struct inode *inode)
{
	truncate_inode_pages_final(&inode->i_data);
	clear_inode(inode);
	if (inode->i_private)
		mshare_region_free(inode->i_private);
}

/* Used is what regions hold in memory, free is what else the machine could give. */
static int ms_statfs(struct dentry *dentry, struct kstatfs *buf)
{
	unsigned long used = mshare_sb_resident(dentry->d_sb) >> PAGE_SHIFT;
	int err = simple_statfs(dentry, buf);

	buf->f_blocks = max(totalram_pages(), used);
	buf->f_bfree = buf->f_blocks - used;
	buf->f_bavail = buf->f_bfree;
	return err;
}

static const struct super_operations super_ops = {
	.statfs = ms_statfs,
	.drop_inode = generic_delete_inode,
	.evict_inode = ms_evict,
};

static int ms_fill_super(struct super_block *sb, struct fs_context *fc)
{
	struct mshare_idmap *idmap = &mshare_no_idmap;
	struct dentry *dentry;
	struct inode *inode;

	sb->s_maxbytes = MAX_LFS_FILESIZE;
	sb->s_blocksize = PAGE_SIZE;
	sb->s_blocksize_bits = PAGE_SHIFT;
	sb->s_magic = MSHAREFS_MAGIC;
	sb->s_op = &super_ops;
	sb->s_iflags |= SB_I_NOEXEC | SB_I_NODEV;
	sb->s_time_gran = 1;

	inode = make_inode(idmap, sb, NULL, S_IFDIR | S_ISVTX | 0777);
	sb->s_root = d_make_root(inode);
	if (!sb->s_root)
		return -ENOMEM;
	inode = make_inode(idmap, sb, NULL, S_IFREG | 0444);
	if (!inode)
		return -ENOMEM;
	inode->i_fop = &control_fops;
	inode->i_flags |= S_IMMUTABLE;
	dentry = d_alloc_name(sb->s_root, "mshare_info");
	if (!dentry) {
		iput(inode);
		return -ENOMEM;
	}
	d_add(dentry, inode);
	return 0;
}

static int ms_get_tree(struct fs_context *fc)
{
	return get_tree_nodev(fc, ms_fill_super);
}

static const struct fs_context_operations context_ops = {
	.get_tree = ms_get_tree,
};

static int ms_init_context(struct fs_context *fc)
{
	fc->ops = &context_ops;
	return 0;
}

struct file_system_type mshare_fs_type = {
	.owner = THIS_MODULE,
	.name = "msharefs",
	.init_fs_context = ms_init_context,
	.kill_sb = kill_litter_super,
};
