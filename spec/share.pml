/*
 * Shared page tables: attach, fault, layout change, reclaim and exit. Read it beside
 * kmod/*.c: functions and fields have the same names.
 *
 * Two windows with two slots each, in two guests (one with ONE_GUEST), on two CPUs. What
 * the kernel promises and hardware does:
 *
 * - A lock has readers or one writer. So has the lock of a VMA.
 * - A CPU walks tables with interrupts off: an IPI waits until the walk has ended. So does
 *   get_user_pages_fast.
 * - A TLB entry is used without a look at any table. It also stands for what a CPU
 *   remembers of the upper levels.
 * - What a spinlock covers is one step.
 *
 * A WITH_ symbol adds a process, a BREAK_ symbol takes out one step of the protocol, and
 * the checker must then find what the step is for. The flush that the kernel makes by
 * itself when the host unmaps is left out: it holds without.
 */
#define WINDOWS	2
#define SLOTS	2
#define CPUS	2
#ifdef ONE_GUEST
#define GUEST(w)	0
#else
#define GUEST(w)	(w)
#endif
#define HOST	2			/* the host's mmap_lock; 0 and 1 are the guests' */
#define NONE	WINDOWS
#define AT(w, s)	((w) * SLOTS + (s))
#define TLB(c, w, s)	(((c) * WINDOWS + (w)) * SLOTS + (s))
#ifndef ACCESSES
#define ACCESSES	1		/* of each CPU */
#endif

/* what a PUD entry points to: nothing, the guest's own page, the blank one, the host's */
#define OWN_PAGE	1
#define BLANK_PAGE	2
#define TABLE(s, n)	(3 + (s) * 2 + (n))
#define of_host(t)	((t) >= TABLE(0, 0))
#define SLOT_OWN	0
#define SLOT_HOST	1
#define SLOT_BLANK	2

byte readers[3], vma_readers[WINDOWS], running;
bool writer[3], vma_writer[WINDOWS];

byte pud[WINDOWS * SLOTS], parked[WINDOWS * SLOTS], state[WINDOWS * SLOTS];
bool mapped[WINDOWS];			/* the VMA is in the guest's tree */
bool owned[WINDOWS];			/* the addresses are the window's */
bool of_region[WINDOWS], of_guest[WINDOWS], vma[WINDOWS];
bool frozen[WINDOWS], closing[WINDOWS];
bool pass[WINDOWS];			/* win->pass == region->pass: this pass has seen it */
byte invalidating[WINDOWS];
bool dead[2], exiting[2];
byte users[2];				/* who holds the mm: exit waits for them */

byte host_pud[SLOTS], made[SLOTS];
bool host_vma[SLOTS], present[SLOTS], page_gone[SLOTS], freed[TABLE(SLOTS, 0)];
bool region_frozen, killed;
byte nr_windows, patience = NONE;	/* the window for which the timer runs */

byte tlb[CPUS * WINDOWS * SLOTS];
bool walking[CPUS];

/*
 * FAIR is for what must end: a writer that waits keeps new readers out, and an interrupt
 * that waits is taken before the CPU walks again.
 */
byte waiting[3], ipi[CPUS];
#ifdef FAIR
#define ADD	1
#else
#define ADD	0
#endif

inline read_lock(l) { atomic { !writer[l] && !waiting[l] -> readers[l]++ } }
inline read_unlock(l) { d_step { assert(readers[l] > 0); readers[l]-- } }
inline write_lock(l) {
	atomic {
		if
		:: !writer[l] && !readers[l]
		:: else -> waiting[l] = waiting[l] + ADD; !writer[l] && !readers[l]; waiting[l] = waiting[l] - ADD
		fi;
		writer[l] = true
	}
}
inline downgrade(l) { d_step { writer[l] = false; readers[l]++ } }
inline write_unlock(l) {
	d_step {
		assert(writer[l]);
		writer[l] = false;
		if :: GUEST(0) == l -> vma_writer[0] = false :: else fi;
		if :: GUEST(1) == l -> vma_writer[1] = false :: else fi
	}
}

#ifdef BREAK_FREEZE
#define is_frozen(w)	false
#define has_to_wait(w, form)	false
#else
#define is_frozen(w)	frozen[w]
#define has_to_wait(w, form)	(frozen[w] || ((form) == KILLABLE && region_frozen))
#endif

/* graft.c */
inline mshare_graft(w, s, host) {
	d_step {
		if
		:: dead[GUEST(w)] || closing[w] || is_frozen(w) || invalidating[w]
		:: else ->
			if
			:: state[AT(w, s)] == SLOT_HOST
			:: else ->
				if
				:: state[AT(w, s)] == SLOT_OWN -> parked[AT(w, s)] = pud[AT(w, s)]
				:: else
				fi;
				pud[AT(w, s)] = host;
				state[AT(w, s)] = SLOT_HOST
			fi
		fi
	}
}

inline ungraft_slot(w, s, own) {
	if
	:: state[AT(w, s)] == SLOT_OWN || (state[AT(w, s)] == SLOT_BLANK && !(own))
	:: else ->
		if
#ifdef BREAK_BLANK
		:: true ->
#else
		:: (own) || parked[AT(w, s)] ->
#endif
			pud[AT(w, s)] = parked[AT(w, s)];
			parked[AT(w, s)] = 0;
			state[AT(w, s)] = SLOT_OWN
#ifndef BREAK_BLANK
		:: else ->
			pud[AT(w, s)] = BLANK_PAGE;
			state[AT(w, s)] = SLOT_BLANK
#endif
		fi;
		changed = true
	fi
}

inline mshare_ungraft(w, own) { ungraft_slot(w, 0, own); ungraft_slot(w, 1, own) }

inline forget(c, w) { tlb[TLB(c, w, 0)] = 0; tlb[TLB(c, w, 1)] = 0 }

inline interrupt(c) {
	if
	:: !walking[c]
	:: else -> ipi[c] = ipi[c] + ADD; !walking[c]; ipi[c] = ipi[c] - ADD
	fi
}

inline flush_cpu(c, g) {
	atomic { interrupt(c);
		if :: GUEST(0) == g -> forget(c, 0) :: else fi;
		if :: GUEST(1) == g -> forget(c, 1) :: else fi }
}

inline mshare_flush_guest(g) {
	if
	:: changed -> flush_cpu(0, g); flush_cpu(1, g); changed = false
	:: else
	fi
}

inline mshare_flush_all() {
	atomic { interrupt(0); forget(0, 0); forget(0, 1) };
	atomic { interrupt(1); forget(1, 0); forget(1, 1) }
}

/* The host's PUD entry; make_tables() and faults fill it under the host's lock. */
inline make_host_table(s) {
	d_step {
		if
		:: host_pud[s]
		:: else -> assert(made[s] < 2); host_pud[s] = TABLE(s, made[s]); made[s]++
		fi
	}
}

/* No lock of a guest is needed. */
inline mshare_host_tables(w) {
	if
	:: frozen[w]
	:: else ->
		read_lock(HOST);
		lacks = (host_vma[0] && !host_pud[0]) || (host_vma[1] && !host_pud[1]);
		read_unlock(HOST);
		if
		:: lacks ->
			write_lock(HOST);
			if :: host_vma[0] -> make_host_table(0) :: else fi;
			if :: host_vma[1] -> make_host_table(1) :: else fi;
			write_unlock(HOST);
			lacks = false
		:: else
		fi
	fi
}

/* The guest's mmap_lock is held. Without wait the host's may not be had. */
inline mshare_graft_all(w, wait) {
	if
	:: frozen[w] || !(wait)
	:: !frozen[w] ->
		read_lock(HOST);
		s = 0;
		do
		:: s == SLOTS -> s = 0; break
		:: s < SLOTS ->
			if
			:: host_vma[s] && host_pud[s] -> mshare_graft(w, s, host_pud[s])
			:: else
			fi;
			s++
		od;
		read_unlock(HOST)
	fi
}

/* fault.c. How a fault ends, and what the flags of the caller allow. */
#define NOPAGE	0			/* the lock is held: access again */
#define RETRY	1			/* the lock is gone: lock and access again */
#define HELD	2			/* RETRY_NOWAIT: the lock is held, the caller gives up */
#define SIGSEGV	3
#define KILLED	4			/* the lock is gone */
#define ANY	0			/* no flag */
#define NOWAIT	1			/* ALLOW_RETRY, RETRY_NOWAIT */
#define KILLABLE	2		/* ALLOW_RETRY, KILLABLE */

inline wait_for_thaw(w, form) {
	if
	:: form == ANY -> !is_frozen(w); ret = NOPAGE	/* its time limit is left out */
	:: form == NOWAIT -> ret = HELD
	:: form == KILLABLE -> read_unlock(GUEST(w)); !region_frozen; ret = RETRY
	fi
}

inline host_fault(s, form) {
	if
	:: atomic { !page_gone[s] || form == ANY ->
		page_gone[s] = false; present[s] = true }; ret = NOPAGE; held = true
	:: page_gone[s] && form == NOWAIT -> ret = HELD; held = true
	:: atomic { page_gone[s] && form == KILLABLE ->	/* read in, without the lock */
		page_gone[s] = false }; read_unlock(HOST); ret = RETRY; held = false
	:: atomic { page_gone[s] && form == KILLABLE ->	/* VM_FAULT_COMPLETED */
		page_gone[s] = false; present[s] = true }; read_unlock(HOST); ret = NOPAGE; held = false
	fi
}

inline forward(w, s, form) {
	if
	:: read_lock(HOST);
		if
		:: !host_vma[s] -> read_unlock(HOST); ret = SIGSEGV
		:: else ->
			make_host_table(s);
			host_fault(s, form);
			if
			:: held && ret == NOPAGE -> mshare_graft(w, s, host_pud[s]); read_unlock(HOST)
			:: held && ret == HELD -> read_unlock(HOST)
			:: !held && ret == RETRY -> read_unlock(GUEST(w))
			:: !held && ret == NOPAGE
			fi
		fi
#ifdef WITH_KILL
	:: form == KILLABLE && writer[HOST] -> read_unlock(GUEST(w)); ret = KILLED
#endif
	fi
}

/* The kernel walks to the last level with the guest's mmap_lock, then asks the module. */
inline mshare_fault(w, s, form) {
	read_lock(GUEST(w));
	if
	:: !mapped[w] -> ret = SIGSEGV
	:: else ->
		atomic { if :: !pud[AT(w, s)] -> pud[AT(w, s)] = OWN_PAGE :: else fi; t = pud[AT(w, s)] };
		if
		:: has_to_wait(w, form) -> wait_for_thaw(w, form)
		:: else ->
			closing[w] = false;
			forward(w, s, form)
		fi;
		assert(ret == RETRY || ret == KILLED || !freed[t]);
	fi;
	if
	:: ret == RETRY || ret == KILLED
	:: else -> read_unlock(GUEST(w))
	fi
}

/* What a TLB remembers may be gone, as there is room for little, or still there. */
inline evict(c, w, s) { if :: tlb[TLB(c, w, s)] = 0 :: true fi }

#define reached(c, w, s)	(owned[w] && !freed[tlb[TLB(c, w, s)]] && !page_gone[s])

/* A CPU that loads or stores, in any window and any slot. */
proctype cpu(byte c) {
	byte w, s, t, n, ret;
	bool held;

	do
	:: n == ACCESSES -> break
	:: n < ACCESSES ->
		if :: w = 0 :: w = 1 fi;
		if :: s = 0 :: s = 1 fi;
		atomic {
			if
			:: exiting[GUEST(w)] -> goto next
			:: else -> users[GUEST(w)]++
			fi;
			evict(c, w, s)
		};
again:
		if
		:: atomic { tlb[TLB(c, w, s)] -> assert(reached(c, w, s)) }
		:: atomic { !tlb[TLB(c, w, s)] && !ipi[c] -> walking[c] = true; t = pud[AT(w, s)] };
			atomic {
				walking[c] = false;
				assert(!freed[t]);
				if
				:: of_host(t) && present[s] -> tlb[TLB(c, w, s)] = t; ret = NOPAGE; t = 0
				:: else -> ret = HELD; t = 0
				fi
			};
			if
			:: ret == NOPAGE -> goto again
			:: else -> mshare_fault(w, s, KILLABLE); t = 0; held = false
			fi;
			if
			:: ret == NOPAGE || ret == RETRY -> goto again
			:: else
			fi
		fi;
		users[GUEST(w)]--;
next:		n++; w = 0; s = 0; ret = 0
	od;
	running--
}

/* get_user_pages for another process, with every form of retry. */
proctype remote(byte w) {
	byte t, ret, form;
	bool held;

	users[GUEST(w)]++;
	if :: form = ANY :: form = NOWAIT :: form = KILLABLE fi;
	do
	:: mshare_fault(w, 0, form); t = 0; held = false;
		if
		:: ret == NOPAGE && form == ANY && frozen[w]	/* not yet there: again */
		:: ret == RETRY
		:: else -> break
		fi
	od;
	users[GUEST(w)]--;
	running--
}

/*
 * smaps and the like, with the mmap_lock; a fault that has the VMA's lock alone, and
 * gives it up before it asks the module. Both read the entry twice.
 */
proctype walker(byte w) {
	byte t, s;

	if :: s = 0 :: s = 1 fi;
	if
	:: read_lock(GUEST(w));
		if
		:: mapped[w] ->
			t = pud[AT(w, s)];
			assert(!t || pud[AT(w, s)]);
			t = pud[AT(w, s)];
			assert(!freed[t])
		:: else
		fi;
		read_unlock(GUEST(w))
	:: atomic { mapped[w] && !vma_writer[w] && !writer[GUEST(w)] -> vma_readers[w]++ };
		t = pud[AT(w, s)];
		assert(!t || pud[AT(w, s)]);
		assert(!freed[t]);
		vma_readers[w]--
	fi;
	running--
}

/* notify.c: what the kernel then finds must be the guest's own. */
inline guest_start(w, own) {
#ifdef BREAK_NOTIFIER
	skip;
#else
	d_step {
#ifndef BREAK_INVALIDATING
		invalidating[w]++;
#endif
		if :: own -> closing[w] = true :: else fi;
		mshare_ungraft(w, own)
	};
	mshare_flush_guest(GUEST(w));
#endif
}

inline guest_end(w) {
	d_step { if :: invalidating[w] -> invalidating[w]-- :: else fi }
}

inline zap(w) {
	assert(!of_host(pud[AT(w, 0)]));
	assert(!of_host(pud[AT(w, 1)]))
}

/* Tables of the guest are freed: with what the kernel made for it, and nothing else. */
inline free_pgtables(w) {
	d_step {
		assert(pud[AT(w, 0)] <= OWN_PAGE && !parked[AT(w, 0)]);
		assert(pud[AT(w, 1)] <= OWN_PAGE && !parked[AT(w, 1)]);
		pud[AT(w, 0)] = 0; pud[AT(w, 1)] = 0
	}
}

/* madvise on a window; after exit has begun, the OOM reaper. */
proctype advise(byte w) {
	bool changed;

	read_lock(GUEST(w));
	if
	:: mapped[w] && !dead[GUEST(w)] ->
		guest_start(w, false);
		zap(w);
		guest_end(w)
	:: else
	fi;
	read_unlock(GUEST(w));
	running--
}

/* attach.c */
inline window_new(w, moving) {
	closing[w] = moving;
	nr_windows++;
	d_step {
#ifndef BREAK_BORN
		frozen[w] = region_frozen;
#endif
		pass[w] = true;
		of_region[w] = true
	};
	d_step { of_guest[w] = true; vma[w] = true }
}

inline window_close(w) {
	d_step { mshare_ungraft(w, true); of_guest[w] = false };
	mshare_flush_guest(GUEST(w));
	of_region[w] = false;
	nr_windows--;
	vma[w] = false
}

/* mmap; with WITH_FORK in a child, whose parent's mmap_lock is held too. */
proctype attach(byte w) {
	byte s;
	bool lacks;

#ifdef WITH_FORK
	write_lock(1 - GUEST(w));
#endif
	write_lock(GUEST(w));
	window_new(w, false);
	if	/* make_upper(): makes an own page where the levels above are missing */
	:: pud[AT(w, 0)] = OWN_PAGE
	:: true
	fi;
	owned[w] = true;
	mshare_host_tables(w);
	mshare_graft_all(w, true);
	mapped[w] = true;
	write_unlock(GUEST(w));
#ifdef WITH_FORK
	write_unlock(1 - GUEST(w));
#endif
	running--
}

/* munmap: out of the tree, then with the lock for read. */
proctype unmap(byte w) {
	bool changed;

	write_lock(GUEST(w));
	vma_writer[w] = true;
	!vma_readers[w];
	mapped[w] = false;
	vma_writer[w] = false;
	downgrade(GUEST(w));
	guest_start(w, true);
	zap(w);
	guest_end(w);
	free_pgtables(w);
	window_close(w);
	owned[w] = false;
	read_unlock(GUEST(w));
	running--
}

/* mremap of the first window to where the second will be. The kernel moves PUD entries. */
proctype mremap() {
	byte s;
	bool changed, lacks;

	write_lock(0);
	window_new(1, true);			/* window_open() */
	guest_start(0, true);
	d_step {
		assert(!pud[AT(1, 0)] && !pud[AT(1, 1)]);
		assert(pud[AT(0, 0)] <= OWN_PAGE && pud[AT(0, 1)] <= OWN_PAGE);
		pud[AT(1, 0)] = pud[AT(0, 0)]; pud[AT(1, 1)] = pud[AT(0, 1)];
		pud[AT(0, 0)] = 0; pud[AT(0, 1)] = 0
	};
	guest_end(0);
	closing[1] = false;			/* window_mremap() */
	owned[1] = true;
	mshare_host_tables(1);
	mshare_graft_all(1, true);
	d_step { mapped[0] = false; mapped[1] = true };
	guest_start(0, true);
	zap(0);
	guest_end(0);
	free_pgtables(0);
	window_close(0);
	owned[0] = false;
	write_unlock(0);
	running--
}

/* The last user of an mm has gone: guest_release(), then exit_mmap(). */
proctype leave(byte g) {
	bool changed;

	atomic { !users[g] -> exiting[g] = true };
	write_lock(g);
	d_step {
		dead[g] = true;
#ifndef BREAK_RELEASE
		mshare_ungraft(g, true)
#endif
	};
	mshare_flush_guest(g);
	write_unlock(g);
	read_lock(g);
	zap(g);
	read_unlock(g);
	write_lock(g);
	mapped[g] = false;
	free_pgtables(g);
	window_close(g);
	write_unlock(g);
	running--
}

/* layout.c */
inline next_pass() { pass[0] = false; pass[1] = false }		/* region->pass++ */

inline next_window() {
	atomic {
		if
		:: of_region[0] && !pass[0] -> w = 0; pass[w] = true
		:: of_region[1] && !pass[1] -> w = 1; pass[w] = true
		:: else -> w = NONE
		fi
	}
}

inline drain_window(v, g) {
	if
	:: of_guest[v] && GUEST(v) == g ->
#ifndef BREAK_VMA_LOCK
		vma_writer[v] = true;
		!vma_readers[v];
#endif
		d_step {
			frozen[v] = true;
			mshare_ungraft(v, false);
#ifndef BREAK_PASS
			pass[v] = true
#endif
		}
	:: else
	fi
}

inline drain(g) {
	drain_window(0, g);
	drain_window(1, g);
#ifndef BREAK_FLUSH
	mshare_flush_guest(g)
#endif
}

inline release() {
	region_frozen = false;
	next_pass();
	if :: of_region[0] -> frozen[0] = false :: else fi;
	if :: of_region[1] -> frozen[1] = false :: else fi
}

/*
 * The timer of freeze(). It may run out as soon as it is set. With FAIR, only when the lock
 * is not to be had: a change ends if the patience is in the end long enough.
 */
proctype mshare_lose_patience() {
end:	do
#ifdef FAIR
	:: d_step { patience != NONE && waiting[GUEST(patience)] -> patience = NONE; release() }
#else
	:: d_step { patience != NONE -> patience = NONE; release() }
#endif
	od
}

inline thaw() {
	d_step { release() };
	do
	:: killed -> break
	:: !killed ->
		next_window();
		if
		:: w == NONE -> break
		:: else ->
			mshare_host_tables(w);
			read_lock(GUEST(w));
			if :: vma[w] -> mshare_graft_all(w, false) :: else fi;
			read_unlock(GUEST(w))
		fi
	od
}

inline begin() { d_step { region_frozen = true; next_pass() } }

inline freeze() {
	begin();
	do
	:: next_window();
		if
		:: w == NONE -> break
		:: else ->
#ifdef WITH_PATIENCE
			patience = w;		/* schedule_delayed_work() */
#endif
			if
#ifdef BREAK_DRAIN
			:: vma[w] -> drain(GUEST(w))
			:: else
#else
			:: write_lock(GUEST(w));
#ifdef WITH_PATIENCE
#ifndef BREAK_CANCEL
				patience = NONE;	/* cancel_delayed_work_sync() */
#endif
#ifndef BREAK_ANEW
				if :: !region_frozen -> begin() :: else fi;
#endif
#endif
				if :: vma[w] -> drain(GUEST(w)) :: else fi;
				write_unlock(GUEST(w))
#endif
#ifdef WITH_KILL
			:: readers[GUEST(w)] || writer[GUEST(w)] -> killed = true; patience = NONE; break
#endif
			fi
		fi
	od
}

/* A thread that keeps the mmap_lock of its process until an access of the other has ended. */
proctype holder(byte g) {
	read_lock(g);
	!users[1 - g];
	read_unlock(g);
	running--
}

/* UNMAP or CREATE_MAPPING of the first slot. */
proctype mshare_layout() {
	byte w, s;
	bool changed, lacks;

#ifdef BREAK_ORDER
	d_step { freed[host_pud[0]] = true; host_pud[0] = 0; present[0] = false };
#endif
#ifdef BREAK_LOCK_ORDER
	write_lock(HOST);
#endif
	freeze();
	if
	:: killed
	:: else ->
#ifndef BREAK_LOCK_ORDER
		write_lock(HOST);
#endif
#ifndef BREAK_ORDER
		d_step { freed[host_pud[0]] = true; host_pud[0] = 0; present[0] = false };
#endif
		if :: host_vma[0] = false :: true fi;
		write_unlock(HOST)
	fi;
	thaw();
	running--
}

/* Reclaim of the page of the second slot: the entry, the flush of notify.c, the page. */
proctype reclaim() {
	present[1] = false;
#ifndef BREAK_HOST_FLUSH
	if
	:: nr_windows -> mshare_flush_all()	/* host_flush() */
	:: else
	fi;
#endif
	/* a fault that came in between has put it back */
	d_step { if :: !present[1] -> page_gone[1] = true :: else fi };
	running--
}

#define start(process)	running++; run process

init {
	byte i;

	atomic {
		for (i : 0 .. SLOTS - 1) {
			host_vma[i] = true; present[i] = true; host_pud[i] = TABLE(i, 0); made[i] = 1
		};
		if :: present[1] = false :: true fi;	/* not yet touched */
		/* attached, with a page of its own parked in the first slot only */
		for (i : 0 .. WINDOWS - 1) {
#if defined(WITH_ATTACH) || defined(WITH_MREMAP)
			if :: i == 1 -> break :: else fi;
#endif
			pud[AT(i, 0)] = TABLE(0, 0); pud[AT(i, 1)] = TABLE(1, 0);
			parked[AT(i, 0)] = OWN_PAGE;
			state[AT(i, 0)] = SLOT_HOST; state[AT(i, 1)] = SLOT_HOST;
			tlb[TLB(0, i, 0)] = TABLE(0, 0); tlb[TLB(1, i, 0)] = TABLE(0, 0);
			if
			:: present[1] -> tlb[TLB(0, i, 1)] = TABLE(1, 0); tlb[TLB(1, i, 1)] = TABLE(1, 0)
			:: else
			fi;
			mapped[i] = true; owned[i] = true; vma[i] = true;
			of_region[i] = true; of_guest[i] = true; nr_windows++
		};
#ifdef WITH_PATIENCE
#ifndef BREAK_PATIENCE
		run mshare_lose_patience();
#endif
#endif
		start(cpu(0));
#ifndef ONE_CPU
		start(cpu(1));
#endif
#ifdef WITH_ATTACH
		start(attach(1));
#endif
#ifdef WITH_MREMAP
		start(mremap());
#endif
#ifdef WITH_UNMAP
		start(unmap(0));
#endif
#ifdef WITH_ADVICE
		start(advise(0));
#endif
#ifdef WITH_EXIT
		start(leave(1));
#endif
#ifdef WITH_REAPER
		start(advise(1));
#endif
#ifdef WITH_WALKER
		start(walker(0));
#endif
#ifdef WITH_HOLDER
		start(holder(1));
#endif
#ifdef WITH_REMOTE
#ifdef WITH_ATTACH
		start(remote(1));		/* by a window that may be born frozen */
#else
		start(remote(0));
#endif
#endif
#ifdef WITH_LAYOUT
		start(mshare_layout());
#endif
#ifdef WITH_RECLAIM
		start(reclaim());
#endif
	}
}

/* With weak fairness: whatever has begun ends, every fault among it. */
ltl ends { <> (running > 0 && <> (running == 0)) }
