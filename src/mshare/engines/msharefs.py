"""Engine ``msharefs``: the kernel module, which shares page tables of any memory.

A region is a file of msharefs, and one set of page tables that every attachment points at.
Memory is not reserved at creation: it comes with the first touch, charged to the process that
touches. The calls are those of ``docs/abi.md``, spoken with ``fcntl.ioctl``.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat as st
import struct
from contextlib import suppress
from typing import ClassVar, NamedTuple

from mshare import mapping
from mshare.engines.answers import Check, Stat
from mshare.engines.base import Engine
from mshare.engines.files import check_content, open_content
from mshare.errors import no_locked_file
from mshare.memory import meminfo
from mshare.sizes import PAGE_SIZE, SLOT_SIZE, human, round_up

MOUNT_POINT = "/sys/fs/mshare"


def _iow(number: int, layout: str) -> int:
    return 1 << 30 | struct.calcsize(layout) << 16 | ord("x") << 8 | number


_MAPPING = "=QQQIIIxxxx"
_RANGE = "=QQ"
_PROTECTION = "=QQII"
_INFO = "=II13Q"
_FILE = "=II"
_MAPPED = "=QII"
_INFO_SIZE = struct.calcsize(_INFO)
CREATE_MAPPING = _iow(0, _MAPPING)
UNMAP = _iow(1, _RANGE)
PROTECT = _iow(2, _PROTECTION)
INFO = _iow(3, _INFO) | 2 << 30
OPEN_FILE = _iow(4, _FILE)
OPEN_MAPPING = _iow(5, _MAPPED)
LOCKED = 1
"""In the flags of INFO: the region's pages never move."""


class Msharefs(Engine):
    """Regions as files of the msharefs mounted on ``/sys/fs/mshare``."""

    name: ClassVar[str] = "msharefs"
    summary: ClassVar[str] = "page tables shared between all processes"
    variable: ClassVar[str] = "MSHARE_MSHAREFS_DIR"
    maps_files: ClassVar[bool] = True
    reserves: ClassVar[bool] = False
    locks: ClassVar[bool] = True

    def directory(self) -> str:
        return self.chosen or MOUNT_POINT

    @property
    def granule(self) -> int:
        """What the file system says in ``mshare_info``: bytes one shared table covers."""
        with suppress(OSError, ValueError), open(f"{self.directory()}/mshare_info") as file:
            return int(file.read())
        return SLOT_SIZE

    def check(self, size: int = PAGE_SIZE) -> Check:
        directory = self.directory()
        if not os.path.exists(f"{directory}/mshare_info"):
            return _missing(directory)
        if not os.access(directory, os.W_OK | os.X_OK):
            return Check(False, f"no permission to write {directory}", f"chmod 1777 {directory}")
        fields = meminfo()
        whole = fields["MemTotal"] + fields["SwapTotal"]
        if size > whole:
            return Check(False, f"memory and swap are {human(whole)}, {human(size)} are needed")
        return Check(True, f"mounted on {directory}")

    def works(self, size: int = PAGE_SIZE) -> bool:
        return os.path.exists(f"{self.directory()}/mshare_info") and super().works(size)

    def reserve(self, fd: int, size: int, name: str, *, locked: bool) -> None:
        check = self.check(size)
        if not check.works:
            raise OSError(errno.ENOSPC, f"no room for the region: {check.advice}", name)
        os.ftruncate(fd, round_up(size, self.granule))
        self.map(fd, name, None, 0, size, 0, readonly=False, locked=locked)

    def create_over(self, name: str, file: str | int) -> tuple[int, bool]:
        fd = file if isinstance(file, int) else open_content(file)
        try:
            info, readonly = check_content(fd, file)
            size = round_up(info.st_size, PAGE_SIZE)

            def fill(region: int) -> None:
                os.ftruncate(region, round_up(size, self.granule))
                self.map(region, name, fd, 0, size, 0, readonly=readonly)

            return self._publish(name, st.S_IMODE(info.st_mode) & 0o777, fill), readonly
        finally:
            if fd is not file:
                os.close(fd)

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
        locked: bool = False,
    ) -> None:
        flags = mapping.MAP_SHARED | mapping.MAP_FIXED
        if locked or info(fd).flags & LOCKED:
            flags |= mapping.MAP_LOCKED
            if file is not None:
                raise no_locked_file(name)
        if file is None:
            flags |= mapping.MAP_ANONYMOUS
        prot = _prot(readonly)
        number = 0 if file is None else file
        args = struct.pack(_MAPPING, offset, size, file_offset, prot, flags, number)
        _call(fd, CREATE_MAPPING, args, "map", name)

    def open_file(self, file: int, *, writable: bool) -> int:
        """A descriptor of the region that all share who ask for the open ``file``.

        :raises OSError: there is no module that can, or the file can't be shared.
        """
        control = os.open(f"{self.directory()}/mshare_info", os.O_RDONLY | os.O_CLOEXEC)
        try:
            access = os.O_RDWR if writable else os.O_RDONLY
            request = bytearray(struct.pack(_FILE, file, access))
            region: int = fcntl.ioctl(control, OPEN_FILE, request)
            return region
        finally:
            os.close(control)

    def unmap(self, fd: int, name: str, offset: int, size: int) -> None:
        _call(fd, UNMAP, struct.pack(_RANGE, offset, size), "unmap", name)

    def protect(self, fd: int, name: str, offset: int, size: int, *, readonly: bool) -> None:
        args = struct.pack(_PROTECTION, offset, size, _prot(readonly), 0)
        _call(fd, PROTECT, args, "protect", name)

    def _place(self, fd: int, name: str, size: int, start: int | None, *, readonly: bool) -> int:
        try:
            return super()._place(fd, name, size, start, readonly=readonly)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            why = "this process runs a virtual machine, which can attach only a locked region"
            cure = "create it with locked=True"
            raise OSError(errno.EOPNOTSUPP, f"{why}; {cure}", name) from None

    def extent(self, fd: int, size: int) -> int:
        return info(fd).mapped_end or size

    def stat(self, name: str) -> Stat:
        if name == "mshare_info":
            raise FileNotFoundError(errno.ENOENT, "no such region", name)
        return super().stat(name)

    def counters(self, name: str) -> dict[str, int]:
        with suppress(PermissionError):
            fd = self.open(name, readonly=True)
            try:
                return info(fd)._asdict()
            finally:
                os.close(fd)
        return {}


def _missing(directory: str) -> Check:
    """Why there is no msharefs: the first obstacle, and the others as notes."""
    from mshare import module

    problems = module.status().problems
    if not problems:
        cure = f"mkdir -p {directory} && mount -t msharefs msharefs {directory}"
        return Check(False, f"msharefs is not mounted on {directory}", cure)
    (why, cure), *others = problems
    return Check(False, why, cure, tuple(f"{what}; then: {how}" for what, how in others))


def _prot(readonly: bool) -> int:
    return mapping.PROT_READ if readonly else mapping.PROT_READ | mapping.PROT_WRITE


_REASONS = {
    errno.EOPNOTSUPP: "only regular files in the page cache can be shared (no hugetlbfs, no DAX)",
    errno.EACCES: "the region, or the file, is not open for writing",
    errno.ENOMEM: "no memory for it (here or in its cgroup), or locked and more than ulimit -l",
    errno.EINVAL: "the kernel module refused the range",
    errno.EBUSY: "what a locked region holds stays while a process, as this one, has it attached",
    errno.EPERM: "the file is sealed against writing, or this user may lock no memory (ulimit -l)",
}


def _call(fd: int, code: int, args: bytes, what: str, name: str) -> None:
    """One ioctl that changes the layout. :raises OSError: with what the errno means here."""
    try:
        fcntl.ioctl(fd, code, args)
    except OSError as error:
        number = error.errno or errno.EIO
        reason = _REASONS.get(number, os.strerror(number))
        raise OSError(number, f"can't {what}: {reason}", name) from None


class Info(NamedTuple):
    """What the kernel counts for a region: bytes, slots, and events since it was made."""

    flags: int
    region_size: int
    alignment: int
    attachments: int
    grafts: int
    ungrafts: int
    faults: int
    flushes: int
    layout_changes: int
    pagetable_bytes: int
    resident_bytes: int
    mapped_bytes: int
    mapped_end: int
    locked_bytes: int


def info(fd: int) -> Info:
    """The counters of the region open as ``fd``. :raises OSError: it is not of msharefs."""
    answer = fcntl.ioctl(fd, INFO, struct.pack(_INFO, _INFO_SIZE, *[0] * len(Info._fields)))
    return Info(*struct.unpack(_INFO, answer)[1:])
