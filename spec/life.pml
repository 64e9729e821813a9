/*
 * Life of a region and of the module: invariants 8 and 9. Two processes make, open, map and
 * leave a region, killed at any point; another unlinks it; the administrator unmounts and
 * unloads at any time. A region is an inode: a name, an open file or a window holds it.
 */
byte names, files, windows;
byte holders;			/* of the module: open files, windows, the mounted file system */
bool mounted = true, loaded = true, made, evicted;
byte guests, calls;		/* known guests; callbacks that run */
byte left;

/* fs.c: ms_evict(), mshare_region_free() */
inline iput() {
	if
	:: made && !names && !files && !windows -> assert(!evicted); evicted = true
	:: else
	fi
}

/* every use of a region is by code of the module */
inline use() { assert(!evicted && loaded) }

inline module_get() {
#ifndef BREAK_OWNER
	holders++
#else
	skip
#endif
}

inline module_put() {
#ifndef BREAK_OWNER
	holders--
#else
	skip
#endif
}

proctype user(bool creator) {
	bool file, window;

	if
	:: atomic { creator && mounted && !made -> made = true; names++; files++; file = true; module_get() }
	:: atomic { mounted && names -> files++; file = true; module_get() }
	:: true -> goto out			/* ENOENT, or killed */
	fi;
	if
	:: atomic { use(); window = true; guests++;
#ifndef BREAK_WINDOW
		windows++;
#endif
		module_get() }
	:: true
	fi;
	if	/* the window keeps the file; a descriptor may be closed before */
	:: atomic { window -> file = false; files--; module_put(); iput() };
		use()				/* an access by the window */
	:: true
	fi;
	/* the end of the process, by itself or by kill -9: do_exit() does what follows */
out:	if
	:: window ->
		atomic { use();			/* guest_release(), then window_close() */
#ifndef BREAK_WINDOW
		windows--;
#endif
		module_put(); iput() }
	:: else
	fi;
	if
	:: atomic { file -> files--; module_put(); iput() }
	:: else
	fi;
#ifdef BREAK_CREATOR
	atomic { if :: creator && made && !evicted -> evicted = true :: else fi };
#endif
	left++
}

/* The mm of a process goes late: its notifier's release may come after all else. */
proctype late_release() {
	do
	:: atomic { guests && calls == 0 -> calls++ };
		assert(loaded);			/* forget(), in the module's text */
		atomic { calls--; if :: guests -> guests-- :: else fi }
	:: left == 3 && !guests -> break
	od
}

proctype unlink() {
	atomic { if :: made && names -> names--; iput() :: else fi };
	left++
}

/* umount and rmmod; both refuse while they must. */
proctype administrator() {
	do
	:: atomic { mounted && !files && !windows ->
		mounted = false; names = 0; module_put(); if :: made && !evicted -> iput() :: else fi }
	:: !holders ->
		/* mshare_exit(): mshare_guests_forget() drops what is known, and waits for callbacks */
#ifndef BREAK_FORGET
		guests = 0;
		calls == 0;
#endif
		loaded = false;
		break
	od
}

init {
	atomic { module_get(); run user(true); run user(false); run unlink(); run late_release(); run administrator() };
	left == 3 && !loaded;
	/* nothing of a region is left */
	assert(!made || evicted)
}
