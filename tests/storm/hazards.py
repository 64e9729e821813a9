"""What can be dangerous to shared page tables: the list of the design, each to be run alone.

A hazard is a set of actions that the workers draw from (``main.c`` has the table), of processes
with another role (``roles.c``) and of disturbances (``disturb.py``). Whatever the hazard, the
workers also attach, detach, store and check.
"""

from __future__ import annotations

from dataclasses import dataclass

#: What every worker does.
ALWAYS = ("attach", "detach", "spin", "probe")


@dataclass(frozen=True)
class Hazard:
    """Actions, roles and disturbances, by name; ``kill``: workers are killed with -9 at random."""

    text: str
    actions: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()
    disturbances: tuple[str, ...] = ()
    layout: str = ""
    kill: bool = False


def _advice(name: str) -> Hazard:
    return Hazard(f"madvise {name}, of parts and of whole windows", (name,))


def _walk(name: str) -> Hazard:
    return Hazard(f"/proc/PID/{name} of processes that attach and fork", (name,), layout="mup")


HAZARDS = {
    "fork": Hazard("fork while others fault, the child killed or not", ("fork",)),
    "mremap": Hazard("windows move while a thread uses them", ("move",)),
    "munmap": Hazard("partial munmap, mprotect, mremap to less: refused", ("refused",)),
    "dontneed": _advice("dontneed"),
    "cold": _advice("cold"),
    "pageout": _advice("pageout"),
    "populate": Hazard("madvise POPULATE_*", ("populate-read", "populate-write"), layout="mup"),
    "collapse": Hazard(
        "madvise COLLAPSE, REMOVE, FREE, HUGEPAGE, MERGEABLE",
        ("collapse", "remove", "free", "hugepage", "mergeable"),
    ),
    "mlock": Hazard("mlock of parts", ("mlock",), layout="mup"),
    "mlockall": Hazard("mlockall(MCL_FUTURE), then windows come and move", ("mlockall",)),
    "process-vm": Hazard("process_vm_readv and writev, own and others'", ("process-vm", "peer")),
    "ptrace": Hazard("ptrace peeks and pokes; /proc/self/mem", ("ptrace", "mem")),
    "direct": Hazard("O_DIRECT from and into windows", ("direct", "pageout")),
    "vmsplice": Hazard(
        "vmsplice and pipes; pages in a pipe outlive the window", ("vmsplice", "pipe")
    ),
    "io-uring": Hazard("registered buffers of io_uring", ("io-uring", "pageout")),
    "futex": Hazard("futexes in windows, also where cells come and go", ("futex",), layout="mup"),
    "smaps": _walk("smaps"),
    "smaps_rollup": _walk("smaps_rollup"),
    "pagemap": _walk("pagemap"),
    "clear_refs": _walk("clear_refs"),
    "numa_maps": _walk("numa_maps"),
    "core": Hazard("core dumps", ("core",)),
    "oom": Hazard("OOM kills and the reaper, in a memory cgroup", roles=("greedy",)),
    "reclaim": Hazard("reclaim of the workers' cgroup", disturbances=("reclaim",)),
    "swap": Hazard(
        "memory pressure with swap, swapoff and swapon", roles=("hog",), disturbances=("swap",)
    ),
    "compaction": Hazard("compaction in a loop", disturbances=("compaction",)),
    "khugepaged": Hazard("khugepaged at full speed", disturbances=("khugepaged",), layout="mup"),
    "numa": Hazard(
        "NUMA balancing, pages moved between nodes (--kernel-args numa=fake=2)",
        disturbances=("numa",),
    ),
    "truncation": Hazard("mapped files are cut, grow and get holes", roles=("cut",)),
    "full-disk": Hazard("mapped files on a full disk", roles=("cut",), disturbances=("full_disk",)),
    "poison": Hazard("memory errors, and pages taken out of use", ("poison", "offline")),
    "memcg": Hazard("some workers in a memory cgroup at its limit", disturbances=("memcg",)),
    "two-regions": Hazard("two regions in one process", ("both",), layout="mup"),
    "twice": Hazard("one region in six windows of a process", ("twice",), layout="mup"),
    "exit": Hazard("a hundred processes killed at once", roles=("crowd",), kill=True),
    "map": Hazard("CREATE_MAPPING over memory and files in use", layout="m"),
    "unmap": Hazard("UNMAP of what is in use", layout="mu"),
    "protect": Hazard("PROTECT both ways of what is stored to", layout="mppppp"),
}

#: In the list of the design, and not here.
ELSEWHERE = {"failed allocations": "a test of its own walks every one: fault injection"}


@dataclass(frozen=True)
class Plan:
    """All that some hazards need, together."""

    actions: tuple[str, ...]
    roles: frozenset[str]
    disturbances: frozenset[str]
    layout: str
    kill: bool


def plan(names: list[str]) -> Plan:
    """What to run for these hazards; for none of them, for all."""
    chosen = [HAZARDS[name] for name in names] or list(HAZARDS.values())
    actions = dict.fromkeys(ALWAYS)
    for hazard in chosen:
        actions |= dict.fromkeys(hazard.actions)
    return Plan(
        tuple(actions),
        frozenset(role for hazard in chosen for role in hazard.roles),
        frozenset(name for hazard in chosen for name in hazard.disturbances),
        max((hazard.layout for hazard in chosen), key=len) if names else "mup",
        any(hazard.kill for hazard in chosen),
    )
