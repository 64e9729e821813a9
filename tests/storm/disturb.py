"""What the rest of the machine does meanwhile: reclaim, swap, compaction, a full disk.

Each is one turn of something, done again and again by a process of its own.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20
CGROUP = Path("/sys/fs/cgroup")
WORKERS, TIGHT, GREEDY = (CGROUP / f"storm-{name}" for name in ("workers", "tight", "greedy"))
_THP = Path("/sys/kernel/mm/transparent_hugepage")
_KHUGEPAGED = {
    _THP / "khugepaged/scan_sleep_millisecs": "0",
    _THP / "khugepaged/alloc_sleep_millisecs": "0",
    _THP / "khugepaged/pages_to_scan": "65536",
    _THP / "enabled": "always",
    _THP / "shmem_enabled": "always",
}
HUNG_TASK = Path("/proc/sys/kernel/hung_task_timeout_secs")
_NUMA = {
    Path("/proc/sys/kernel/numa_balancing"): "1",
    Path("/sys/kernel/debug/sched/numa_balancing/scan_period_min_ms"): "10",
    Path("/sys/kernel/debug/sched/numa_balancing/scan_delay_ms"): "0",
}
_MOVE_PAGES, _MOVE_ALL, _MOVED = 279, 4, 64
_COLLAPSE = 25
#: Files on tmpfs that regions have, too, and that nobody makes shorter.
_FILES = [Path("/dev/shm/storm") / name for name in ("owned", "cells-0", "cells-1")]
_libc = ctypes.CDLL(None)


def _write(path: Path, text: str) -> None:
    with suppress(OSError):
        path.write_text(text)


def reclaim(rng: random.Random) -> None:
    """Some of what the workers were charged for; often so much that pages in use go too.

    MiB by MiB for some seconds: where each page takes long, one call for all may look as a hang.
    """
    group = rng.choice([WORKERS, TIGHT])
    end = time.monotonic() + 5
    for _ in range(rng.choice([rng.randint(1, 32), 32])):
        _write(group / "memory.reclaim", str(MIB))
        if time.monotonic() > end:
            break
    if rng.random() < 0.1:
        _write(Path("/proc/sys/vm/drop_caches"), "1")


def swap(_rng: random.Random) -> None:
    """All of it comes back. swapoff may be refused, or be killed, for want of memory."""
    for line in Path("/proc/swaps").read_text().splitlines()[1:]:
        device = line.split()[0]
        subprocess.run(["swapoff", device], check=False, stderr=subprocess.DEVNULL)
        subprocess.run(["swapon", device], check=False, stderr=subprocess.DEVNULL)


def compaction(_rng: random.Random) -> None:
    """Pages move."""
    _write(Path("/proc/sys/vm/compact_memory"), "1")


def khugepaged(rng: random.Random) -> None:
    """Huge pages come and are split.

    This process maps files of regions in the ordinary way. By its mappings khugepaged finds them,
    and so does the collapse that it asks for itself.
    """
    _write(_THP / "shmem_enabled", rng.choice(["always", "advise", "within_size", "never"]))
    with suppress(OSError, ValueError), open(rng.choice(_FILES), "rb") as file:
        plain = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        _plain[file.name] = plain
        for at in range(0, len(plain), mmap.PAGESIZE):
            plain[at]
        if rng.random() < 0.5:
            plain.madvise(_COLLAPSE)


_plain: dict[str, mmap.mmap] = {}


def nodes() -> int:
    """NUMA nodes of this machine."""
    return len(list(Path("/sys/devices/system/node").glob("node[0-9]*")))


def numa(rng: random.Random) -> None:
    """Pages of a worker's window move to another node, where there are several."""
    pids = (WORKERS / "cgroup.procs").read_text().split()
    if nodes() < 2 or not pids:
        return
    pid = rng.choice(pids)
    with suppress(OSError):
        maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
        windows = [int(line.split("-")[0], 16) for line in maps if "/storm-" in line]
        start = rng.choice(windows) if windows else 0
        pages = (ctypes.c_ulong * _MOVED)(
            *(start + rng.randrange(4096) * 4096 for _ in range(_MOVED))
        )
        to = (ctypes.c_int * _MOVED)(*(rng.randrange(nodes()) for _ in range(_MOVED)))
        result = (ctypes.c_int * _MOVED)()
        _libc.syscall(_MOVE_PAGES, int(pid), ctypes.c_ulong(_MOVED), pages, to, result, _MOVE_ALL)


def full_disk(rng: random.Random) -> None:
    """Not a block is free, for a while."""
    name = "/mnt/disk/storm/rest"
    fd = os.open(name, os.O_WRONLY | os.O_CREAT)
    end, step = 0, 64 * MIB
    while step >= 4096:
        try:
            os.posix_fallocate(fd, end, step)
            end += step
        except OSError:
            step //= 4
    subprocess.run(["sleep", str(rng.uniform(0, 2))], check=True)
    os.close(fd)
    os.unlink(name)


def memcg(rng: random.Random) -> None:
    """The limit of the group for some of the workers goes up and down."""
    _write(TIGHT / "memory.max", str(rng.randint(8, 48) * MIB))


@dataclass(frozen=True)
class Disturbance:
    """A turn, the longest pause after it in seconds, and settings while it runs.

    ``event`` of ``/proc/vmstat`` is counted when something comes of it.
    """

    turn: Callable[[random.Random], None]
    pause: float
    settings: dict[Path, str]
    event: str = ""


DISTURBANCES = {
    "reclaim": Disturbance(reclaim, 0.1, {}, "pswpout"),
    "swap": Disturbance(swap, 20, {}, "pswpin"),
    "compaction": Disturbance(compaction, 2, {}, "pgmigrate_success"),
    "khugepaged": Disturbance(khugepaged, 3, _KHUGEPAGED, "thp_collapse_alloc"),
    "numa": Disturbance(numa, 0.2, _NUMA, "numa_pte_updates"),
    "full_disk": Disturbance(full_disk, 10, {}),
    "memcg": Disturbance(memcg, 2, {}),
}


def events() -> dict[str, int]:
    """How often each of them has had an effect since the boot."""
    lines = Path("/proc/vmstat").read_text().splitlines()
    counts = {name: int(value) for name, value in (line.split() for line in lines)}
    return {name: counts.get(each.event, 0) for name, each in DISTURBANCES.items() if each.event}


def chosen(value: str) -> str:
    """What is set, of a file that shows all choices."""
    return value.split("[")[1].split("]", maxsplit=1)[0] if "[" in value else value.strip()


class Settings:
    """Set for the time of the storm, as they were before after it."""

    def __init__(self, names: frozenset[str], hang: float) -> None:
        # where a flush of another processor takes long, so do the waits that the kernel watches
        wanted = {HUNG_TASK: str(round(hang))}
        for name in names:
            wanted |= DISTURBANCES[name].settings
        self._before = {path: chosen(path.read_text()) for path in wanted if path.exists()}
        for path in self._before:
            path.write_text(wanted[path])

    def restore(self) -> None:
        """As it was."""
        for path, value in self._before.items():
            path.write_text(value)


def make_groups() -> None:
    """The memory cgroups. What needs no more than it has is never killed for the others."""
    _write(CGROUP / "cgroup.subtree_control", "+memory")
    for folder in (WORKERS, TIGHT, GREEDY):
        folder.mkdir(exist_ok=True)
    for folder in (TIGHT, GREEDY):
        (folder / "memory.max").write_text(str(32 * MIB))
    _write(GREEDY / "memory.swap.max", "0")


def remove_groups() -> None:
    """Nobody is in them."""
    for folder in (WORKERS, TIGHT, GREEDY):
        with suppress(OSError):
            folder.rmdir()
