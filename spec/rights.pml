/*
 * Who may write, what is reached, and who pays: invariants 5, 6 and 7. A page of content
 * that two views of the host map; a guest that has its window for reading, and one for
 * writing; PROTECT, which takes the right to write away from all; reclaim, and a hole that
 * somebody makes in the file.
 */
#define READER	0
#define WRITER	1
#define GUESTS	2
#define READ	1			/* an entry or a TLB: nothing, READ, WRITE */
#define WRITE	2
#define MSHARE_RO	0		/* views */
#define MSHARE_RW	1

/* mshare_mmap() */
#ifdef BREAK_VIEW
#define view(g)	MSHARE_RW
#else
#define view(g)	(g)
#endif

byte entry[2], tlb[GUESTS];
bool vm_write[2];			/* VM_WRITE of the host's mapping */
bool write_notify, frozen, protected, copied[2];
byte faults;				/* under way, with a guest's mmap_lock */

/* the page: in memory, or in swap, with who pays, or nowhere */
#define ROOT	GUESTS
#define NOBODY	3
#define NOWHERE	0
#define SWAPPED	1
#define IN_MEMORY	2
byte page, payer = NOBODY, faulting = NOBODY;

inline reached(g) { assert(!copied[view(g)]) }
inline written(g) { assert(g == WRITER && !protected); reached(g) }

/* tmpfs charges a new page to the owner of the mm that asks, and one from swap to who had it. */
inline shmem_fault(owner) {
	atomic {
		if
		:: page == NOWHERE -> payer = owner
		:: else
		fi;
		page = IN_MEMORY
	}
}

/* fault.c: forward(), with shmem.c: mshare_shmem_charge() */
inline forward(g, write) {
	if
#ifndef BREAK_HOST_RIGHTS
	:: write && !vm_write[view(g)] -> signal = true
#endif
	:: else ->
		if
#ifdef BREAK_CHARGE
		:: page != IN_MEMORY -> shmem_fault(ROOT)
#else
		:: page != IN_MEMORY -> shmem_fault(g)
#endif
		:: else
		fi;
		/* handle_mm_fault() in the host mm, which has no owner: fault_present() */
#ifdef BREAK_PRESENT
		shmem_fault(ROOT);
#endif
		atomic {
			assert(payer != ROOT);
			if
			:: page == IN_MEMORY ->
#ifdef BREAK_SHARED
				copied[view(g)] = copied[view(g)] || write;
#endif
				entry[view(g)] = (write -> WRITE : (entry[view(g)] -> entry[view(g)] : READ))
			:: else			/* gone again: the access comes back */
			fi
		}
	fi
}

/* A load or a store of a guest, or the kernel's own with get_user_pages_fast. */
proctype guest(byte g) {
	bool write, signal;

	if :: write = true :: write = false fi;
	do
	:: atomic { tlb[g] >= WRITE - !write -> /* the TLB, no table */
		if :: write -> written(g) :: else -> reached(g) fi }; break
	:: atomic { tlb[g] < WRITE - !write && entry[view(g)] >= WRITE - !write && !frozen ->
		tlb[g] = entry[view(g)];
		/* the kernel has looked at the guest's VMA before it lets a store fault; a TLB takes
		 * what the entry says, and so does get_user_pages_fast for a write */
		if :: entry[view(g)] == WRITE -> written(g) :: else -> reached(g) fi }; break
	:: atomic { entry[view(g)] < WRITE - !write && !frozen -> faults++;
		if
		:: write && g == READER -> signal = true	/* the guest's VMA */
		:: else
		fi };
		if
		:: signal
		/* present but not writable: do_wp_page(), by the guest's rights if nobody is asked */
		:: !signal && write && entry[view(g)] == READ && !(write_notify) ->
			entry[view(g)] = WRITE
		:: !signal -> forward(g, write)
		fi;
		faults--;
		if :: signal -> break :: else fi
	od
}

/* protect.c: do_protect() between freeze and thaw. */
proctype mshare_layout_protect() {
#ifndef BREAK_MKWRITE
	write_notify = true;
#endif
	atomic { !faults ->			/* the mmap_lock of each guest, for write */
		frozen = true;
#ifndef BREAK_PROTECT_FLUSH
		tlb[READER] = 0;
		tlb[WRITER] = 0
#endif
	};
	vm_write[MSHARE_RW] = false;
	atomic { if :: entry[MSHARE_RW] == WRITE -> entry[MSHARE_RW] = READ :: else fi };
	frozen = false;
	protected = true
}

proctype reclaim() {
	atomic {
		if
		:: page == IN_MEMORY ->
			entry[0] = 0; entry[1] = 0; tlb[READER] = 0; tlb[WRITER] = 0;
			page = SWAPPED
		:: else
		fi
	}
}

proctype punch() {
	atomic {
		entry[0] = 0; entry[1] = 0; tlb[READER] = 0; tlb[WRITER] = 0;
		page = NOWHERE; payer = NOBODY
	}
}

init {
	atomic {
		vm_write[MSHARE_RW] = true;
		run guest(READER);
		run guest(WRITER);
		run guest(WRITER);
		run mshare_layout_protect();
		run reclaim();
		run punch()
	}
}
