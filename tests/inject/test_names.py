"""Calls on names: open, mkdir, link, rename, unlink, stat, statfs, mount."""

from __future__ import annotations

import ctypes
import errno
import os

import pytest

from mshare.engines.msharefs import info
from tests.inject.inject import Caller, Workers, answer, check, mount, standing, umount
from tests.kernel import abi
from tests.kernel.abi import SLOT

NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL
ROOM = (errno.ENOMEM, errno.ENOSPC)
LINKAT, AT_FDCWD, AT_EMPTY_PATH = 265, -100, 0x1000


def nothing(result: object) -> None:
    """Nothing to undo."""


def test_create(path: str) -> None:
    """A region that cannot be made has no name; the next one can."""
    before = standing()

    def undo(fd: int) -> None:
        os.close(fd)
        os.unlink(path)

    def same(code: int) -> None:
        assert standing() == before

    check(Caller, lambda: os.open(path, NEW, 0o600), undo, same, ROOM)
    assert standing() == before


def test_unnamed(path: str) -> None:
    """The same without a name."""
    before = standing()
    flags = os.O_TMPFILE | os.O_RDWR

    def same(code: int) -> None:
        assert standing() == before

    check(Caller, lambda: os.open(abi.MOUNT, flags, 0o600), os.close, same, ROOM)
    assert standing() == before


def test_link_of_unnamed(path: str) -> None:
    """A region that gets no name stays without; the link can be made later."""
    fd = os.open(abi.MOUNT, os.O_TMPFILE | os.O_RDWR, 0o600)
    spare = os.open(abi.MOUNT, os.O_TMPFILE | os.O_RDWR, 0o600)
    held = [fd, spare]
    before = standing()

    new, empty = ctypes.create_string_buffer(path.encode()), ctypes.create_string_buffer(b"")

    def link() -> None:
        # not by /proc/self/fd, where a lookup without memory is ENOENT
        abi.syscall(
            LINKAT,
            held[0],
            ctypes.addressof(empty),
            AT_FDCWD,
            ctypes.addressof(new),
            AT_EMPTY_PATH,
        )

    def undo(result: object) -> None:
        # a file that had a name and lost it gets no other
        os.unlink(path)
        os.close(held[0])
        held[0] = os.open(abi.MOUNT, os.O_TMPFILE | os.O_RDWR, 0o600)

    def same(code: int) -> None:
        assert standing() == before
        assert os.fstat(held[0]).st_nlink == 0

    check(Caller, link, undo, same)
    for each in (held[0], spare):
        os.close(each)


def test_folder(path: str) -> None:
    """mkdir and rmdir."""
    before = standing()

    def same(code: int) -> None:
        assert standing() == before

    check(Caller, lambda: os.mkdir(path), lambda result: os.rmdir(path), same, ROOM)

    def there(code: int) -> None:
        assert os.path.isdir(path)

    os.mkdir(path)
    check(Caller, lambda: os.rmdir(path), lambda result: os.mkdir(path), there)
    os.rmdir(path)
    assert standing() == before


def test_names_of_a_region(region: int, path: str) -> None:
    """link, rename and unlink: done or not, and the number of names is right."""
    before = standing(region)
    other = f"{path}-2"

    def same(code: int) -> None:
        assert standing(region) == before
        assert os.fstat(region).st_nlink == len(
            [name for name in os.listdir(abi.MOUNT) if path in f"{abi.MOUNT}/{name}"]
        )

    check(Caller, lambda: os.link(path, other), lambda result: os.unlink(other), same)
    check(Caller, lambda: os.rename(path, other), lambda result: os.rename(other, path), same)
    os.link(path, other)
    before = standing(region)
    check(Caller, lambda: os.unlink(other), lambda result: os.link(path, other), same)
    os.unlink(other)


@pytest.mark.parametrize("call", [os.ftruncate, lambda fd, size: os.posix_fallocate(fd, 0, size)])
@pytest.mark.parametrize("where", [Caller, Workers])
def test_size(path: str, where: type[Caller] | type[Workers], call: object) -> None:
    """A region without a host mm has no size, and gets one later."""
    held = [os.open(path, NEW, 0o600)]
    assert callable(call)

    def size() -> None:
        call(held[0], SLOT)

    def undo(result: object) -> None:
        assert os.fstat(held[0]).st_size == info(held[0]).region_size == SLOT
        os.unlink(path)
        os.close(held[0])
        held[0] = os.open(path, NEW, 0o600)

    def same(code: int) -> None:
        assert os.fstat(held[0]).st_size == info(held[0]).region_size == 0
        with pytest.raises(OSError, match="Invalid"):
            abi.create_mapping(held[0])

    check(where, size, undo, same)
    os.close(held[0])


def test_questions(region: int, path: str) -> None:
    """stat, statvfs and INFO fail or tell the truth; statx of one with files too."""
    size = 1 << 20
    address = abi.mmap(region)
    abi.fill(address, size)
    for at in range(0, 32 << 20, 2 << 20):
        abi.create_mapping(region, at + (256 << 20), 1 << 20)
    whole = info(region)
    assert whole.resident_bytes == size
    used = os.statvfs(abi.MOUNT)

    def stat(result: os.stat_result) -> None:
        assert (result.st_size, result.st_blocks * 512) == (SLOT, size)

    def statvfs(result: os.statvfs_result) -> None:
        assert result.f_blocks - result.f_bfree == used.f_blocks - used.f_bfree

    def told(result: object) -> None:
        assert result == whole

    check(Caller, lambda: os.fstat(region), stat, nothing, least=0)
    check(Caller, lambda: os.stat(path), stat, nothing)
    check(Caller, lambda: os.statvfs(abi.MOUNT), statvfs, nothing)
    check(Caller, lambda: info(region), told, nothing, least=0)
    abi.munmap(address)


def test_mount(tmp_path: os.PathLike[str]) -> None:
    """A mount that fails leaves no reference; one that works has its file, and goes."""
    folder = os.fspath(tmp_path)
    before = standing()

    def undo(result: object) -> None:
        assert os.listdir(folder) == ["mshare_info"]
        with open(f"{folder}/mshare_info") as file:
            assert int(file.read()) == SLOT
        umount(folder)

    def same(code: int) -> None:
        assert not os.path.ismount(folder)
        assert standing() == before

    check(Caller, lambda: mount("msharefs", folder), undo, same)
    assert standing() == before


def test_umount(tmp_path: os.PathLike[str]) -> None:
    """An unmount takes the regions with it, also when memory is short, or changes nothing."""
    folder = os.fspath(tmp_path)

    def prepare() -> None:
        mount("msharefs", folder)
        fd = abi.make(f"{folder}/region")
        address = abi.mmap(fd)
        abi.put(address, b"content")
        abi.munmap(address)
        os.close(fd)

    def undo(result: object) -> None:
        assert answer(os.stat, f"{folder}/region") == "ENOENT"
        prepare()

    def same(code: int) -> None:
        fd = os.open(f"{folder}/region", os.O_RDWR)
        address = abi.mmap(fd)
        assert abi.get(address, 7) == b"content"
        abi.munmap(address)
        os.close(fd)

    prepare()
    check(Caller, lambda: umount(folder), undo, same)
    umount(folder)
