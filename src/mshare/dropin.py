"""``mshare.mmap``: Python's ``mmap.mmap``, with page tables that all processes share.

It is made as a plain mapping of the same arguments. If that maps a large part of a regular file
MAP_SHARED, and the kernel module is there, the object then looks at the file through the region
that the module keeps of it (OPEN_FILE in ``docs/abi.md``); on any doubt it stays what it is. So
every method is CPython's own, and this file only moves the object's pointer from one mapping of
the file to the other. The plain one stays, untouched and therefore without page tables, until
the object is closed: then, and when the size changes, the pointer is moved back first.
"""

from __future__ import annotations

import ctypes
import mmap as python
import operator
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from mmap import (
    ACCESS_COPY,
    ACCESS_DEFAULT,
    ACCESS_READ,
    ACCESS_WRITE,
    MAP_SHARED,
    PROT_READ,
    PROT_WRITE,
)
from typing import Any, Self

from mshare import engines, mapping
from mshare.engines.msharefs import Msharefs
from mshare.errors import invalid, unsupported
from mshare.sizes import SLOT_SIZE, parse_offset, round_up

__all__ = ["ACCESS_COPY", "ACCESS_DEFAULT", "ACCESS_READ", "ACCESS_WRITE", "mmap"]

_POPULATE = {22, 23}
"""MADV_POPULATE_READ and MADV_POPULATE_WRITE: they fill the mapping that is looked at."""


@cache
def min_size() -> int:
    """Bytes: below, a window of its own costs a process about as much as the plain page tables.

    :raises InvalidValue: ``MSHARE_MMAP_MIN`` is not a size.
    """
    chosen = os.environ.get("MSHARE_MMAP_MIN") or "4M"
    try:
        return parse_offset(chosen)
    except ValueError:
        raise invalid("not a size", f"MSHARE_MMAP_MIN={chosen}") from None


class _Fields(ctypes.Structure):
    """How CPython's mmap object starts, after its header: 3.11 to 3.14."""

    _fields_ = [("data", ctypes.c_void_p), ("size", ctypes.c_ssize_t)]

    @classmethod
    def of(cls, memory: python.mmap) -> _Fields:
        return cls.from_address(id(memory) + object.__basicsize__)


def _layout_is_known() -> bool:
    """Whether the fields are where they are read and written."""
    with python.mmap(-1, 3 * python.PAGESIZE) as memory:
        fields = _Fields.of(memory)
        data = fields.data
        start = (ctypes.c_char * 1).from_buffer(memory)
        found: bool = data == ctypes.addressof(start) and fields.size == len(memory)
        del start
        return found


_usable = _layout_is_known()


class _End:
    """Takes a window away when it goes itself. Nobody looks through it by then."""

    def __init__(self, address: int, length: int, region: int) -> None:
        self._where, self._region = (address, length), region

    def __del__(self, munmap: Any = mapping.munmap, close: Any = os.close) -> None:
        if self._where[0]:
            munmap(*self._where)
        close(self._region)


class _Window:
    """A window onto the region of a file, for one mmap object, which looks through it or not."""

    _address = 0

    def __init__(self, memory: python.mmap, region: int, prot: int, offset: int) -> None:
        """From the file's ``offset`` on; the open ``region`` then belongs to this object."""
        self.region, self.prot, self.offset = region, prot, offset
        self._fields = fields = _Fields.of(memory)
        self._plain, self._size = fields.data, fields.size
        first = offset // SLOT_SIZE * SLOT_SIZE
        self._length = round_up(offset - first + fields.size, SLOT_SIZE)
        self._address = mapping.mmap(0, self._length, prot, MAP_SHARED, region, first)
        self._inside = self._address + offset - first
        self.enter()

    def __del__(self, last: Any = _End) -> None:
        # in two steps, as mapping._memory_type: other finalizers of the same garbage may look in
        self._end = last(self._address, self._length, self.region)

    def enter(self) -> None:
        """Let the object look through the window, unless it was closed or resized meanwhile."""
        if (self._fields.data, self._fields.size) == (self._plain, self._size):
            self._fields.data = self._inside

    def leave(self) -> None:
        """Let it look at its own mapping of the file, if it looks through this window."""
        if self._fields.data == self._inside:
            self._fields.data = self._plain


@contextmanager
def _plain(window: _Window | None) -> Iterator[None]:
    """Let the object look at its own mapping for the block, and for good if that ends well."""
    if window:
        window.leave()
    try:
        yield
    except BaseException:
        if window:
            window.enter()
        raise


def _open_region(fileno: int, *, writable: bool) -> int:
    """The region of the file. :raises OSError: it has none, for whatever reason."""
    engine = engines.asked(None) or engines.by_name(Msharefs.name)
    if not isinstance(engine, Msharefs) or not _usable:
        raise unsupported("share the mapping of a file", engine.name, Msharefs.name, str(fileno))
    return engine.open_file(fileno, writable=writable)


class mmap(python.mmap):  # noqa: N801
    """A file in memory: ``mmap.mmap`` with its arguments, methods and errors.

    Where the kernel module is loaded, all processes that map a file this way use one set of page
    tables for it, whoever comes first: see :attr:`shared`. The right to the file is the
    descriptor's, as ever. Nothing has a name, so nothing is left when the last process ends.
    """

    __slots__ = ("_window",)
    _window: _Window | None

    def __new__(
        cls,
        fileno: int,
        length: int,
        flags: int = MAP_SHARED,
        prot: int = PROT_WRITE | PROT_READ,
        access: int = ACCESS_DEFAULT,
        offset: int = 0,
        **more: Any,
    ) -> Self:
        smallest = min_size()
        numbers = map(operator.index, (fileno, flags, prot, access, offset))
        fileno, flags, prot, access, offset = numbers
        self = super().__new__(cls, fileno, length, flags, prot, access, offset, **more)
        self._window = None
        if access == ACCESS_READ:
            prot = PROT_READ
        sharable = flags == MAP_SHARED and access != ACCESS_COPY and fileno >= 0
        if sharable and prot in (PROT_READ, PROT_READ | PROT_WRITE) and len(self) >= smallest:
            with suppress(OSError):
                self._share(_open_region(fileno, writable=prot != PROT_READ), prot, offset)
        return self

    def _share(self, region: int, prot: int, offset: int) -> None:
        """Look at the file through its region from now on. :raises OSError: as mmap(2)."""
        self._window = _Window(self, region, prot, offset)

    @property
    def shared(self) -> bool:
        """Whether the page tables are shared; if not, this is plain ``mmap.mmap``."""
        return self._window is not None

    def __del__(self) -> None:
        # what is unmapped next, by the object itself, has to be its own mapping
        window = getattr(self, "_window", None)
        if window:
            window.leave()

    def close(self) -> None:
        """As ``mmap.mmap.close``. :raises BufferError: there are views of it."""
        window = self._window
        with _plain(window):
            super().close()
        self._window = None

    def resize(self, newsize: int) -> None:
        """As ``mmap.mmap.resize``, file and mapping."""
        window = self._window
        with _plain(window):
            super().resize(newsize)
        if window:
            self._window = None
            with suppress(OSError):
                self._share(os.dup(window.region), window.prot, window.offset)

    def madvise(self, option: int, *range_: int) -> None:
        """As ``mmap.mmap.madvise``. All but POPULATE is advice on the file, or on no mapping."""
        window = self._window
        if option in _POPULATE:
            super().madvise(option, *range_)
            return
        with _plain(window):
            super().madvise(option, *range_)
        if window:
            window.enter()

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return super().__repr__().replace("<mmap ", "<mshare.mmap ", 1)
