/*
 * Is what an access found what had to be found? The checks, and what each of them catches:
 *
 *   owned page      done <= page <= intent: lost store, stale translation, foreign content
 *   stamped page    of a cell: the stamp of its last CREATE_MAPPING; the same, and old content
 *   other pages     zeros or a stamp of their own: foreign content
 *   cell, quiet     mapped: reached; unmapped or, for a store, protected: not reached. A success is
 *                   a translation that outlived UNMAP or PROTECT
 *   read-only       no store through such a window succeeds, ever
 *   hole            nothing there, ever
 *   cut file        before its end: reached; after it: not reached
 *   poisoned page   not reached once the poisoning is done
 *
 * Where a state can change meanwhile it is read before and after the access, and only what was the
 * same both times is judged. The protection of pages against stores that come late is checked by
 * the changer (roles.c), that of freed memory by the hog.
 */
#include <signal.h>
#include "storm.h"

/* One access, to be judged. */
struct access {
	const struct view *view;
	const struct method *how;
	unsigned long offset, page;
	bool store;
	uint64_t value;
	int sig;
};

/* Only if the window is still the one that was meant. */
static void wrong(const struct access *a, const char *what)
{
	const struct window *w = &a->view->now;

	if (a->view->of && a->view->of->seq != w->seq)
		return;
	finding("%s: %s by %s at %lx of region %u through a %s window at %p: signal %d, %lx",
		what, a->store ? "store" : "load", a->how->name, a->offset, w->region,
		w->writable ? "writable" : "read-only", w->at, a->sig, a->value);
}

static void judge(const struct access *a, bool reached, int sig)
{
	if (a->sig == TOO_LATE)
		return;
	if (reached && a->sig)
		wrong(a, "not reached what is there");
	else if (!reached && !a->sig)
		wrong(a, "reached what must not be reached");
	else if (!reached && a->sig != sig && a->sig != ANY_SIGNAL)
		wrong(a, "the wrong signal");
	if (!reached)
		count(DENIED, 1);
}

static void go(struct access *a)
{
	char *at = a->view->now.at + (a->offset - a->view->now.slot * SLOT);

	a->sig = a->store ? a->how->store(at, a->value) : a->how->load(at, &a->value);
	count(CHECKS, 1);
}

/* A page that anybody may store to. */
static void judge_common(const struct access *a)
{
	if (!a->sig && !a->store && a->value &&
	    !genuine(a->value, JUNK_ID, a->offset / PAGE))
		wrong(a, "foreign content");
}

static void owned(struct access *a, const struct area *area)
{
	struct control *ctl = self.ctl;
	unsigned int object = object_of(area, a->view->now.region);
	uint64_t low = ctl->done[object][a->page], high;

	go(a);
	high = ctl->intent[object][a->page];
	judge(a, true, 0);
	if (a->sig)
		return;
	if (!genuine(a->value, object, a->page))
		wrong(a, "foreign content");
	else if (generation(a->value) < low)
		wrong(a, "lost store or stale translation");
	else if (generation(a->value) > high)
		wrong(a, "content from the future");
}

static void cut(struct access *a, const struct area *area)
{
	_Atomic uint64_t *seq = &self.ctl->cut[area->object].seq;
	uint64_t before = *seq, pages = self.ctl->cut[area->object].pages;

	go(a);
	judge_common(a);
	/* a store in a hole needs room on the disk */
	if (!(before & 1) && *seq == before && !(a->store && !area->object && a->page < pages))
		judge(a, a->page < pages, SIGBUS);
}

static void poisonable(struct access *a)
{
	_Atomic uint64_t *state;
	uint64_t before;

	state = &self.ctl->poisoned[a->page + a->view->now.region * 1024];
	before = *state;
	go(a);
	judge_common(a);
	if (before != 1 && *state == before)
		judge(a, !before, SIGBUS);
}

static void in_cell(struct access *a)
{
	unsigned int region = a->view->now.region, index = a->page % CELL_PAGES;
	struct cell *cell = &self.ctl->cell[region][a->page / CELL_PAGES];
	uint64_t before = cell->seq;
	struct cell was = *cell;
	unsigned int id = FIXED_ID + (was.file ? 1 + region * 2 + was.file : region);
	bool fixed = !(index % FIXED_EVERY), quiet;

	go(a);
	quiet = !(before & 1) && cell->seq == before;
	if (quiet)
		judge(a, was.mapped && (!a->store || was.writable), SIGSEGV);
	if (a->sig || a->store)
		return;
	if (!fixed)
		judge_common(a);
	else if (quiet && a->value != stamp(id, a->offset / PAGE, was.file ? 1 : was.epoch))
		wrong(a, "content of before the layout change");
}

static void dispatch(struct access *a)
{
	const struct area *area;

	if (!a->view->now.at)
		return;
	if (a->offset >= CELL_BASE) {
		a->page = (a->offset - CELL_BASE) / PAGE;
		if (a->page < CELLS * CELL_PAGES)
			in_cell(a);
		return;
	}
	area = area_at(a->offset);
	if (!area)
		return;
	a->page = (a->offset - area->offset) / PAGE;
	switch (area->kind) {
	case OWNED:
		owned(a, area);
		break;
	case CUT:
		cut(a, area);
		break;
	case SPARSE:
		/* the disk may be full */
		go(a);
		judge_common(a);
		break;
	case POISONABLE:
		poisonable(a);
		break;
	case HOLE:
		go(a);
		judge(a, false, SIGSEGV);
		break;
	}
}

void check_load(const struct view *view, unsigned long offset, const struct method *how)
{
	struct access a = { .view = view, .how = how, .offset = offset };

	dispatch(&a);
}

/* Of a stamp for common pages; owned and fixed ones are not touched but where it must fail. */
void check_store(const struct view *view, unsigned long offset, const struct method *how)
{
	struct access a = { .view = view, .how = how, .offset = offset, .store = true };
	const struct area *area = area_at(offset);
	bool cell = offset >= CELL_BASE;

	/* it pins the page and may store late; the changer does not watch these */
	if (cell && how == &methods[PROCESS_VM])
		a.offset = offset += PAGE;
	/* another one each time, or a store that comes late would not be seen */
	a.value = stamp(JUNK_ID, offset / PAGE, microseconds() & ((1UL << 29) - 1));
	if (!view->now.writable || (area && (area->readonly || area->kind == HOLE))) {
		go(&a);
		judge(&a, false, SIGSEGV);
	} else if (cell ? (offset - CELL_BASE) / PAGE % FIXED_EVERY : area && area->kind != OWNED) {
		dispatch(&a);
	}
}

/* Some offset in the region that the window shows and that has a meaning. */
unsigned long place(const struct view *view, uint64_t *r)
{
	const struct area *area = &areas[draw(r, 3) ? draw(r, 4) : draw(r, n_areas)];
	unsigned int slot = view->now.slot + draw(r, view->now.slots);
	unsigned long page;

	if (slot) {
		page = draw(r, CELLS) * CELL_PAGES;
		if (draw(r, 2))
			return CELL_BASE + (page + draw(r, CELL_PAGES / FIXED_EVERY) * FIXED_EVERY) * PAGE;
		return CELL_BASE + (page + draw(r, CELL_PAGES / SPREAD) * SPREAD + SPREAD / 2) * PAGE;
	}
	page = draw(r, area->pages);
	return area->offset + page * PAGE + (area->kind == OWNED ? draw(r, 3) * WORD : 0);
}

/* A page that this process stores to, in a window for it. */
bool own_page(const struct view *view, uint64_t *r, const struct area **area, unsigned long *page)
{
	unsigned long workers = self.ctl->workers;

	if (!view->now.writable || view->now.slot || self.index >= workers)
		return false;
	*area = &areas[draw(r, 3)];
	*page = draw(r, (*area)->pages / workers) * workers + self.index;
	return true;
}

char *page_at(const struct view *view, const struct area *area, unsigned long page)
{
	return view->now.at + area->offset + page * PAGE;
}

/* The next generation of a page of ours. */
void advance(const struct view *view, const struct area *area, unsigned long page,
	     const struct method *how)
{
	unsigned int object = object_of(area, view->now.region);
	uint32_t next = self.ctl->intent[object][page] + 1;
	struct access a = { .view = view, .how = how, .page = page, .store = true };

	if (next >= 1U << 29)
		return;
	a.value = stamp(object, page, next);
	self.ctl->intent[object][page] = next;
	for (unsigned int word = 0; word < 3; word++) {
		a.offset = area->offset + page * PAGE + word * WORD;
		go(&a);
		judge(&a, true, 0);
		if (a.sig)
			return;
	}
	self.ctl->done[object][page] = next;
	count(STORES, 1);
}
