"""What lies where in a region, and what an access to it gives: the inside of the model.

`Content`   bytes that can be mapped: a file, or anonymous memory
`Layout`    which content lies where in a region; what lies nowhere is a hole
`Region`    a layout with a size, an owner and names
`Window`    one mapping of a region in one process
`Mapping`   a file or other memory that a process has mapped without msharefs
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

PAGE = 4096
SLOT = 1 << 30
"""What one entry of the upper page tables covers; sizes, offsets and addresses are multiples."""
MAX_SIZE = 32 << 40
ADDRESSES = 1 << 47
"""A process's addresses end here, less a page."""

READ, WRITE, EXEC = 1, 2, 4
RW = READ | WRITE
SHARED, PRIVATE, FIXED, ANONYMOUS = 0x01, 0x02, 0x10, 0x20
NORESERVE, NOREPLACE, LOCKED = 0x4000, 0x100000, 0x2000
MAYMOVE, TO_FIXED, DONTUNMAP = 1, 2, 4
FILE_SIZE = 8 * PAGE
"""Of files that are mapped, at first."""
TMPFILE = "."
"""Instead of a name: a region without one, by O_TMPFILE."""


class Fault(Exception):
    """An access that ends the process: SIGSEGV or SIGBUS. A system call says EFAULT instead."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.signal = number


class Closed(Exception):
    """The region was closed: a ValueError in the library."""


class Readonly(Exception):
    """A view refuses to be written to: an error of Python or NumPy, not of the memory."""


def refuse(code: int) -> NoReturn:
    """The call fails with ``code`` and changes nothing."""
    raise OSError(code, os.strerror(code))


def refuse_if(condition: object, code: int) -> None:
    """As `refuse`, on a condition."""
    if condition:
        refuse(code)


def pages(start: int, size: int) -> range:
    """Numbers of the pages that ``size`` bytes from ``start`` lie in."""
    return range(start // PAGE, -(-(start + size) // PAGE))


def drop(table: dict[int, Any], numbers: range) -> None:
    """Forget what a table has for some pages."""
    for number in [each for each in table if each in numbers]:
        del table[number]


@dataclass(eq=False)
class Content:
    """Bytes that can be mapped, by page. A file has a size; anonymous memory has no end.

    ``readable`` and ``writable`` say what the descriptor allows that a file is mapped by.
    """

    size: int | None = None
    pages: dict[int, bytearray] = field(default_factory=dict)
    paged_out: bool = False
    """Somebody asked for pages to leave memory, so nobody knows how many are in it."""

    def page(self, number: int) -> bytearray:
        """A page, zeros at first."""
        return self.pages.setdefault(number, bytearray(PAGE))

    def resize(self, size: int) -> None:
        """Cut the file, or let it grow by zeros. Sizes are whole pages here."""
        self.size = size
        drop(self.pages, range(size // PAGE, 1 << 63))

    def number(self, position: int) -> int:
        """The number of the page there. ABI, Faults: past the end of a file, SIGBUS."""
        if self.size is not None and position >= self.size:
            raise Fault(signal.SIGBUS)
        return position // PAGE


@dataclass(frozen=True)
class Source:
    """What a descriptor of a file leads to: content, or something that cannot be shared."""

    content: Content | None
    readable: bool = True
    writable: bool = True
    sealed: bool = False
    """A memfd that nobody may write to any more."""


@dataclass(frozen=True, eq=False)
class Extent:
    """Content in a region from ``start`` to ``end``, beginning with byte ``offset`` of it."""

    start: int
    end: int
    content: Content
    offset: int
    writable: bool
    may_write: bool
    """Whether PROTECT may make it writable: the descriptor it came from was, and no seal is."""
    locked_by: int | None = None
    """MAP_LOCKED: the user whose limit it counts against. Its pages never leave memory."""

    def part(self, start: int, end: int) -> Extent:
        """What of it lies between ``start`` and ``end``."""
        start, end = max(start, self.start), min(end, self.end)
        return replace(self, start=start, end=end, offset=self.offset + start - self.start)


class Layout:
    """The extents of a region, in order and without overlap. The rest is hole."""

    def __init__(self) -> None:
        self.extents: list[Extent] = []

    def at(self, position: int) -> Extent | None:
        """The extent there, or None in a hole."""
        return next((each for each in self.extents if each.start <= position < each.end), None)

    def within(self, start: int, end: int) -> list[Extent]:
        """What lies between ``start`` and ``end``, extents at its edges cut."""
        return [
            each.part(start, end) for each in self.extents if each.start < end > start < each.end
        ]

    def remove(self, start: int, end: int) -> None:
        """Make a hole. Anonymous memory there is freed."""
        for gone in self.within(start, end):
            if gone.content.size is None:
                drop(gone.content.pages, pages(gone.offset, gone.end - gone.start))
        self._cut(start, end)

    def _cut(self, start: int, end: int) -> None:
        self.extents = self.within(0, start) + self.within(end, 1 << 63)

    def put(self, extent: Extent) -> None:
        """Put content in place of what is there."""
        self._cut(extent.start, extent.end)
        self.extents = sorted([*self.extents, extent], key=lambda each: each.start)

    @property
    def mapped_bytes(self) -> int:
        """INFO: what is not a hole."""
        return sum(each.end - each.start for each in self.extents)

    @property
    def mapped_end(self) -> int:
        """INFO: where the last extent ends."""
        return max((each.end for each in self.extents), default=0)

    @property
    def resident_bytes(self) -> int | None:
        """INFO: what is in memory, if all is anonymous: what is locked, and pages touched."""
        if any(each.content.size is not None for each in self.extents):
            return None
        movable = {each.content for each in self.extents if each.locked_by is None}
        if any(content.paged_out for content in movable):
            return None
        return self.locked_bytes() + sum(len(content.pages) for content in movable) * PAGE

    def locked_bytes(self, *users: int) -> int:
        """INFO: what never moves; or what of it counts against the limit of some users."""
        locked = [each for each in self.extents if each.locked_by is not None]
        return sum(each.end - each.start for each in locked if not users or each.locked_by in users)


@dataclass(eq=False)
class Region:
    """A regular file of msharefs. ABI, The file system."""

    mode: int
    owner: int
    names: set[str]
    linkable: bool = False
    """Made by O_TMPFILE and not linked yet."""
    size: int = 0
    layout: Layout = field(default_factory=Layout)
    locked: bool | None = None
    """Whether all content is locked, or none: the first mapping decides it, for good."""
    of: tuple[Content, bool] | None = None
    """OPEN_FILE: the file it is the region of, and whether it is the one for writers."""
    layout_changes: int = 0
    windows: list[Window] = field(default_factory=list)
    """All windows on it, in all processes."""
    tables: dict[bool, dict[int, bool]] = field(default_factory=lambda: {True: {}, False: {}})
    """The one set of page tables of each view (writable or read-only): which pages it has an
    entry for, and whether that allows writing. An access that finds its entry is no fault,
    whoever made it."""

    def check_range(self, start: int, size: int) -> None:
        """ABI, The ioctls: whole pages, not empty, inside the region."""
        wrong = size <= 0 or (start | size) % PAGE or start + size > self.size
        refuse_if(wrong, errno.EINVAL)

    def set_size(self, size: int) -> None:
        """ABI, Making a region: once, a multiple of a slot."""
        if size == self.size:
            return
        refuse_if(self.size or size <= 0 or size % SLOT, errno.EINVAL)
        refuse_if(size > MAX_SIZE, errno.EFBIG)
        self.size = size

    def change(self, start: int, size: int) -> None:
        """A layout change of a range begins: all windows are taken out and put in place again.

        What is in a locked region is neither taken nor changed while there are windows.
        """
        for window in self.windows:
            window.loose.clear()
        kept = self.locked and self.windows and self.layout.within(start, start + size)
        refuse_if(kept, errno.EBUSY)
        self.layout_changes += 1
        for view in self.tables.values():
            drop(view, pages(start, size))

    @property
    def slots_in_place(self) -> int:
        """INFO, grafts less ungrafts: slots of windows that use the region's tables now."""
        return sum(len(window.in_place()) for window in self.windows)


@dataclass(eq=False)
class Window:
    """One mapping of a region. ABI, Windows: it stays a whole."""

    region: Region
    address: int
    size: int
    offset: int
    writable: bool
    readable: bool = True
    """Not so with PROT_WRITE alone: the processor reads all the same, some system calls do not."""
    kept: dict[str, str] = field(default_factory=lambda: {"fork": "DOFORK", "read": "NORMAL"})
    """The last advice of each kind that is kept with a window; DONTFORK: no child gets it."""
    loose: set[int] = field(default_factory=set)
    """Slots taken out of the process by MADV_DONTNEED, until the next access there."""

    @property
    def end(self) -> int:
        return self.address + self.size

    def position(self, address: int) -> int:
        """Where in the region an address is."""
        return address - self.address + self.offset

    def in_place(self) -> set[int]:
        """Slots that share the region's tables: all that have content, from mmap on."""
        mine = range(self.offset // SLOT, (self.offset + self.size) // SLOT)
        within = self.region.layout.within
        return {each for each in mine if within(each * SLOT, (each + 1) * SLOT)} - self.loose

    def find(self, address: int, *, write: bool) -> tuple[Content, int]:
        """The content there, and the number of the page in it.

        ABI, Faults: in a hole, and where the window or the content is read-only, SIGSEGV.
        """
        position = self.position(address)
        extent = self.region.layout.at(position)
        if not extent or (write and not (self.writable and extent.writable)):
            raise Fault(signal.SIGSEGV)
        content = extent.content
        return content, content.number(extent.offset + position - extent.start)

    def access(self, address: int, *, write: bool) -> tuple[bytearray, bool]:
        """The page there, the same one for everybody, and whether this may be a fault served.

        It is none when the entry is there, whichever process brought it in.
        """
        content, page = self.find(address, write=write)
        number, slot = self.position(address) // PAGE, self.position(address) // SLOT
        entries = self.region.tables[self.writable]
        ready = slot not in self.loose and number in entries and entries[number] >= write
        self.loose.discard(slot)
        if content.size is None and not content.paged_out:
            entries[number] = entries.get(number, False) or write
        return content.page(page), not ready


@dataclass(eq=False)
class Mapping:
    """A file or other memory, mapped by mmap(2) or shmat(2). ABI, OPEN_MAPPING."""

    address: int
    size: int
    content: Content
    offset: int
    shared: bool
    writable: bool
    may_write: bool
    """Whether mprotect could make it writable."""
    may_move: bool
    """Whether remap_file_pages could move it to any part of the file."""

    @property
    def end(self) -> int:
        return self.address + self.size

    def find(self, address: int, *, write: bool) -> tuple[Content, int]:
        """As that of a window."""
        if write and not self.writable:
            raise Fault(signal.SIGSEGV)
        return self.content, self.content.number(self.offset + address - self.address)

    def access(self, address: int, *, write: bool) -> tuple[bytearray, bool]:
        """As that of a window."""
        content, number = self.find(address, write=write)
        return content.page(number), True


def populate(window: Window, address: int, size: int, *, write: bool) -> None:
    """Touch each page of a range. EFAULT where an access would be a signal."""
    for number in pages(address, size):
        try:
            window.access(number * PAGE, write=write)
        except Fault:
            refuse(errno.EFAULT)


def _populate_read(window: Window, address: int, size: int) -> None:
    refuse_if(not window.readable, errno.EINVAL)
    populate(window, address, size, write=False)


def _populate_write(window: Window, address: int, size: int) -> None:
    refuse_if(not window.writable, errno.EINVAL)
    populate(window, address, size, write=True)


def _let_go(window: Window, address: int, size: int) -> None:
    """DONTNEED: the process's entries go, the region's stay, and so does the content."""
    first, last = window.position(address), window.position(address + size - 1)
    window.loose |= set(range(first // SLOT, last // SLOT + 1)) & window.in_place()


def _page_out(window: Window, address: int, size: int) -> None:
    """COLD and PAGEOUT: the content may leave memory and comes back."""
    start = window.position(address)
    for extent in window.region.layout.within(start, start + size):
        extent.content.paged_out = True
    for view in window.region.tables.values():
        drop(view, pages(start, size))


def _remove(window: Window, address: int, size: int) -> None:
    refuse(errno.EOPNOTSUPP if window.writable else errno.EACCES)


def _refused(window: Window, address: int, size: int) -> None:
    refuse(errno.EINVAL)


def _nothing(window: Window, address: int, size: int) -> None:
    """Succeeds without effect."""


def _keep(kind: str, advice: str) -> Callable[[Window, int, int], None]:
    """Advice that is kept with a window is for all of it, unless it changes nothing."""

    def keep(window: Window, address: int, size: int) -> None:
        if window.kept.get(kind) != advice:
            refuse_if((address, size) != (window.address, window.size), errno.EINVAL)
            window.kept[kind] = advice

    return keep


ADVICE: dict[str, Callable[[Window, int, int], None]] = {
    "DONTNEED": _let_go,
    "COLD": _page_out,
    "PAGEOUT": _page_out,
    "POPULATE_READ": _populate_read,
    "POPULATE_WRITE": _populate_write,
    "REMOVE": _remove,
    "FREE": _refused,
    "WIPEONFORK": _refused,
    "DODUMP": _refused,
    "COLLAPSE": _refused,
    "MERGEABLE": _nothing,
    "HUGEPAGE": _keep("huge", "HUGEPAGE"),
    "NOHUGEPAGE": _keep("huge", "NOHUGEPAGE"),
    "SEQUENTIAL": _keep("read", "SEQUENTIAL"),
    "NORMAL": _keep("read", "NORMAL"),
    "DONTDUMP": _nothing,
    "WILLNEED": _nothing,
    "DONTFORK": _keep("fork", "DONTFORK"),
    "DOFORK": _keep("fork", "DOFORK"),
}
"""What each advice does to a window. ABI, Windows."""
