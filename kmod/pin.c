// SPDX-License-Identifier: GPL-2.0-only
/*
 * Locked regions: all content is in memory, and stays where it is.
 *
 * A guest may hand its window to a second MMU (KVM) that hears of changes in the
 * guest's mm only. What the host mm does must then never take a page away: each is
 * pinned while it is mapped, and nothing is taken out of a locked region while it
 * has windows. Nor can others take it: the content is the region's own memory. A
 * file's would be in the hands of whoever may cut it or punch holes in it.
 * The first mapping makes a region locked or movable for good.
 *
 * Locks: region->layout for the list of pins and the kind, which others read
 * without it. Pinning takes the host's mmap_lock and runs on the kernel worker;
 * the pins count against the RLIMIT_MEMLOCK of the user who asked.
 */
#include <linux/cred.h>
#include <linux/fdtable.h>
#include <linux/magic.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include "mshare.h"

#define PIN_PAGES 500	/* the struct fills a page */

/* Part of one mapping. */
struct mshare_pin {
	struct list_head list;		/* in region->pins */
	const struct cred *cred;	/* whose user's limit; NULL: the caller need not count */
	unsigned long first;		/* page of the region */
	unsigned long nr;		/* pages still pinned */
	struct page *page[PIN_PAGES];
};

/* Caller's context: whose limit it is. */
int mshare_pin_account(struct mshare_pinning *p, u64 size)
{
	unsigned long limit = rlimit(RLIMIT_MEMLOCK) >> PAGE_SHIFT;
	unsigned long pages = size >> PAGE_SHIFT;

	if (!can_do_mlock())
		return -EPERM;
	p->task = current;
	p->cred = NULL;
	if (capable(CAP_IPC_LOCK))
		return 0;
	if (atomic_long_add_return(pages, &current_user()->locked_vm) > limit) {
		atomic_long_sub(pages, &current_user()->locked_vm);
		return -ENOMEM;
	}
	p->cred = get_current_cred();
	p->counted = pages;
	return 0;
}

/* What was counted and not pinned. */
void mshare_pin_done(struct mshare_pinning *p)
{
	if (!p->cred)
		return;
	atomic_long_sub(p->counted, &p->cred->user->locked_vm);
	put_cred(p->cred);
}

static void unpin_page(struct mshare_region *r, struct mshare_pin *pin, unsigned long i)
{
	if (!pin->page[i])
		return;
	unpin_user_page(pin->page[i]);
	pin->page[i] = NULL;
	pin->nr--;
	atomic64_dec(&r->locked);
	if (pin->cred)
		atomic_long_dec(&pin->cred->user->locked_vm);
}

void mshare_unpin(struct mshare_region *r, unsigned long offset, unsigned long size)
{
	unsigned long from = offset >> PAGE_SHIFT, to = from + (size >> PAGE_SHIFT), i;
	struct mshare_pin *pin, *next;

	list_for_each_entry_safe(pin, next, &r->pins, list) {
		for (i = max(from, pin->first); i < min(to, pin->first + PIN_PAGES); i++)
			unpin_page(r, pin, i - pin->first);
		if (pin->nr)
			continue;
		list_del(&pin->list);
		put_cred(pin->cred);
		kfree(pin);
		cond_resched();
	}
}

static int pin_some(struct mshare_region *r, struct mshare_pinning *p, unsigned long first,
		    unsigned long pages)
{
	unsigned long addr = MSHARE_RW + (first << PAGE_SHIFT);
	struct mshare_pin *pin;
	int got;

	pin = kzalloc(sizeof(*pin), GFP_KERNEL_ACCOUNT | __GFP_RETRY_MAYFAIL);
	if (!pin)
		return -ENOMEM;
	pin->first = first;
	if (p->cred)
		pin->cred = get_cred(p->cred);
	list_add(&pin->list, &r->pins);
	while (pin->nr < pages) {
		/* reading is enough: shared memory has no page that a store would replace */
		got = pin_user_pages_fast(addr + (pin->nr << PAGE_SHIFT), pages - pin->nr,
					  FOLL_LONGTERM, pin->page + pin->nr);
		if (got <= 0)
			return got ?: -EFAULT;
		pin->nr += got;
		atomic64_add(got, &r->locked);
		if (p->cred)
			p->counted -= got;
	}
	return 0;
}

/*
 * On the kernel worker, with region->layout held and every guest drained; all pages
 * are in memory. On an error the caller unpins the range.
 */
int mshare_pin(struct mshare_region *r, struct mshare_pinning *p, u64 offset, u64 size)
{
	unsigned long first = offset >> PAGE_SHIFT, end = first + (size >> PAGE_SHIFT), pages;
	int err = 0;

	for (; first < end && !err; first += pages) {
		pages = min_t(unsigned long, end - first, PIN_PAGES);
		err = fatal_signal_pending(p->task) ? -EINTR : pin_some(r, p, first, pages);
		cond_resched();
	}
	return err;
}

/*
 * What this says is final with all guests drained: a window that is not counted yet
 * cannot hand on a page before the thaw.
 */
bool mshare_keeps(struct mshare_region *r, u64 offset, u64 size)
{
	bool content;

	if (list_empty(&r->pins) || !atomic_read(&r->nr_windows))
		return false;
	mmap_read_lock(r->mm);
	content = find_vma_intersection(r->mm, MSHARE_RO + offset, MSHARE_RO + offset + size);
	mmap_read_unlock(r->mm);
	return content;
}

static int is_vm(const void *unused, struct file *file, unsigned int fd)
{
	return file_inode(file)->i_sb->s_magic == ANON_INODE_FS_MAGIC &&
	       !strcmp(file->f_path.dentry->d_name.name, "kvm-vm");
}

/* A process with a virtual machine may make a window its memory: only if no page of it moves. */
bool mshare_may_attach(const struct mshare_region *r)
{
	return READ_ONCE(r->kind) == MSHARE_LOCKED || !iterate_fd(current->files, 0, is_vm, NULL);
}
