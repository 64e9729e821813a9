// SPDX-License-Identifier: GPL-2.0-only
/*
 * Life of a region and of its host mm.
 *
 * The region belongs to its inode. Names, open files and windows hold the inode,
 * so the last of them to go frees it, whoever made it. By then no guest is left
 * and the host mm goes the way of any mm, together with all tables below the
 * grafted entries.
 *
 * Locks: mshare_regions_lock guards the list of all regions. What changes mappings of
 * the host mm runs on a kernel worker, under region->layout; what makes it, under the
 * inode lock, or before anybody else has the inode.
 */
#include <linux/cred.h>
#include <linux/file.h>
#include <linux/kthread.h>
#include <linux/memcontrol.h>
#include <linux/mman.h>
#include <linux/mutex.h>
#include <linux/sched/coredump.h>
#include <linux/sched/mm.h>
#include <linux/slab.h>
#include <linux/workqueue.h>
#include "compat.h"
#include "mshare.h"

static DEFINE_MUTEX(mshare_regions_lock);
static LIST_HEAD(mshare_regions);
static struct workqueue_struct *mshare_wq, *mshare_trials;
/* taken inside guests' mmap_locks: lockdep must tell them apart */
static struct lock_class_key mshare_host_lock_class;

#ifdef MSHARE_NEED_NO_COLLAPSE
struct anon_vma mshare_no_collapse;
#endif

int mshare_region_init(void)
{
	mshare_wq = alloc_workqueue("mshare", WQ_UNBOUND, 0);
	mshare_trials = alloc_workqueue("mshare_trials", WQ_UNBOUND, 0);
	if (mshare_wq && mshare_trials)
		return 0;
	mshare_region_exit();
	return -ENOMEM;
}

void mshare_region_exit(void)
{
	if (mshare_wq)
		destroy_workqueue(mshare_wq);
	if (mshare_trials)
		destroy_workqueue(mshare_trials);
}

struct host_work {
	struct work_struct work;
	struct mshare_region *r;
	struct mm_struct *mm;
	struct mem_cgroup *memcg;
	const struct cred *cred;
	int (*fn)(struct mshare_region *r, void *arg);
	void *arg;
	int err;
};

static void host_worker(struct work_struct *work)
{
	struct host_work *hw = container_of(work, struct host_work, work);
	struct mem_cgroup *old = set_active_memcg(hw->memcg);
	const struct cred *own = override_creds(hw->cred);

	if (hw->mm)
		kthread_use_mm(hw->mm);
	hw->err = hw->fn(hw->r, hw->arg);
	if (hw->mm)
		kthread_unuse_mm(hw->mm);
	revert_creds(own);
	set_active_memcg(old);
}

/*
 * Run fn on a kernel worker with mm, or none, as its own. The caller's group pays,
 * and security modules are asked whether the caller may. What is for no region yet may
 * take as long as a file system wants, and has no place where others wait behind it.
 */
int mshare_host_run(struct mshare_region *r, struct mm_struct *mm,
		    int (*fn)(struct mshare_region *r, void *arg), void *arg)
{
	struct host_work hw = {
		.r = r, .mm = mm, .cred = current_cred(), .fn = fn, .arg = arg,
	};

	hw.memcg = get_mem_cgroup_from_mm(current->mm);
	INIT_WORK_ONSTACK(&hw.work, host_worker);
	queue_work(r ? mshare_wq : mshare_trials, &hw.work);
	flush_work(&hw.work);
	destroy_work_on_stack(&hw.work);
	mem_cgroup_put(hw.memcg);
	return hw.err;
}

/* On the worker, which has the host's mm: a mapping in place of what is there. */
int mshare_host_map(struct file *file, unsigned long addr, unsigned long size, unsigned long prot,
		    unsigned long flags, unsigned long offset)
{
	unsigned long at = vm_mmap(file, addr, size, prot, MAP_SHARED | MAP_FIXED | flags, offset);

	if (IS_ERR_VALUE(at))
		return at;
	mshare_shmem_adopt(current->mm, addr, size);
	return 0;
}

/* Map one page that nobody touches: its slot's tables are the blank ones. */
static int make_blank(struct mshare_region *r, struct mm_struct *mm, struct file *file)
{
	int err = mshare_host_map(file, MSHARE_BLANK, PAGE_SIZE, PROT_READ, 0, 0);

	if (err)
		return err;
	mmap_write_lock(mm);
	err = mshare_make_tables(mm, MSHARE_BLANK);
	if (!err)
		r->blank = *mshare_pudp(mm, MSHARE_BLANK);
	mmap_write_unlock(mm);
	return err;
}

/* On a worker: it has no mm of its own to inherit from, and no signals. */
struct mm_struct *mshare_host_mm(void)
{
	struct mm_struct *mm = mshare_mm_alloc();

	if (!mm)
		return NULL;
	lockdep_set_class(&mm->mmap_lock, &mshare_host_lock_class);
#ifdef CONFIG_MEMCG
	mm->owner = NULL;	/* this worker, which will be gone */
#endif
	mm->task_size = TASK_SIZE_MAX;
	mm->mmap_base = MSHARE_RW;
	mshare_init_search(mm);
	/* on khugepaged's list already, it must believe: what it collapses, the mm pays for */
	set_bit(MMF_VM_HUGEPAGE, &mm->flags);
	return mm;
}

static int make_host(struct mshare_region *r, void *file)
{
	struct mm_struct *mm = mshare_host_mm();
	int err;

	if (!mm)
		return -ENOMEM;
	kthread_use_mm(mm);
	err = make_blank(r, mm, file);
	kthread_unuse_mm(mm);
	if (!err) {
		r->mn.ops = &mshare_host_ops;
		err = mmu_notifier_register(&r->mn, mm);
	}
	if (err) {
		mmput(mm);
		return err;
	}
	r->mm = mm;
	return 0;
}

/*
 * Inode lock held, or nobody else has the inode. A size is set once; setting it again to
 * the same is no change.
 */
int mshare_region_set_size(struct mshare_region *r, loff_t size)
{
	struct file *file;
	int err;

	if (size == r->size)
		return 0;
	if (r->size || size <= 0 || size & ~SLOT_MASK)
		return -EINVAL;
	if (size > MSHARE_MAX_SIZE)
		return -EFBIG;
	file = mshare_shmem_file(r, PAGE_SIZE, VM_NORESERVE);
	if (IS_ERR(file))
		return PTR_ERR(file);
	err = mshare_host_run(r, NULL, make_host, file);
	fput(file);
	if (!err)
		smp_store_release(&r->size, size);	/* after mm */
	return err;
}

struct mshare_region *mshare_region_new(struct super_block *sb)
{
	struct mshare_region *r = kzalloc(sizeof(*r), GFP_KERNEL_ACCOUNT);

	if (!r)
		return NULL;
	mutex_init(&r->layout);
	spin_lock_init(&r->lock);
	INIT_LIST_HEAD(&r->windows);
	INIT_LIST_HEAD(&r->pins);
	init_waitqueue_head(&r->thaw);
	INIT_DELAYED_WORK(&r->patience, mshare_lose_patience);
	r->sb = sb;
	mutex_lock(&mshare_regions_lock);
	list_add(&r->all, &mshare_regions);
	mutex_unlock(&mshare_regions_lock);
	return r;
}

static struct inode *find_source(struct super_block *sb, struct address_space *source, u32 access)
{
	struct mshare_region *r;
	struct inode *inode;

	list_for_each_entry(r, &mshare_regions, all) {
		if (r->source != source || r->access != access || r->sb != sb)
			continue;
		inode = igrab(r->inode);	/* NULL: its last user has just gone */
		if (inode)
			return inode;
	}
	return NULL;
}

/* The inode of the region of a file, with a reference, or NULL. */
struct inode *mshare_region_find(struct super_block *sb, struct address_space *source, u32 access)
{
	struct inode *inode;

	mutex_lock(&mshare_regions_lock);
	inode = find_source(sb, source, access);
	mutex_unlock(&mshare_regions_lock);
	return inode;
}

/* From now on the region is found, unless another was first: the one to use. */
struct inode *mshare_region_publish(struct inode *inode, struct address_space *source, u32 access)
{
	struct mshare_region *r = inode->i_private;
	struct inode *first;

	mutex_lock(&mshare_regions_lock);
	first = find_source(inode->i_sb, source, access);
	if (!first) {
		r->inode = inode;
		r->access = access;
		r->source = source;
		first = inode;
	}
	mutex_unlock(&mshare_regions_lock);
	return first;
}

/* The inode is going: no name, no open file, no window. Never fails, waits for no process. */
void mshare_region_free(struct mshare_region *r)
{
	mutex_lock(&mshare_regions_lock);
	list_del(&r->all);
	mutex_unlock(&mshare_regions_lock);
	if (r->mm) {
		mshare_unpin(r, 0, r->size);
		mmu_notifier_unregister(&r->mn, r->mm);
		mmput(r->mm);
	}
	kfree(r);
}

/*
 * Pages of content in memory. A file of the region's own holds no page that is
 * not mapped, so all of it counts, once: other content may lie between its parts.
 * Neighbouring mappings of any other file are counted together, up to what of the
 * file is in memory. Without wait, or for a caller that is killed, the number may
 * be the last one known: a host's lock can be held for long, by a slow disk say.
 */
u64 mshare_region_resident(struct mshare_region *r, bool wait, u64 *mapped, u64 *last_end)
{
	unsigned long addr = MSHARE_RW, end = MSHARE_RW + mshare_size(r);
	u64 pages = 0, total = 0, run = 0;
	struct address_space *mapping, *last = NULL;
	struct vm_area_struct *vma;
	struct xarray seen;

	if (addr != end) {
		if (wait ? mmap_read_lock_killable(r->mm) : !mmap_read_trylock(r->mm))
			return READ_ONCE(r->resident);
		xa_init(&seen);
		for (; (vma = find_vma_intersection(r->mm, addr, end)); addr = vma->vm_end) {
			mapping = vma->vm_file->f_mapping;
			total += vma_pages(vma);
			if (mshare_shmem_owned(r, vma->vm_file)) {
				/* must not fail: what is not counted would seem to be gone */
				if (!xa_insert(&seen, mapping->host->i_ino, xa_mk_value(1),
					       GFP_KERNEL | __GFP_NOFAIL))
					pages += READ_ONCE(mapping->nrpages);
				continue;
			}
			if (last != mapping) {
				if (last)
					pages += min_t(u64, run, READ_ONCE(last->nrpages));
				last = mapping;
				run = 0;
			}
			run += vma_pages(vma);
		}
		if (last)
			pages += min_t(u64, run, READ_ONCE(last->nrpages));
		mmap_read_unlock(r->mm);
		xa_destroy(&seen);
		WRITE_ONCE(r->resident, pages << PAGE_SHIFT);
	}
	if (mapped)
		*mapped = total << PAGE_SHIFT;
	if (last_end)
		*last_end = addr - MSHARE_RW;
	return pages << PAGE_SHIFT;
}

/*
 * Call fn for each file in a range of the host mm, with a reference and without
 * the host's lock. The first error is returned, and does not end the walk.
 */
int mshare_each_file(struct mshare_region *r, unsigned long addr, unsigned long size,
		     int (*fn)(struct file *file, loff_t pos, loff_t len, void *arg), void *arg)
{
	unsigned long end = addr + size, from;
	struct vm_area_struct *vma;
	struct file *file;
	int err = 0, ret;
	loff_t pos;

	while (addr < end) {
		if (mmap_read_lock_killable(r->mm))
			return -EINTR;
		vma = find_vma_intersection(r->mm, addr, end);
		if (!vma) {
			mmap_read_unlock(r->mm);
			break;
		}
		from = max(addr, vma->vm_start);
		addr = min(end, vma->vm_end);
		pos = ((loff_t)vma->vm_pgoff << PAGE_SHIFT) + (from - vma->vm_start);
		file = get_file(vma->vm_file);
		mmap_read_unlock(r->mm);
		ret = fn(file, pos, addr - from, arg);
		err = err ?: ret;
		fput(file);
	}
	return err;
}

u64 mshare_sb_resident(struct super_block *sb)
{
	struct mshare_region *r;
	u64 bytes = 0;

	mutex_lock(&mshare_regions_lock);
	list_for_each_entry(r, &mshare_regions, all)
		if (r->sb == sb)
			bytes += mshare_region_resident(r, false, NULL, NULL);
	mutex_unlock(&mshare_regions_lock);
	return bytes;
}
