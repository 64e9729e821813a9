// SPDX-License-Identifier: MIT
/*
 * A program that knows nothing but the ABI: open, ftruncate, ioctl, mmap. It makes a region of
 * one slot, puts anonymous memory into it, writes, and has another process read and answer.
 *
 *	cc -O2 -Wall -Wextra -o raw_abi raw_abi.c && ./raw_abi [folder of msharefs]
 */
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

struct mshare_create {
	uint64_t region_offset, size, offset;
	uint32_t prot, flags, fd;
};

#define MSHAREFS_CREATE_MAPPING _IOW('x', 0, struct mshare_create)
#define SIZE (1UL << 30)
#define PAGE 4096UL
#define TOUCHED (64UL << 20)

static char path[4096];

static void fail(const char *what)
{
	fprintf(stderr, "%s: %s: %s\n", path, what, strerror(errno));
	unlink(path);
	exit(1);
}

static long faults(void)
{
	struct rusage usage;

	getrusage(RUSAGE_SELF, &usage);
	return usage.ru_minflt;
}

static char *attach(void)
{
	int fd = open(path, O_RDWR);
	char *memory;

	if (fd < 0)
		fail("open");
	memory = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (memory == MAP_FAILED)
		fail("mmap");
	close(fd);
	return memory;
}

static int second_process(void)
{
	char *memory = attach();
	unsigned long sum = 0;
	long before;

	faults();	/* once for this process's own copies of its pages */
	before = faults();
	for (unsigned long at = 0; at < TOUCHED; at += PAGE)
		sum += (unsigned char)memory[at];
	printf("second process: %lu pages read, %ld faults\n", TOUCHED / PAGE, faults() - before);
	strcpy(memory + TOUCHED - PAGE + 1, "answer");
	return sum == TOUCHED / PAGE * 7 ? 0 : 1;
}

int main(int count, char **words)
{
	struct mshare_create mapping = {
		.size = SIZE,
		.prot = PROT_READ | PROT_WRITE,
		.flags = MAP_SHARED | MAP_FIXED | MAP_ANONYMOUS,
	};
	char *memory;
	int fd, status;

	snprintf(path, sizeof(path), "%s/raw-abi-%d", count > 1 ? words[1] : "/sys/fs/mshare",
		 getpid());
	fd = open(path, O_RDWR | O_CREAT | O_EXCL, 0600);
	if (fd < 0)
		fail("open");
	if (ftruncate(fd, SIZE))
		fail("ftruncate");
	if (ioctl(fd, MSHAREFS_CREATE_MAPPING, &mapping))
		fail("CREATE_MAPPING");
	close(fd);
	memory = attach();
	for (unsigned long at = 0; at < TOUCHED; at += PAGE)
		memory[at] = 7;
	printf("first process: %lu pages written at %p\n", TOUCHED / PAGE, (void *)memory);
	fflush(stdout);

	if (!fork()) {
		/* Not inherited: attached anew, at another address. */
		char *other = mmap(NULL, SIZE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

		if (other == MAP_FAILED || munmap(memory, SIZE))
			fail("munmap");
		exit(second_process());
	}
	wait(&status);
	if (status || strcmp(memory + TOUCHED - PAGE + 1, "answer"))
		fail("what the second process saw or wrote is not there");
	printf("first process: the answer is there\n");
	if (munmap(memory, SIZE) || unlink(path))
		fail("clean up");
	return 0;
}
