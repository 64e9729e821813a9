// SPDX-License-Identifier: MIT
/*
 * A program that knows nothing of mshare, for tests/kernel/test_run.py.
 *
 *   calls          every call on a mapping, and what came of it, to compare
 *   threads N      N times each call that a window can't do, while threads look at
 *                  the mapping all the time
 *   storm SECONDS  threads, a signal handler and forked children that map and unmap
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/shm.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE	4096UL
#define PAGES	650UL
#define SIZE	(PAGES * PAGE)
#define PART	(150 * PAGE)

long mbind(void *address, unsigned long length, int mode, const unsigned long *nodes,
	   unsigned long count, unsigned int flags) __attribute__((weak));

static void *map(size_t size, int flags)
{
	return mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | flags, -1, 0);
}

static void die(const char *what)
{
	fprintf(stderr, "%s: %s\n", what, strerror(errno));
	exit(1);
}

static char *filled(void)
{
	char *memory = map(SIZE, 0);

	if (memory == MAP_FAILED)
		die("mmap");
	for (size_t i = 0; i < PAGES; i++)
		*(size_t *)(memory + i * PAGE) = i + 1;
	return memory;
}

static char *segment(void)
{
	int id = shmget(IPC_PRIVATE, SIZE, 0600);
	char *memory = shmat(id, NULL, 0);

	shmctl(id, IPC_RMID, NULL);
	for (size_t i = 0; i < PAGES; i++)
		*(size_t *)(memory + i * PAGE) = i + 1;
	return memory;
}

/* Which pages can be read, which written, and what they hold, as one line. */
static void look(const char *memory, size_t pages)
{
	size_t readable = 0, writable = 0, sum = 0, value;
	int ends[2];

	if (pipe(ends))
		die("pipe");
	for (size_t i = 0; i < pages; i++) {
		if (write(ends[1], memory + i * PAGE, sizeof(value)) != sizeof(value))
			continue;
		readable++;
		if (read(ends[0], &value, sizeof(value)) != sizeof(value))
			die("read");
		sum += value * (i + 1);
		if (write(ends[1], &value, sizeof(value)) != sizeof(value))
			die("write");
		if (read(ends[0], (char *)memory + i * PAGE, sizeof(value)) == sizeof(value))
			writable++;
		else if (read(ends[0], &value, sizeof(value)) != sizeof(value))
			die("read");
	}
	close(ends[0]);
	close(ends[1]);
	printf("  %zu readable, %zu writable, sum %zu\n", readable, writable, sum);
}

static void said(const char *name, long number, long result)
{
	int code = errno;

	if (result == -1)
		printf("%s %ld: %s\n", name, number, strerrorname_np(code));
	else
		printf("%s %ld: done\n", name, number);
}

static const int advices[] = { MADV_NORMAL, MADV_RANDOM, MADV_SEQUENTIAL, MADV_WILLNEED,
	MADV_DONTNEED, MADV_FREE, MADV_REMOVE, MADV_DONTFORK, MADV_DOFORK, MADV_MERGEABLE,
	MADV_UNMERGEABLE, MADV_HUGEPAGE, MADV_NOHUGEPAGE, MADV_DONTDUMP, MADV_DODUMP,
	MADV_WIPEONFORK, MADV_KEEPONFORK, MADV_COLD, MADV_PAGEOUT, MADV_POPULATE_READ,
	MADV_POPULATE_WRITE, 77 };
#define ADVICES (sizeof(advices) / sizeof(*advices))

/* A call that keeps the content. False: there is no such number. */
static int keeping(char *memory, int number)
{
	char *part = memory + PART;

	switch (number) {
	case 0:
		return mprotect(part, PART, PROT_READ | PROT_WRITE);
	case 1:
		return pkey_mprotect(part, PART, PROT_READ | PROT_WRITE, -1);
	case 2:
		return mlock(part, PART);
	case 3:
		return mlock2(memory, SIZE, MLOCK_ONFAULT);
	case 4:
		/* of libnuma, which may not be here */
		return mbind ? mbind(part, PART, 0, NULL, 0, 0) : 0;
	case 5:
		return madvise(part, PART, MADV_DONTFORK);
	case 6:
		return madvise(memory, SIZE, MADV_HUGEPAGE);
	case 7:
		return remap_file_pages(part, PART, 0, PART / PAGE, 0);
	case 8:
		return msync(part, PART, MS_SYNC);
	case 9:
		return munlock(part, PART);
	case 10:
		return posix_madvise(part, PART, POSIX_MADV_RANDOM);
	case 11:
		return mlockall(MCL_CURRENT) || munlockall();
	default:
		return -2;
	}
}

static void on(const char *kind, char *(*make)(void))
{
	unsigned char resident[PAGES];
	char *memory, *other;
	size_t count = 0;

	printf("--- %s\n", kind);
	for (int number = 0; number < 12; number++) {
		memory = make();
		said("keeping", number, keeping(memory, number));
		look(memory, PAGES);
		said("munmap", 0, munmap(memory, SIZE));
		look(memory, 3);
	}
	for (size_t i = 0; i < 2 * ADVICES; i++) {
		memory = make();
		said(i % 2 ? "advice on all" : "advice", advices[i / 2],
		     i % 2 ? madvise(memory, SIZE, advices[i / 2]) :
		     madvise(memory + PART, PART, advices[i / 2]));
		look(memory, PAGES);
		said("then munmap of a part", i, munmap(memory + 3 * PART, PART));
		look(memory, PAGES);
		munmap(memory, SIZE);
	}
	for (int way = 0; way < 6; way++) {
		static const size_t from[] = { 0, 0, PART, PAGES * PAGE - PART, 0, 1 };
		static const size_t size[] = { SIZE - 100, PART, PART, PART, SIZE, PAGE };

		memory = make();
		said("munmap of a part", way, munmap(memory + from[way], size[way]));
		look(memory, PAGES);
		munmap(memory, SIZE);
	}
	for (int way = 0; way < 5; way++) {
		static const size_t old[] = { SIZE, SIZE, SIZE, 0, PART };
		static const size_t new[] = { SIZE + PART, PART, SIZE, SIZE, 2 * PART };
		static const int flags[] = { MREMAP_MAYMOVE, 0, MREMAP_MAYMOVE | MREMAP_FIXED,
			MREMAP_MAYMOVE, 0 };
		char *target = mmap(NULL, 2 * SIZE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

		memory = make();
		other = mremap(memory, old[way], new[way], flags[way], target);
		said("mremap", way, (long)other);
		/* what grows may stay where it is or not */
		if (way)
			look(memory, PAGES);
		if (other != MAP_FAILED)
			look(other, PAGES);
		munmap(memory, SIZE);
		munmap(target, 2 * SIZE);
	}
	memory = make();
	said("mprotect", PROT_READ, mprotect(memory + PART, PART, PROT_READ));
	look(memory, PAGES);
	said("mprotect", PROT_NONE, mprotect(memory + PART, PART, PROT_NONE));
	look(memory, PAGES);
	said("mprotect", 99, mprotect(memory + 1, PART, PROT_NONE));
	munmap(memory, SIZE);
	memory = make();
	other = mmap(memory + PART, PART, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	said("mmap over a part", 0, (long)other);
	look(memory, PAGES);
	munmap(memory, SIZE);
	memory = make();
	if (!fork()) {
		memory[PART] = 77;
		mprotect(memory, PAGE, PROT_READ);
		memory[2 * PART] = 78;
		_exit(0);
	}
	wait(NULL);
	printf("the child wrote %d and %d\n", memory[PART], memory[2 * PART]);
	said("madvise", MADV_REMOVE, madvise(memory + PART, PART, MADV_REMOVE));
	said("mincore", 0, mincore(memory, SIZE, resident));
	for (size_t i = 0; i < PAGES; i++)
		count += resident[i] & 1;
	printf("%zu pages in memory\n", count);
	said("shmdt", 0, shmdt(memory));
	look(memory, PAGES);
	said("shmdt", 1, shmdt(memory));
}

static void refused(void)
{
	said("no length", 0, (long)map(0, 0));
	said("no such file", 0, (long)mmap(NULL, SIZE, PROT_READ, MAP_SHARED, 999, 0));
	said("too large", 0, (long)map(SIZE_MAX - PAGE, 0));
	said("no flags", 0, (long)mmap(NULL, SIZE, PROT_READ, MAP_ANONYMOUS, -1, 0));
	said("no segment", 0, (long)shmat(-1, NULL, 0));
	said("nothing to detach", 0, shmdt((void *)PAGE));
	said("populated", 0, (long)map(SIZE, MAP_POPULATE));
	said("without a reserve", 0, (long)map(SIZE, MAP_NORESERVE));
}

static char *volatile shared;
static _Atomic int stop, looking;

/* One page counts up, another never changes. */
static void *looker(void *number)
{
	long own = (long)number;
	volatile long *counter = (volatile long *)(shared + (PART / PAGE + own) * PAGE);
	volatile long *fixed = (volatile long *)(shared + (PAGES - 1 - own) * PAGE);

	*counter = 0;
	for (long last = 0; !stop; *counter = ++last) {
		if (*fixed != (long)(PAGES - own) || *counter != last) {
			fprintf(stderr, "%ld: %ld, not %ld, and %ld\n", own, *counter, last, *fixed);
			abort();
		}
		looking |= 1 << own;
	}
	return NULL;
}

static void wait_for_all(void)
{
	looking = 0;
	while (looking != 7)
		sched_yield();
}

static void threads(int rounds)
{
	pthread_t ids[3];

	for (int round = 0; round < rounds; round++)
		for (int number = 0; number < 12; number++) {
			shared = filled();
			stop = 0;
			for (long i = 0; i < 3; i++)
				pthread_create(&ids[i], NULL, looker, (void *)i);
			wait_for_all();
			if (keeping(shared, number))
				die("keeping");
			wait_for_all();
			stop = 1;
			for (int i = 0; i < 3; i++)
				pthread_join(ids[i], NULL);
			munmap(shared, SIZE);
		}
	printf("%d rounds\n", rounds);
}

static _Atomic long maps, alarms;

static void use(unsigned int *seed)
{
	size_t size = (1 + rand_r(seed) % 30) << 20;
	char *memory = map(size, 0);

	if (memory == MAP_FAILED)
		die("mmap");
	memory[0] = 1;
	memory[size - 1] = 2;
	switch (rand_r(seed) % 4) {
	case 0:
		if (mprotect(memory, PAGE, PROT_READ))
			die("mprotect");
		break;
	case 1:
		if (munmap(memory + PAGE, PAGE))
			die("munmap");
		break;
	}
	if (memory[0] != 1 || memory[size - 1] != 2)
		abort();
	if (munmap(memory, size))
		die("munmap");
	maps++;
}

static void on_alarm(int number)
{
	unsigned int seed = alarms++;
	int saved = errno;

	(void)number;
	use(&seed);
	errno = saved;
}

static void *user(void *number)
{
	unsigned int seed = (long)number;

	while (!stop)
		use(&seed);
	return NULL;
}

static long now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000000 + time.tv_nsec / 1000;
}

/* One signal for each child, at any moment of its life, however long that takes here. Those of an
 * interval could follow each other faster than they are handled.
 */
static void storm(int seconds)
{
	struct itimerval once = { 0 };
	struct sigaction action = { .sa_handler = on_alarm, .sa_flags = SA_RESTART };
	long start = now(), end = start + seconds * 1000000L, last = 1000, delay;
	unsigned int seed = 99;
	pthread_t ids[2];
	int status, forks = 0;
	pid_t pid;

	sigaction(SIGALRM, &action, NULL);
	for (long i = 0; i < 2; i++)
		pthread_create(&ids[i], NULL, user, (void *)i);
	/* on a slow machine until enough of each has happened */
	for (; start < end || maps < 50 || alarms < 6 || forks < 3; forks++) {
		delay = 1 + rand_r(&seed) % last;
		once.it_value.tv_sec = delay / 1000000;
		once.it_value.tv_usec = delay % 1000000;
		setitimer(ITIMER_REAL, &once, NULL);
		pid = fork();
		if (!pid) {
			use(&seed);
			_exit(0);
		}
		while (waitpid(pid, &status, 0) < 0)
			;
		if (status) {
			fprintf(stderr, "a child ended with %x\n", status);
			exit(1);
		}
		last = now() - start;
		start += last;
	}
	stop = 1;
	for (int i = 0; i < 2; i++)
		pthread_join(ids[i], NULL);
	setitimer(ITIMER_REAL, &(struct itimerval){ 0 }, NULL);
	printf("%ld mappings, %ld signals, %d children\n", maps, alarms, forks);
}

int main(int argc, char **argv)
{
	const char *mode = argc > 1 ? argv[1] : "";

	setvbuf(stdout, NULL, _IOLBF, 0);
	if (!strcmp(mode, "calls")) {
		on("anonymous", filled);
		on("System V", segment);
		refused();
	} else if (!strcmp(mode, "threads") && argc > 2) {
		threads(atoi(argv[2]));
	} else if (!strcmp(mode, "storm") && argc > 2) {
		storm(atoi(argv[2]));
	} else {
		return 2;
	}
	return 0;
}
