/* A process among others: fork, crash, sleep on a futex, be looked at through /proc. */
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include "storm.h"

/* Only looks: the pages are its parent's to store to. */
static void live_as_child(uint64_t r, bool crash)
{
	const struct rlimit unlimited = { RLIM_INFINITY, RLIM_INFINITY };
	struct view v;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	for (unsigned int n = draw(&r, 256); n; n--)
		if (some_view(&r, false, &v))
			check_load(&v, place(&v, &r), &methods[draw(&r, 2)]);
	if (crash) {
		setrlimit(RLIMIT_CORE, &unlimited);
		signal(SIGABRT, SIG_DFL);
		abort();
	}
	switch (draw(&r, 4)) {
	case 0:
		for (struct window *w = self.window; w < self.window + WINDOWS; w++)
			if (w->at)
				munmap(w->at, w->slots * SLOT);
		break;
	case 1:
		/* until it is killed */
		for (;;)
			pause();
	}
	_exit(0);
}

static void parent(uint64_t r, bool crash)
{
	const struct timespec wait = { 0, draw(&r, 50) * 1000000 };
	int status, wanted = crash ? SIGABRT : SIGKILL;
	pid_t pid = fork();

	if (!pid)
		live_as_child(r, crash);
	if (pid < 0)
		return;
	count(FORKS, 1);
	probe(r, INSTRUCTION);
	if (!crash) {
		nanosleep(&wait, NULL);
		kill(pid, SIGKILL);
		count(CHILDREN_KILLED, 1);
	}
	if (waitpid(pid, &status, 0) != pid)
		finding("waitpid: %s", strerror(errno));
	/* whatever else: the OOM killer */
	else if (status && !(WIFSIGNALED(status) &&
			     (WTERMSIG(status) == wanted || WTERMSIG(status) == SIGKILL)))
		finding("a child ended with %x", status);
}

void fork_child(uint64_t r, long unused)
{
	parent(r, false);
}

void core(uint64_t r, long unused)
{
	parent(r, true);
}

/* Waiters and wakers meet at words of cells, which come and go. */
void futex(uint64_t r, long unused)
{
	const struct timespec wait = { 0, draw(&r, 20) * 1000000 };
	struct view v;
	char *at;

	if (!some_view(&r, true, &v))
		return;
	at = v.now.at + (place(&v, &r) & ~(PAGE - 1)) - v.now.slot * SLOT + 64 + draw(&r, 2) * 4;
	for (unsigned int n = 0; n < 8; n++)
		if (syscall(SYS_futex, at, n % 2 ? FUTEX_WAIT : FUTEX_WAKE, 0, &wait, NULL, 0) < 0 &&
		    errno != EFAULT && errno != EAGAIN && errno != ETIMEDOUT && errno != EINTR &&
		    errno != EHWPOISON)
			finding("futex: %s", strerror(errno));
}

static void read_all(int fd)
{
	static char buffer[1 << 16];

	while (read(fd, buffer, sizeof(buffer)) > 0 && !stopping())
		;
}

static const char *const walks[] = { "smaps", "smaps_rollup", "numa_maps", "pagemap", "clear_refs" };

/* Whole files, of this process or another one; it may be gone. */
void walk(uint64_t r, long which)
{
	struct seat *seat = draw(&r, 2) ? self.seat : &self.ctl->seat[draw(&r, self.ctl->workers)];
	uint64_t entries[512], window = seat->window, at;
	char path[64];
	int fd;

	snprintf(path, sizeof(path), "/proc/%lu/%s", seat->pid, walks[which]);
	fd = open(path, (which == 4 ? O_WRONLY : O_RDONLY) | O_CLOEXEC);
	if (fd < 0)
		return;
	if (which == 4)
		dprintf(fd, "%lu", 1 + draw(&r, 5));
	else if (which < 3)
		read_all(fd);
	else
		for (unsigned int n = 0; window && n < 64; n++) {
			at = draw(&r, 2) ? draw(&r, 256) * 2 * MIB :
					   SLOT + draw(&r, CELLS / 2 + 1) * 2 * MIB;
			if (pread(fd, entries, sizeof(entries), (window + at) / PAGE * 8) < 0)
				break;
		}
	close(fd);
	count(WALKS, 1);
}
