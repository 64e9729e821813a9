"""The region of a mapping (OPEN_MAPPING): who gets it, and who does not."""

from __future__ import annotations

import errno
import fcntl
import os
from functools import partial
from pathlib import Path

import pytest

from mshare.engines.msharefs import info
from tests.kernel import abi
from tests.kernel.abi import ANONYMOUS, PAGE, PRIVATE, READ, RW, SHARED
from tests.kernel.test_dropin import (
    F_SEAL_FUTURE_WRITE,
    OPEN_MAPPING,
    open_file,
    open_mapping,
    refused,
)
from tests.kernel.test_lifetime import nothing_left
from tests.kernel.test_run import SHM_RDONLY, SHMAT, SHMDT, attaches, segment

SIZE = 16 << 20
RDONLY, RDWR = os.O_RDONLY, os.O_RDWR
REMAP_FILE_PAGES = 216


def seen_through(region: int, address: int, prot: int = RW) -> None:
    """A window onto the region and the mapping are the same memory."""
    window = abi.mmap(region, prot=prot)
    try:
        if prot == RW:
            abi.put(window + 5 * PAGE, b"from the window")
            assert abi.get(address + 5 * PAGE, 15) == b"from the window"
            abi.put(address + 9, b"from the mapping")
        assert abi.get(window, PAGE) == abi.get(address, PAGE)
        assert abi.get_safely(window + SIZE - 1, 1) == abi.get(address + SIZE - 1, 1)
        refused(errno.EFAULT, partial(abi.get_safely, window + SIZE, 1))
    finally:
        abi.munmap(window)


def test_region_of_anonymous_memory() -> None:
    """Shared anonymous memory has a region; a child that inherits the memory gets the same."""
    address = abi.mmap(-1, SIZE, RW, SHARED | ANONYMOUS)
    abi.put(address, b"early")
    region = open_mapping(address + 3 * PAGE)
    seen_through(region, address)

    def child() -> int:
        own = open_mapping(address)
        window = abi.mmap(own)
        assert abi.get(window, 5) == b"early"
        return info(own).attachments

    keep = abi.mmap(region)
    assert abi.Child(child).result() == 3
    abi.munmap(address, SIZE)
    assert abi.get(keep, 5) == b"early"
    abi.munmap(keep)
    os.close(region)


def test_region_of_a_segment() -> None:
    """A System V segment has one, also when it is removed; nobody counts as attached by it."""
    with nothing_left(), segment() as number:
        address = abi.syscall(SHMAT, number, 0, 0)
        region = open_mapping(address)
        seen_through(region, address)
        assert attaches(number) == 1
        other = abi.syscall(SHMAT, number, 0, SHM_RDONLY)
        again = open_mapping(other, RDONLY)
        seen_through(again, other, READ)
        refused(errno.EACCES, partial(open_mapping, other, RDWR))
        refused(errno.EACCES, partial(abi.mmap, again, prot=RW))
        assert attaches(number) == 2
        for place in (address, other):
            abi.syscall(SHMDT, place)
        assert attaches(number) == 0
        os.close(again)
        os.close(region)
    with segment() as number:
        address = abi.syscall(SHMAT, number, 0, 0)
    region = open_mapping(address)
    abi.syscall(SHMDT, address)
    window = abi.mmap(region)
    assert abi.get(window, 1) == b"\0"
    abi.munmap(window)
    os.close(region)


@pytest.mark.parametrize("kind", ["memfd", "tmpfs", "disk"])
def test_region_of_a_mapped_file(kind: str, tmp_path: Path, disk: str) -> None:
    """It is the one that OPEN_FILE gives, also when the file is deleted."""
    if kind == "memfd":
        fd = os.memfd_create("content")
    else:
        path = Path(disk if kind == "disk" else tmp_path) / "content"
        fd = os.open(path, RDWR | os.O_CREAT, 0o600)
        path.unlink()
    os.ftruncate(fd, SIZE)
    address = abi.mmap(fd, SIZE)
    for access in (RDWR, RDONLY):
        first, second = open_mapping(address, access), open_file(fd, access)
        seen_through(first, address, RW if access == RDWR else READ)
        window = abi.mmap(first, prot=READ)
        assert info(second).attachments == 1
        abi.munmap(window)
        os.close(first)
        os.close(second)
    os.close(fd)
    os.close(open_mapping(address))
    abi.munmap(address, SIZE)


def test_no_more_rights_than_the_mapping(tmp_path: Path) -> None:
    """A mapping that can never write gives no writer; one that can be made to write does."""
    path = tmp_path / "content"
    path.write_bytes(bytes(SIZE))
    for access, gives in ((RDONLY, False), (RDWR, True)):
        fd = os.open(path, access)
        address = abi.mmap(fd, SIZE, READ)
        os.close(fd)
        os.close(open_mapping(address, RDONLY))
        if gives:
            os.close(open_mapping(address, RDWR))
        else:
            refused(errno.EACCES, partial(open_mapping, address, RDWR))
        abi.munmap(address, SIZE)
    fd = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, SIZE)
    early = abi.mmap(fd, SIZE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, F_SEAL_FUTURE_WRITE)
    late = abi.mmap(fd, SIZE, READ)
    refused(errno.EPERM, partial(open_mapping, early, RDWR))
    refused(errno.EACCES, partial(open_mapping, late, RDWR))
    for address in (early, late):
        region = open_mapping(address, RDONLY)
        refused(errno.EACCES, partial(abi.mmap, region, prot=RW))
        os.close(region)
        abi.munmap(address, SIZE)
    os.close(fd)


def test_no_more_of_the_file_than_the_mapping_reaches(tmp_path: Path) -> None:
    """From an offset on, a mapping gives the file only if it could be moved to the file's start."""
    path = tmp_path / "content"
    path.write_bytes(b"secret".ljust(SIZE, b"x"))
    fd = os.open(path, RDONLY)
    address = abi.mmap(fd, PAGE, READ, offset=PAGE)
    os.close(fd)
    refused(errno.EACCES, partial(open_mapping, address, RDONLY))
    refused(errno.EINVAL, partial(abi.syscall, REMAP_FILE_PAGES, address, PAGE, 0, 0, 0))
    assert abi.get(abi.mremap(address, PAGE, 2 * PAGE, 1), 2 * PAGE) == b"x" * 2 * PAGE
    fd = os.open(path, RDWR)
    address = abi.mmap(fd, PAGE, READ, offset=PAGE)
    os.close(fd)
    os.close(open_mapping(address, RDONLY))
    abi.syscall(REMAP_FILE_PAGES, address, PAGE, 0, 0, 0)
    assert abi.get(address, 6) == b"secret"
    abi.munmap(address, PAGE)


def test_mappings_that_have_no_region(region: int, tmp_path: Path) -> None:
    """Each wrong address, kind of mapping and argument has its errno."""
    shared = abi.mmap(-1, SIZE, RW, SHARED | ANONYMOUS)
    for access in (os.O_WRONLY, 7, RDWR | os.O_CREAT):
        refused(errno.EINVAL, partial(open_mapping, shared, access))
    refused(errno.EINVAL, partial(open_mapping, shared, RDWR, 1))
    abi.munmap(shared, SIZE)
    for address in (shared, 0, PAGE - 1, 1 << 47, 1 << 63, (1 << 64) - 1):
        refused(errno.EFAULT, partial(open_mapping, address))
    control = os.open(f"{abi.MOUNT}/mshare_info", RDONLY)
    refused(errno.EFAULT, partial(abi.syscall, 16, control, OPEN_MAPPING, 1))
    refused(errno.ENOTTY, partial(fcntl.ioctl, control, OPEN_MAPPING + 1, bytes(16)))
    refused(errno.ENOTTY, partial(fcntl.ioctl, region, OPEN_MAPPING, bytes(16)))
    os.close(control)
    path = tmp_path / "content"
    path.write_bytes(bytes(SIZE))
    with open(path, "r+b") as file:
        for prot in (READ, RW):
            private = abi.mmap(file.fileno(), SIZE, prot, PRIVATE)
            refused(errno.EINVAL, partial(open_mapping, private, RDONLY))
            abi.munmap(private, SIZE)
    private = abi.anonymous(SIZE)
    refused(errno.EINVAL, partial(open_mapping, private, RDONLY))
    abi.munmap(private, SIZE)
    window = abi.mmap(region)
    refused(errno.EOPNOTSUPP, partial(open_mapping, window, RDONLY))
    abi.munmap(window)
    huge = os.memfd_create("huge", os.MFD_HUGETLB)
    os.ftruncate(huge, SIZE)
    address = abi.mmap(huge, SIZE, RW, SHARED | 0x4000)
    refused(errno.EOPNOTSUPP, partial(open_mapping, address))
    abi.munmap(address, SIZE)
    os.close(huge)
