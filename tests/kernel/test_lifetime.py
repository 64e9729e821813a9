"""A region lives while it has a name, an open file or a window, and leaves nothing behind."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import mshare
from mshare.engines.msharefs import info
from tests.kernel import abi
from tests.kernel.abi import PAGE, READ, SLOT

SIZE = 8 << 20
UMOUNT = 166
"""umount2(2). The command takes so long that what is late has come by then."""


def module_users() -> int:
    """The module's reference count: one for each mount, open file and window's file."""
    return int(Path("/sys/module/mshare/refcnt").read_text())


class Slab:
    """Counts what slab caches hold without what is free or of no use, which is given back first.

    That is done to all caches: for each slab of one that is charged to memory cgroups the kernel
    keeps a list in another, and KASAN keeps back what is free. The files for it stay open: opening
    one costs the kernel an object that it frees late.
    """

    KINDS = ("kmalloc", "mm_struct", "vm_area_struct", "inode_cache", "shmem_inode_cache")
    """Those that regions and processes use."""

    def __init__(self) -> None:
        root = Path("/sys/kernel/slab")
        counted = {cache.resolve() for cache in root.iterdir() if cache.name.startswith(self.KINDS)}
        caches = {cache.resolve() for cache in root.iterdir()}
        # what is counted comes last: less is taken between its turn and the count
        order = sorted(caches, key=lambda cache: cache in counted)
        self._files = [os.open(cache / "shrink", os.O_WRONLY) for cache in order]

    def shrink(self) -> None:
        """Give back names and inodes that nobody uses, and what is free."""
        Path("/proc/sys/vm/drop_caches").write_text("2")
        for file in self._files:
            os.pwrite(file, b"1", 0)

    def count(self, least: dict[str, int]) -> None:
        """Live objects of each cache, by its name, where they are fewer than before.

        A processor's slab counts as in use as a whole: one object that somebody took since the
        cache was shrunk is hundreds of small ones. The least of several counts is without that.
        """
        self.shrink()
        lines = map(str.split, Path("/proc/slabinfo").read_text().splitlines()[2:])
        for name, live, *_ in lines:
            if name.startswith(self.KINDS):
                least[name] = min(int(live), least.get(name, int(live)))

    def close(self) -> None:
        for file in self._files:
            os.close(file)


@contextmanager
def nothing_left(objects: int = 0) -> Iterator[None]:
    """After the block memory, page tables and references are as before it, and slab caches.

    :param objects: how many were made and removed. The kernel has some objects of its own come
        and go: a fifth as many may be left in a slab cache. 0: they are not looked at.
    """
    room = {"PageTables": 256 << 10, "Shmem": 64 << 10}
    users, slab = module_users(), Slab()
    live: dict[str, int] = {}
    for _ in range(3 if objects else 0):
        slab.count(live)
    before = {field: abi.meminfo(field) for field in room}
    yield
    assert abi.settle(module_users, users) == users
    for field, more in room.items():
        most = before[field] + more

        def now(field: str = field) -> int:
            return abi.meminfo(field)

        assert abi.settle(now, most) <= most, field

    left: dict[str, int] = {}

    def most_grown() -> int:
        slab.count(left)
        return max(count - live.get(name, count) for name, count in left.items())

    if objects:
        limit = objects // 5
        grown = abi.settle(most_grown, limit, 60)
        assert grown <= limit, str({name: (live.get(name), left[name]) for name in left})
    slab.close()


def wait_until(done: Callable[[], bool]) -> None:
    """Wait at most 20 seconds."""
    deadline = time.monotonic() + 20
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_creator_killed(path: str) -> None:
    """Its region is whole for who comes after."""

    def creator() -> None:
        fd = abi.make(path)
        abi.fill(abi.mmap(fd), SIZE)
        abi.forever()

    child = abi.Child(creator)
    wait_until(lambda: os.path.exists(path) and os.stat(path).st_blocks * 512 == SIZE)
    time.sleep(0.3)
    child.kill()
    fd = os.open(path, os.O_RDWR)
    assert info(fd).attachments == 0
    address = abi.mmap(fd)
    assert abi.get(address, SIZE) == b"\7" * SIZE
    abi.munmap(address)
    os.close(fd)


def test_creator_killed_anywhere(path: str) -> None:
    """Killed at any point of making a region: what has a name works, and the rest is gone."""

    def creator() -> None:
        number = 0
        while True:
            fd = abi.make(f"{path}-{number}")
            address = abi.mmap(fd)
            abi.fill(address, 1 << 20)
            os.close(fd)
            number += 1

    folder, stem = os.path.split(path)
    with nothing_left():
        for wait in range(12):
            child = abi.Child(creator)
            time.sleep(0.05 + wait / 97)
            child.kill()
            for name in [name for name in os.listdir(folder) if name.startswith(stem)]:
                fd = os.open(f"{folder}/{name}", os.O_RDWR)
                if os.fstat(fd).st_size:
                    assert info(fd).attachments == 0
                    abi.create_mapping(fd, 0, PAGE)
                    address = abi.mmap(fd)
                    abi.put(address, b"whole")
                    abi.munmap(address)
                os.close(fd)
                os.unlink(f"{folder}/{name}")


@pytest.mark.parametrize("last", ["name", "descriptor", "window", "inherited window"])
def test_last_user_gone(path: str, last: str) -> None:
    """While one of them is left the content is; then nothing is."""

    def whole(window: int) -> bool:
        return abi.get(window, SIZE) == b"\7" * SIZE

    with nothing_left():
        before = abi.meminfo("Shmem")
        fd = abi.make(path)
        address = abi.mmap(fd)
        abi.fill(address, SIZE)
        reading, writing = os.pipe()

        def heir() -> bool:
            os.close(fd)
            os.close(writing)
            os.read(reading, 1)
            return whole(address)

        child = abi.Child(heir) if last == "inherited window" else None
        if last != "window":
            abi.munmap(address)
        if last != "descriptor":
            os.close(fd)
        if last != "name":
            os.unlink(path)
        assert abi.meminfo("Shmem") >= before + SIZE
        os.close(writing)
        match last:
            case "name":
                fd = os.open(path, os.O_RDWR)
                address = abi.mmap(fd)
                assert whole(address)
                abi.munmap(address)
                os.close(fd)
                os.unlink(path)
            case "descriptor":
                address = abi.mmap(fd)
                assert whole(address)
                abi.munmap(address)
                os.close(fd)
            case "window":
                assert whole(address)
                abi.munmap(address)
        if child:
            assert child.result()
        os.close(reading)


def test_unlinked_while_attached(path: str) -> None:
    """The name is free for another region at once; the old one goes on."""
    old = abi.make(path)
    window = abi.mmap(old)
    abi.put(window, b"old")
    os.unlink(path)
    new = abi.make(path)
    other = abi.mmap(new)
    assert abi.get(other, 3) == bytes(3)
    abi.put(other, b"new")
    assert abi.get(window, 3) == b"old"
    assert os.fstat(old).st_nlink == 0
    assert info(old).attachments == 1
    abi.protect(old, 0, SLOT, READ)
    assert abi.dies_by(abi.put, window, b"x") == signal.SIGSEGV
    for address, fd in ((window, old), (other, new)):
        abi.munmap(address)
        os.close(fd)


def test_killed_while_attached(region: int, path: str) -> None:
    """200 processes killed: idle ones, ones that inherited it, ones in the middle of a fault."""
    address = abi.mmap(region)
    abi.fill(address, SIZE)
    ready, go = os.pipe()

    def idle(inherit: bool) -> None:
        window = address if inherit else abi.mmap(os.open(path, os.O_RDWR))
        abi.touch(window, PAGE)
        os.write(go, b".")
        abi.forever()

    def busy() -> None:
        os.write(go, b".")
        while True:
            window = abi.mmap(region)
            abi.touch(window, SIZE)
            abi.fill(window + SIZE, SIZE)
            abi.munmap(window)

    def herd(count: int, *works: Callable[[], None]) -> None:
        children = [abi.Child(works[number % len(works)]) for number in range(count)]
        for _ in children:
            os.read(ready, 1)
        for child in children:
            os.kill(child.pid, signal.SIGKILL)
        for child in children:
            assert child.signal() == signal.SIGKILL

    def faulting(rounds: int, count: int) -> None:
        for _ in range(rounds):
            children = [abi.Child(busy) for _ in range(count)]
            for _ in children:
                os.read(ready, 1)
            for child in children:
                abi.unmap(region, SIZE, SIZE)
                abi.create_mapping(region, SIZE, SIZE)
                child.kill()

    herd(8, lambda: idle(False), lambda: idle(True))
    faulting(1, 4)
    with nothing_left(200):
        herd(120, lambda: idle(False), lambda: idle(True))
        faulting(10, 8)
        assert info(region).attachments == 1
        abi.unmap(region, SIZE, SIZE)
        abi.create_mapping(region, SIZE, SIZE)
    counted = info(region)
    assert counted.grafts - counted.ungrafts == 1
    assert counted.resident_bytes == SIZE
    assert abi.get(address, SIZE) == b"\7" * SIZE
    abi.munmap(address)
    assert info(region).grafts == info(region).ungrafts
    os.close(ready)
    os.close(go)


def test_made_and_removed(region: int, path: str) -> None:
    """300 regions, each attached twice, written and protected, leave nothing."""

    def use(count: int) -> None:
        for _ in range(count):
            fd = abi.make(path)
            address, again = abi.mmap(fd), abi.mmap(fd, prot=READ)
            abi.fill(address, 16 * PAGE)
            assert abi.get(again, 16 * PAGE) == b"\7" * 16 * PAGE
            abi.protect(fd, 0, PAGE, READ)
            os.unlink(path)
            os.close(fd)
            for window in (address, again):
                abi.munmap(window)

    os.unlink(path)
    use(10)
    # The window keeps this process known to the module: forgetting a process takes its time.
    address = abi.mmap(region)
    with nothing_left(300):
        use(300)
    abi.munmap(address)


def test_failed_attachments_leave_nothing(region: int, path: str) -> None:
    """300 of each kind of refused call: no window, no reference, no memory."""

    def refused(count: int) -> None:
        fixed = abi.SHARED | abi.FIXED
        for _ in range(count):
            for call in (
                lambda: abi.mmap(region, flags=abi.PRIVATE),
                lambda: abi.mmap(region, flags=fixed, address=(5 << 40) + PAGE),
                lambda: abi.create_mapping(region, SLOT),
                lambda: abi.create_mapping(region, flags=fixed, fd=region),
                lambda: abi.mprotect(address, SLOT, READ),
                lambda: abi.munmap(address, PAGE),
                lambda: os.ftruncate(region, 2 * SLOT),
                lambda: os.open(path, os.O_CREAT | os.O_EXCL),
            ):
                with pytest.raises(OSError, match="Errno"):
                    call()

    address = abi.mmap(region)
    refused(10)
    with nothing_left(300):
        refused(300)
        assert info(region).attachments == 1
    abi.munmap(address)


def test_module_stays_while_used(tmp_path: Path) -> None:
    """A window alone, with its mount, name and descriptor gone, keeps the module loaded."""
    users = module_users()
    subprocess.run(["mount", "-t", "msharefs", "msharefs", tmp_path], check=True)
    fd = abi.make(f"{tmp_path}/region")
    address = abi.mmap(fd)
    abi.put(address, b"there")
    os.unlink(f"{tmp_path}/region")
    os.close(fd)
    subprocess.run(["umount", "--lazy", tmp_path], check=True)
    assert module_users() > users
    result = subprocess.run(["rmmod", "mshare"], capture_output=True, text=True, check=False)
    assert result.returncode
    assert "in use" in result.stderr
    assert abi.get(address, 5) == b"there"
    abi.munmap(address)
    assert abi.settle(module_users, users) == users


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_is_let_go_at_once(path: str, tmp_path: Path, replaced: bool) -> None:
    """When the call returns that takes a file out, its file system can be unmounted."""
    fd, folder = abi.make(path), ctypes.create_string_buffer(os.fsencode(tmp_path))
    for _ in range(20):
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", tmp_path], check=True)
        file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
        os.ftruncate(file, SIZE)
        abi.create_mapping(fd, size=SIZE, flags=abi.SHARED | abi.FIXED, fd=file)
        os.close(file)
        if replaced:
            abi.create_mapping(fd, size=SIZE)
        else:
            abi.unmap(fd, 0, SIZE)
        abi.syscall(UMOUNT, ctypes.addressof(folder), 0)
    os.close(fd)


def test_every_byte_shows(region: int, path: str) -> None:
    """stat, statvfs and INFO count what is in memory, and no more when it is gone."""

    def used() -> int:
        whole = os.statvfs(abi.MOUNT)
        return (whole.f_blocks - whole.f_bfree) * whole.f_frsize

    address = abi.mmap(region)
    before = used()
    assert os.stat(path).st_blocks == info(region).resident_bytes == 0
    abi.fill(address, SIZE)
    assert os.stat(path).st_blocks * 512 == info(region).resident_bytes == SIZE
    shown = {each.name: each.resident for each in mshare.list("msharefs")}
    assert shown[os.path.basename(path)] == SIZE
    assert used() == before + SIZE
    assert abi.meminfo("Shmem") >= SIZE
    # The tables of both views: a PTE page for each 2 MiB that was touched, and a few above.
    assert SIZE >> 9 <= info(region).pagetable_bytes <= (SIZE >> 9) + 10 * PAGE
    abi.unmap(region, 0, SIZE // 2)
    assert os.stat(path).st_blocks * 512 == info(region).resident_bytes == SIZE // 2
    abi.munmap(address)
    assert used() == before + SIZE // 2
    abi.unmap(region, 0, SLOT)
    assert used() == before
    assert info(region).resident_bytes == info(region).mapped_bytes == 0
