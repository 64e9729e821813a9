"""What a process asks of its window: answered or refused, and never another one's loss."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from mshare.engines.msharefs import info
from tests.kernel import abi
from tests.kernel.abi import PAGE, READ, SLOT

SIZE = 4 << 20
ADVICE = {
    "NORMAL": 0,
    "RANDOM": 1,
    "SEQUENTIAL": 2,
    "WILLNEED": 3,
    "DONTNEED": 4,
    "FREE": 8,
    "REMOVE": 9,
    "DONTFORK": 10,
    "DOFORK": 11,
    "MERGEABLE": 12,
    "HUGEPAGE": 14,
    "NOHUGEPAGE": 15,
    "DONTDUMP": 16,
    "DODUMP": 17,
    "WIPEONFORK": 18,
    "COLD": 20,
    "PAGEOUT": 21,
    "POPULATE_READ": 22,
    "POPULATE_WRITE": 23,
    "DONTNEED_LOCKED": 24,
    "COLLAPSE": 25,
    "SOFT_OFFLINE": 101,
}
REFUSED = {
    "REMOVE": errno.EOPNOTSUPP,
    "FREE": errno.EINVAL,
    "DODUMP": errno.EINVAL,
    "WIPEONFORK": errno.EINVAL,
    "COLLAPSE": errno.EINVAL,
}
"""What a window refuses whole or in part. All others either work or are hints."""
MBIND, MOVE_PAGES, PKEY_MPROTECT, REMAP_FILE_PAGES = 237, 279, 329, 216
NORESERVE, MOVE = 0x4000, 2


def content(number: int = 0) -> bytes:
    """A page that says which it is."""
    return (b"%8d" % number) * (PAGE // 8)


@pytest.fixture
def window(region: int) -> Iterator[int]:
    """The address of a window whose first pages have content."""
    address = abi.mmap(region)
    for number in range(SIZE // PAGE):
        abi.put(address + number * PAGE, content(number))
    yield address
    abi.munmap(address)


def intact(address: int) -> bool:
    """All content is there."""
    return all(
        abi.get(address + number * PAGE, PAGE) == content(number) for number in range(SIZE // PAGE)
    )


@pytest.mark.parametrize("name", ADVICE)
@pytest.mark.parametrize("length", [SIZE, SLOT], ids=["part", "whole"])
def test_advice_loses_nothing(region: int, window: int, name: str, length: int) -> None:
    """One process advises on its window; it and another have all content after it."""
    if name == "SOFT_OFFLINE":
        length = 4 * PAGE  # the machine loses these pages
    elif length == SLOT and name.startswith("POPULATE"):
        length = SLOT // 16  # the rest of the slot would fill the machine

    def advise() -> tuple[int, bool]:
        mine = abi.mmap(region)
        return abi.code_of(abi.madvise, mine, length, ADVICE[name]), intact(mine)

    code, good = abi.Child(advise).result()
    assert good
    assert intact(window)
    if name in REFUSED:
        assert code == REFUSED[name]


def test_poisoned_page(path: str) -> None:
    """A broken page kills who touches it, by SIGBUS; the rest of the region is as before."""
    fd = abi.make(path, fill=False)
    abi.create_mapping(fd, size=SIZE)
    address = abi.mmap(fd)
    abi.put(address, content(1))
    abi.put(address + PAGE, content(2))

    def poison() -> None:
        abi.madvise(abi.mmap(fd) + PAGE, PAGE, 100)

    abi.Child(poison).result()
    assert abi.dies_by(abi.get, address + PAGE, 1) == signal.SIGBUS
    assert abi.get(address, PAGE) == content(1)
    abi.munmap(address)
    os.close(fd)


def test_locking(region: int, window: int) -> None:
    """mlock fills the pages but locks none: the memory is not this process's to lock."""
    abi.mlock(window, SIZE)
    status = Path("/proc/self/status").read_text()
    assert "VmLck:\t       0 kB" in status
    assert abi.touch(window, SIZE) == 0
    assert intact(window)


def test_locking_all(path: str) -> None:
    """mlockall before and after attaching."""
    fd = abi.make(path, fill=False)
    abi.create_mapping(fd, size=SIZE)

    def lock() -> bool:
        abi.mlockall(3)
        address = abi.mmap(fd)
        for number in range(SIZE // PAGE):
            abi.put(address + number * PAGE, content(number))
        abi.mlockall(3)
        good = intact(address)
        abi.munmap(address)
        return good

    assert abi.Child(lock).result()
    address = abi.mmap(fd)
    assert intact(address)
    abi.munmap(address)
    os.close(fd)


def test_other_refusals(window: int) -> None:
    """Calls that would split the window or give it rights of its own."""
    nodes = abi.memory(abi.anonymous(PAGE))
    nodes[0] = 1
    mask = abi.address_of(nodes)
    assert abi.code_of(abi.syscall, MBIND, window, PAGE, 2, mask, 8, 0) in (
        errno.EINVAL,
        errno.ENOSYS,
    )
    assert abi.code_of(abi.syscall, PKEY_MPROTECT, window, PAGE, READ, 0) == errno.EINVAL
    code = abi.code_of(abi.syscall, REMAP_FILE_PAGES, window, PAGE, 0, 1, 0)
    assert code in (errno.EINVAL, errno.ENOMEM)
    assert intact(window)


def test_moved_between_nodes(window: int) -> None:
    """mbind and move_pages on the whole window: to a user, nothing happens."""
    nodes = abi.memory(abi.anonymous(PAGE))
    nodes[0] = 1
    assert abi.code_of(abi.syscall, MBIND, window, SLOT, 2, abi.address_of(nodes), 8, 2) in (
        0,
        errno.ENOSYS,
    )
    count = 16
    spots, status = (ctypes.c_uint64 * count)(), (ctypes.c_int * count)(*[1] * count)
    spots[:] = [window + number * PAGE for number in range(count)]
    targets = (ctypes.c_int * count)()
    arguments = [ctypes.addressof(each) for each in (spots, targets, status)]
    abi.syscall(MOVE_PAGES, 0, count, *arguments, MOVE)
    assert set(status) <= {0, -errno.EFAULT}, list(status)
    assert intact(window)


def test_core_dump(region: int, window: int, tmp_path: Path) -> None:
    """A crash writes a core without the region, and harms nobody."""
    pattern = Path("/proc/sys/kernel/core_pattern")
    before = pattern.read_text()
    pattern.write_text(f"{tmp_path}/core")

    def crash() -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY,) * 2)
        Path("/proc/self/coredump_filter").write_text("0x7f")
        abi.touch(window, SIZE)  # without a copy that the core would hold
        os.kill(os.getpid(), signal.SIGABRT)

    try:
        assert abi.dies_by(crash) == signal.SIGABRT
    finally:
        pattern.write_text(before)
    core = next(tmp_path.glob("core*"))
    assert 0 < core.stat().st_blocks * 512 < 200 << 20
    found = core.read_bytes()
    # a page or two may lie about in the process's own memory
    assert sum(content(number) in found for number in range(0, SIZE // PAGE, 16)) < 4
    assert intact(window)
    assert info(region).attachments == 1


def test_stack_next_to_a_window(region: int) -> None:
    """A mapping that grows down stops short of the window below it."""
    gap = 2 << 20
    place = abi.mmap(-1, 3 * SLOT, READ, abi.PRIVATE | abi.ANONYMOUS)
    start = (place + SLOT - 1) & -SLOT
    abi.munmap(place, 3 * SLOT)
    window = abi.mmap(region, flags=abi.SHARED | abi.FIXED, address=start)
    abi.put(window + SLOT - PAGE, content(9))
    grows = abi.PRIVATE | abi.ANONYMOUS | abi.FIXED | 0x100
    top = abi.mmap(-1, PAGE, abi.RW, grows, window + SLOT + gap)
    lowest = abi.memory(abi.mmap(-1, PAGE, abi.RW, abi.SHARED | abi.ANONYMOUS)).cast("Q")

    def grow() -> None:
        for number in range(gap // PAGE):
            abi.put(top - number * PAGE, b"stack")
            lowest[0] = top - number * PAGE

    assert abi.dies_by(grow) == signal.SIGSEGV
    assert window + SLOT < lowest[0] < top
    assert abi.get(window + SLOT - PAGE, PAGE) == content(9)
    abi.munmap(window)
    abi.munmap(top, PAGE)


def test_huge_pages_next_to_a_window(region: int, window: int) -> None:
    """Huge pages, whose tables the kernel shares by itself, in the slot beside the window."""
    fd = os.memfd_create("huge", os.MFD_HUGETLB)
    os.ftruncate(fd, SLOT)

    def beside() -> None:
        place = abi.mmap(-1, 4 * SLOT, READ, abi.PRIVATE | abi.ANONYMOUS)
        start = (place + SLOT - 1) & -SLOT
        fixed = abi.SHARED | abi.FIXED
        huge = abi.mmap(fd, SLOT, abi.RW, fixed | NORESERVE, start)
        mine = abi.mmap(region, SLOT, abi.RW, fixed, start + SLOT)
        abi.put(huge, b"huge")
        assert intact(mine)
        assert abi.Child(abi.get, huge, 4).result() == b"huge"
        abi.munmap(huge)
        assert intact(mine)

    abi.Child(beside).result()
    os.close(fd)
    assert intact(window)
