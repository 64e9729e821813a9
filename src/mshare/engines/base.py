"""What an engine is: a way to keep a region under a name and to map it.

Every engine keeps its regions as files of one directory, so names, owners, mode bits and
lifetimes are the file system's own. A region's file appears under its name when it is whole:
it is made without a name, gets its memory, and is then linked. A creator that dies before
leaves nothing; one that dies after leaves a region like any other.
"""

from __future__ import annotations

import ctypes
import errno
import operator
import os
import stat as st
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import ClassVar, SupportsIndex

from mshare import mapping
from mshare.engines.answers import Check, Stat
from mshare.engines.files import READ, READ_WRITE
from mshare.errors import RUN_OUT, invalid, unsupported
from mshare.names import check_name
from mshare.sizes import MAX_SIZE, PAGE_SIZE

DEFAULT_MODE = 0o600


class Engine(ABC):
    """One way to share. An instance holds no region, only where regions are."""

    name: ClassVar[str]
    summary: ClassVar[str]
    """What becomes of page tables, in a few words."""
    alignment: ClassVar[int] = 1
    """Bytes: addresses are chosen as multiples of this, so that page tables can be shared."""
    maps_files: ClassVar[bool] = False
    """Whether ``backing=`` works."""
    scans: ClassVar[bool] = False
    """Whether finding the directory takes a look at all mounts, so that it is tried last."""
    reserves: ClassVar[bool] = True
    """Whether a region has all its memory from the start."""
    locks: ClassVar[bool] = False
    """Whether ``locked=`` works."""

    variable: ClassVar[str]
    """The environment variable that names another directory for the regions."""

    def __init__(self) -> None:
        chosen = os.environ.get(self.variable)
        self.chosen = os.path.abspath(chosen) if chosen else None
        """That directory, as it was set when mshare was imported."""

    @abstractmethod
    def directory(self) -> str:
        """The directory of this engine's regions, which may not exist yet.

        :raises OSError: ENODEV when this machine has no place for it.
        """

    @abstractmethod
    def check(self, size: int = PAGE_SIZE) -> Check:
        """Whether a region of ``size`` bytes could be created by this user now."""

    def works(self, size: int = PAGE_SIZE) -> bool:
        """What :meth:`check` says, without the time to find out why not."""
        return self.check(size).works

    @abstractmethod
    def reserve(self, fd: int, size: int, name: str, *, locked: bool) -> None:
        """Give the unnamed file ``fd`` its size, rounded up to the granule, and its memory.

        Memory that is ``locked`` never moves.

        :raises OSError: ENOSPC when it does not fit; nothing else may fail later for it.
        """

    @property
    def granule(self) -> int:
        """Bytes: a region's file is a multiple of this."""
        return PAGE_SIZE

    def create(
        self,
        name: str,
        size: int,
        mode: int,
        *,
        locked: bool = False,
        fill: Callable[[int], None] = lambda fd: None,
    ) -> int:
        """Make the region ``name`` of ``size`` bytes, whole pages; a descriptor to write to it.

        :param fill: called with a descriptor of the region before it has its name.
        :raises FileExistsError: the name is taken.
        :raises OSError: ENOSPC when the memory is not there; ENODEV without a place for it;
            EOPNOTSUPP when this engine can't lock it.
        """
        if locked and not self.locks:
            raise unsupported("lock a region in memory", self.name, "msharefs", name)

        def make(fd: int) -> None:
            self.reserve(fd, size, name, locked=locked)
            fill(fd)

        return self._publish(name, mode, make)

    def _publish(self, name: str, mode: int, fill: Callable[[int], None]) -> int:
        """Make a file without a name, have it filled, and link it as ``name``; its descriptor."""
        with self._making(name) as directory:
            if os.path.lexists(f"{directory}/{name}"):
                raise exists(name)
            fd = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fill(fd)
            os.fchmod(fd, mode)
            parent = os.open(directory, os.O_PATH | os.O_CLOEXEC)
            try:
                os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=parent, follow_symlinks=True)
            except FileExistsError:
                raise exists(name) from None
            finally:
                os.close(parent)
        except BaseException:
            os.close(fd)
            raise
        return self._named(name, fd)

    def _named(self, name: str, fd: int) -> int:
        """A descriptor of the new region ``fd`` for which ``/proc`` shows its name.

        Where the mode bits keep even the owner out, or the name is gone already, ``fd`` itself.
        """
        try:
            spare = self.open(name, readonly=False)
        except OSError:
            return fd
        with suppress(OSError):
            if os.path.sameopenfile(spare, fd):
                spare, fd = fd, spare
        os.close(spare)
        return fd

    def create_over(self, name: str, file: str | int) -> tuple[int, bool]:
        """Make the region ``name`` over a file, by path or descriptor.

        :returns: a descriptor of the region, and whether its content can only be read.

        :raises OSError: EOPNOTSUPP when this engine can't.
        """
        raise unsupported("put a file into a region", self.name, "msharefs and shm", name)

    def map(
        self,
        fd: int,
        name: str,
        file: int | None,
        offset: int,
        size: int,
        file_offset: int,
        *,
        readonly: bool,
    ) -> None:
        """Put ``size`` bytes of an open file, or fresh memory, into the region ``fd``.

        :raises OSError: EOPNOTSUPP when this engine can't.
        """
        raise unsupported("map into a region", self.name, "msharefs", name)

    def unmap(self, fd: int, name: str, offset: int, size: int) -> None:
        """Take away what is mapped in a part of the region ``fd``.

        :raises OSError: EOPNOTSUPP when this engine can't.
        """
        raise unsupported("unmap a part of a region", self.name, "msharefs", name)

    def protect(self, fd: int, name: str, offset: int, size: int, *, readonly: bool) -> None:
        """Forbid or allow writing to a part of the region ``fd``, for every process.

        :raises OSError: EOPNOTSUPP when this engine can't.
        """
        raise unsupported("protect a part of a region", self.name, "msharefs", name)

    def extent(self, fd: int, size: int) -> int:
        """Bytes of the region ``fd``, whose file has ``size``, that hold content."""
        return size

    def open(self, name: str, *, readonly: bool) -> int:
        """A descriptor of the region's file.

        :raises FileNotFoundError: no region of this name.
        :raises PermissionError: its mode bits forbid this user the access.
        """
        try:
            flags = READ if readonly else READ_WRITE
            return os.open(f"{self.directory()}/{name}", flags | os.O_NOFOLLOW)
        except FileNotFoundError:
            return self._open_missing(name, readonly=readonly)

    def _open_missing(self, name: str, *, readonly: bool) -> int:
        """What :meth:`open` does when nothing is there under this name."""
        raise FileNotFoundError(errno.ENOENT, "no such region", f"{self.directory()}/{name}")

    def place(
        self,
        fd: int,
        name: str,
        size: int,
        *,
        readonly: bool,
        address: SupportsIndex | None = None,
    ) -> int:
        """Map all ``size`` bytes of ``fd`` and return the address.

        :raises InvalidValue: EINVAL when ``address`` is not one the engine can use.
        :raises FileExistsError: something is mapped at ``address``.
        """
        start = None if address is None else self._checked(address, name, size)
        try:
            return self._place(fd, name, size, start, readonly=readonly)
        except FileExistsError:
            message = f"something is mapped at the address {start:#x}, or in {size} bytes from it"
            raise FileExistsError(errno.EEXIST, message, name) from None

    def _checked(self, address: SupportsIndex, name: str, size: int) -> int:
        try:
            start = operator.index(address)
        except TypeError:
            message = f"an address is an integer, not {type(address).__name__}"
            raise TypeError(message) from None
        if start <= 0 or start % self.unit:
            raise invalid(f"the address {start:#x} is not a positive multiple of {self.unit}", name)
        if start + size > _END:
            raise invalid(f"{size} bytes at the address {start:#x} go past {_END:#x}", name)
        return start

    def _place(self, fd: int, name: str, size: int, start: int | None, *, readonly: bool) -> int:
        """Map at ``start``, or with None where the engine is at its best."""
        alignment = self.alignment
        return mapping.place(fd, size, readonly=readonly, address=start, alignment=alignment)

    @property
    def unit(self) -> int:
        """Bytes: a given address must be a multiple of this."""
        return self.granule

    def stat(self, name: str) -> Stat:
        """The region ``name``. :raises FileNotFoundError: no region of this name."""
        info = os.lstat(f"{self.directory()}/{name}")
        if not self._is_region(info):
            raise FileNotFoundError(errno.ENOENT, "no such region", name)
        return self._stat(name, info)

    def stat_open(self, fd: int, name: str) -> Stat:
        """The region whose file is open as ``fd``, also when its name is gone."""
        return Engine._stat(self, name, os.fstat(fd))

    def counters(self, name: str) -> dict[str, int]:
        """What the kernel counts for the region ``name``; empty where it counts nothing."""
        return {}

    def list(self) -> Iterator[Stat]:
        """All regions of this engine, in no order.

        :raises OSError: no descriptor or memory to look for them.
        """
        try:
            names = os.listdir(self.directory())
        except OSError as error:
            if error.errno in RUN_OUT:
                raise
            return
        for name in names:
            with suppress(ValueError):
                check_name(name)
                with suppress(FileNotFoundError):
                    yield self.stat(name)

    def unlink(self, name: str) -> None:
        """Remove the name; the memory goes with the last attachment.

        :raises FileNotFoundError: no region of this name.
        :raises PermissionError: it belongs to another user.
        """
        os.unlink(f"{self.directory()}/{name}")

    def leads_to(self, name: str, info: os.stat_result) -> bool:
        """Whether the name is that of the region whose file has this status."""
        try:
            return os.path.samestat(os.stat(f"{self.directory()}/{name}"), info)
        except FileNotFoundError:
            return False

    def owns(self, fd: int) -> bool:
        """Whether ``fd`` is a file of this engine's file system.

        :raises OSError: nobody can tell, for want of descriptors or memory.
        """
        try:
            return os.stat(self.directory()).st_dev == os.fstat(fd).st_dev
        except OSError as error:
            if error.errno in RUN_OUT:
                raise
            return False

    def _is_region(self, info: os.stat_result) -> bool:
        return st.S_ISREG(info.st_mode)

    def _stat(self, name: str, info: os.stat_result) -> Stat:
        return Stat(
            name=name,
            engine=self.name,
            size=info.st_size,
            resident=info.st_blocks * 512,
            mode=st.S_IMODE(info.st_mode),
            uid=info.st_uid,
            gid=info.st_gid,
            created=info.st_ctime,
        )

    @contextmanager
    def _making(self, name: str) -> Iterator[str]:
        """The directory, made for everybody (mode 1777) if it is not there, to make a file in.

        :raises FileExistsError: the name is taken.
        :raises OSError: ENODEV when this user can make no region here, and what to do about it.
        """
        try:
            directory = self.directory()
            if not os.path.lexists(directory):
                _make_folder(directory)
            yield directory
        except FileExistsError:
            raise exists(name) from None
        except OSError as error:
            if error.errno not in RUN_OUT:
                check = self.check()
                if not check.works:
                    raise OSError(errno.ENODEV, check.advice, name) from None
            raise OSError(error.errno, error.strerror, name) from None

    def _parent(self) -> str:
        """The directory, or where it would be made."""
        directory = self.directory()
        return directory if os.path.lexists(directory) else os.path.dirname(directory)

    def _obstacle(self, cure: str) -> Check | None:
        """Why this user can make no file in the directory; ``cure`` if it is missing."""
        parent = self._parent()
        if not os.path.isdir(parent):
            if self.chosen:
                return Check(False, f"{parent} is not a folder; set {self.variable} to one")
            return Check(False, f"{parent} is not a folder", cure)
        if not os.access(parent, os.W_OK | os.X_OK):
            cure = f"install -d -m 1777 {self.directory()}"
            return Check(False, f"no permission to write {parent}", cure)
        return None


_AT_FDCWD, _NOREPLACE = -100, 1


def _make_folder(directory: str) -> None:
    """For everybody, from the moment that it is there: its maker may be stopped at any time."""
    spare = f"{directory}.{os.urandom(8).hex()}"
    os.mkdir(spare, 0o700)
    try:
        os.chmod(spare, 0o1777)
        _rename_new(spare, directory)
    except FileExistsError:
        os.rmdir(spare)
    except BaseException:
        os.rmdir(spare)
        raise


def _rename_new(old: str, new: str) -> None:
    """rename(2), but not over an empty folder: another may be about to make a file in that.

    :raises FileExistsError: ``new`` is there.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), _NOREPLACE):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), new)


_END = 2 * MAX_SIZE
"""Where a process's addresses end."""


def exists(name: str) -> FileExistsError:
    """The exception for a name that is taken."""
    message = "a region of this name exists; attach to it, or unlink it first"
    return FileExistsError(errno.EEXIST, message, name)
