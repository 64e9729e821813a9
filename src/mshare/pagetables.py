"""What page tables, resident memory and page faults cost, from the kernel's own figures.

Every figure is a :class:`Figure`: an integer that knows its unit and the kernel file it was
read from. Works for the own process, and for others as far as ``/proc`` allows.
"""

from __future__ import annotations

import os
import resource
from typing import NamedTuple

from mshare.memory import meminfo

_KB = 1024


class Figure(int):
    """An integer with its ``unit`` ("bytes", "faults") and ``source``, a kernel file and field."""

    unit: str
    source: str

    def __new__(cls, value: int, unit: str, source: str) -> Figure:
        figure = super().__new__(cls, value)
        figure.unit, figure.source = unit, source
        return figure

    def __repr__(self) -> str:
        return f"{int(self)} {self.unit} ({self.source})"

    def __getnewargs__(self) -> tuple[int, str, str]:  # type: ignore[override]
        return int(self), self.unit, self.source


class Mapping(NamedTuple):
    """One mapping of a process: addresses, ``path`` ("" if anonymous), sizes in bytes."""

    start: int
    end: int
    path: str
    size: Figure
    resident: Figure
    shared: bool


def process(pid: int | None = None) -> Figure:
    """Page-table bytes of a process (by default this one).

    Counts its own tables of every level. A table it shares is counted as the sharing kernel
    does: hugetlbfs counts the shared PMD page for each sharer.

    :raises ProcessLookupError: no such process.
    """
    path = f"/proc/{pid or 'self'}/status"
    for line in _lines(path, pid):
        if line.startswith("VmPTE:"):
            return Figure(int(line.split()[1]) * _KB, "bytes", f"{path} VmPTE")
    return Figure(0, "bytes", f"{path} VmPTE")


def system() -> Figure:
    """Page-table bytes of all processes together, without the kernel's own."""
    return Figure(meminfo()["PageTables"], "bytes", "/proc/meminfo PageTables")


def mappings(pid: int | None = None) -> list[Mapping]:
    """Every mapping of a process with its resident bytes, huge pages included.

    :raises ProcessLookupError: no such process.
    :raises PermissionError: it belongs to another user.
    """
    path = f"/proc/{pid or 'self'}/smaps"
    found: list[Mapping] = []
    start = end = size = resident = 0
    name, shared = "", False

    def add() -> None:
        if end:
            found.append(
                Mapping(
                    start,
                    end,
                    name,
                    Figure(size, "bytes", f"{path} Size"),
                    Figure(resident, "bytes", f"{path} Rss + Shared_Hugetlb + Private_Hugetlb"),
                    shared,
                )
            )

    for line in _smaps(path, pid):
        key, _, value = line.partition(":")
        if key in ("Size", "Rss", "Shared_Hugetlb", "Private_Hugetlb"):
            number = int(value.split()[0]) * _KB
            if key == "Size":
                size = number
            else:
                resident += number
        elif "-" in key.split(" ", 1)[0]:
            add()
            fields = line.rstrip("\n").split(None, 5)
            start, end = (int(number, 16) for number in fields[0].split("-"))
            shared, resident = fields[1][3] == "s", 0
            name = fields[5] if len(fields) > 5 else ""
    add()
    return found


def own(pid: int | None = None) -> Figure:
    """Bytes of memory that a process has for itself: in private mappings, and in no other process.

    What forked processes have in common counts for none of them, until one writes to it.

    :raises ProcessLookupError: no such process.
    :raises PermissionError: it belongs to another user.
    """
    path = f"/proc/{pid or 'self'}/smaps"
    total, private = 0, False
    for line in _smaps(path, pid):
        key, _, value = line.partition(":")
        if key in ("Private_Clean", "Private_Dirty"):
            total += private * int(value.split()[0]) * _KB
        elif "-" in key.split(" ", 1)[0]:
            private = line.split(None, 2)[1][3] == "p"
    return Figure(total, "bytes", f"{path} Private_Clean + Private_Dirty of private mappings")


def mapping_at(address: int, pid: int | None = None) -> Mapping:
    """The mapping that holds ``address``. :raises LookupError: nothing is mapped there."""
    for mapping in mappings(pid):
        if mapping.start <= address < mapping.end:
            return mapping
    raise LookupError(f"nothing is mapped at {address:#x}")


class Faults:
    """Page faults of this process over a block of code.

    >>> with Faults() as faults:
    ...     work = bytearray(1 << 20)
    >>> faults.minor >= 0, faults.major.unit
    (True, 'faults')

    ``minor`` faults found their page in memory, ``major`` ones waited for a disk; threads count
    together. Read by getrusage(2), which is what ``/proc/PID/stat`` shows as minflt and majflt.
    """

    def __init__(self) -> None:
        self._start = self._end = (0, 0)

    def __enter__(self) -> Faults:
        self._start = self._end = _fault_counts()
        return self

    def __exit__(self, *_: object) -> None:
        self._end = _fault_counts()

    @property
    def minor(self) -> Figure:
        """Minor faults in the block."""
        return Figure(self._end[0] - self._start[0], "faults", "/proc/self/stat minflt")

    @property
    def major(self) -> Figure:
        """Major faults in the block."""
        return Figure(self._end[1] - self._start[1], "faults", "/proc/self/stat majflt")


def _fault_counts() -> tuple[int, int]:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_minflt, usage.ru_majflt


def _smaps(path: str, pid: int | None) -> list[str]:
    """All of it: a process that ends while it is read has the rest left out."""
    lines = _lines(path, pid)
    if pid and lines and not process(pid):
        raise _gone(pid)
    return lines


def _lines(path: str, pid: int | None) -> list[str]:
    try:
        with open(path, errors="surrogateescape", newline="\n") as file:
            return file.readlines()
    except (FileNotFoundError, ProcessLookupError):
        raise _gone(pid) from None


def _gone(pid: int | None) -> ProcessLookupError:
    import errno

    return ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH), pid)
