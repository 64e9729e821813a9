/* Processes of another kind: those that change layouts and files, take memory, come as a crowd. */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>
#include "storm.h"

/* What the changer holds in its hands: a run of cells. */
struct run {
	unsigned int region, first, n;
	unsigned long offset, size;
	struct cell *cells;
};

static struct view window_of_changer(unsigned int region)
{
	struct view v = { .now = { .region = region, .slots = 2, .writable = true } };

	v.now.at = mmap(NULL, 2 * SLOT, PROT_READ | PROT_WRITE, MAP_SHARED, self.fd[region][1], 0);
	if (v.now.at == MAP_FAILED)
		finding("attach: %s", strerror(errno));
	return v;
}

static uint64_t *word(const struct view *v, const struct run *run, unsigned long page)
{
	return (uint64_t *)(v->now.at + run->offset + page * PAGE);
}

/* Fresh memory holds zeros and nothing that was there before; then it gets its stamps. */
static void stamp_cells(const struct view *v, const struct run *run, uint32_t epoch)
{
	unsigned int id = FIXED_ID + run->region;

	for (unsigned long page = 0; page < run->n * CELL_PAGES; page += FIXED_EVERY) {
		if (*word(v, run, page))
			finding("fresh memory holds %lx", *word(v, run, page));
		*word(v, run, page) = stamp(id, run->offset / PAGE + page, epoch);
	}
}

/* What nobody may store to any more does not change. */
static void stays(const struct view *v, const struct run *run, uint64_t *r)
{
	unsigned long page[16];
	uint64_t value[16];

	for (unsigned int n = 0; n < 16; n++) {
		page[n] = draw(r, run->n * CELL_PAGES / SPREAD) * SPREAD + SPREAD / 2;
		if (!run->cells[page[n] / CELL_PAGES].mapped)
			page[n] = ~0UL;
		else
			value[n] = *(volatile uint64_t *)word(v, run, page[n]);
	}
	usleep(draw(r, 20000));
	for (unsigned int n = 0; n < 16; n++)
		if (page[n] != ~0UL && *(volatile uint64_t *)word(v, run, page[n]) != value[n])
			finding("a store after PROTECT at %lx of region %u: %lx, was %lx",
				run->offset + page[n] * PAGE, run->region,
				*word(v, run, page[n]), value[n]);
	count(CHECKS, 16);
}

static bool map(const struct run *run, uint64_t *r, struct cell *to)
{
	int file = -1, done;

	to->file = draw(r, 3);
	to->writable = !to->file || draw(r, 4);
	to->mapped = true;
	to->epoch++;
	if (to->file)
		file = open_cell_file(run->region, to->file - 1);
	done = create_mapping(self.fd[run->region][1], run->offset, run->size, file,
			      to->file ? run->first * CELL_SIZE : 0, to->writable);
	if (to->file)
		close(file);
	return !done;
}

static void change(const struct view *v, const struct run *run, char op, uint64_t *r)
{
	static struct cell next;
	int fd = self.fd[run->region][1];
	bool done;

	if (!next.epoch)
		next.epoch = self.seed & 0xfffffff;

	if (op == 'm') {
		done = map(run, r, &next);
		if (done && !next.file)
			stamp_cells(v, run, next.epoch);
	} else if (op == 'u') {
		done = !unmap(fd, run->offset, run->size);
	} else {
		next.writable = draw(r, 2);
		done = !protect(fd, run->offset, run->size, next.writable);
	}
	if (!done)
		finding("layout change %c: %s", op, strerror(errno));
	for (struct cell *cell = run->cells; cell < run->cells + run->n; cell++) {
		if (op == 'm') {
			cell->file = next.file;
			cell->epoch = next.epoch;
		}
		if (op != 'p')
			cell->mapped = op == 'm';
		cell->writable = next.writable;
	}
	count(LAYOUTS, 1);
}

/* At the end: all that has an owner is there, in both regions. */
void verify(void)
{
	for (unsigned int region = 0; region < REGIONS; region++) {
		struct view v = window_of_changer(region);

		for (const struct area *area = areas; area < areas + n_areas; area++)
			for (unsigned long page = 0; page < area->pages; page++)
				if (area->kind == OWNED)
					check_load(&v, area->offset + page * PAGE,
						   &methods[INSTRUCTION]);
	}
}

/* One process for each region. ops: m map, u unmap, p protect; the first one is always a map. */
void change_layout(unsigned int region, const char *ops)
{
	struct view v = window_of_changer(region);
	uint64_t r = self.seed;

	for (uint64_t turn = 0; !stopping(); turn++) {
		struct run run = { .region = region, .n = turn ? 1 + draw(&r, 16) : CELLS };
		uint64_t start = microseconds();
		char op = turn ? ops[draw(&r, strlen(ops))] : 'm';

		run.first = draw(&r, CELLS - run.n + 1);
		run.offset = CELL_BASE + run.first * CELL_SIZE;
		run.size = run.n * CELL_SIZE;
		run.cells = &self.ctl->cell[region][run.first];
		for (unsigned int n = 0; n < run.n; n++)
			run.cells[n].seq |= 1;
		change(&v, &run, op, &r);
		for (unsigned int n = 0; n < run.n; n++)
			run.cells[n].seq++;
		if (op == 'p' && !run.cells->writable)
			stays(&v, &run, &r);
		self.seat->beats++;
		/* the others are to get on, too */
		usleep(draw(&r, microseconds() - start + 1000));
	}
}

/* Mapped files get shorter and longer, another one gets holes again. */
void cut_files(void)
{
	uint64_t r = self.seed;
	int fd[2], sparse = open(areas[6].file, O_RDWR);

	for (int n = 0; n < 2; n++)
		fd[n] = open(areas[4 + n].file, O_RDWR);
	while (!stopping()) {
		unsigned int n = draw(&r, 2);
		unsigned long pages = draw(&r, 1025);

		self.ctl->cut[n].seq |= 1;
		if (ftruncate(fd[n], pages * PAGE))
			finding("ftruncate: %s", strerror(errno));
		self.ctl->cut[n].pages = pages;
		self.ctl->cut[n].seq++;
		fallocate(sparse, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
			  draw(&r, 4000) * PAGE, draw(&r, 96) * PAGE + PAGE);
		self.seat->beats++;
		usleep(draw(&r, 50000));
	}
}

/* Take memory, so that everybody else's is reclaimed, and see that nobody else stores in it. */
void hog(unsigned long mib)
{
	char *at = mmap(NULL, mib * MIB, PROT_READ | PROT_WRITE,
			MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	for (uint64_t turn = 1; !stopping(); turn++) {
		for (unsigned long n = 0; n < mib * MIB && !stopping(); n += PAGE) {
			for (unsigned long word = 0; word < PAGE; word += WORD) {
				uint64_t *spot = (uint64_t *)(at + n + word);

				if (*spot && *spot != turn - 1 + n)
					finding("a store into memory of another: %lx", *spot);
				*spot = turn + n;
			}
			self.seat->beats++;
		}
		if (turn % 4 == 3)
			madvise(at, mib * MIB, MADV_DONTNEED);
	}
}

/* Many children that all are killed in one call, itself too. */
void crowd(unsigned int children)
{
	uint64_t r = self.seed;
	unsigned int region = draw(&r, REGIONS);
	struct view v = { .now = { .region = region, .slots = 2, .writable = draw(&r, 2) } };

	setpgid(0, 0);
	v.now.at = mmap(NULL, 2 * SLOT, PROT_READ | (v.now.writable ? PROT_WRITE : 0), MAP_SHARED,
			self.fd[region][v.now.writable], 0);
	if (v.now.at == MAP_FAILED)
		finding("attach: %s", strerror(errno));
	for (unsigned int n = 0; n < children; n++) {
		r = mix(r);
		self.seat->beats++;
		if (fork())
			continue;
		for (unsigned int look = 0; look < 4; look++)
			check_load(&v, place(&v, &r), &methods[INSTRUCTION]);
		for (;;)
			pause();
	}
	usleep(draw(&r, 300000));
	count(CROWDS, 1);
	kill(0, SIGKILL);
}

/* In a small memory cgroup: asks for memory until the OOM killer and its reaper come. */
void greedy(void)
{
	uint64_t r = self.seed;

	for (unsigned int n = 0; n < 4; n++)
		twice(mix(r + n), 2);
	for (;;) {
		char *at = mmap(NULL, MIB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

		memset(at, 7, MIB);
		probe(draw(&r, ~0UL), INSTRUCTION);
		self.seat->beats++;
	}
}
