/*
 * worker ROLE CONTROL SEAT SEED ARGUMENT [ACTION...]: one process of the storm.
 *
 * ARGUMENT is a number or a text for the role. Each step of the role "work" draws all it needs from
 * a state of its own, mixed from the seed and the step: what one step finds does not change what
 * the next one does. "plan" prints the steps of a seed instead of doing them.
 */
#include <err.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>
#include "storm.h"

struct worker self;

struct action {
	const char *name;
	action_fn *run;
	long arg;
};

static const struct action actions[] = {
	{ "attach", attach, 0 },
	{ "detach", detach, 0 },
	{ "spin", spin, 0 },
	{ "probe", probe, INSTRUCTION },
	{ "move", move, 0 },
	{ "refused", refused, 0 },
	{ "twice", twice, 1 },
	{ "both", twice, 2 },
	{ "dontneed", advise, MADV_DONTNEED },
	{ "cold", advise, MADV_COLD },
	{ "pageout", advise, MADV_PAGEOUT },
	{ "populate-read", advise, MADV_POPULATE_READ },
	{ "populate-write", advise, MADV_POPULATE_WRITE },
	{ "remove", advise, MADV_REMOVE },
	{ "free", advise, MADV_FREE },
	{ "collapse", advise, 25 },
	{ "hugepage", advise, MADV_HUGEPAGE },
	{ "mergeable", advise, MADV_MERGEABLE },
	{ "mlock", lock, 0 },
	{ "mlockall", lock_all, 0 },
	{ "poison", poison, 0 },
	{ "offline", offline, 0 },
	{ "process-vm", probe, PROCESS_VM },
	{ "mem", probe, PROC_MEM },
	{ "pipe", probe, PIPE },
	{ "direct", direct, 0 },
	{ "vmsplice", pages_in_pipe, 0 },
	{ "io-uring", ring, 0 },
	{ "peer", peer, 0 },
	{ "ptrace", peek, 0 },
	{ "fork", fork_child, 0 },
	{ "core", core, 0 },
	{ "futex", futex, 0 },
	{ "smaps", walk, 0 },
	{ "smaps_rollup", walk, 1 },
	{ "numa_maps", walk, 2 },
	{ "pagemap", walk, 3 },
	{ "clear_refs", walk, 4 },
};

void count(int which, uint64_t number)
{
	self.ctl->counts[which] += number;
}

bool stopping(void)
{
	return self.ctl->stop;
}

/* The first one is kept, and ends all. */
void finding(const char *format, ...)
{
	char text[400];
	va_list args;

	va_start(args, format);
	vsnprintf(text, sizeof(text), format, args);
	va_end(args);
	if (!self.ctl->findings++)
		snprintf(self.ctl->finding, sizeof(self.ctl->finding),
			 "%s (process %u, seed %lu, step %lu: %s)", text, self.index, self.seed,
			 self.seat->step, self.seat->action);
	self.ctl->stop = 1;
}

static const struct action *find_action(const char *name)
{
	for (size_t n = 0; n < sizeof(actions) / sizeof(actions[0]); n++)
		if (!strcmp(actions[n].name, name))
			return &actions[n];
	errx(2, "no action %s", name);
}

/* All steps of one life. It ends with windows attached. */
static void work(unsigned int n, char **names, bool plan)
{
	const struct action *enabled[64];
	uint64_t r = self.seed, steps = 20 + draw(&r, 1000);

	for (unsigned int i = 0; i < n; i++)
		enabled[i] = find_action(names[i]);
	if (!plan && draw(&r, 2))
		start_looker();
	for (uint64_t step = 0; step < steps && (plan || !stopping()); step++) {
		uint64_t own = mix(self.seed + mix(step));
		const struct action *action = enabled[draw(&own, n)];

		if (plan) {
			printf("%lu %s %lx\n", step, action->name, own);
			continue;
		}
		strcpy(self.seat->action, action->name);
		self.seat->step = step;
		self.seat->beats++;
		action->run(own, action->arg);
	}
}

static void open_control(const char *path)
{
	int fd = open(path, O_RDWR);

	self.ctl = mmap(NULL, sizeof(*self.ctl), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (self.ctl == MAP_FAILED)
		err(2, "%s", path);
	close(fd);
	self.seat = &self.ctl->seat[self.index];
	self.seat->pid = getpid();
	self.seat->window = 0;
	strcpy(self.seat->action, "start");
}

static void enter_cgroup(const char *folder)
{
	char path[128];
	int fd;

	if (!folder)
		return;
	snprintf(path, sizeof(path), "%s/cgroup.procs", folder);
	fd = open(path, O_WRONLY);
	if (write(fd, "0", 1) != 1)
		err(2, "%s", path);
	close(fd);
}

/* For a test: one of everything that is read from outside. */
static int sit(void)
{
	printf("%lu\n", self.ctl->workers);
	strcpy(self.seat->action, "sit");
	self.seat->step = 3;
	self.seat->beats++;
	count(POISON, 9);
	finding("a test");
	return 0;
}

int main(int argc, char **argv)
{
	const char *role = argv[1], *argument = argv[5];

	if (argc == 2 && !strcmp(role, "size"))
		return printf("%zu\n", sizeof(struct control)) < 0;
	if (argc < 6)
		errx(2, "usage: worker ROLE CONTROL SEAT SEED ARGUMENT [ACTION...]");
	self.index = atoi(argv[3]);
	self.seed = strtoul(argv[4], NULL, 10);
	if (!strcmp(role, "plan")) {
		work(argc - 6, argv + 6, true);
		return 0;
	}
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	open_control(argv[2]);
	catch_faults();
	enter_cgroup(getenv("STORM_CGROUP"));
	if (!strcmp(role, "sit"))
		return sit();
	if (!strcmp(role, "setup")) {
		set_up();
		return 0;
	}
	for (unsigned int region = 0; region < REGIONS; region++) {
		self.fd[region][0] = open_region(region, O_RDONLY);
		self.fd[region][1] = open_region(region, O_RDWR);
	}
	make_arena();
	if (!strcmp(role, "work"))
		work(argc - 6, argv + 6, false);
	else if (!strcmp(role, "layout"))
		change_layout(atoi(argument), argv[6]);
	else if (!strcmp(role, "cut"))
		cut_files();
	else if (!strcmp(role, "hog"))
		hog(strtoul(argument, NULL, 10));
	else if (!strcmp(role, "crowd"))
		crowd(atoi(argument));
	else if (!strcmp(role, "greedy"))
		greedy();
	else if (!strcmp(role, "verify"))
		verify();
	else
		errx(2, "no role %s", role);
	_exit(0);
}
