"""Engine ``shm``: files on tmpfs, and names for files elsewhere. The baseline on any Linux.

Page tables are not shared: each process pays 8 bytes per page and its own faults. Transparent
huge pages lower both, where the machine allows them for shared memory.
"""

from __future__ import annotations

import errno
import functools
import os
import stat as st
from contextlib import suppress
from typing import ClassVar

from mshare import mapping, memory
from mshare.engines.answers import Check, Stat
from mshare.engines.base import Engine
from mshare.engines.files import READ, READ_WRITE, check_content, mounted, open_content
from mshare.errors import RUN_OUT, invalid
from mshare.sizes import HUGE_PAGE, PAGE_SIZE, human

_PIECE = 4 << 20
"""Bytes allocated by one call. On 6.1 a signal undoes the call, and Python makes it again: with a
timer a long one would never end."""
HUGE_SETTING = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"


class Shm(Engine):
    """Regions as files of ``/dev/shm/mshare`` (or of the tmpfs folder ``MSHARE_SHM_DIR``)."""

    name: ClassVar[str] = "shm"
    summary: ClassVar[str] = "page tables not shared"
    variable: ClassVar[str] = "MSHARE_SHM_DIR"
    maps_files: ClassVar[bool] = True

    def directory(self) -> str:
        return self.chosen or "/dev/shm/mshare"

    def check(self, size: int = PAGE_SIZE) -> Check:
        obstacle = self._obstacle("mount -t tmpfs tmpfs /dev/shm")
        if obstacle:
            return obstacle
        available = memory.available()
        if available.bytes < size:
            return Check(False, f"{available} free, {human(size)} are needed")
        parent = self._parent()
        space = os.statvfs(parent)
        free = space.f_bavail * space.f_frsize
        if free < size:
            why = f"{parent} has {human(free)} free, {human(size)} are needed"
            cure = f"mount -o remount,size={_grown(space, size)} {_mount(parent)}"
            return Check(False, why, cure if _is_tmpfs(os.stat(parent).st_dev) else None)
        return Check(True, f"{human(free)} free on {parent}", None, self._notes(parent))

    def _notes(self, parent: str) -> tuple[str, ...]:
        directory = self.directory()
        notes = []
        with suppress(OSError):
            info = os.stat(directory)
            if info.st_uid not in (0, os.geteuid()):
                notes.append(
                    f"{directory} belongs to user {info.st_uid}, who can remove any region in it; "
                    f"as root: chown root:root {directory}"
                )
        device = os.stat(parent).st_dev
        if not _is_tmpfs(device):
            notes.append(f"{parent} is not on a tmpfs: regions are files on its disk")
        elif not _huge_setting(device):
            notes.append(
                f"transparent huge pages are off on {_mount(parent)}; "
                f"as root: mount -o remount,huge=advise {_mount(parent)}"
            )
        return tuple(notes)

    def reserve(self, fd: int, size: int, name: str, *, locked: bool) -> None:
        check = self.check(size)
        if not check.works:
            raise OSError(errno.ENOSPC, f"no room for the region: {check.advice}", name)
        os.ftruncate(fd, size)
        _populate_huge(fd, size)
        try:
            for start in range(0, size, _PIECE):
                os.posix_fallocate(fd, start, min(_PIECE, size - start))
        except OSError as error:
            raise OSError(error.errno, f"no room for the region: {error.strerror}", name) from None

    def create_over(self, name: str, file: str | int) -> tuple[int, bool]:
        path = _path_of(file)
        fd = open_content(path)
        try:
            _, readonly = check_content(fd, file)
            if isinstance(file, int) and not os.path.sameopenfile(fd, file):
                raise invalid(_NO_PATH, file)
            with self._making(name) as directory:
                os.symlink(path, f"{directory}/{name}")
        except BaseException:
            os.close(fd)
            raise
        return fd, readonly

    def open(self, name: str, *, readonly: bool) -> int:
        try:
            return super().open(name, readonly=readonly)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
        try:
            return self._follow(name, READ if readonly else READ_WRITE)
        except FileNotFoundError:
            return self._open_missing(name, readonly=readonly)

    def _follow(self, name: str, flags: int) -> int:
        """Open the file of a region over one: not one that its maker could not have opened so."""
        directory = self.directory()
        link = os.open(f"{directory}/{name}", os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            maker, target = os.fstat(link).st_uid, os.readlink("", dir_fd=link)
        finally:
            os.close(link)
        look = os.open(os.path.join(directory, target), os.O_PATH | os.O_CLOEXEC)
        try:
            info = os.fstat(look)
            trusted = maker in (0, os.geteuid(), info.st_uid)
            trusted = trusted or (flags == READ and bool(info.st_mode & st.S_IROTH))
            if not trusted or not st.S_ISREG(info.st_mode):
                message = f"user {maker}, who may not open it so, leads this name to {target}"
                raise PermissionError(errno.EACCES, message, name)
            return os.open(f"/proc/self/fd/{look}", flags)
        finally:
            os.close(look)

    def _open_missing(self, name: str, *, readonly: bool) -> int:
        path = f"{self.directory()}/{name}"
        if os.path.islink(path):
            gone = f"the region's file {os.readlink(path)} is gone"
            message = f"{gone}; remove the region: mshare rm {name}"
            raise FileNotFoundError(errno.ENOENT, message, name)
        return super()._open_missing(name, readonly=readonly)

    def leads_to(self, name: str, info: os.stat_result) -> bool:
        path = f"{self.directory()}/{name}"
        return super().leads_to(name, info) or (os.path.islink(path) and not os.path.exists(path))

    def _place(self, fd: int, name: str, size: int, start: int | None, *, readonly: bool) -> int:
        if not _huge_setting(os.fstat(fd).st_dev):
            return super()._place(fd, name, size, start, readonly=readonly)
        # elsewhere no huge page is used, and since 6.12 a fault makes none
        placed = mapping.place(fd, size, readonly=readonly, address=start, alignment=HUGE_PAGE)
        with suppress(OSError):
            mapping.madvise(placed, size, mapping.MADV_HUGEPAGE)
        return placed

    def _is_region(self, info: os.stat_result) -> bool:
        return st.S_ISREG(info.st_mode) or st.S_ISLNK(info.st_mode)

    def _stat(self, name: str, info: os.stat_result) -> Stat:
        if not st.S_ISLNK(info.st_mode):
            return super()._stat(name, info)
        path = f"{self.directory()}/{name}"
        try:
            backing = os.readlink(path)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return self._stat(name, os.lstat(path))  # made anew meanwhile, in memory
        broken = None
        try:
            target = os.stat(path)
        except OSError as error:
            target, broken = info, f"{backing}: {error.strerror}"
        return Stat(
            name=name,
            engine=self.name,
            size=0 if broken else target.st_size,
            resident=None,
            mode=st.S_IMODE(target.st_mode),
            uid=target.st_uid,
            gid=target.st_gid,
            created=info.st_ctime,
            backing=backing,
            broken=broken,
        )


_NO_PATH = "the open file has no path any more, so a name can't lead to it"


def _path_of(file: str | int) -> str:
    """The absolute path of a file. :raises InvalidValue: it is open, and has none any more."""
    if isinstance(file, str):
        return os.path.realpath(file)
    check_content(file, file)
    path = os.readlink(f"/proc/self/fd/{file}")
    if not os.path.exists(path):
        raise invalid(_NO_PATH, file)
    return path


@functools.cache
def _is_tmpfs(device: int) -> bool:
    return mounted(device)[0].endswith("tmpfs")


@functools.cache
def _huge_setting(device: int) -> str:
    """What a tmpfs was mounted with (``huge=``), as this process first saw it; empty is never.

    The machine's setting is about memory without a mount (memfd, SysV), but for ``deny`` and
    ``force``: Documentation/admin-guide/mm/transhuge.rst.

    :raises OSError: no descriptor or memory to look at it.
    """
    try:
        with open(HUGE_SETTING) as file:
            machine = file.read().split("[")[-1].split("]")[0]
        if machine in ("deny", "force"):
            return machine.replace("deny", "")
    except OSError as error:
        if error.errno in RUN_OUT:
            raise
        return ""
    options = mounted(device)[1]
    setting = next((word for word in options.split(",") if word.startswith("huge=")), "")
    return setting.removeprefix("huge=").replace("never", "")


def _populate_huge(fd: int, size: int) -> None:
    """Fill the file with huge pages where the setting is ``advise``.

    fallocate(2) would fill it with small ones that stay small. A failure here is no loss:
    fallocate fills what is left and tells the error.
    """
    if _huge_setting(os.fstat(fd).st_dev) != "advise":
        return
    with suppress(OSError):
        address = mapping.place(fd, size, readonly=False, alignment=HUGE_PAGE)
        try:
            mapping.madvise(address, size, mapping.MADV_HUGEPAGE)
            mapping.madvise(address, size, mapping.MADV_POPULATE_WRITE)
        finally:
            mapping.munmap(address, size)


def _mount(path: str) -> str:
    while not os.path.ismount(path):
        path = os.path.dirname(path)
    return path


def _grown(space: os.statvfs_result, size: int) -> str:
    used = (space.f_blocks - space.f_bavail) * space.f_frsize
    return f"{-(-(used + size) // (1 << 20))}M"
