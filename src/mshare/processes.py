"""The processes of this machine and what they map shared, from ``/proc``; nothing is changed.

A process may end at any time: then it is ``ProcessLookupError``, or left out of a list.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple

from mshare.sizes import HUGE_PAGE, PAGE_SIZE, SLOT_SIZE

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

SAMPLES = 512
"""Blocks of 2 MiB that are looked at in a mapping, at least: all of them, up to 1 GiB."""
_ENTRY = 8
_PER_BLOCK = HUGE_PAGE // PAGE_SIZE
_NAME = re.compile(rb"^Name:\t(.*)$", re.M)
_VMPTE = re.compile(rb"^VmPTE:\s*(\d+) kB$", re.M)
_SHARED = re.compile(
    rb"^([0-9a-f]+)-([0-9a-f]+) .(.).s ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) (\d+) *(.*)$", re.M
)
_SMAPS = re.compile(rb"^([0-9a-f]+)-[0-9a-f]+ |^(?:Shmem|File)PmdMapped:\s*(\d+) kB$", re.M)


class Process(NamedTuple):
    """A process with an address space: its program's name and its page-table bytes (VmPTE)."""

    pid: int
    name: str
    page_tables: int


class Shared(NamedTuple):
    """A shared mapping: where, at which offset of which file, and whether it may be written."""

    start: int
    end: int
    offset: int
    device: tuple[int, int]
    inode: int
    path: str
    writable: bool

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.start


class Occupied(NamedTuple):
    """What of a mapping is in a process's page tables, in bytes: exact, or from a sample."""

    tables: int
    resident: int
    common: int = 0
    """A bit for each block that is looked at in every process that maps this part of the file."""
    weight: float = 1.0
    """How many blocks a bit of ``common`` stands for."""


def pids() -> list[int]:
    """Every process that ``/proc`` shows to this user."""
    return sorted(int(entry) for entry in os.listdir("/proc") if entry.isdigit())


def process(pid: int) -> Process | None:
    """The process ``pid``; None for one without memory: the kernel's own, or dead."""
    with _vanishing(pid), open(f"/proc/{pid}/status", "rb") as file:
        text = file.read()
    name, tables = _NAME.search(text), _VMPTE.search(text)
    if not (name and tables):
        return None
    return Process(pid, _text(name[1]), int(tables[1]) * 1024)


def processes() -> Iterator[Process]:
    """Every process with memory of its own that ``/proc`` shows to this user."""
    for pid in pids():
        with suppress(ProcessLookupError, PermissionError):
            found = process(pid)
            if found:
                yield found


def shared_mappings(pid: int) -> list[Shared]:
    """The shared mappings of a process.

    :raises PermissionError: it belongs to another user.
    """
    with _vanishing(pid), open(f"/proc/{pid}/maps", "rb") as file:
        text = file.read()
    return [
        Shared(
            start=int(start, 16),
            end=int(end, 16),
            offset=int(offset, 16),
            device=(int(major, 16), int(minor, 16)),
            inode=int(inode),
            path=_text(path),
            writable=write == b"w",
        )
        for start, end, write, offset, major, minor, inode, path in _SHARED.findall(text)
    ]


def occupied(pid: int, mappings: list[Shared], samples: int = SAMPLES) -> list[Occupied]:
    """How much of each mapping the page tables of ``pid`` hold, from ``/proc/PID/pagemap``.

    A PTE page is there for each block of 2 MiB with a page in it. In a mapping of more than
    ``samples`` blocks as many are looked at, from equal parts: half of them chosen for this
    process, and they give its figures; half the same in each process that maps this part.

    :raises PermissionError: it belongs to another user.
    """
    huge = _huge_mapped(pid)
    with _vanishing(pid), open(f"/proc/{pid}/pagemap", "rb", buffering=0) as file:
        return [
            _occupied(file.fileno(), mapping, pid, huge.get(mapping.start, 0), samples)
            for mapping in mappings
        ]


def _occupied(pagemap: int, mapping: Shared, pid: int, huge: int, samples: int) -> Occupied:
    import numpy as np

    first, last = mapping.start // HUGE_PAGE, -(-mapping.end // HUGE_PAGE)
    if mapping.size <= samples * HUGE_PAGE:
        own = common = _pages(pagemap, mapping, list(range(first, last)))
    else:
        part = mapping.offset, mapping.size
        own = _pages(pagemap, mapping, _sample(first, last, samples // 2, (pid, mapping.start)))
        common = _pages(pagemap, mapping, _sample(first, last, samples // 2, part))
    weight = (last - first) / len(own)
    blocks = round(np.count_nonzero(own) * weight)
    slots = -(-mapping.end // SLOT_SIZE) - mapping.start // SLOT_SIZE
    return Occupied(
        tables=(max(blocks - huge // HUGE_PAGE, 0) + min(slots, blocks)) * PAGE_SIZE,
        resident=min(round(int(own.sum()) * weight) * PAGE_SIZE, mapping.size),
        common=int.from_bytes(np.packbits(common > 0).tobytes()),
        weight=weight,
    )


def _sample(first: int, last: int, count: int, seed: tuple[int, int]) -> list[int]:
    """Blocks from ``first`` to before ``last``, one from each of equal parts."""
    import numpy as np

    parts = np.linspace(first, last, count + 1)
    inside = np.random.default_rng(seed).random(count)
    chosen: list[int] = (parts[:-1] + inside * np.diff(parts)).astype(int).tolist()
    return chosen


def _pages(pagemap: int, mapping: Shared, blocks: list[int]) -> npt.NDArray[np.int64]:
    """How many pages of each block are in the page tables."""
    import numpy as np

    pages = np.zeros(len(blocks), np.int64)
    for done in range(0, len(blocks), SAMPLES):
        batch = blocks[done : done + SAMPLES]
        entries = np.zeros((len(batch), _PER_BLOCK), np.int64)
        for row, block in enumerate(batch):
            low = max(mapping.start, block * HUGE_PAGE)
            high = min(mapping.end, (block + 1) * HUGE_PAGE)
            room = entries[row, : (high - low) // PAGE_SIZE]
            # a process that has ended since pagemap was opened reads as nothing
            if not os.preadv(pagemap, [room.data], low // PAGE_SIZE * _ENTRY):
                raise ProcessLookupError
        pages[done : done + len(batch)] = (entries < 0).sum(axis=1)
    return pages


def _huge_mapped(pid: int) -> dict[int, int]:
    """Bytes of each mapping, by its start, that are mapped as huge pages and so need no PTE page.

    ``smaps`` walks all memory of the process, so only where this machine has such pages at all.
    """
    from mshare.memory import meminfo

    fields = meminfo()
    if not fields.get("ShmemPmdMapped", 0) + fields.get("FilePmdMapped", 0):
        return {}
    with _vanishing(pid), open(f"/proc/{pid}/smaps", "rb") as file:
        text = file.read()
    found: dict[int, int] = {}
    start = 0
    for address, kilobytes in _SMAPS.findall(text):
        if address:
            start = int(address, 16)
        elif kilobytes != b"0":
            found[start] = found.get(start, 0) + int(kilobytes) * 1024
    return found


@contextmanager
def _vanishing(pid: int) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH), pid) from None


def _text(name: bytes) -> str:
    """A name as it can be shown: what is no text, or would steer a terminal, escaped."""
    text = name.decode("utf-8", "backslashreplace")
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )
