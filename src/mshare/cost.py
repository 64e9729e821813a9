"""What sharing costs, by arithmetic: page tables and faults of each engine, before anything runs.

On x86-64 a table is a page of 4096 bytes: a PTE page maps 2 MiB, a PMD page 1 GiB and a PUD
page 512 GiB. Memory starts at a multiple of 512 GiB here, in a part of the address space that
nothing else uses; elsewhere a process has the upper tables already (up to 8 KiB less) or begins
in the middle of one (up to 12 KiB more).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, SupportsIndex

from mshare.errors import invalid
from mshare.sizes import HUGE_PAGE, PAGE_SIZE, SLOT_SIZE, parse_size

PUD_COVERS = 512 * SLOT_SIZE
FAULT_AROUND = 16
"""Small pages that one read fault maps, if they are in memory (``fault_around_bytes``)."""
WINDOW = 3 * PAGE_SIZE
"""At most what a window of msharefs needs in a process for each 512 GiB: a PUD page, and the PMD
page and PTE page that are made with it."""
REGION = 3 * PAGE_SIZE
"""What a region of msharefs has besides: the tables of a place in which nothing is mapped."""
PAGE_SIZES = (PAGE_SIZE, HUGE_PAGE)


class Cost(NamedTuple):
    """What one engine costs for some memory in some processes. Bytes, and counts of faults."""

    engine: str
    page_tables: int
    """In all."""
    once: int
    """The part of it that there is once, however many processes there are."""
    per_process: int
    """The part that each process adds."""
    vmpte: int
    """What ``VmPTE`` shows for each process; hugetlb counts shared tables for each sharer."""
    faults_first: int
    """To touch every page, content being there: the first process."""
    faults_further: int
    """Each further one."""
    content: int
    """Memory for the content."""


def tables(size: int, page_size: int = PAGE_SIZE) -> int:
    """Bytes of one whole set of tables for ``size`` bytes of pages of ``page_size``."""
    pages = _pages(size, SLOT_SIZE) + _pages(size, PUD_COVERS)
    if page_size == PAGE_SIZE:
        pages += _pages(size, HUGE_PAGE)
    return pages * PAGE_SIZE


def windows(size: int) -> int:
    """Bytes at most that a process adds of its own to use ``size`` bytes on msharefs."""
    return _pages(size, PUD_COVERS) * WINDOW


def plan(
    size: SupportsIndex | str,
    processes: int,
    *,
    page_size: int = PAGE_SIZE,
    writing: bool = False,
) -> list[Cost]:
    """The cost of each engine, and of a private copy in each process.

    Every process touches every page: by reading, or by writing. On msharefs readers have a set
    of tables of their own, next to that of who filled the region.

    :raises TypeError: a size that is neither an integer nor a string, or part of a process.
    :raises InvalidValue: EINVAL for a size that is none, a page size that x86-64 has not, or no
        process.
    """
    bytes_ = parse_size(size)
    if page_size not in PAGE_SIZES:
        raise invalid("a page size is 4K or 2M", page_size)
    if not isinstance(processes, SupportsIndex):
        raise TypeError(f"processes are a whole number, not {processes!r}")
    if processes < 1:
        raise invalid("processes are 1 or more", processes)
    return [engine(bytes_, processes, page_size, writing) for engine in _ENGINES]


def _pages(size: int, covers: int) -> int:
    return -(-size // covers)


def _faults(size: int, page_size: int, writing: bool) -> int:
    around = FAULT_AROUND if page_size == PAGE_SIZE and not writing else 1
    return _pages(size, page_size * around)


def _msharefs(size: int, processes: int, page_size: int, writing: bool) -> Cost:
    once = REGION + tables(size, page_size) * (1 if writing else 2)
    each = windows(size)
    faults = _faults(size, page_size, writing)
    return Cost("msharefs", once + processes * each, once, each, each, faults, 0, size)


def _hugetlb(size: int, processes: int, page_size: int, writing: bool) -> Cost:
    """The kernel shares the PMD page of each whole GiB; the rest is each process's own."""
    slots, rest = divmod(size, SLOT_SIZE)
    once = slots * PAGE_SIZE
    each = (_pages(rest, SLOT_SIZE) + _pages(size, PUD_COVERS)) * PAGE_SIZE
    own = _pages(rest, HUGE_PAGE)
    return Cost(
        engine="hugetlb",
        page_tables=once + processes * each,
        once=once,
        per_process=each,
        vmpte=once + each,
        faults_first=slots * (SLOT_SIZE // HUGE_PAGE) + own,
        faults_further=slots + own,
        content=_pages(size, HUGE_PAGE) * HUGE_PAGE,
    )


def _shm(size: int, processes: int, page_size: int, writing: bool) -> Cost:
    each = tables(size, page_size)
    faults = _faults(size, page_size, writing)
    return Cost("shm", processes * each, 0, each, each, faults, faults, size)


def _private(size: int, processes: int, page_size: int, writing: bool) -> Cost:
    """A copy in each process. The kernel keeps a PTE page in store for each of its huge pages."""
    each = tables(size)
    faults = _faults(size, page_size, writing=True)
    return Cost("private", processes * each, 0, each, each, faults, faults, processes * size)


_ENGINES: tuple[Callable[[int, int, int, bool], Cost], ...] = (_msharefs, _hugetlb, _shm, _private)
