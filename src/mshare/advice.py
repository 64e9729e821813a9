"""What many processes map on this machine, what its page tables cost, and what would be saved.

Only shared mappings count. Memory that forked processes have in common until one writes to it
is private to each of them, and no sharing of page tables would help it.
"""

from __future__ import annotations

import errno
import os
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from mshare import cost, engines
from mshare.processes import (
    SAMPLES,
    Occupied,
    Process,
    Shared,
    occupied,
    pids,
    process,
    shared_mappings,
)
from mshare.sizes import HUGE_PAGE, PAGE_SIZE, SLOT_SIZE, round_up

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many steps are behind it, and of how many."""

_BLOCKS = 1 << 20
"""Blocks of 2 MiB that are looked at in all, if that is enough: some seconds."""
_SPECIAL = {"devtmpfs", "devpts", "proc", "sysfs", "debugfs", "tracefs", "cgroup", "cgroup2", "bpf"}
_ANONYMOUS = {"anonymous": "anonymous shared memory"}
_POSTGRES = {"postgres", "postmaster"}


class Target(NamedTuple):
    """A file or segment that several processes map. Bytes."""

    kind: str
    """file, shm, memfd, sysv, anonymous or hugetlb."""
    path: str
    pids: list[int]
    programs: dict[str, int]
    """Processes of each program, most first."""
    size: int
    """The part of it that is mapped."""
    resident: int
    """The most that one process has in its page tables."""
    page_tables: int
    """For it, of all these processes together, now; an estimate (see :func:`occupied`)."""
    saves: int
    """How much less it would be with shared page tables, at least."""
    change: str
    """What to do."""


class Advice(NamedTuple):
    """``targets``, best first, and how many processes were ``read`` and could not be."""

    targets: list[Target]
    read: int
    unreadable: int


@dataclass
class _Group:
    kind: str
    path: str
    users: dict[int, list[Shared]] = field(default_factory=lambda: defaultdict(list))
    found: dict[int, list[Occupied]] = field(default_factory=lambda: defaultdict(list))


def scan(minimum: int = 1 << 20, progress: Progress = lambda text, done, total: None) -> Advice:
    """Look at every process that this user may, for what would save ``minimum`` bytes or more.

    ``maps`` of every process comes first. Only what could save that much is looked at closer.

    :raises OSError: ENOSYS where the kernel does not show page maps.
    """
    if not os.path.exists("/proc/self/pagemap"):
        raise OSError(errno.ENOSYS, "this kernel shows no page maps", "/proc/self/pagemap")
    groups, programs, unreadable = _groups(progress)
    groups = [each for each in groups if len(each.users) > 1 and _most(each) >= minimum]
    _measure(groups, progress)
    targets = [_target(group, programs) for group in groups if len(group.found) > 1]
    targets = [target for target in targets if target.saves >= minimum]
    targets.sort(key=lambda target: target.saves, reverse=True)
    return Advice(targets, len(programs), unreadable)


def _groups(progress: Progress) -> tuple[list[_Group], dict[int, Process], int]:
    kinds = _Kinds()
    groups: dict[tuple[tuple[int, int], int, str], _Group | None] = {}
    programs: dict[int, Process] = {}
    unreadable = 0
    everyone = pids()
    for done, pid in enumerate(everyone):
        progress("reading maps", done, len(everyone))
        try:
            found = process(pid)
            mappings = shared_mappings(pid) if found else []
        except ProcessLookupError:
            continue
        except PermissionError:
            unreadable += 1
            continue
        if found:
            programs[pid] = found
        for mapping in mappings:
            key = mapping.device, mapping.inode, _namespace(pid, mapping)
            if key not in groups:
                kind = kinds.of(mapping, pid)
                groups[key] = _Group(kind, mapping.path) if kind else None
            group = groups[key]
            if group:
                group.users[pid].append(mapping)
    return [group for group in groups.values() if group], programs, unreadable


class _Kinds:
    """What a mapping is, by the file system its file is on."""

    def __init__(self) -> None:
        self._types = _file_systems("self")
        self._seen: set[str] = set()
        fd = os.memfd_create("mshare-advise")
        try:
            device = os.fstat(fd).st_dev
        finally:
            os.close(fd)
        self._memory = os.major(device), os.minor(device)

    def _look_into(self, pid: int) -> None:
        """Learn what is mounted where a process lives; a container has mounts of its own."""
        with suppress(OSError):
            namespace = os.readlink(f"/proc/{pid}/ns/mnt")
            if namespace not in self._seen:
                self._seen.add(namespace)
                self._types = _file_systems(pid) | self._types

    def of(self, mapping: Shared, pid: int) -> str | None:
        """None for what is no memory of files or segments, or is shared already."""
        if mapping.device not in self._types and mapping.device != self._memory:
            self._look_into(pid)
        kind = self._types.get(mapping.device)
        if kind:
            if kind in _SPECIAL or kind == "msharefs":
                return None
            return {"tmpfs": "shm", "hugetlbfs": "hugetlb"}.get(kind, "file")
        for start, name in (("/SYSV", "sysv"), ("/memfd:", "memfd"), ("/anon_hugepage", "hugetlb")):
            if mapping.path.startswith(start):
                return name if mapping.device == self._memory else "hugetlb"
        if mapping.device == self._memory:
            return "anonymous"
        return "file" if mapping.path.startswith("/") and mapping.device[0] else None


def _namespace(pid: int, mapping: Shared) -> str:
    """Where an inode number of System V shared memory, which is the segment's id, counts."""
    if not mapping.path.startswith("/SYSV"):
        return ""
    try:
        return os.readlink(f"/proc/{pid}/ns/ipc")
    except OSError:
        return ""


def _file_systems(pid: int | str) -> dict[tuple[int, int], str]:
    """The type of each mounted file system, by device."""
    found = {}
    with open(f"/proc/{pid}/mountinfo", errors="backslashreplace") as file:
        for line in file:
            before, _, after = line.partition(" - ")
            major, minor = before.split()[2].split(":")
            found[int(major), int(minor)] = after.split()[0]
    return found


def _most(group: _Group) -> int:
    """The most that page tables of a group can be, in bytes."""
    page = HUGE_PAGE if group.kind == "hugetlb" else PAGE_SIZE
    return sum(cost.tables(m.size, page) for user in group.users.values() for m in user)


def _measure(groups: list[_Group], progress: Progress) -> None:
    """Fill in what each process has in its page tables; who ends meanwhile is left out."""
    wanted = defaultdict(list)
    for group in groups:
        for pid in group.users:
            wanted[pid].append(group)
    mappings = sum(len(user) for group in groups for user in group.users.values())
    samples = max(SAMPLES, _BLOCKS // max(mappings, 1))
    for done, (pid, its) in enumerate(wanted.items()):
        progress("reading page maps", done, len(wanted))
        try:
            found = iter(occupied(pid, [m for group in its for m in group.users[pid]], samples))
        except (ProcessLookupError, PermissionError):
            continue
        for group in its:
            group.found[pid] = [next(found) for _ in group.users[pid]]


def _target(group: _Group, programs: dict[int, Process]) -> Target:
    mappings = [mapping for pid in group.found for mapping in group.users[pid]]
    size = _mapped(mappings)
    resident = max(sum(each.resident for each in found) for found in group.found.values())
    now, then = (_hugetlb if group.kind == "hugetlb" else _small)(group, size)
    now = min(now, sum(programs[pid].page_tables for pid in group.found))
    names = Counter(programs[pid].name for pid in group.found)
    return Target(
        kind=group.kind,
        path=_ANONYMOUS.get(group.kind) or group.path.removesuffix(" (deleted)"),
        pids=list(group.found),
        programs=dict(names.most_common()),
        size=size,
        resident=min(resident, size),
        page_tables=now,
        saves=max(now - then, 0),
        change=_change(group, size, names),
    )


def _small(group: _Group, size: int) -> tuple[int, int]:
    """Page tables now, and with msharefs: a set for writers, one for readers."""
    now = then = 0
    for writable in (True, False):
        users = [
            [
                (m, each)
                for m, each in zip(group.users[pid], found, strict=True)
                if m.writable is writable
            ]
            for pid, found in group.found.items()
        ]
        tables = [sum(each.tables for _, each in user) for user in users]
        now += sum(tables)
        together = _together([pair for user in users for pair in user])
        then += min(max(together, *tables), cost.tables(size), sum(tables))
    return now, cost.REGION + then + len(group.found) * cost.windows(size)


def _together(found: list[tuple[Shared, Occupied]]) -> int:
    """Bytes of one set of tables for whatever of these mappings any process has in its own."""
    parts: dict[tuple[int, int, int], tuple[int, float]] = {}
    for mapping, each in found:
        part = mapping.offset, mapping.size, mapping.start % HUGE_PAGE
        parts[part] = parts.get(part, (0, 0.0))[0] | each.common, each.weight
    return sum(
        cost.tables(round(common.bit_count() * weight) * HUGE_PAGE)
        for common, weight in parts.values()
    )


def _hugetlb(group: _Group, size: int) -> tuple[int, int]:
    """Page tables now, and with each mapping aligned so that the kernel shares the PMD pages."""
    shared: set[int] = set()
    own = 0
    for pid in group.found:
        for mapping in group.users[pid]:
            whole: set[int] = set()
            if (mapping.start - mapping.offset) % SLOT_SIZE == 0:
                end = (mapping.offset + mapping.size) // SLOT_SIZE
                whole = set(range(-(-mapping.offset // SLOT_SIZE), end))
            shared |= whole
            own += -(-mapping.end // SLOT_SIZE) - mapping.start // SLOT_SIZE - len(whole)
    slots, rest = divmod(size, SLOT_SIZE)
    then = slots + (len(group.found) if rest else 0)
    return (len(shared) + own) * PAGE_SIZE, then * PAGE_SIZE


def _mapped(mappings: list[Shared]) -> int:
    """Bytes of the file that at least one of the mappings holds."""
    size = reached = 0
    for start, end in sorted({(each.offset, each.offset + each.size) for each in mappings}):
        size += max(end - max(start, reached), 0)
        reached = max(reached, end)
    return size


def _change(group: _Group, size: int, names: Counter[str]) -> str:
    path = group.path.removesuffix(" (deleted)")
    program = names.most_common(1)[0][0]
    if group.kind == "hugetlb":
        return "map it at an address that is a whole GiB, as mshare.attach does on engine hugetlb"
    if group.kind == "file":
        return "mshare.mmap(...) in place of mmap.mmap(...), with the same arguments"
    if program in _POSTGRES and group.kind in ("anonymous", "sysv"):
        pages = round_up(size, HUGE_PAGE) // HUGE_PAGE
        pool = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages"
        return (
            "huge_pages = on and huge_page_size = 2MB in postgresql.conf; before it is restarted, "
            f"as root, {pages} more huge pages: echo $(($(cat {pool}) + {pages})) > {pool}"
        )
    if os.path.dirname(path) == engines.by_name("shm").directory():
        name = os.path.basename(path)
        return f"mshare module load, as root; then create the region {name} anew"
    return (
        "the program as it is: mshare run -- PROGRAM ...; or "
        f"mshare.create('NAME', {size}) once; in each process: mshare.attach('NAME')"
    )
