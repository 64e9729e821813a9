"""Who pays for the memory of a region, and what happens when there is not enough of it."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from mshare.engines.msharefs import info
from tests.kernel import abi
from tests.kernel.abi import PAGE, SLOT
from tests.kernel.test_races import collapsing, meanwhile

MIB = 1 << 20
SIZE = 64 * MIB
PROCESS_VM_WRITEV = 311


def fill_new(region: int, start: int, size: int) -> None:
    """Attach and store in every page of a range."""
    address = abi.mmap(region)
    abi.fill(address + start, size)


def stamp(address: int, size: int) -> None:
    """Give every page its number."""
    words = abi.memory(address, size).cast("Q")
    for number in range(size // PAGE):
        words[number * PAGE // 8] = number + 1


def stamped(address: int, size: int) -> bool:
    """Every page has its number."""
    words = abi.memory(address, size).cast("Q")
    return all(words[number * PAGE // 8] == number + 1 for number in range(size // PAGE))


def reclaim(folder: str, size: int) -> None:
    """Ask for ``size`` bytes of a cgroup back; the kernel may find fewer."""
    with suppress(OSError):
        Path(f"{folder}/memory.reclaim").write_text(str(size))


def swapped() -> int:
    """Bytes of swap in use."""
    return abi.meminfo("SwapTotal") - abi.meminfo("SwapFree")


@pytest.fixture
def window(region: int) -> Iterator[int]:
    """A window of this process."""
    address = abi.mmap(region)
    yield address
    abi.munmap(address)


def test_first_toucher_pays(region: int) -> None:
    """The process that touches a page first is charged for it, not the creator or the next."""
    with abi.cgroup("first") as first, abi.cgroup("second") as second:
        abi.within(first, fill_new, region, 0, SIZE).result()
        paid = abi.current(first)
        assert SIZE <= paid < SIZE + 16 * MIB
        abi.within(second, fill_new, region, 0, SIZE).result()
        assert abi.current(second) < 16 * MIB
        abi.within(second, fill_new, region, SIZE, SIZE).result()
        assert abi.current(second) >= SIZE
        assert abi.current(first) <= paid
        abi.unmap(region, 0, SLOT)
        assert abi.settle(lambda: abi.current(first), 16 * MIB) < 16 * MIB


def test_content_of_a_file_is_paid_too(disk: str, path: str) -> None:
    """Page cache that a forwarded fault reads in belongs to the process that faulted."""
    Path(f"{disk}/content").write_bytes(bytes(SIZE))
    fd, file = abi.make(path, fill=False), os.open(f"{disk}/content", os.O_RDWR)
    abi.create_mapping(fd, size=SIZE, flags=abi.SHARED | abi.FIXED, fd=file)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    with abi.cgroup("reader") as reader:
        abi.within(reader, lambda: abi.touch(abi.mmap(fd), SIZE)).result()
        assert abi.current(reader) >= SIZE // 2
    os.close(fd)
    os.close(file)


def test_remote_touch_charges_the_owner(region: int) -> None:
    """process_vm_writev into a process's window is charged to that process."""
    elsewhere = abi.memory(abi.mmap(-1, PAGE, abi.RW, abi.SHARED | abi.ANONYMOUS)).cast("Q")

    def stay() -> None:
        elsewhere[0] = abi.mmap(region)
        abi.forever()

    with abi.cgroup("owner") as owner:
        child = abi.within(owner, stay)
        assert abi.settle(lambda: 0 if elsewhere[0] else 1, 0) == 0
        size = 8 * MIB
        source = abi.anonymous(size)
        before = abi.current(owner)
        for at in range(0, size, MIB):
            ours, theirs = abi.vector(source + at, MIB), abi.vector(elsewhere[0] + at, MIB)
            abi.syscall(PROCESS_VM_WRITEV, child.pid, ours[0], 1, theirs[0], 1, 0)
        grown = abi.current(owner) - before
        child.kill()
    assert grown >= size * 3 // 4


def test_what_goes_while_it_is_touched_is_paid_too(path: str) -> None:
    """Holes made in the middle of faults do not let a page be charged to nobody."""
    pages = 100
    file = os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR)
    os.ftruncate(file, pages * PAGE)
    fd = abi.make(path, fill=False)
    abi.create_mapping(fd, size=pages * PAGE, flags=abi.SHARED | abi.FIXED, fd=file)
    note = abi.memory(abi.mmap(-1, PAGE, abi.RW, abi.SHARED | abi.ANONYMOUS)).cast("Q")

    def store() -> None:
        content = abi.memory(abi.mmap(fd), pages * PAGE)
        while True:
            content[note[0] * PAGE] = 1
            note[1] += 1

    def turns(number: int) -> None:
        end = note[1] + number
        while note[1] < end:
            pass

    with abi.cgroup("stores") as group:
        child = abi.within(group, store)
        for page in range(pages):
            note[0] = page
            turns(2)
            for _ in range(20):
                abi.punch(file, page * PAGE, PAGE)
            turns(2)
        address = abi.mmap(file, pages * PAGE, abi.READ)
        abi.touch(address, pages * PAGE)
        with open("/proc/kpagecgroup", "rb") as table:
            payers = Counter(
                int.from_bytes(os.pread(table.fileno(), 8, frame * 8), "little")
                for frame in abi.frames(address, pages * PAGE)
            )
        child.kill()
        assert payers == {os.stat(group).st_ino: pages}
    abi.munmap(address, pages * PAGE)
    os.close(fd)
    os.close(file)


def test_what_khugepaged_finds_stays_paid(path: str) -> None:
    """It does not put huge pages that nobody pays for in the place of small ones."""
    size = 16 * MIB
    file, other = os.memfd_create("content"), os.memfd_create("other")
    os.ftruncate(file, size)
    os.ftruncate(other, 2 * MIB)
    fd = abi.make(path, fill=False)
    room = abi.mmap(-1, 4 * MIB, abi.READ, abi.PRIVATE | abi.ANONYMOUS)
    aligned = (room + 2 * MIB - 1) & -(2 * MIB)

    def stay() -> None:
        abi.fill(abi.mmap(fd), size)
        abi.forever()

    with collapsing() as settings, abi.cgroup("fills") as group:
        # it gets to know a mapping when that is made; what is touched now is small
        abi.create_mapping(fd, size=size, flags=abi.SHARED | abi.FIXED, fd=file)
        plain = abi.mmap(other, 2 * MIB, abi.RW, abi.SHARED | abi.FIXED, aligned)
        (settings / "shmem_enabled").write_text("never")
        abi.fill(plain, 2 * MIB)
        child = abi.within(group, stay)
        assert abi.settle(lambda: size - abi.current(group), 0) <= 0
        (settings / "shmem_enabled").write_text("always")
        # not by its own count, which leaves out pages that the process it looked at had not touched
        missed = abi.settle(lambda: not abi.huge(plain), 0, seconds=120)
        assert not missed, "nothing was collapsed: the test would not see it"
        lost = abi.settle(lambda: abi.current(group) - size // 2, 0, seconds=15) < 0
        child.kill()
    assert not lost
    abi.munmap(room, 4 * MIB)
    for each in (fd, file, other):
        os.close(each)


def test_over_its_limit_a_group_kills_its_own(region: int, window: int) -> None:
    """The process that asks for too much dies; the region and its other users do not."""
    abi.put(window, b"whole")
    stay = abi.Child(abi.forever)
    with abi.cgroup("small", **{"max": str(32 * MIB), "swap.max": "0"}) as small:
        greedy = abi.within(small, fill_new, region, PAGE, SIZE)
        assert greedy.signal() in (signal.SIGKILL, signal.SIGBUS)
        events = Path(f"{small}/memory.events").read_text()
        assert "oom 0" not in events
        assert os.waitpid(stay.pid, os.WNOHANG) == (0, 0)
        assert abi.get(window, 5) == b"whole"
        # what it filled stays: it is the region's
        assert 8 * MIB < info(region).resident_bytes <= 33 * MIB
        abi.unmap(region, 0, SLOT)
    stay.kill()


def test_killed_for_its_own_memory(region: int, window: int) -> None:
    """The OOM killer and its reaper take a process that has a window; content stays."""
    stamp(window, MIB)

    def greedy() -> None:
        address = abi.mmap(region)
        assert stamped(address, MIB)
        abi.fill(abi.anonymous(SIZE), SIZE)

    for _ in range(4):
        with abi.cgroup("greedy", **{"max": str(32 * MIB), "swap.max": "0"}) as folder:
            assert abi.within(folder, greedy).signal() == signal.SIGKILL
        assert stamped(window, MIB)
    assert info(region).attachments == 1


def test_swapped_out_and_in(region: int, window: int) -> None:
    """Reclaimed pages go to swap and come back, to another process and after swapoff."""
    with abi.cgroup("swap") as folder:

        def fill() -> None:
            address = abi.mmap(region)
            stamp(address, SIZE)

        before = swapped()
        abi.within(folder, fill).result()
        reclaim(folder, SIZE)
        assert swapped() - before > SIZE // 2
        assert info(region).resident_bytes < SIZE // 2
        assert abi.Child(lambda: stamped(abi.mmap(region), SIZE // 2)).result()
        reclaim(folder, SIZE)
        device = Path("/proc/swaps").read_text().splitlines()[1].split()[0]
        subprocess.run(["swapoff", device], check=True)
        try:
            assert stamped(window, SIZE)
        finally:
            subprocess.run(["swapon", device], check=True)


def test_no_store_is_lost_to_reclaim(region: int, window: int) -> None:
    """Processes count up in pages that are swapped out under them."""
    pages = 64
    with abi.cgroup("counting") as folder:

        def counter(half: int) -> Callable[[], None]:
            state = {"turn": 0, "in": 0}

            def once() -> None:
                if not state["in"]:
                    abi.enter(folder)
                    state["in"] = 1
                words = abi.memory(window, pages * PAGE).cast("Q")
                for number in range(half, pages, 2):
                    spot = number * PAGE // 8
                    assert words[spot] == state["turn"], number
                    words[spot] = state["turn"] + 1
                state["turn"] += 1

            return once

        before = swapped()
        most = 0
        with meanwhile(counter(0), counter(1)):
            for _ in range(200):
                reclaim(folder, pages * PAGE)
                most = max(most, swapped() - before)
        assert most > 0
        words = abi.memory(window, pages * PAGE).cast("Q")
        assert min(words[number * PAGE // 8] for number in range(pages)) > 0


def test_full_disk_under_a_file(disk: str, path: str) -> None:
    """A store in a hole of a file on a full disk: SIGBUS, and content elsewhere is safe."""
    name = f"{disk}/sparse"
    fd, file = abi.make(path, fill=False), os.open(name, os.O_RDWR | os.O_CREAT)
    os.pwrite(file, b"first", 0)
    os.ftruncate(file, SIZE)
    abi.create_mapping(fd, size=SIZE, flags=abi.SHARED | abi.FIXED, fd=file)
    os.fsync(file)
    rest = os.open(f"{disk}/rest", os.O_WRONLY | os.O_CREAT)
    try:
        step = 64 * MIB
        end = 0
        while step >= PAGE:
            try:
                os.posix_fallocate(rest, end, step)
                end += step
            except OSError as error:
                assert error.errno == errno.ENOSPC
                step //= 4
        assert end > 0
        assert abi.dies_by(fill_new, fd, SIZE // 2, SIZE // 2) == signal.SIGBUS
        address = abi.mmap(fd)
        assert abi.get(address, 5) == b"first"
        abi.put(address, b"again")
        abi.munmap(address)
    finally:
        os.close(rest)
        os.unlink(f"{disk}/rest")
    abi.Child(fill_new, fd, SIZE // 2, MIB).result()
    os.close(fd)
    os.fsync(file)
    assert os.pread(file, 5, 0) == b"again"
    assert os.pread(file, 5, SIZE // 2) == b"\7" * 5
    os.close(file)


def test_full_tmpfs_under_a_file(path: str, tmp_path: Path) -> None:
    """The same on a tmpfs with a size."""
    folder = str(tmp_path)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4M", "tmpfs", folder], check=True)
    try:
        fd, file = abi.make(path, fill=False), os.open(f"{folder}/file", os.O_RDWR | os.O_CREAT)
        os.ftruncate(file, 8 * MIB)
        abi.create_mapping(fd, size=8 * MIB, flags=abi.SHARED | abi.FIXED, fd=file)
        assert abi.dies_by(fill_new, fd, 0, 8 * MIB) == signal.SIGBUS
        address = abi.mmap(fd)
        assert abi.get(address, 2) == b"\7\7"
        abi.munmap(address)
        os.close(fd)
        os.unlink(path)
        os.close(file)
    finally:
        subprocess.run(["umount", folder], check=True)


def test_address_space_limit(region: int) -> None:
    """RLIMIT_AS counts a window as any mapping: ENOMEM, and nothing attached."""

    def attach() -> int | None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * PAGE
        resource.setrlimit(resource.RLIMIT_AS, (used + SLOT // 2,) * 2)
        try:
            abi.mmap(region)
        except OSError as error:
            return error.errno
        return None

    assert abi.Child(attach).result() == errno.ENOMEM
    assert info(region).attachments == 0
