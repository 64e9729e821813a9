/* Requests of a process that concern its memory: madvise, mlock, poisoned pages. */
#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include "storm.h"

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
#define MADV_SOFT_OFFLINE 101

/* Some part of a window that is mapped for good, or cells. */
static char *part(const struct view *v, uint64_t *r, unsigned long *size)
{
	unsigned long offset = place(v, r) & ~(PAGE - 1), left;

	left = (v->now.slot + v->now.slots) * SLOT - offset;
	*size = PAGE << draw(r, 12);
	if (*size > left)
		*size = left;
	return v->now.at + offset - v->now.slot * SLOT;
}

/* What the ABI says each advice does; in cells a populate may meet a hole. */
static bool allowed(long advice, const struct view *v, bool whole, int error)
{
	switch (advice) {
	case MADV_REMOVE:
		return error == (v->now.writable ? EOPNOTSUPP : EACCES);
	case MADV_FREE:
	case MADV_COLLAPSE:
		return error == EINVAL;
	case MADV_HUGEPAGE:
		/* a flag of the mapping, which cannot be split */
		return !error || (!whole && error == EINVAL);
	case MADV_POPULATE_READ:
		return !error || error == EFAULT || error == EHWPOISON;
	case MADV_POPULATE_WRITE:
		return error == EINVAL ||
		       (v->now.writable && (!error || error == EFAULT || error == EHWPOISON));
	default:
		return !error;
	}
}

void advise(uint64_t r, long advice)
{
	unsigned long size;
	struct view v;
	char *at;

	if (!some_view(&r, false, &v))
		return;
	if (draw(&r, 8)) {
		at = part(&v, &r, &size);
	} else {
		at = v.now.at;
		size = v.now.slots * SLOT;
	}
	if (advice == MADV_POPULATE_READ || advice == MADV_POPULATE_WRITE)
		size = size < 4 * MIB ? size : 4 * MIB;
	errno = 0;
	madvise(at, size, advice);
	if (!allowed(advice, &v, size == v.now.slots * SLOT, errno))
		finding("madvise %ld of %lx at %p: %s", advice, size, at, strerror(errno));
	probe(r, INSTRUCTION);
}

/* Brings pages in and locks none: the pages stay reclaimable. */
void lock(uint64_t r, long unused)
{
	unsigned long size;
	struct view v;
	char *at;

	if (!some_view(&r, false, &v))
		return;
	at = part(&v, &r, &size);
	if (mlock(at, size) && errno != ENOMEM && errno != EAGAIN && errno != EHWPOISON)
		finding("mlock: %s", strerror(errno));
	probe(r, INSTRUCTION);
	munlock(at, size);
}

/* The windows that come next are locked as well as the kernel would lock them. */
void lock_all(uint64_t r, long unused)
{
	if (mlockall(MCL_FUTURE | (draw(&r, 2) ? MCL_ONFAULT : 0)) && errno != ENOMEM)
		finding("mlockall: %s", strerror(errno));
	attach(r, 0);
	move(r, 0);
	munlockall();
}

static bool may_poison(uint64_t *r)
{
	return !draw(r, 8) && self.ctl->counts[POISON] < 64;
}

/* A memory error: nobody reads the page again, and nobody is hurt who does not. */
void poison(uint64_t r, long unused)
{
	const struct area *area = POISON_AREA;
	_Atomic uint64_t *state;
	unsigned long page;
	struct view v;

	if (!some_view(&r, true, &v) || v.now.slot || !may_poison(&r))
		return;
	page = draw(&r, area->pages);
	state = &self.ctl->poisoned[page + v.now.region * 1024];
	if (*state)
		return;
	*state = 1;
	check_store(&v, area->offset + page * PAGE, &methods[INSTRUCTION]);
	/* if it failed the page may be marked or not: it stays unjudged */
	if (!madvise(page_at(&v, area, page), PAGE, MADV_HWPOISON))
		*state = 2;
	count(POISON, 1);
	check_load(&v, area->offset + page * PAGE, &methods[INSTRUCTION]);
}

/* A page that is about to go bad: its content moves. */
void offline(uint64_t r, long unused)
{
	const struct area *area;
	unsigned long page;
	struct view v;

	if (!some_view(&r, true, &v) || !own_page(&v, &r, &area, &page) || !may_poison(&r))
		return;
	advance(&v, area, page, &methods[INSTRUCTION]);
	madvise(page_at(&v, area, page), PAGE, MADV_SOFT_OFFLINE);
	count(POISON, 1);
	check_load(&v, area->offset + page * PAGE, &methods[INSTRUCTION]);
	advance(&v, area, page, &methods[INSTRUCTION]);
}
