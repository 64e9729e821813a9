// SPDX-License-Identifier: GPL-2.0-only
/*
 * Loading and unloading: what the module cannot serve is refused here, the
 * mount point is made, and the one symbol the kernel does not export is found.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/kprobes.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/static_call.h>
#include <linux/sysfs.h>
#include <xen/xen.h>
#include "compat.h"
#include "mshare.h"

#define CREATE_TRACE_POINTS
#include "trace.h"

#if !defined(CONFIG_X86_64) || CONFIG_PGTABLE_LEVELS < 4
#error "mshare grafts PUD entries of x86-64 page tables"
#endif
#if !MSHARE_SPLIT_LOCKS
#error "mshare needs page-table locks that belong to the table, not to the mm"
#endif

/*
 * A static call, not a pointer: kernels that check indirect branches have
 * sealed the entry of a function whose address they believe nobody takes.
 */
static struct mm_struct *no_mm_alloc(void)
{
	return NULL;
}

DEFINE_STATIC_CALL(mshare_mm_alloc_call, no_mm_alloc);

struct mm_struct *mshare_mm_alloc(void)
{
	return static_call(mshare_mm_alloc_call)();
}

static int find_mm_alloc(void)
{
	struct kprobe kp = { .symbol_name = "mm_alloc" };
	int err = register_kprobe(&kp);

	if (err)
		return err;
	static_call_update(mshare_mm_alloc_call, (struct mm_struct *(*)(void))kp.addr);
	unregister_kprobe(&kp);
	return 0;
}

static int __init mshare_init(void)
{
	int err;

	if (xen_pv_domain()) {
		pr_err("not loaded: a Xen PV guest does not own its page tables\n");
		return -ENODEV;
	}
	if (!mshare_userfaultfd_keeps_out()) {
		pr_err("not loaded: userfaultfd of this kernel changes tables of special mappings\n");
		return -EOPNOTSUPP;
	}
	err = find_mm_alloc();
	if (err) {
		pr_err("not loaded: no probe on mm_alloc (%d); is kernel.kprobes_all disabled?\n",
		       err);
		return err;
	}
	err = mshare_attach_init();
	if (err)
		return err;
	err = mshare_region_init();
	if (err)
		goto no_region;
	err = sysfs_create_mount_point(fs_kobj, "mshare");
	if (err)
		goto no_mount_point;
	err = register_filesystem(&mshare_fs_type);
	if (err)
		goto no_filesystem;
	return 0;

no_filesystem:
	sysfs_remove_mount_point(fs_kobj, "mshare");
no_mount_point:
	mshare_region_exit();
no_region:
	mshare_attach_exit();
	return err;
}

static void __exit mshare_exit(void)
{
	unregister_filesystem(&mshare_fs_type);
	sysfs_remove_mount_point(fs_kobj, "mshare");
	mshare_guests_forget();
	mshare_region_exit();
	mshare_attach_exit();
}

module_init(mshare_init);
module_exit(mshare_exit);
MODULE_DESCRIPTION("Page tables shared between processes");
MODULE_AUTHOR("the mshare authors");
MODULE_ALIAS_FS("msharefs");
MODULE_LICENSE("GPL");
MODULE_VERSION("0.1.0");
