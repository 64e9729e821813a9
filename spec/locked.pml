/*
 * Locked regions: a page that a second MMU (KVM) has does not leave the region. Read it
 * beside kmod/pin.c; of layout.c and attach.c there is what that needs.
 *
 * Two pages, each a mapping of its own; two guests that have a virtual machine before they
 * attach; two callers. All go on for ever. That a drained guest reaches nothing by its own
 * tables is for share.pml.
 */
#define MSHARE_EMPTY	0		/* as the wish of a caller: UNMAP */
#define MSHARE_MOVABLE	1
#define MSHARE_LOCKED	2
#define GUESTS	2
#define PAGES	2

bool layout;				/* region->layout */
bool content[PAGES], pinned[PAGES];
byte kind, nr_windows;
bool region_frozen, of_region[GUESTS], frozen[GUESTS];

/* What it has it reaches at any time. It hears of changes in the guest's mm only. */
bool second_mmu[GUESTS * PAGES];
#define HAS(g, p)	second_mmu[(g) * PAGES + (p)]

inline leaves(p) { assert(!HAS(0, p) && !HAS(1, p)) }

#ifdef BREAK_ATTACH
#define mshare_may_attach()	true
#else
#define mshare_may_attach()	(kind == MSHARE_LOCKED)
#endif

proctype guest(byte g) {
	do
	:: mshare_may_attach() ->		/* mshare_mmap(): window_new() */
		nr_windows++;
		atomic {
#ifndef BREAK_BORN
			frozen[g] = region_frozen;
#endif
			of_region[g] = true
		};
		do
		:: atomic { !frozen[g] && content[0] -> HAS(g, 0) = true }
		:: atomic { !frozen[g] && content[1] -> HAS(g, 1) = true }
		:: atomic { HAS(g, 0) = false; HAS(g, 1) = false }; break	/* munmap, exit */
		od;
		atomic { of_region[g] = false; frozen[g] = false };	/* window_close() */
		nr_windows--
	od
}

/* layout.c */
inline drain(g) { d_step { if :: of_region[g] -> frozen[g] = true :: else fi } }
inline freeze() { region_frozen = true; drain(0); drain(1) }
inline thaw() { d_step { region_frozen = false; frozen[0] = false; frozen[1] = false } }

#ifdef BREAK_KEEPS
#define mshare_keeps(p)	false
#else
#define mshare_keeps(p)	((pinned[0] || pinned[1]) && nr_windows && content[p])
#endif

/*
 * What was there goes, or one of the views cannot: then it stays as it was. When mshare_pin()
 * fails nothing is there.
 */
inline do_map(p, new) {
	if
	:: content[p] ->
		err = true
#ifdef BREAK_HALF
		; pinned[p] = false
#endif
	:: true ->
		if :: content[p] -> leaves(p) :: else fi;
		pinned[p] = false;
		content[p] = new != MSHARE_EMPTY;
		if
#ifdef BREAK_PIN
		:: new == MSHARE_LOCKED
#else
		:: new == MSHARE_LOCKED -> pinned[p] = true
#endif
		:: new == MSHARE_LOCKED -> leaves(p); content[p] = false; err = true
		:: else
		fi
	fi
}

#define unfit(new)	(new != MSHARE_EMPTY && kind != MSHARE_EMPTY && kind != new)

/* CREATE_MAPPING or UNMAP of a page. */
proctype caller() {
	byte p, new;
	bool err;

	do
	:: if :: p = 0 :: p = 1 fi;
		if :: new = MSHARE_EMPTY :: new = MSHARE_MOVABLE :: new = MSHARE_LOCKED fi;
#ifdef BREAK_LAYOUT
		err = unfit(new);
#endif
		atomic { !layout -> layout = true };
#ifndef BREAK_LAYOUT
#ifndef BREAK_KIND
		err = unfit(new);		/* map_tried() */
#endif
#endif
		if
		:: err
		:: else ->			/* change() */
#ifdef BREAK_ASKED
			err = mshare_keeps(p); freeze();
#else
			freeze(); err = mshare_keeps(p);
#endif
			if :: err :: else -> do_map(p, new) fi;
			thaw();
			if :: !err && new != MSHARE_EMPTY -> kind = new :: else fi
		fi;
		d_step { layout = false; p = 0; new = 0; err = false }
	od
}

proctype reclaim() {
	do
	:: atomic { content[0] && !pinned[0] -> leaves(0) }
	:: atomic { content[1] && !pinned[1] -> leaves(1) }
	od
}

#ifdef BREAK_FILE
/* Content that others can reach: whoever may write to the file takes a page out of it. */
active proctype owner() {
	do
	:: atomic { content[0] -> leaves(0) }
	od
}
#endif

init { atomic { run guest(0); run guest(1); run caller(); run caller(); run reclaim() } }
