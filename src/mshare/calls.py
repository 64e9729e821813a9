"""The two calls mshare began with, as functions: ``mshare`` and ``mshare_unlink``.

They work on addresses, as system calls do; :func:`mshare.create` and :func:`mshare.attach` are
what a Python program wants. Proposed for Linux in 2022 ("mm/mshare: Add basic page table
sharing using mshare"); the meaning of the flags is POSIX's, as in open(2).
"""

from __future__ import annotations

import ctypes
import errno
import os
from contextlib import suppress

from mshare import engines, mapping
from mshare.engines import Engine
from mshare.engines.base import exists
from mshare.errors import about, invalid
from mshare.names import check_name, creating
from mshare.regions import check_mode, unlink
from mshare.sizes import MAX_SIZE, SLOT_SIZE

_FLAGS = os.O_ACCMODE | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


def mshare(name: str, addr: int, length: int, oflag: int, mode: int = 0o600) -> int:
    """Share ``length`` bytes of this process from address ``addr`` on, as the region ``name``.

    If the region exists it is mapped there, in place of what was mapped. If not, and ``oflag``
    has O_CREAT, it is created, gets the content of what is mapped in the range, and takes its
    place: to the process nothing changes but that others can share it. The range stays mapped
    until the process unmaps it or ends. No other thread may write to the range meanwhile.

    :param addr: a multiple of 1 GiB; 0 lets the engine choose.
    :param length: bytes: the region's size exactly, a multiple of the engine's page.
    :param oflag: O_RDONLY or O_RDWR, and O_CREAT, O_EXCL. O_WRONLY is O_RDWR: no memory here
        can be written and not read.
    :param mode: permission bits of a region it creates.
    :returns: the address.
    :raises FileExistsError: EEXIST, O_CREAT and O_EXCL and the name is taken.
    :raises FileNotFoundError: ENOENT, no such region and no O_CREAT.
    :raises PermissionError: EACCES, the region's mode bits forbid the access.
    :raises InvalidValue: EINVAL, a bad name, address, length, flag or mode.
    """
    check_name(name)
    readonly = _readonly(oflag)
    check_mode(mode)
    _check_range(addr, length)
    with about(name):
        return _share(name, addr, length, oflag, mode, readonly)


def _share(name: str, addr: int, length: int, oflag: int, mode: int, readonly: bool) -> int:
    while True:
        if oflag & os.O_CREAT:
            with creating(name):
                if not engines.holder(name):
                    with suppress(FileExistsError):  # the lock does not keep other users out
                        return _create(name, addr, length, mode, readonly)
            if oflag & os.O_EXCL:
                raise exists(name)
        try:
            engine, fd = engines.open_region(name, None, readonly=readonly)
        except FileNotFoundError:
            if oflag & os.O_CREAT and engines.holder(name) is None:
                continue
            raise
        try:
            return _map_over(engine, fd, name, addr, length, readonly=readonly)
        finally:
            os.close(fd)


def mshare_unlink(name: str) -> None:
    """Remove the region's name; those who share it keep it.

    :raises FileNotFoundError: ENOENT, no such region.
    :raises PermissionError: EACCES, it belongs to another user.
    """
    unlink(name)


def _readonly(oflag: int) -> bool:
    access = oflag & os.O_ACCMODE
    if oflag & ~_FLAGS or access == os.O_ACCMODE:
        raise invalid("flags are O_RDONLY, O_WRONLY or O_RDWR, with O_CREAT and O_EXCL", oct(oflag))
    return access == os.O_RDONLY


def _check_range(addr: int, length: int) -> None:
    if addr < 0 or addr % SLOT_SIZE:
        raise invalid(f"the address is not a multiple of {SLOT_SIZE}", hex(addr))
    if length <= 0 or addr + length > 2 * MAX_SIZE:
        raise invalid("the length is not a positive number of bytes below the end", length)


def _create(name: str, addr: int, length: int, mode: int, readonly: bool) -> int:
    engine = engines.best(None, length)
    if length % engine.granule:
        raise invalid(f"the length is not a multiple of {engine.granule}", length)

    def fill(region: int) -> None:
        if addr:
            _copy_in(engine, region, name, addr, length)

    fd = engine.create(name, length, mode, fill=fill)
    try:
        return _map_over(engine, fd, name, addr, length, readonly=readonly)
    except BaseException:
        engine.unlink(name)
        raise
    finally:
        os.close(fd)


def _map_over(engine: Engine, fd: int, name: str, addr: int, length: int, *, readonly: bool) -> int:
    """Map the region in place of what is mapped at ``addr``."""
    size = os.fstat(fd).st_size
    if length != size:
        raise invalid(f"the region '{name}' has {size} bytes, and the length must be that", length)
    if not addr:
        return mapping.place(fd, size, readonly=readonly, alignment=SLOT_SIZE)
    prot = mapping.PROT_READ if readonly else mapping.PROT_READ | mapping.PROT_WRITE
    return mapping.mmap(addr, size, prot, mapping.MAP_SHARED | mapping.MAP_FIXED, fd)


def _copy_in(engine: Engine, fd: int, name: str, addr: int, length: int) -> None:
    """Copy what is mapped in the range into the region; what is not reads as zeros."""
    parts = _readable(addr, addr + length)
    if not parts:
        return
    copy = engine.place(fd, name, length, readonly=False)
    try:
        for start, end in parts:
            ctypes.memmove(copy + start - addr, start, end - start)
    finally:
        mapping.munmap(copy, length)


def _readable(start: int, end: int) -> list[tuple[int, int]]:
    """The parts of the range that are mapped, from ``/proc/self/maps``.

    :raises OSError: EACCES when a part can't be read: its content could not be kept.
    """
    parts = []
    with open("/proc/self/maps", errors="surrogateescape", newline="\n") as file:
        for line in file:
            where, access, *_ = line.split()
            low, high = (int(number, 16) for number in where.split("-"))
            if low < end and high > start:
                if access[0] != "r":
                    raise PermissionError(
                        errno.EACCES, f"{where} is mapped {access}, its content can't be kept"
                    )
                parts.append((max(low, start), min(high, end)))
    return parts
