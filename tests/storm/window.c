/* Windows of a process: they come, move and go, and are used; a second thread looks meanwhile. */
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include "storm.h"

#define SPOT (2 * SLOT)		/* each window has two places for two slots each */
#define ARENA (WINDOWS * 2 * SPOT)
#define CROOKED (ARENA + SLOT + PAGE)	/* behind it, where nothing is ever attached */

static char *spot(unsigned int number, unsigned int which)
{
	return self.arena + (number * 2 + which) * SPOT;
}

static void cover(char *at, unsigned long size)
{
	if (mmap(at, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1,
		 0) != at)
		finding("cannot cover what was unmapped: %s", strerror(errno));
}

/* Addresses that nothing else gets, so that what is not attached is not there. */
void make_arena(void)
{
	char *at = mmap(NULL, ARENA + 5 * SLOT, PROT_NONE,
			MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	self.arena = (char *)(((uintptr_t)at + SLOT - 1) & ~(SLOT - 1));
}

bool view_of(unsigned int number, struct view *view)
{
	struct window *w = &self.window[number];
	uint32_t seq = w->seq;

	view->of = w;
	view->now = *w;
	view->now.seq = seq;
	return !(seq & 1) && w->seq == seq;
}

bool some_view(uint64_t *r, bool writable, struct view *view)
{
	unsigned int first = draw(r, WINDOWS);

	for (unsigned int n = 0; n < WINDOWS; n++)
		if (view_of((first + n) % WINDOWS, view) && view->now.at &&
		    (view->now.writable || !writable))
			return true;
	return false;
}

/*
 * The other thread stores only while it holds this, and a window changes only while it does not:
 * what is attached next at the address is not to get the store.
 */
static pthread_mutex_t storing = PTHREAD_MUTEX_INITIALIZER;

static void begin(struct window *w)
{
	pthread_mutex_lock(&storing);
	w->seq++;
	self.seat->window = 0;
}

static void end(struct window *w)
{
	w->seq++;
	pthread_mutex_unlock(&storing);
}

/* For others, who may come too late. */
static void publish(void)
{
	char *at = NULL;

	for (struct window *w = self.window; w < self.window + WINDOWS; w++)
		if (w->at && !w->slot)
			at = w->at;
	self.seat->window = (uintptr_t)at;
}

static void attach_as(struct window *w, uint64_t *r, unsigned int region)
{
	char *at = draw(r, 4) ? spot(w - self.window, draw(r, 2)) : NULL;

	begin(w);
	w->region = region;
	w->writable = draw(r, 3);
	w->slot = draw(r, 3) == 0;
	w->slots = w->slot ? 1 : 1 + draw(r, 2);
	w->at = mmap(at, w->slots * SLOT, PROT_READ | (w->writable ? PROT_WRITE : 0),
		     MAP_SHARED | (at ? MAP_FIXED : 0), self.fd[region][w->writable],
		     w->slot * SLOT);
	if (w->at == MAP_FAILED) {
		w->at = NULL;
		finding("attach: %s", strerror(errno));
	}
	end(w);
	count(ATTACHES, 1);
}

static void drop(struct window *w)
{
	char *at = w->at;

	begin(w);
	w->at = NULL;
	if (munmap(at, w->slots * SLOT))
		finding("munmap: %s", strerror(errno));
	if (at >= self.arena && at < self.arena + ARENA)
		cover(at, w->slots * SLOT);
	end(w);
}

void attach(uint64_t r, long unused)
{
	struct window *w = &self.window[draw(&r, WINDOWS)];

	if (w->at)
		drop(w);
	attach_as(w, &r, draw(&r, REGIONS));
	publish();
}

/* One region in all windows, or both by turns. */
void twice(uint64_t r, long regions)
{
	unsigned int region = draw(&r, REGIONS);

	for (unsigned int n = 0; n < WINDOWS; n++) {
		if (self.window[n].at)
			drop(&self.window[n]);
		attach_as(&self.window[n], &r, (region + (regions > 1 ? n : 0)) % REGIONS);
	}
	publish();
	probe(r, INSTRUCTION);
}

void detach(uint64_t r, long unused)
{
	struct window *w = &self.window[draw(&r, WINDOWS)];

	if (w->at)
		drop(w);
	publish();
}

void move(uint64_t r, long unused)
{
	unsigned int number = draw(&r, WINDOWS);
	struct window *w = &self.window[number];
	char *from = w->at, *to = spot(number, w->at == spot(number, 0));

	if (!from)
		return;
	begin(w);
	w->at = mremap(from, w->slots * SLOT, w->slots * SLOT, MREMAP_MAYMOVE | MREMAP_FIXED, to);
	if (w->at != to)
		finding("mremap: %s", strerror(errno));
	if (from >= self.arena && from < self.arena + ARENA)
		cover(from, w->slots * SLOT);
	end(w);
	publish();
	count(MOVES, 1);
	probe(r, INSTRUCTION);
}

static void must_be(const char *call, int result, int wanted)
{
	if (!result || errno != wanted)
		finding("%s: %s, not %s", call, result ? strerror(errno) : "done", strerror(wanted));
}

/* What a window does not let be done to it. */
void refused(uint64_t r, long unused)
{
	struct view v;
	unsigned long size;
	char *at;

	if (!some_view(&r, false, &v))
		return;
	at = v.now.at;
	size = v.now.slots * SLOT;
	must_be("munmap of the first part", munmap(at, MIB << draw(&r, 9)), EINVAL);
	must_be("munmap of the last part", munmap(at + size - 4 * PAGE, 4 * PAGE), EINVAL);
	must_be("mprotect", mprotect(at, PAGE << draw(&r, 18), PROT_READ), EINVAL);
	must_be("mremap to less", mremap(at, size, SLOT / 2, 0) == MAP_FAILED ? -1 : 0, EINVAL);
	must_be("mremap to a crooked address",
		mremap(at, size, size, MREMAP_MAYMOVE | MREMAP_FIXED,
		       self.arena + CROOKED) == MAP_FAILED ? -1 : 0, EINVAL);
	cover(self.arena + CROOKED, size);
}

/*
 * In a few pages of our own: what reclaim must not lose. A store through a stale translation shows
 * at the load after it alone; the next store would hide it.
 */
static void spin_in_own(const struct view *v, uint64_t *r)
{
	const struct area *area[4];
	unsigned long page[4];

	for (unsigned int n = 0; n < 4; n++)
		if (!own_page(v, r, &area[n], &page[n]))
			return;
	for (unsigned long turn = draw(r, 1UL << draw(r, 17)); turn && !stopping(); turn--) {
		unsigned int n = turn % 4;

		check_load(v, area[n]->offset + page[n] * PAGE, &methods[INSTRUCTION]);
		advance(v, area[n], page[n], &methods[INSTRUCTION]);
	}
	for (unsigned int n = 0; n < 4; n++)
		check_load(v, area[n]->offset + page[n] * PAGE, &methods[INSTRUCTION]);
}

/* In a page of a cell: what a layout change must not leave behind. */
static void spin_in_cell(const struct view *v, uint64_t *r)
{
	unsigned long page = draw(r, CELLS) * CELL_PAGES + draw(r, CELL_PAGES / SPREAD) * SPREAD +
			     SPREAD / 2;

	for (unsigned long turn = draw(r, 1UL << draw(r, 14)); turn && !stopping(); turn--) {
		check_load(v, CELL_BASE + page * PAGE, &methods[INSTRUCTION]);
		check_store(v, CELL_BASE + page * PAGE, &methods[INSTRUCTION]);
	}
}

/* Load and store in one place as fast as can be, so that its translation stays in use. */
void spin(uint64_t r, long unused)
{
	struct view v;

	if (!some_view(&r, true, &v))
		return;
	if (v.now.slot + v.now.slots > 1 && draw(&r, 2))
		spin_in_cell(&v, &r);
	else
		spin_in_own(&v, &r);
}

/* Loads and stores here and there. */
void probe(uint64_t r, long how)
{
	const struct area *area;
	unsigned long page;
	struct view v;

	for (unsigned int n = 8 + draw(&r, how == INSTRUCTION ? 512 : 32); n && !stopping(); n--) {
		if (!some_view(&r, false, &v))
			return;
		if (draw(&r, 3))
			check_load(&v, place(&v, &r), &methods[how]);
		else if (draw(&r, 2))
			check_store(&v, place(&v, &r), &methods[how]);
		else if (own_page(&v, &r, &area, &page))
			advance(&v, area, page, &methods[how]);
	}
}

/*
 * Load in one place, whatever the other thread does to the window there. What is not attached must
 * not be there.
 */
static void watch(unsigned int number, uint64_t *r)
{
	unsigned long offset = draw(r, 16) * PAGE;
	char *at = spot(number, draw(r, 2));
	uint64_t value;
	struct view v;

	for (unsigned long turn = draw(r, 1UL << draw(r, 14)); turn && !stopping(); turn--) {
		if (!view_of(number, &v))
			continue;
		if (v.now.at) {
			at = v.now.at;
			check_load(&v, v.now.slot * SLOT + offset, &methods[INSTRUCTION]);
			continue;
		}
		if (at < self.arena || at >= self.arena + ARENA)
			return;
		if (!try_load(at + offset, &value) && self.window[number].seq == v.now.seq)
			finding("a window that has gone is still there: %lx", value);
		count(CHECKS, 1);
	}
}

/* While the other thread maps and moves. */
static void *looker(void *unused)
{
	uint64_t r = self.seed ^ 1;
	struct view v;

	while (!stopping()) {
		unsigned int number = draw(&r, WINDOWS);

		watch(number, &r);
		if (view_of(number, &v) && v.now.at) {
			check_load(&v, place(&v, &r), &methods[draw(&r, 2)]);
			if (!pthread_mutex_trylock(&storing)) {
				if (view_of(number, &v) && v.now.at)
					check_store(&v, place(&v, &r), &methods[INSTRUCTION]);
				pthread_mutex_unlock(&storing);
			}
		}
		if (!draw(&r, 64))
			usleep(draw(&r, 20000));
	}
	return NULL;
}

void start_looker(void)
{
	pthread_t thread;

	if (pthread_create(&thread, NULL, looker, NULL))
		finding("no thread");
}
