/* The kernel takes pages of a window by get_user_pages: for another process, for a disk, a pipe. */
#include <errno.h>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>
#include "storm.h"

/* One page of this process's on the disk, past the page cache. */
static int scratch(void)
{
	static int fd = -1;
	char path[64];

	if (fd < 0) {
		snprintf(path, sizeof(path), "/mnt/disk/storm/direct-%u", self.index);
		fd = open(path, O_RDWR | O_DIRECT | O_CLOEXEC);
	}
	return fd;
}

/* A page of ours and the generation it has. */
static bool mine(uint64_t *r, struct view *v, const struct area **area, unsigned long *page,
		 unsigned int *object)
{
	if (!some_view(r, true, v) || !own_page(v, r, area, page))
		return false;
	*object = object_of(*area, v->now.region);
	return self.ctl->intent[*object][*page] + 1 < 1U << 29;
}

/* The next generation on the disk, to be read into the page of the window. */
static char *next_page(unsigned int object, unsigned long page, uint32_t *next)
{
	static char buffer[PAGE] __attribute__((aligned(4096)));
	uint64_t value;

	*next = self.ctl->intent[object][page] + 1;
	value = stamp(object, page, *next);
	for (unsigned long word = 0; word < PAGE; word += WORD)
		memcpy(buffer + word, &value, sizeof(value));
	return buffer;
}

/* Read from the disk into the window, then write from there; what arrives must be the stamp. */
void direct(uint64_t r, long unused)
{
	const struct area *area;
	unsigned int object;
	unsigned long page;
	struct view v;
	uint32_t next;
	char *buffer, *at;
	ssize_t done;
	int fd = scratch();

	if (!mine(&r, &v, &area, &page, &object))
		return;
	at = page_at(&v, area, page);
	buffer = next_page(object, page, &next);
	if (pwrite(fd, buffer, PAGE, 0) != PAGE)
		finding("direct write from own memory: %s", strerror(errno));
	self.ctl->intent[object][page] = next;
	done = pread(fd, at, PAGE, 0);
	if (done != PAGE)
		finding("direct read into a window: %zd, %s", done, strerror(errno));
	self.ctl->done[object][page] = next;
	count(STORES, 1);
	check_load(&v, area->offset + page * PAGE, &methods[INSTRUCTION]);
	done = pwrite(fd, at, PAGE, 0);
	if (done != PAGE)
		finding("direct write from a window: %zd, %s", done, strerror(errno));
	memset(buffer, 0, PAGE);
	if (pread(fd, buffer, PAGE, 0) != PAGE ||
	    *(uint64_t *)buffer != stamp(object, page, next))
		finding("the disk got %lx instead of generation %u of page %lu of object %u",
			*(uint64_t *)buffer, next, page, object);
}

/* The pipe holds the page itself, while the window goes and the page is swapped out. */
void pages_in_pipe(uint64_t r, long unused)
{
	const struct area *area;
	unsigned int object;
	unsigned long page;
	struct iovec vector;
	struct view v;
	uint64_t value;
	int ends[2];
	ssize_t done;

	if (!mine(&r, &v, &area, &page, &object) || pipe(ends))
		return;
	vector = (struct iovec){ page_at(&v, area, page), PAGE };
	done = vmsplice(ends[1], &vector, 1, 0);
	if (done != PAGE)
		finding("vmsplice: %zd, %s", done, strerror(errno));
	if (draw(&r, 2))
		advise(r, MADV_PAGEOUT);
	else
		detach(r, 0);
	if (read(ends[0], &value, sizeof(value)) != sizeof(value) ||
	    value != stamp(object, page, self.ctl->done[object][page]))
		finding("the pipe holds %lx, not generation %u of page %lu of object %u", value,
			self.ctl->done[object][page], page, object);
	close(ends[0]);
	close(ends[1]);
}

/* A ring with one entry: its pages, mapped. */
struct ring {
	int fd;
	char *queues, *entries;
	struct io_uring_params params;
};

static bool ring_open(struct ring *ring)
{
	struct io_uring_params *p = &ring->params;

	memset(ring, 0, sizeof(*ring));
	ring->fd = syscall(SYS_io_uring_setup, 1, p);
	if (ring->fd < 0)
		return false;
	ring->queues = mmap(NULL, p->cq_off.cqes + p->cq_entries * sizeof(struct io_uring_cqe),
			    PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring->fd,
			    IORING_OFF_SQ_RING);
	ring->entries = mmap(NULL, sizeof(struct io_uring_sqe), PROT_READ | PROT_WRITE,
			     MAP_SHARED | MAP_POPULATE, ring->fd, IORING_OFF_SQES);
	return ring->queues != MAP_FAILED && ring->entries != MAP_FAILED;
}

static void ring_close(struct ring *ring)
{
	struct io_uring_params *p = &ring->params;

	munmap(ring->queues, p->cq_off.cqes + p->cq_entries * sizeof(struct io_uring_cqe));
	munmap(ring->entries, sizeof(struct io_uring_sqe));
	close(ring->fd);
}

static int ring_read(struct ring *ring, int fd, char *at)
{
	struct io_uring_sqe *entry = (void *)ring->entries;
	struct io_uring_params *p = &ring->params;
	_Atomic uint32_t *tail = (void *)(ring->queues + p->sq_off.tail);

	*entry = (struct io_uring_sqe){
		.opcode = IORING_OP_READ_FIXED,
		.fd = fd,
		.addr = (uintptr_t)at,
		.len = PAGE,
	};
	*(uint32_t *)(ring->queues + p->sq_off.array) = 0;
	++*tail;
	if (syscall(SYS_io_uring_enter, ring->fd, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0) != 1)
		return -errno;
	return ((struct io_uring_cqe *)(ring->queues + p->cq_off.cqes))->res;
}

/* A page pinned for long; the disk reads into it after it was paged out or the window has gone. */
void ring(uint64_t r, long unused)
{
	const struct area *area;
	unsigned int object;
	unsigned long page;
	struct iovec vector;
	struct ring ring;
	struct view v;
	uint32_t next;
	char *at = NULL;
	int got;

	if (!ring_open(&ring))
		return;
	/* refused where a file tracks its dirty pages, on 6.1 always: then it takes another page */
	for (int tries = 8; tries && !at; tries--) {
		if (!mine(&r, &v, &area, &page, &object))
			continue;
		vector = (struct iovec){ page_at(&v, area, page), PAGE };
		if (!syscall(SYS_io_uring_register, ring.fd, IORING_REGISTER_BUFFERS, &vector, 1))
			at = vector.iov_base;
		else if (errno != EOPNOTSUPP && errno != EFAULT && errno != ENOMEM)
			finding("registering a buffer: %s", strerror(errno));
	}
	if (at) {
		count(REGISTERED, 1);
		if (pwrite(scratch(), next_page(object, page, &next), PAGE, 0) != PAGE)
			finding("direct write from own memory: %s", strerror(errno));
		madvise(at, PAGE, draw(&r, 2) ? MADV_PAGEOUT : MADV_DONTNEED);
		self.ctl->intent[object][page] = next;
		got = ring_read(&ring, scratch(), at);
		if (got != PAGE)
			finding("read into a registered buffer: %d", got);
		self.ctl->done[object][page] = next;
		count(STORES, 1);
		check_load(&v, area->offset + page * PAGE, &methods[INSTRUCTION]);
	}
	ring_close(&ring);
}

/* Read an owned page of another process; which region its window shows is not known. */
void peer(uint64_t r, long unused)
{
	struct control *ctl = self.ctl;
	struct seat *seat = &ctl->seat[draw(&r, ctl->workers)];
	unsigned long page = draw(&r, OBJECT_PAGES);
	uint32_t low[REGIONS], high[REGIONS];
	uint64_t value, window = seat->window, beats = seat->beats;
	struct iovec ours = { &value, sizeof(value) };
	struct iovec theirs = { (char *)window + page * PAGE, sizeof(value) };

	for (unsigned int region = 0; region < REGIONS; region++)
		low[region] = ctl->done[region][page];
	if (!window || process_vm_readv(seat->pid, &ours, 1, &theirs, 1, 0) != sizeof(value))
		return;
	count(CHECKS, 1);
	for (unsigned int region = 0; region < REGIONS; region++) {
		high[region] = ctl->intent[region][page];
		if (genuine(value, region, page) && generation(value) >= low[region] &&
		    generation(value) <= high[region])
			return;
	}
	/* another window may be there by now */
	if (seat->window != window || seat->beats != beats)
		return;
	finding("process %lu shows %lx in page %lu: done %u and %u, intent %u and %u", seat->pid,
		value, page, low[0], low[1], high[0], high[1]);
}

/* A child that is traced: its window is read and written by ptrace, which waits 10 s at most. */
void peek(uint64_t r, long unused)
{
	const struct area *area;
	unsigned int object;
	unsigned long page;
	struct view v;
	uint32_t next;
	uint64_t start;
	long value;
	char *at;
	bool late;
	pid_t pid;
	int status;

	if (!mine(&r, &v, &area, &page, &object))
		return;
	at = page_at(&v, area, page);
	pid = fork();
	if (!pid) {
		ptrace(PTRACE_TRACEME, 0, NULL, NULL);
		raise(SIGSTOP);
		_exit(0);
	}
	if (pid < 0 || waitpid(pid, &status, 0) != pid || !WIFSTOPPED(status))
		return;
	start = microseconds();
	value = ptrace(PTRACE_PEEKDATA, pid, at, NULL);
	late = microseconds() - start >= 10000000;
	if (!late && value != (long)stamp(object, page, self.ctl->done[object][page]))
		finding("ptrace reads %lx, not generation %u", value, self.ctl->done[object][page]);
	next = self.ctl->intent[object][page] + 1;
	value = stamp(object, page, next);
	self.ctl->intent[object][page] = next;
	start = microseconds();
	if (ptrace(PTRACE_POKEDATA, pid, at, value) && microseconds() - start < 10000000)
		finding("ptrace cannot write: %s", strerror(errno));
	check_load(&v, area->offset + page * PAGE, &methods[INSTRUCTION]);
	kill(pid, SIGKILL);
	waitpid(pid, &status, 0);
	advance(&v, area, page, &methods[INSTRUCTION]);
}
