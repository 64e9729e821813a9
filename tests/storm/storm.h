/*
 * Processes of the storm: what they share, and what a page has to hold.
 *
 * Slot 0 of each region is mapped once and for good (areas.c); slot 1 is a row of cells that the
 * layout changer maps, unmaps and protects all the time. What every page holds is known from
 * memory that has nothing to do with mshare: struct control, a file in /dev/shm.
 */
#ifndef STORM_H
#define STORM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define PAGE 4096UL
#define WORD (PAGE / 2 - 8)	/* a stamp is at 0, WORD and 2 * WORD of its page */
#define SLOT (1UL << 30)
#define MIB (1UL << 20)

enum {
	REGIONS = 2,
	OBJECTS = 4,		/* what has an owner for each page: two regions, two files */
	OBJECT_PAGES = 4096,
	CELLS = 64,
	CELL_PAGES = 256,
	FIXED_EVERY = 32,	/* of a cell's pages, one in 32 is stamped by the changer only */
	SPREAD = 8,		/* of the others, one in 8 is used: 32 pages a cell, 16 MiB in all */
	SEATS = 128,		/* a seat is a process in the table below */
	WINDOWS = 6,
	COUNTS = 16,
	/* who stamped a page: the objects; what only the changer stores; everybody */
	FIXED_ID = OBJECTS,
	JUNK_ID = 15,
};

/* Not on a border of 2 MiB, so that huge pages are split and cells share tables. */
#define CELL_BASE (SLOT + 3 * PAGE)
#define CELL_SIZE (CELL_PAGES * PAGE)

/* The changer makes seq odd, changes the layout, fills in the rest, makes seq even. */
struct cell {
	_Atomic uint64_t seq;
	uint32_t mapped, writable, file, epoch;
};

struct seat {
	_Atomic uint64_t beats;	/* one for each action; the watchdog looks */
	_Atomic uint64_t pid;
	_Atomic uint64_t window;	/* where slot 0 of some region is; for others to read */
	_Atomic uint64_t step;
	char action[32];
};

struct control {
	_Atomic uint64_t stop, findings, workers, spare;
	_Atomic uint64_t counts[COUNTS];
	char finding[512];
	struct seat seat[SEATS];
	struct cell cell[REGIONS][CELLS];
	struct {
		_Atomic uint64_t seq, pages;
	} cut[2];
	_Atomic uint64_t poisoned[OBJECT_PAGES];
	/* a page's generation before and after its owner stores it; see stamp.c */
	_Atomic uint32_t intent[OBJECTS][OBJECT_PAGES];
	_Atomic uint32_t done[OBJECTS][OBJECT_PAGES];
};

/* Names in control.py, in this order. */
enum { ATTACHES, FORKS, CHECKS, STORES, DENIED, LAYOUTS, CHILDREN_KILLED, MOVES, WALKS, CROWDS, POISON,
       REGISTERED };

enum kind { OWNED, HOLE, CUT, SPARSE, POISONABLE };

struct area {
	const char *file;	/* NULL: anonymous */
	unsigned long offset, pages;
	enum kind kind;
	int object;		/* OWNED: whose generations; CUT: which of the two */
	bool readonly;
};

/* seq is odd while the main thread changes it; its other thread takes a view and looks again. */
struct window {
	_Atomic uint32_t seq;
	char *at;		/* NULL: not attached */
	unsigned int region, slot, slots;
	bool writable;
};

struct view {
	struct window now;
	const struct window *of;
};

struct worker {
	struct control *ctl;
	struct seat *seat;
	unsigned int index;
	uint64_t seed;
	int fd[REGIONS][2];	/* for reading, for both */
	struct window window[WINDOWS];
	char *arena;
};

/* How to reach memory. Each returns 0, or the signal that an access gave or would have given. */
struct method {
	const char *name;
	int (*load)(const void *at, uint64_t *value);
	int (*store)(void *at, uint64_t value);
};

#define ANY_SIGNAL 255	/* a system call does not say which */
#define TOO_LATE 254	/* a layout change took so long that the kernel gave up waiting for it */

extern const struct method methods[];
enum { INSTRUCTION, PROCESS_VM, PROC_MEM, PIPE };

/* main.c */
extern struct worker self;
void finding(const char *format, ...) __attribute__((format(printf, 1, 2)));
void count(int which, uint64_t number);
bool stopping(void);

/* stamp.c */
uint64_t microseconds(void);
uint64_t mix(uint64_t x);
uint64_t draw(uint64_t *state, uint64_t below);
uint64_t stamp(unsigned int id, unsigned long page, uint64_t generation);
bool genuine(uint64_t value, unsigned int id, unsigned long page);
uint64_t generation(uint64_t value);

/* reach.c */
void catch_faults(void);
int try_load(const void *at, uint64_t *value);
int try_store(void *at, uint64_t value);

/* areas.c */
extern const struct area areas[];
extern const unsigned int n_areas;
#define POISON_AREA (&areas[7])
const struct area *area_at(unsigned long offset);
unsigned int object_of(const struct area *area, unsigned int region);
int open_region(unsigned int region, int flags);
int open_cell_file(unsigned int region, unsigned int file);
int create_mapping(int fd, unsigned long offset, unsigned long size, int file, unsigned long from,
		   bool writable);
int unmap(int fd, unsigned long offset, unsigned long size);
int protect(int fd, unsigned long offset, unsigned long size, bool writable);
void set_up(void);

/* check.c */
unsigned long place(const struct view *view, uint64_t *r);
void check_load(const struct view *view, unsigned long offset, const struct method *how);
void check_store(const struct view *view, unsigned long offset, const struct method *how);
bool own_page(const struct view *view, uint64_t *r, const struct area **area, unsigned long *page);
char *page_at(const struct view *view, const struct area *area, unsigned long page);
void advance(const struct view *view, const struct area *area, unsigned long page,
	     const struct method *how);

/* window.c */
bool view_of(unsigned int number, struct view *view);
bool some_view(uint64_t *r, bool writable, struct view *view);
void make_arena(void);
void start_looker(void);

/* what a process does; r is what this step draws from */
typedef void action_fn(uint64_t r, long arg);
action_fn attach, twice, detach, move, refused, spin, probe;		/* window.c */
action_fn advise, lock, lock_all, poison, offline;			/* memory.c */
action_fn direct, pages_in_pipe, ring, peer, peek;				/* gup.c */
action_fn fork_child, core, futex, walk;				/* process.c */

/* roles.c */
void verify(void);
void change_layout(unsigned int region, const char *ops);
void cut_files(void);
void hog(unsigned long mib);
void crowd(unsigned int children);
void greedy(void);

#endif
