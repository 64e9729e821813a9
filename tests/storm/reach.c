/* Ways to memory that may not be there: an instruction, or the kernel on behalf of one. */
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>
#include "storm.h"

static __thread sigjmp_buf *volatile landing;	/* kept in order with volatile accesses */

static void on_fault(int sig, siginfo_t *info, void *context)
{
	if (landing)
		siglongjmp(*landing, sig);
	finding("signal %d at %p where none is possible", sig, info->si_addr);
	_exit(1);
}

/* Not blocked while it is handled: the jump leaves the mask as it is. */
void catch_faults(void)
{
	struct sigaction action = { .sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_NODEFER };

	sigaction(SIGSEGV, &action, NULL);
	sigaction(SIGBUS, &action, NULL);
}

int try_load(const void *at, uint64_t *value)
{
	sigjmp_buf here;
	int sig = sigsetjmp(here, 0);

	if (!sig) {
		landing = &here;
		*value = *(const volatile uint64_t *)at;
	}
	landing = NULL;
	return sig;
}

int try_store(void *at, uint64_t value)
{
	sigjmp_buf here;
	int sig = sigsetjmp(here, 0);

	if (!sig) {
		landing = &here;
		*(volatile uint64_t *)at = value;
	}
	landing = NULL;
	return sig;
}

/* A call that transfers all or fails with one of two errors. */
static int verdict(const char *call, ssize_t done, int error)
{
	if (done == sizeof(uint64_t))
		return 0;
	if (done >= 0 || errno != error)
		finding("%s: %zd, %s", call, done, done < 0 ? strerror(errno) : "");
	return ANY_SIGNAL;
}

static int vm_load(const void *at, uint64_t *value)
{
	struct iovec ours = { value, sizeof(*value) }, theirs = { (void *)at, sizeof(*value) };

	return verdict("process_vm_readv", process_vm_readv(getpid(), &ours, 1, &theirs, 1, 0),
		       EFAULT);
}

static int vm_store(void *at, uint64_t value)
{
	struct iovec ours = { &value, sizeof(value) }, theirs = { at, sizeof(value) };

	return verdict("process_vm_writev", process_vm_writev(getpid(), &ours, 1, &theirs, 1, 0),
		       EFAULT);
}

/* Such an access holds the lock of the process, so it waits for a layout change 10 s at most. */
static int mem_load(const void *at, uint64_t *value)
{
	uint64_t start = microseconds();
	int fd = open("/proc/self/mem", O_RDONLY);
	int sig = verdict("read of mem", pread(fd, value, sizeof(*value), (off_t)at), EIO);

	close(fd);
	return sig && microseconds() - start >= 10000000 ? TOO_LATE : sig;
}

static int mem_store(void *at, uint64_t value)
{
	uint64_t start = microseconds();
	int fd = open("/proc/self/mem", O_RDWR);
	int sig = verdict("write of mem", pwrite(fd, &value, sizeof(value), (off_t)at), EIO);

	close(fd);
	return sig && microseconds() - start >= 10000000 ? TOO_LATE : sig;
}

/* copy_from_user and copy_to_user */
static int pipe_load(const void *at, uint64_t *value)
{
	int ends[2], sig;

	if (pipe(ends))
		return ANY_SIGNAL;
	sig = verdict("write to a pipe", write(ends[1], at, sizeof(*value)), EFAULT);
	if (!sig && read(ends[0], value, sizeof(*value)) != sizeof(*value))
		finding("a pipe lost what was written");
	close(ends[0]);
	close(ends[1]);
	return sig;
}

static int pipe_store(void *at, uint64_t value)
{
	int ends[2], sig;

	if (pipe(ends))
		return ANY_SIGNAL;
	if (write(ends[1], &value, sizeof(value)) != sizeof(value))
		finding("a pipe took nothing");
	sig = verdict("read from a pipe", read(ends[0], at, sizeof(value)), EFAULT);
	close(ends[0]);
	close(ends[1]);
	return sig;
}

const struct method methods[] = {
	{ "an instruction", try_load, try_store },
	{ "process_vm", vm_load, vm_store },
	{ "/proc/self/mem", mem_load, mem_store },
	{ "a pipe", pipe_load, pipe_store },
};
