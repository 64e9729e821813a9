"""Regions by name: memory that any number of processes attach to."""

from __future__ import annotations

import builtins
import errno
import fcntl
import os
from collections.abc import Callable
from contextlib import suppress
from typing import SupportsIndex

from mshare import engines
from mshare.engines import Engine, Stat
from mshare.engines.base import DEFAULT_MODE, exists
from mshare.errors import about, invalid, no_locked_file
from mshare.names import check_name, creating
from mshare.region import PathOrFd, Region
from mshare.sizes import region_size


def create(
    name: str,
    size: SupportsIndex | str | None = None,
    mode: int | None = None,
    *,
    backing: PathOrFd | None = None,
    engine: str | None = None,
    address: SupportsIndex | None = None,
    locked: bool = False,
    fill: Callable[[Region], object] | None = None,
) -> Region:
    """Create a region and attach it for reading and writing.

    :param size: bytes, or a string such as ``"4G"``; whole pages of 4096 bytes. An engine with
        larger pages rounds it up: ``Region.size`` says what there is.
    :param mode: permission bits, exactly as given (no umask); 0600 by default.
    :param backing: a regular file, by path or open descriptor, to be the region's content; then
        size and permission are the file's. Read-only where only reading is allowed.
    :param engine: an engine's name; by default ``MSHARE_ENGINE``, else the best that works.
    :param address: attach here; by default an address the engine likes.
    :param locked: take all memory now and never move it, as a process needs that gives its
        window to a virtual machine. Counts against RLIMIT_MEMLOCK. Not with ``backing``.
    :param fill: called with the region before it has its name, so that nobody sees it half
        filled. If it fails, or its process dies, there is no region. Others of this user who
        create the name meanwhile wait for it. With ``address`` it must keep no view.
    :raises FileExistsError: the name is taken.
    :raises OSError: ENOSPC when the memory is not there, now rather than later; EOPNOTSUPP where
        the engine can't lock, or a file is to be locked.
    :raises ValueError: a bad name, size or mode (an ``OSError`` with errno too).
    """
    check_name(name)
    engines.asked(engine)
    if backing is not None:
        if fill is not None:
            raise TypeError("a region over a file has the file's content; leave out fill")
        if locked:
            raise no_locked_file(name)
        return _create_over(name, size, mode, backing, engine, address)
    if size is None:
        raise TypeError("a region needs a size, or backing= a file")
    bytes_ = region_size(size)
    mode = check_mode(DEFAULT_MODE if mode is None else mode)
    with about(name):
        with creating(name):
            if engines.holder(name):
                raise exists(name)
            best = engines.best(engine, bytes_, locked=locked)

            def filled(fd: int) -> None:
                if fill is not None:
                    copy = os.dup(fd)
                    with Region(name, best, copy, readonly=False, address=address) as region:
                        fill(region)

            fd = best.create(name, bytes_, mode, locked=locked, fill=filled)
        return _attach_created(name, best, fd, address, readonly=False)


def _create_over(
    name: str,
    size: SupportsIndex | str | None,
    mode: int | None,
    backing: PathOrFd,
    engine: str | None,
    address: SupportsIndex | None,
) -> Region:
    if size is not None or mode is not None:
        raise invalid("a region over a file has the file's size and mode; leave them out", name)
    file = backing if isinstance(backing, int) else os.fspath(backing)
    with about(name):
        with creating(name):
            if engines.holder(name):
                raise exists(name)
            chosen = engines.best(engine, over_file=True)
            fd, readonly = chosen.create_over(name, file)
        return _attach_created(name, chosen, fd, address, readonly=readonly)


def _attach_created(
    name: str, engine: Engine, fd: int, address: SupportsIndex | None, *, readonly: bool
) -> Region:
    """Attach the region ``fd``, just made; if that fails, nothing of it remains."""
    try:
        return Region(name, engine, fd, readonly=readonly, address=address)
    except BaseException:
        with suppress(OSError):
            engine.unlink(name)
        raise


def check_mode(mode: object) -> int:
    """Return ``mode`` if it is permission bits.

    :raises TypeError: not an integer.
    :raises InvalidValue: EINVAL when it is more.
    """
    if not isinstance(mode, int) or isinstance(mode, bool):
        raise TypeError(f"mode is an integer such as 0o640, not {type(mode).__name__}")
    if not 0 <= mode <= 0o777:
        raise invalid("mode is permission bits, 0 to 0o777", oct(mode))
    return mode


def attach(
    name: str | int,
    readonly: bool = False,
    *,
    engine: str | None = None,
    address: SupportsIndex | None = None,
) -> Region:
    """Attach a region that exists.

    :param name: its name, or an open descriptor of it (as another process may have sent); the
        descriptor stays the caller's.
    :param engine: where to look; by default ``MSHARE_ENGINE``, else everywhere.
    :param address: attach here, where nothing may be mapped; by default the engine chooses.
    :raises FileNotFoundError: no such region.
    :raises PermissionError: its mode bits forbid it.
    """
    if isinstance(name, int) and not isinstance(name, bool):
        return _attach_fd(name, readonly, address)
    name = check_name(name)
    with about(name):
        found, fd = engines.open_region(name, engine, readonly=readonly)
        return Region(name, found, fd, readonly=readonly, address=address)


def _attach_fd(fd: int, readonly: bool, address: SupportsIndex | None) -> Region:
    try:
        access = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
    except (OSError, ValueError, OverflowError):
        message = f"{os.strerror(errno.EBADF)}: none such is open in this process"
        raise OSError(errno.EBADF, message, fd) from None
    name = os.path.basename(os.readlink(f"/proc/self/fd/{fd}")).removesuffix(" (deleted)")
    if access == os.O_WRONLY or (access == os.O_RDONLY and not readonly):
        raise PermissionError(errno.EACCES, "the descriptor is not open for this access", name)
    with about(name):
        owner = next((each for each in engines.ENGINES if each.owns(fd)), engines.ENGINES[-1])
        copy = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
        return Region(name, owner, copy, readonly=readonly, address=address)


def unlink(name: str, *, engine: str | None = None) -> None:
    """Remove the region's name. Its memory goes when the last attachment does.

    :raises FileNotFoundError: no such region.
    :raises PermissionError: it belongs to another user.
    """
    check_name(name)
    try:
        with about(name):
            found = engines.find(name, engine)
            found.unlink(name)
    except FileNotFoundError as error:
        if error.filename == name:
            raise
        raise engines.missing(name) from None
    except PermissionError as error:
        message = "only its owner or root can remove the region"
        raise PermissionError(error.errno, message, name) from None


def stat(name: str, *, engine: str | None = None) -> Stat:
    """Size, memory, owner and mode of a region. :raises FileNotFoundError: no such region."""
    check_name(name)
    with about(name):
        return engines.find(name, engine).stat(name)


def list(engine: str | None = None) -> builtins.list[Stat]:
    """Every region on this machine, by name; with ``engine``, those it holds."""
    chosen = engines.by_name(engine) if engine else None
    found = [
        region for each in ((chosen,) if chosen else engines.ENGINES) for region in each.list()
    ]
    return sorted(found, key=lambda region: (region.name, region.engine))
