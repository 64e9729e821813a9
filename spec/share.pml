/*
 * Shared page tables: attach, fault, layout change, reclaim and exit.
 *
 * Two guests with two slots each run on two CPUs. A table is named by its number plus
 * one; 0 is no table. What the kernel promises and hardware does is modelled as follows.
 *
 * - A lock of an mm has readers or one writer. Readers may walk the tables.
 * - A CPU walks with interrupts off: an IPI waits until the walk has ended. So does
 *   get_user_pages_fast.
 * - A TLB entry is used without looking at any table.
 *
 * Compiled with one of the BREAK_ symbols the protocol lacks one step, and the checker
 * must find why it is there.
 */
#define GUESTS	2
#define SLOTS	2
#define CPUS	2
#define HOST	GUESTS			/* the host's mmap_lock */
#define AT(g, s)	((g) * SLOTS + (s))
#define TLB(c, g, s)	(((c) * GUESTS + (g)) * SLOTS + (s))

byte readers[GUESTS + 1];
bool writer[GUESTS + 1];

byte pud[GUESTS * SLOTS];		/* what the guest's PUD entry points to */
byte current[SLOTS];			/* which of two tables the host uses */
bool freed[SLOTS * 2];
bool present[SLOTS];			/* the host's last entry, of a page */
bool page_gone[SLOTS];
bool region_frozen;
bool frozen[GUESTS], dead[GUESTS];
byte invalidating[GUESTS];

byte tlb[CPUS * GUESTS * SLOTS];
bool walking[CPUS];

inline read_lock(l) { atomic { !writer[l] -> readers[l]++ } }
inline read_unlock(l) { readers[l]-- }
inline write_lock(l) { atomic { !writer[l] && readers[l] == 0 -> writer[l] = true } }
inline write_unlock(l) { writer[l] = false }

#ifdef BREAK_FREEZE
#define is_frozen(g)	(frozen[g] && false)
#else
#define is_frozen(g)	frozen[g]
#endif
#define alive(s, t)	(!freed[(s) * 2 + (t) - 1])

/* Under guest->lock in the code. */
inline graft(g, s) {
	atomic {
		if
		:: !dead[g] && !invalidating[g] && !is_frozen(g) -> pud[AT(g, s)] = current[s] + 1
		:: else
		fi
	}
}

inline ungraft(g) {
	atomic { pud[AT(g, 0)] = 0; pud[AT(g, 1)] = 0 }
}

inline flush_cpu(c, g) {
	atomic { !walking[c] -> tlb[TLB(c, g, 0)] = 0; tlb[TLB(c, g, 1)] = 0 }
}

inline flush_guest(g) {
	flush_cpu(0, g);
	flush_cpu(1, g)
}

inline flush_all() {
	atomic { !walking[0] ->
		tlb[TLB(0, 0, 0)] = 0; tlb[TLB(0, 0, 1)] = 0;
		tlb[TLB(0, 1, 0)] = 0; tlb[TLB(0, 1, 1)] = 0 };
	atomic { !walking[1] ->
		tlb[TLB(1, 0, 0)] = 0; tlb[TLB(1, 0, 1)] = 0;
		tlb[TLB(1, 1, 0)] = 0; tlb[TLB(1, 1, 1)] = 0 }
}

/* fault.c: true in done when the access may be tried again or the process is gone. */
inline fault(g, s) {
	read_lock(g);
	if
	:: dead[g] -> read_unlock(g)
	:: !dead[g] && is_frozen(g) ->
		read_unlock(g);
		!region_frozen			/* wait without the lock */
	:: else ->
		read_lock(HOST);
		atomic { page_gone[s] = false; present[s] = true };	/* handle_mm_fault */
		graft(g, s);
		read_unlock(HOST);
		read_unlock(g)
	fi
}

/* A CPU that loads or stores twice, in any guest and any slot. */
proctype cpu(byte c) {
	byte g, s, t, accesses;

	do
	:: accesses == 2 -> break
	:: accesses < 2 ->
		if :: g = 0 :: g = 1 fi;
		if :: s = 0 :: s = 1 fi;
again:
		if
		:: atomic { dead[g] -> tlb[TLB(c, g, 0)] = 0; tlb[TLB(c, g, 1)] = 0 }
		:: atomic { !dead[g] && tlb[TLB(c, g, s)] ->
			/* the access: what it reaches must still be there */
			assert(alive(s, tlb[TLB(c, g, s)]) && !page_gone[s]) }
		:: atomic { !dead[g] && !tlb[TLB(c, g, s)] -> walking[c] = true; t = pud[AT(g, s)] };
			atomic {
				if
				:: t -> assert(alive(s, t));
					if
					:: present[s] -> tlb[TLB(c, g, s)] = t; walking[c] = false
					:: else -> walking[c] = false; t = 0
					fi
				:: else -> walking[c] = false
				fi
			};
			if
			:: t -> skip
			:: else -> fault(g, s); goto again
			fi
		fi;
		accesses++; g = 0; s = 0; t = 0
	od
}

/* /proc/PID/smaps and the like: reads an entry, then the table, under the mmap_lock. */
proctype walker(byte g) {
	byte t;

	read_lock(g);
	t = pud[AT(g, 0)];
	if
	:: t -> assert(alive(0, t))
	:: else
	fi;
	read_unlock(g)
}

/* madvise on a window: the notifier takes the tables out; the kernel clears what it finds. */
proctype advise(byte g) {
	read_lock(g);
#ifndef BREAK_NOTIFIER
	atomic { invalidating[g]++; ungraft(g) };
	flush_guest(g);
#endif
	assert(!pud[AT(g, 0)] && !pud[AT(g, 1)]);	/* never the host's */
	invalidating[g] = 0;
	read_unlock(g)
}

/* notify.c: ->release, then the kernel frees the guest's tables. */
proctype leave(byte g) {
	write_lock(g);
	atomic {
		dead[g] = true;
#ifndef BREAK_RELEASE
		ungraft(g)
#endif
	};
	flush_guest(g);
	write_unlock(g);
	assert(!pud[AT(g, 0)] && !pud[AT(g, 1)])
}

/* layout.c: the one path that frees a table of the host. */
proctype layout() {
	byte g;

#ifdef BREAK_ORDER
	atomic { freed[current[0]] = true; current[0] = 1 - current[0] };
#endif
	region_frozen = true;
	do
	:: g < GUESTS ->
#ifndef BREAK_DRAIN
		write_lock(g);
#endif
		atomic { frozen[g] = true; ungraft(g) };
#ifndef BREAK_DRAIN
		write_unlock(g);
#endif
		g++
	:: else -> break
	od;
#ifndef BREAK_FLUSH
	flush_all();
#endif
#ifndef BREAK_ORDER
	write_lock(HOST);
	atomic { freed[current[0]] = true; current[0] = 1 - current[0]; present[0] = false };
	write_unlock(HOST);
#endif
	atomic { region_frozen = false; frozen[0] = false; frozen[1] = false };
	g = 0;
	do
	:: g < GUESTS ->
		read_lock(g);
		read_lock(HOST);
		graft(g, 0);
		graft(g, 1);
		read_unlock(HOST);
		read_unlock(g);
		g++
	:: else -> break
	od
}

/* Reclaim of a page: the entry, the flush by the host's notifier, the page. */
proctype reclaim() {
	atomic {
		if
		:: present[1] -> present[1] = false
		:: else -> goto end
		fi
	};
#ifndef BREAK_HOST_FLUSH
	flush_all();
#endif
	/* a fault that came in between has put it back */
	atomic { if :: !present[1] -> page_gone[1] = true :: else fi };
end:	skip
}

init {
	atomic {
		present[0] = true;
		present[1] = true;
		pud[AT(0, 0)] = 1; pud[AT(0, 1)] = 1;
		pud[AT(1, 0)] = 1; pud[AT(1, 1)] = 1;
		run cpu(0);
		run cpu(1);
#ifdef WITH_LAYOUT
		run layout();
		run walker(0);
#endif
#ifdef WITH_ADVICE
		run advise(0);
#endif
#ifdef WITH_EXIT
		run leave(1);
#endif
#ifdef WITH_RECLAIM
		run reclaim();
#endif
	}
}
