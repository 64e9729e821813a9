/*
 * What the patch of 2022 did, and the four races the review suspected in it. Each is
 * compiled alone; the checker must find it. See docs/review.md, rows S1 to S4.
 *
 * A lock of an mm is held by readers or by one writer.
 */
#define GUEST	0
#define CALLER	1
#define HOST	2

byte readers[3];
bool writer[3];

inline read_lock(l) { atomic { !writer[l] -> readers[l]++ } }
inline write_lock(l) { atomic { !writer[l] && readers[l] == 0 -> writer[l] = true } }
inline write_unlock(l) { writer[l] = false }
inline read_unlock(l) { atomic { assert(readers[l] > 0); readers[l]-- } }

#ifdef S1
/*
 * handle_mm_fault() ends with mmap_read_unlock(current->mm). In get_user_pages_remote() the
 * lock that is held is the target's.
 */
active proctype remote_fault() {
	byte task = CALLER;

	read_lock(GUEST);
	read_lock(HOST);
	/* VM_FAULT_RETRY: __handle_mm_fault() has released the host's lock */
	read_unlock(HOST);
	read_unlock(task)
}
#endif

#ifdef S2
bool table_freed;
byte host_entry = 1, guest_entry;

/* find_shared_vma() reads the host's tables, sets the guest's entry, and locks only then. */
active proctype fault() {
	byte seen;

	read_lock(GUEST);
	seen = host_entry;
	if
	:: seen -> guest_entry = seen; assert(!table_freed)
	:: else
	fi;
	read_unlock(GUEST)
}

active proctype host_unmap() {
	write_lock(HOST);
	host_entry = 0;
	table_freed = true;
	write_unlock(HOST)
}
#endif

#ifdef S3
byte mapped;			/* whose mapping is at the address */

/* mshare(): vm_mmap() drops the lock; the mapping is looked up again under it. */
active proctype attach() {
	write_lock(GUEST);
	mapped = 1;
	write_unlock(GUEST);
	write_lock(GUEST);
	assert(mapped == 1);	/* it is marked as shared, whatever it is */
	write_unlock(GUEST)
}

active proctype other_thread() {
	write_lock(GUEST);
	mapped = 2;
	write_unlock(GUEST)
}
#endif

#ifdef S4
byte vm_mm = HOST, changing;

/* The VMA is in the guest's tree, and its vm_mm is the host's: two locks for one object. */
active proctype by_tree() {
	write_lock(GUEST);
	changing++;
	assert(changing == 1);
	changing--;
	write_unlock(GUEST)
}

active proctype by_vm_mm() {
	write_lock(vm_mm);
	changing++;
	assert(changing == 1);
	changing--;
	write_unlock(vm_mm)
}
#endif
