/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * One region, its host mm, and the windows (attachments) onto it.
 *
 * Locks, outermost first:
 *   region->layout     mutex: one layout change at a time
 *   guest mmap_lock    then the lock of the window's VMA, where there is one
 *   host mmap_lock     own lock class
 *   region->lock       spinlock: list of windows, frozen
 *   guest->lock        spinlock: state of every slot of one mm
 *   guest page_table_lock
 * region->lock and guest->lock are never held together. The host's page-table
 * locks may be held when the TLB flush callback runs; it takes no lock.
 */
#ifndef _MSHARE_H
#define _MSHARE_H

#include <linux/fs.h>
#include <linux/kref.h>
#include <linux/mm.h>
#include <linux/mmu_notifier.h>
#include <linux/mutex.h>
#include <linux/spinlock.h>
#include <linux/wait.h>
#include <linux/workqueue.h>
#include "mshare_uapi.h"
#include "plant.h"

#define SLOT_SHIFT	PUD_SHIFT
#define SLOT_SIZE	PUD_SIZE
#define SLOT_MASK	PUD_MASK

/*
 * Address space of a host mm. The content is mapped twice, for writable and for
 * read-only attachments; the gap keeps mappings of the two from becoming one. The
 * blank slot lends its empty PMD page to slots taken out of a process while others
 * may be walking there.
 */
#define MSHARE_BLANK	SLOT_SIZE
#define MSHARE_MAX_SIZE	(32UL << 40)
#define MSHARE_RW	(SLOT_SIZE << 10)
#define MSHARE_RO	(MSHARE_RW + MSHARE_MAX_SIZE + SLOT_SIZE)

/* Decided by the first mapping; only a locked region has pages that never move. */
enum mshare_kind { MSHARE_EMPTY, MSHARE_MOVABLE, MSHARE_LOCKED };

struct mshare_region {
	struct mm_struct *mm;		/* host mm; NULL until the size is set */
	unsigned long size;		/* set once, after mm */
	struct mmu_notifier mn;		/* on the host mm */
	pud_t blank;
	struct mutex layout;		/* one change at a time; kind, pins */
	enum mshare_kind kind;
	struct list_head pins;		/* of pin.c */
	spinlock_t lock;		/* windows, frozen, pass */
	struct list_head windows;
	bool frozen;
	unsigned int pass;		/* number of the current walk over windows */
	wait_queue_head_t thaw;
	struct delayed_work patience;	/* ends a freeze that waits for a guest */
	bool write_notify;		/* some writable content starts write-protected */
	atomic_t nr_windows;
	atomic64_t locked;		/* pages */
	atomic64_t grafts, ungrafts, faults, flushes, changes;
	u64 resident;			/* bytes when they were last counted */
	struct list_head all;		/* every region, under mshare_regions_lock */
	struct address_space *source;	/* the file it is the region of; for good */
	u32 access;			/* and how that is open */
	struct inode *inode;		/* its own, while it has a source */
	struct super_block *sb;
};

/* One per process mm that has a window, found through its mmu notifier. */
struct mshare_guest {
	struct mmu_notifier mn;
	spinlock_t lock;		/* windows and all their slots */
	struct list_head windows;
	bool dead;			/* the mm is exiting: never graft again */
	struct list_head known;		/* of notify.c */
};

/*
 * A slot is SLOT_OWN while its PUD entry is none or points to an empty PMD page
 * that the kernel made for the guest; only that state may meet the kernel's
 * code that frees or moves page tables.
 */
enum mshare_state { SLOT_OWN, SLOT_HOST, SLOT_BLANK };

struct mshare_slot {
	pud_t *pudp;			/* NULL until the upper levels exist */
	pud_t parked;			/* the guest's own PMD page, while not in place */
	enum mshare_state state;
};

struct mshare_window {
	struct kref ref;
	struct mshare_region *region;
	struct mshare_guest *guest;	/* holds a reference to the notifier */
	struct vm_area_struct *vma;	/* NULL after close; see attach.c */
	unsigned long start, end;	/* addresses in the guest */
	unsigned long host;		/* where start lies in the host mm */
	struct list_head of_region, of_guest;
	unsigned int pass;
	unsigned int invalidating;	/* notifier ranges open on the window */
	bool frozen;			/* drained for a layout change */
	bool closing;			/* being unmapped or moved */
	struct mshare_slot slot[];
};

static inline struct mm_struct *mshare_mm(const struct mshare_window *win)
{
	return win->guest->mn.mm;
}

static inline unsigned long mshare_slots(const struct mshare_window *win)
{
	return (win->end - win->start) >> SLOT_SHIFT;
}

/* Once it is seen to be set, so is the mm. */
static inline unsigned long mshare_size(const struct mshare_region *r)
{
	/* pairs with the release in mshare_region_set_size() */
	return smp_load_acquire(&r->size);
}

/* fs.c */
extern struct file_system_type mshare_fs_type;
bool mshare_is_region(struct file *file);
struct inode *mshare_region_inode(struct super_block *sb);

/* ioctl.c */
bool mshare_file_fits(struct file *file, bool overlay);
long mshare_ioctl(struct file *file, unsigned int cmd, unsigned long arg);

/* region.c */
int mshare_region_init(void);
void mshare_region_exit(void);
struct mshare_region *mshare_region_new(struct super_block *sb);
int mshare_region_set_size(struct mshare_region *r, loff_t size);
struct inode *mshare_region_find(struct super_block *sb, struct address_space *source, u32 access);
struct inode *mshare_region_publish(struct inode *inode, struct address_space *source, u32 access);
void mshare_region_free(struct mshare_region *r);
u64 mshare_region_resident(struct mshare_region *r, bool wait, u64 *mapped, u64 *last_end);
u64 mshare_sb_resident(struct super_block *sb);
int mshare_each_file(struct mshare_region *r, unsigned long addr, unsigned long size,
		     int (*fn)(struct file *file, loff_t pos, loff_t len, void *arg), void *arg);
struct mm_struct *mshare_host_mm(void);
int mshare_host_run(struct mshare_region *r, struct mm_struct *mm,
		    int (*fn)(struct mshare_region *r, void *arg), void *arg);
int mshare_host_map(struct file *file, unsigned long addr, unsigned long size, unsigned long prot,
		    unsigned long flags, unsigned long offset);

/* layout.c */
int mshare_layout(struct mshare_region *r, unsigned int op, bool notify,
		  int (*fn)(struct mshare_region *r, void *arg), void *arg, u64 offset, u64 size);
int mshare_change(struct mshare_region *r, unsigned int op, bool notify,
		  int (*fn)(struct mshare_region *r, void *arg), void *arg, u64 offset, u64 size);
void mshare_settle(struct mshare_region *r, bool done);
void mshare_lose_patience(struct work_struct *work);

/* map.c */
int mshare_layout_try(struct file *file, const struct mshare_create *req);
int mshare_layout_map(struct mshare_region *r, struct file *file,
		      const struct mshare_create *req);
int mshare_layout_unmap(struct mshare_region *r, const struct mshare_unmap *req);

/* protect.c */
int mshare_layout_protect(struct mshare_region *r, const struct mshare_protect *req);

/* pin.c */
struct mshare_pinning {
	struct task_struct *task;	/* who may be killed */
	const struct cred *cred;	/* whose user's limit it is; NULL: nobody's */
	unsigned long counted;		/* pages not pinned yet */
};

int mshare_pin_account(struct mshare_pinning *p, u64 size);
void mshare_pin_done(struct mshare_pinning *p);
int mshare_pin(struct mshare_region *r, struct mshare_pinning *p, u64 offset, u64 size);
void mshare_unpin(struct mshare_region *r, unsigned long offset, unsigned long size);
bool mshare_keeps(struct mshare_region *r, u64 offset, u64 size);
bool mshare_may_attach(const struct mshare_region *r);

/* attach.c */
int mshare_attach_init(void);
void mshare_attach_exit(void);
int mshare_mmap(struct file *file, struct vm_area_struct *vma);
unsigned long mshare_get_unmapped_area(struct file *file, unsigned long addr, unsigned long len,
				       unsigned long pgoff, unsigned long flags);
void mshare_window_put(struct mshare_window *win);
void mshare_set_ops(struct mshare_window *win);

/* graft.c */
pud_t *mshare_pudp(struct mm_struct *mm, unsigned long addr);
int mshare_make_tables(struct mm_struct *mm, unsigned long addr);
bool mshare_graft(struct mshare_window *win, unsigned long i, pud_t host);
void mshare_host_tables(struct mshare_window *win);
void mshare_graft_all(struct mshare_window *win, bool wait);
bool mshare_ungraft(struct mshare_window *win, unsigned long start, unsigned long end, bool own);
void mshare_flush_guest(struct mm_struct *mm);
void mshare_flush_all(void);

/* notify.c */
struct mshare_guest *mshare_guest_get(struct mm_struct *mm);
void mshare_guests_forget(void);
extern const struct mmu_notifier_ops mshare_host_ops;

/* fault.c */
vm_fault_t mshare_fault(struct vm_fault *vmf);
vm_fault_t mshare_mkwrite(struct vm_fault *vmf);

/* shmem.c */
struct file *mshare_shmem_file(struct mshare_region *r, unsigned long size, unsigned long flags);
int mshare_shmem_fill(struct file *file, u64 offset, u64 size);
bool mshare_shmem_owned(struct mshare_region *r, struct file *file);
void mshare_shmem_adopt(struct mm_struct *mm, unsigned long addr, unsigned long size);
vm_fault_t mshare_shmem_charge(struct vm_area_struct *host, unsigned long addr,
			       struct mm_struct *guest, bool write, struct page **page);

/* source.c */
long mshare_open_file(struct file *control, void __user *arg);
long mshare_open_mapping(struct file *control, void __user *arg);

/* main.c */
struct mm_struct *mshare_mm_alloc(void);

#endif
