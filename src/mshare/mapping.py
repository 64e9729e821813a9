"""Shared mappings at chosen addresses, owned by the views over them.

Python's ``mmap`` can't choose an address; the C library can. What :func:`own` returns is a
memoryview whose last copy, slice or array to die unmaps the memory.
"""

from __future__ import annotations

import ctypes
import functools
import os
from typing import Any

PROT_NONE, PROT_READ, PROT_WRITE = 0, 1, 2
MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS = 0x01, 0x02, 0x10, 0x20
MAP_LOCKED, MAP_NORESERVE, MAP_FIXED_NOREPLACE = 0x2000, 0x4000, 0x100000
MADV_HUGEPAGE, MADV_POPULATE_WRITE = 14, 23

_libc = ctypes.CDLL(None, use_errno=True)
_mmap = _libc.mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
]
_munmap = _libc.munmap
_munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_madvise = _libc.madvise
_madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_FAILED = ctypes.c_void_p(-1).value


def _error(call: str) -> OSError:
    code = ctypes.get_errno()
    return OSError(code, f"{call}: {os.strerror(code)}")


def mmap(address: int, size: int, prot: int, flags: int, fd: int, offset: int = 0) -> int:
    """mmap(2): the address it chose. :raises OSError: as the system call."""
    result: int | None = _mmap(address, size, prot, flags, fd, offset)
    if result == _FAILED:
        raise _error("mmap")
    return result or 0


def munmap(address: int, size: int) -> None:
    """munmap(2). :raises OSError: as the system call."""
    if _munmap(address, size):
        raise _error("munmap")


def madvise(address: int, size: int, advice: int) -> None:
    """madvise(2). :raises OSError: as the system call."""
    if _madvise(address, size, advice):
        raise _error("madvise")


def place(
    fd: int, size: int, *, readonly: bool, address: int | None = None, alignment: int = 1
) -> int:
    """Map ``size`` bytes of ``fd`` MAP_SHARED and return the address.

    :param address: where; None lets the kernel pick one that is a multiple of ``alignment``.
    :raises FileExistsError: something is mapped at ``address``.
    """
    prot = PROT_READ if readonly else PROT_READ | PROT_WRITE
    if address is not None:
        return mmap(address, size, prot, MAP_SHARED | MAP_FIXED_NOREPLACE, fd)
    if alignment <= 1:
        return mmap(0, size, prot, MAP_SHARED, fd)
    start = mmap(_last_place.get(alignment, 0), size, prot, MAP_SHARED, fd)
    if start % alignment:
        munmap(start, size)
        start = _place_aligned(fd, size, prot, alignment)
        _last_place[alignment] = start
    return start


_last_place: dict[int, int] = {}
"""Alignment to an address found for it: free again more often than not, and then one call does."""


def _place_aligned(fd: int, size: int, prot: int, alignment: int) -> int:
    """Reserve enough addresses to hold an aligned range, map there, give back the rest."""
    reserve = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE
    start = mmap(0, size + alignment, PROT_NONE, reserve, -1)
    head = -start % alignment
    try:
        mmap(start + head, size, prot, MAP_SHARED | MAP_FIXED, fd)
    except BaseException:
        munmap(start, size + alignment)
        raise
    if head:
        munmap(start, head)
    munmap(start + head + size, alignment - head)
    return start + head


class _Unmap:
    """Unmaps memory when it goes."""

    def __init__(self, address: int, mapped: int) -> None:
        self._where = address, mapped

    def __del__(self, call: Any = _munmap) -> None:
        call(*self._where)


@functools.lru_cache(maxsize=64)
def _memory_type(size: int, mapped: int) -> type[ctypes.Array[ctypes.c_ubyte]]:
    """The type of ``size`` of ``mapped`` bytes, unmapped when nobody looks into them any more.

    In two steps: the collector calls every ``__del__`` of a piece of garbage, in any order, before
    it takes the first part of it away, and other finalizers may look into the memory until then.
    """

    def leave(memory: Any, last: Any = _Unmap, where: Any = ctypes.addressof) -> None:
        memory.last = last(where(memory), mapped)

    body = {"_type_": ctypes.c_ubyte, "_length_": size, "__del__": leave}
    return type("Memory", (ctypes.Array,), body)


def own(address: int, size: int, mapped: int, *, readonly: bool) -> memoryview:
    """A view of the first ``size`` of ``mapped`` bytes; its last copy to die unmaps them all.

    Without memory for it they are unmapped at once.
    """
    try:
        memory = _memory_type(size, mapped).from_address(address)
    except BaseException:
        munmap(address, mapped)
        raise
    view = memoryview(memory).cast("B")
    return view.toreadonly() if readonly else view
