"""Engine ``hugetlb``: files on hugetlbfs, whose page tables stock kernels already share.

The kernel shares the PMD page of 1 GiB of a hugetlbfs file between processes when each maps
that GiB whole, MAP_SHARED, at an address and file offset aligned to 1 GiB, while another has it
mapped (``mm/hugetlb.c``, ``huge_pmd_share``). So this engine aligns every attachment. The rest
of a size that is not whole GiB, and every page of a smaller region, is not shared; at 8 bytes
per 2 MiB it costs little.

Huge pages are the administrator's to reserve. This engine never does; ``check`` says how.
"""

from __future__ import annotations

import errno
import os
import re
from contextlib import suppress
from typing import ClassVar

from mshare.engines.answers import Check
from mshare.engines.base import Engine
from mshare.engines.files import mounted
from mshare.memory import meminfo
from mshare.sizes import HUGE_PAGE, PAGE_SIZE, SLOT_SIZE, human, round_up

MOUNT_POINT = "/dev/hugepages"


class Hugetlb(Engine):
    """Regions as files of the folder ``mshare`` on a hugetlbfs (or of ``MSHARE_HUGETLB_DIR``)."""

    name: ClassVar[str] = "hugetlb"
    summary: ClassVar[str] = (
        "page tables shared by the kernel, per whole GiB, between live processes"
    )
    alignment: ClassVar[int] = SLOT_SIZE
    scans: ClassVar[bool] = True

    variable: ClassVar[str] = "MSHARE_HUGETLB_DIR"

    def __init__(self) -> None:
        super().__init__()
        self._found: str | None = None

    def directory(self) -> str:
        if self.chosen:
            return self.chosen
        if self._found is None:
            mounts = _mounts()
            if not mounts:
                raise OSError(
                    errno.ENODEV, f"no hugetlbfs is mounted; as root: {_MOUNT}", "hugetlb"
                )
            self._found = f"{mounts[0]}/mshare"
        return self._found

    def _forget(self) -> bool:
        """Look for the mount anew next time, if the one found is no more."""
        gone = self._found is not None and not os.path.isdir(self._found)
        if gone:
            self._found = None
        return gone

    @property
    def granule(self) -> int:
        """The huge page size of the mount, 2 MiB where there is none."""
        with suppress(OSError):
            return os.statvfs(self._parent()).f_bsize
        return HUGE_PAGE

    def check(self, size: int = PAGE_SIZE) -> Check:
        if not os.path.isdir("/sys/kernel/mm/hugepages"):
            return Check(False, "this kernel is built without hugetlbfs")
        self._forget()
        try:
            parent = self._parent()
        except OSError:
            return Check(False, "no hugetlbfs is mounted", _MOUNT)
        return self._obstacle(_MOUNT) or self._room(parent, size)

    def _obstacle(self, cure: str) -> Check | None:
        obstacle = super()._obstacle(cure)
        if obstacle or not self.chosen:
            return obstacle
        parent = self._parent()
        if mounted(os.stat(parent).st_dev)[0] == "hugetlbfs":
            return None
        cure = f"mount -t hugetlbfs -o mode=1777 hugetlbfs {parent}"
        return Check(False, f"{parent} is not on a hugetlbfs", cure)

    def _room(self, parent: str, size: int) -> Check:
        page = os.statvfs(parent).f_bsize
        needed = round_up(size, page) // page
        free = _free_pages(page)
        if free < needed:
            total = _pool(page, "nr_hugepages") + needed - free
            memory = meminfo()["MemTotal"]
            if total * page > memory:
                why = f"memory is {human(memory)}, {human(total * page)} of huge pages are needed"
                return Check(False, why)
            setting = f"/sys/kernel/mm/hugepages/hugepages-{page >> 10}kB/nr_hugepages"
            why = f"{free} free huge pages of {human(page)}, {needed} needed"
            return Check(False, why, f"echo {total} > {setting}")
        left = _mount_space(parent)
        if left is not None and left < needed * page:
            why = f"the mount of {parent} is limited and has {human(left)} left"
            return Check(False, why, f"mount -o remount,size={human(size)} {parent}")
        return Check(True, f"{free} free huge pages of {human(page)}")

    def _open_missing(self, name: str, *, readonly: bool) -> int:
        before = self._found
        if self._forget() and self.directory() != before:
            return self.open(name, readonly=readonly)
        return super()._open_missing(name, readonly=readonly)

    def reserve(self, fd: int, size: int, name: str, *, locked: bool) -> None:
        size = round_up(size, self.granule)
        obstacle = self._obstacle(_MOUNT)
        if obstacle:
            raise OSError(errno.ENODEV, obstacle.advice, name)
        room = self._room(self._parent(), size)
        if not room.works:
            raise OSError(errno.ENOSPC, f"no room for the region: {room.advice}", name)
        os.ftruncate(fd, size)
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError as error:
            raise OSError(error.errno, f"no room for the region: {error.strerror}", name) from None


_MOUNT = f"mkdir -p {MOUNT_POINT} && mount -t hugetlbfs -o mode=1777 hugetlbfs {MOUNT_POINT}"


def _mounts() -> list[str]:
    """Mount points of hugetlbfs whose pages fit a GiB several times, smallest pages first."""
    found = []
    with open("/proc/self/mounts", errors="surrogateescape") as file:
        for line in file:
            if " hugetlbfs " in line:
                point = _unescaped(line.split()[1])
                with suppress(OSError):
                    page = os.statvfs(point).f_bsize
                    if page < SLOT_SIZE:
                        found.append((page, point))
    return [point for _, point in sorted(found)]


def _unescaped(path: str) -> str:
    """A path as it is: the kernel writes space, tab, newline and backslash in octal."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)


def _pool(page: int, field: str) -> int:
    with open(f"/sys/kernel/mm/hugepages/hugepages-{page >> 10}kB/{field}") as file:
        return int(file.read())


def _free_pages(page: int) -> int:
    """Huge pages of ``page`` bytes a new file could get: free, not promised, or overcommit."""
    unpromised = _pool(page, "free_hugepages") - _pool(page, "resv_hugepages")
    overcommit = _pool(page, "nr_overcommit_hugepages") - _pool(page, "surplus_hugepages")
    return unpromised + max(overcommit, 0)


def _mount_space(path: str) -> int | None:
    """Bytes left on a hugetlbfs mounted with ``size=``; None without that limit."""
    space = os.statvfs(path)
    if space.f_blocks == 0 or space.f_blocks == 0xFFFFFFFFFFFFFFFF:
        return None
    return space.f_bavail * space.f_bsize
