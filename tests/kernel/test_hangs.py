"""Who can make whom wait: a process that hinders a layout change hinders nobody else."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import time
from pathlib import Path

import pytest

from mshare.engines.msharefs import info
from tests.kernel import abi, fuse
from tests.kernel.abi import PAGE, READ, RW, SLOT
from tests.kernel.test_lifetime import wait_until

LONGEST = 4.0
"""Seconds a fault may take while a layout change waits for somebody; half a second, and room."""


def ended(pid: int) -> bool:
    """Whether a child has ended; it stays to be waited for."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


@pytest.mark.usefixtures("needs_fuse")
@pytest.mark.parametrize("window", [READ, RW])
def test_one_that_holds_its_lock_stops_no_others(region: int, tmp_path: Path, window: int) -> None:
    """A process faults on a FUSE file that is never answered, with its mmap_lock held.

    A change of the layout waits for it, and can be killed. Meanwhile all others take faults in the
    region, new windows come, and its numbers can be read. When the server ends the change is made.
    """
    address = abi.mmap(region)
    asked = abi.memory(abi.mmap(-1, PAGE, RW, abi.SHARED | abi.ANONYMOUS))

    def deaf(attempt: int) -> int | None:
        """Two reads that fail, so that the kernel tries again with its locks; then no answer."""
        asked[0] = attempt
        return errno.EIO if attempt <= 2 else None

    def hold(name: str) -> None:
        abi.mmap(region, prot=window)
        with open(name, "rb") as file:
            mmap.mmap(file.fileno(), PAGE, prot=mmap.PROT_READ)[0]

    def others() -> float:
        """Faults for six seconds, the longest of them."""
        longest, started = 0.0, time.monotonic()
        page = 1
        while time.monotonic() < started + 6:
            before = time.monotonic()
            abi.put(address + page * (2 << 20), b"here")
            abi.munmap(abi.mmap(region))
            assert info(region).region_size == SLOT
            os.statvfs(abi.MOUNT)
            longest = max(longest, time.monotonic() - before)
            page = page % 500 + 1
            time.sleep(0.02)
        return longest

    with fuse.mounted(str(tmp_path), deaf) as name:
        holder = abi.Child(hold, name)
        wait_until(lambda: asked[0] >= 3)
        changes = info(region).layout_changes
        changer = abi.Child(abi.protect, region, 0, PAGE, READ)
        other = abi.Child(others)
        assert other.result() < LONGEST
        assert not ended(changer.pid)
        changer.kill()
        second = abi.Child(abi.protect, region, 0, PAGE, READ)
        time.sleep(1)
        assert not ended(second.pid)
        assert info(region).layout_changes == changes
    second.result()
    assert holder.signal() == signal.SIGBUS
    assert info(region).layout_changes == changes + 1
    assert abi.dies_by(abi.put, address, b"BAD!") == signal.SIGSEGV
    abi.munmap(address)


@pytest.mark.parametrize("stop", [signal.SIGSTOP, signal.SIGKILL])
def test_a_stopped_process_stops_nobody(region: int, stop: int) -> None:
    """Every change of the layout goes on, and what a stopped process may do changes with it."""
    address = abi.mmap(region)
    abi.put(address, b"here")
    stopped = abi.Child(abi.forever)
    os.kill(stopped.pid, stop)

    def change() -> None:
        abi.protect(region, 0, PAGE, READ)
        abi.unmap(region, PAGE, PAGE)
        abi.create_mapping(region, PAGE, PAGE)

    changer = abi.Child(change)
    wait_until(lambda: ended(changer.pid))
    changer.result()
    assert abi.get(address, 4) == b"here"
    assert abi.dies_by(abi.put, address, b"BAD!") == signal.SIGSEGV
    stopped.kill()
    abi.munmap(address)


def test_changes_without_end_starve_nobody(region: int) -> None:
    """One changes the layout as fast as it can: another still takes all its faults."""
    address = abi.mmap(region)
    changes = info(region).layout_changes

    def change() -> None:
        while True:
            abi.protect(region, 0, PAGE, READ)
            abi.protect(region, 0, PAGE, RW)

    def faults() -> None:
        for page in range(1, 200):
            abi.put(address + page * PAGE, b"here")
            abi.munmap(abi.mmap(region))

    changer = abi.Child(change)
    victim = abi.Child(faults)
    wait_until(lambda: ended(victim.pid))
    victim.result()
    changer.kill()
    assert info(region).layout_changes > changes + 2
    abi.munmap(address)


def test_the_largest_region_is_changed_at_once(path: str) -> None:
    """32 TiB in one mapping: a change takes no time for what has no tables."""
    size = 32 << 40
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    os.ftruncate(fd, size)
    abi.create_mapping(fd, size=size, flags=abi.SHARED | abi.FIXED | abi.ANONYMOUS | 0x4000)
    started = time.monotonic()
    for prot in (READ, RW):
        abi.protect(fd, 0, size, prot)
    assert time.monotonic() - started < LONGEST
    os.close(fd)
