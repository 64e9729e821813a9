"""Two things at once: each pair for a short while, with every byte that is read checked."""

from __future__ import annotations

import errno
import os
import random
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

import pytest

from mshare.engines.msharefs import info
from tests.kernel import abi
from tests.kernel.abi import PAGE, READ, RW, SLOT

SECONDS = 2.0
PAGES = 512
SIZE = PAGES * PAGE
BELOW = 64 << 20
HUGE = 2 << 20
CHANGED = 64 << 20
"""As much of the half that a change takes away has content."""
NOHUGEPAGE, COLLAPSE = 15, 25
FIXED = abi.SHARED | abi.FIXED
OVER = abi.PRIVATE | abi.ANONYMOUS | abi.FIXED
FUTEX, VMSPLICE, IO_URING_SETUP, IO_URING_REGISTER = 202, 278, 425, 427
WALKS = ["smaps", "pagemap", "numa_maps", "clear_refs", "smaps_rollup"]
LAYOUTS = ["map", "unmap", "protect"]


def page(number: int) -> bytes:
    """What page ``number`` holds."""
    return (b"%8d" % number) * (PAGE // 8)


def whole(address: int) -> None:
    """Check every page."""
    for number in range(PAGES):
        assert abi.get(address + number * PAGE, PAGE) == page(number)


@pytest.fixture
def window(region: int) -> Iterator[int]:
    """A window whose first pages have content."""
    address = abi.mmap(region)
    for number in range(PAGES):
        abi.put(address + number * PAGE, page(number))
    yield address
    whole(address)
    abi.munmap(address)


@contextmanager
def meanwhile(*works: Callable[[], None]) -> Iterator[None]:
    """Processes that do ``works`` again and again during the block, and find no fault."""
    stop = shared()

    def repeat(work: Callable[[], None]) -> int:
        for turn in count(1):
            work()
            if stop[0]:
                return turn
        return 0

    children = [abi.Child(repeat, work) for work in works]
    try:
        yield
    finally:
        stop[0] = 1
    for child in children:
        assert child.result() > 0


def shared() -> memoryview:
    """A page that children have in common with this process."""
    return abi.memory(abi.mmap(-1, PAGE, RW, abi.SHARED | abi.ANONYMOUS))


def for_a_while(work: Callable[[], object]) -> None:
    """Do it for some seconds."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        work()


def layout(region: int, kind: str, window: int = 0) -> Callable[[], None]:
    """A change of the second half of the slot, and back.

    With a window, of a half with content, so that page tables go.
    """
    half = SLOT // 2

    def change() -> None:
        for at in range(half, half + CHANGED, HUGE) if window else ():
            abi.put(window + at, b"x")
        before = info(region).pagetable_bytes
        if kind == "map":
            abi.create_mapping(region, half, half)
        elif kind == "unmap":
            abi.unmap(region, half, half)
            if window:
                assert info(region).pagetable_bytes <= before - CHANGED // HUGE // 2 * PAGE
            abi.create_mapping(region, half, half)
        else:
            abi.protect(region, half, half, READ)
            abi.protect(region, half, half, RW)

    return change


def walk(name: str) -> Callable[[], None]:
    """One pass of a page-table walk that /proc offers, over this process."""

    def read() -> None:
        if name == "clear_refs":
            for kind in "134":
                Path("/proc/self/clear_refs").write_text(kind)
            return
        if name != "pagemap":
            with suppress(FileNotFoundError):
                Path(f"/proc/self/{name}").read_bytes()
            return
        starts = [
            int(line.split("-")[0], 16)
            for line in Path("/proc/self/maps").read_text().splitlines()
            if abi.MOUNT in line or "/kernel-" in line
        ]
        with open("/proc/self/pagemap", "rb", buffering=0) as file:
            for start in starts:
                for at, size in ((0, SIZE), (SLOT // 2, CHANGED)):
                    file.seek((start + at) // PAGE * 8)
                    assert len(file.read(size // PAGE * 8)) == size // PAGE * 8

    return read


@pytest.mark.parametrize("kind", LAYOUTS)
def test_layout_changes_under_faults(region: int, window: int, kind: str) -> None:
    """Others store in pages of their own, also in what comes and goes."""

    def store(number: int) -> Callable[[], None]:
        turn = count()

        def once() -> None:
            value = page(next(turn))
            spot = window + SIZE + number * PAGE
            abi.put(spot, value)
            whole(window)
            assert abi.get(spot, PAGE) == value

        return once

    with meanwhile(store(0), store(1)):
        for_a_while(layout(region, kind))


@pytest.mark.parametrize("kind", LAYOUTS)
def test_accesses_to_what_changes(region: int, window: int, kind: str) -> None:
    """Loads and stores in the very half: they succeed, or fail as the layout says."""
    half = window + SLOT // 2
    done = shared().cast("Q")

    def load() -> None:
        for number in range(0, PAGES, 16):
            try:
                seen = abi.get_safely(half + number * PAGE, 8)
            except OSError as error:
                assert (error.errno, kind) == (errno.EFAULT, "unmap")
            else:
                assert set(seen) <= {0, ord("x")}
                done[0] += 1

    def store() -> None:
        try:
            abi.put_safely(half, b"x" * PAGE)
        except OSError as error:
            assert error.errno == errno.EFAULT
            assert kind != "map"
        else:
            done[1] += 1

    with meanwhile(load, store):
        for_a_while(layout(region, kind, window))
    assert done[0]
    assert done[1]


@pytest.mark.parametrize("name", WALKS)
def test_walkers_during_layout_changes(region: int, window: int, name: str) -> None:
    """Readers of /proc walk the tables that a change takes away."""
    with meanwhile(walk(name), lambda: whole(window)):
        for_a_while(layout(region, "unmap", window))


def together(*works: Callable[[], object]) -> None:
    """Each on a thread of its own. :raises BaseException: what one of them raised."""
    with ThreadPoolExecutor(len(works)) as pool:
        for done in [pool.submit(work) for work in works]:
            done.result()


def test_fork_during_faults(region: int, window: int) -> None:
    """Threads fault while the process forks; parent and children read what is there."""

    def fork() -> None:
        abi.Child(whole, window).result()

    def both() -> None:
        own = abi.mmap(region)
        together(lambda: whole(own), fork)
        abi.munmap(own)

    with meanwhile(both, lambda: abi.madvise(window, SLOT, 4)):
        for_a_while(fork)


def swap_places(region: int, spots: list[int]) -> Callable[[], None]:
    """Mapping and unmapping at the same address, by two threads of one process."""

    def once() -> None:
        def attach() -> None:
            abi.mmap(region, SLOT, READ, FIXED, spots[0])

        def cover() -> None:
            abi.mmap(-1, SLOT, RW, OVER | 0x4000, spots[0])

        together(attach, cover, attach, cover)

    return once


def move(region: int, spots: list[int]) -> Callable[[], None]:
    """mremap from one address to another and back."""

    def once() -> None:
        abi.mmap(region, SLOT, RW, FIXED, spots[0])
        abi.mremap(spots[0], SLOT, SLOT, 3, spots[1])
        abi.mremap(spots[1], SLOT, SLOT, 3, spots[0])

    return once


def test_fork_of_who_is_to_stop(region: int, window: int) -> None:
    """A freeze of its group that meets a fork leaves no child without the window."""

    def fork_often() -> None:
        # below the window, so it is copied before it: fork is slow, and then comes to the window
        below = abi.mmap(-1, BELOW, RW, abi.PRIVATE | abi.ANONYMOUS, window - SLOT)
        assert below < window
        abi.madvise(below, BELOW, NOHUGEPAGE)
        abi.fill(below, BELOW)
        for _ in range(20):
            assert abi.Child(abi.get, window, PAGE).result() == page(0)

    with abi.cgroup("freezes") as folder:
        child = abi.within(folder, fork_often)
        pause = 0.01
        while not os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            for state in "1", "0":
                Path(folder, "cgroup.freeze").write_text(state)
                time.sleep(random.uniform(0, pause))
            pause *= 1.02  # an interrupted fork begins anew: it needs a pause as long as it is
        child.result()


@pytest.mark.parametrize("change", [swap_places, move])
def test_attach_and_unmap_of_one_range(
    region: int, window: int, change: Callable[[int, list[int]], Callable[[], None]]
) -> None:
    """A reader sees a whole page of the region, zeros of the other mapping, or no page."""

    def race() -> None:
        place = abi.mmap(-1, 3 * SLOT, READ, abi.PRIVATE | abi.ANONYMOUS)
        first = (place + SLOT - 1) & -SLOT
        once = change(region, [first, first + SLOT])
        stop = False
        seen: Counter[str] = Counter()
        names = {page(5): "region", bytes(PAGE): "other"}

        def look() -> None:
            while not stop:
                try:
                    seen[names.get(abi.get_safely(first + 5 * PAGE, PAGE), "wrong")] += 1
                except OSError as error:
                    seen[errno.errorcode[error.errno or 0]] += 1

        def swap() -> None:
            nonlocal stop
            try:
                # a move leaves a hole: the other mapping is there only before the first one
                abi.settle(lambda: not seen["other"], 0, seconds=60)
                for_a_while(once)
                end = time.monotonic() + 60
                while not seen["region"] and time.monotonic() < end:
                    once()
            finally:
                stop = True

        together(look, swap)
        assert seen["region"]
        assert seen["other"]
        assert set(seen) <= {"region", "other"} | ({"EFAULT"} if change is move else set())

    with meanwhile(lambda: whole(window)):
        abi.Child(race).result()


def test_hundreds_exit_at_once(region: int, window: int) -> None:
    """300 processes killed in one call, with a layout change in the middle of it."""
    before = abi.meminfo("PageTables")

    def crowd() -> None:
        os.setpgid(0, 0)
        for _ in range(300):
            if os.fork() == 0:
                abi.forever()
        abi.forever()

    child = abi.Child(crowd)
    deadline = time.monotonic() + 900  # a kernel with detectors takes minutes
    while info(region).attachments < 302 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert info(region).attachments == 302
    os.killpg(child.pid, signal.SIGKILL)
    layout(region, "unmap")()
    child.signal()
    assert abi.settle(lambda: info(region).attachments, 1, seconds=60) == 1
    limit = before + (256 << 10)
    assert abi.settle(lambda: abi.meminfo("PageTables"), limit, seconds=60) <= limit


def test_futex_across_windows(region: int, window: int) -> None:
    """Sleepers in a process with the window elsewhere are woken."""

    def sleep() -> None:
        mine = abi.mmap(region)
        assert mine != window
        abi.put(window + SIZE, b"\1\0\0\0")
        with suppress(BlockingIOError):
            abi.syscall(FUTEX, mine + SIZE + 4, 0, 0, 0, 0, 0)

    child = abi.Child(sleep)
    while abi.get(window + SIZE, 1) != b"\1":
        time.sleep(0.01)
    deadline = time.monotonic() + 20
    while not abi.syscall(FUTEX, window + SIZE + 4, 1, 1, 0, 0, 0):
        assert time.monotonic() < deadline
    child.result()


def test_faults_of_others(region: int, window: int) -> None:
    """process_vm_readv and /proc/PID/mem of a process that has not touched its window."""
    with open("/proc/sys/vm/drop_caches", "w") as file:
        file.write("1")
    elsewhere = shared().cast("Q")

    def stay() -> None:
        elsewhere[0] = abi.mmap(region)
        abi.forever()

    child = abi.Child(stay)
    while not elsewhere[0]:
        time.sleep(0.01)
    try:
        assert abi.get_safely(elsewhere[0] + 7 * PAGE, PAGE, child.pid) == page(7)
        # not yet there: the fault makes it, for the other process
        assert abi.get_safely(elsewhere[0] + SIZE, PAGE, child.pid) == bytes(PAGE)
        with open(f"/proc/{child.pid}/mem", "r+b", buffering=0) as memory:
            memory.seek(elsewhere[0] + SIZE + PAGE)
            assert memory.write(page(1)) == PAGE
        assert abi.get(window + SIZE + PAGE, PAGE) == page(1)
    finally:
        child.kill()


def test_pages_in_a_pipe(region: int, window: int) -> None:
    """vmsplice: the pipe keeps the pages, also when the window and the layout have gone."""
    reading, writing = os.pipe()

    def splice() -> None:
        half = abi.mmap(region) + SLOT // 2
        abi.put(half, page(3))
        vector = abi.vector(half, PAGE)
        assert abi.syscall(VMSPLICE, writing, vector[0], 1, 0) == PAGE

    abi.Child(splice).result()
    abi.unmap(region, SLOT // 2, SLOT // 2)
    assert os.read(reading, PAGE) == page(3)
    os.close(reading)
    os.close(writing)


def test_direct_io(window: int, disk: str) -> None:
    """A file written from the window and read into it, past the page cache."""
    fd = os.open(f"{disk}/direct", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    assert os.pwritev(fd, [abi.memory(window, SIZE)], 0) == SIZE
    assert os.preadv(fd, [abi.memory(window + SIZE, SIZE)], 0) == SIZE
    os.close(fd)
    whole(window + SIZE)


def test_fixed_buffers(region: int, window: int) -> None:
    """io_uring keeps pages of the window pinned; the layout changes and the process ends."""

    def pin() -> None:
        half = abi.mmap(region) + SLOT // 2
        params = abi.memory(abi.anonymous(PAGE))
        ring = abi.syscall(IO_URING_SETUP, 4, abi.address_of(params))
        vector = abi.vector(half, SIZE)
        try:
            abi.syscall(IO_URING_REGISTER, ring, 0, vector[0], 1)
        except OSError as error:
            # 6.1 takes no file mapping but those of tmpfs and hugetlbfs
            assert error.errno == errno.EOPNOTSUPP
            assert os.uname().release.startswith("6.1.")
        layout(region, "unmap")()
        abi.put(half, page(1))

    for _ in range(8):
        abi.Child(pin).result()


def test_compaction(window: int) -> None:
    """Pages move while everybody reads and writes them."""

    def write() -> None:
        for number in range(PAGES):
            abi.put(window + number * PAGE, page(number))

    with meanwhile(write, lambda: whole(window)):
        for_a_while(lambda: Path("/proc/sys/vm/compact_memory").write_text("1"))


@contextmanager
def collapsing() -> Iterator[Path]:
    """khugepaged at full speed, over shared memory too; the folder with its settings."""
    base = Path("/sys/kernel/mm/transparent_hugepage")
    wanted = {"khugepaged/scan_sleep_millisecs": "0", "khugepaged/alloc_sleep_millisecs": "0"}
    wanted |= {"shmem_enabled": "always", "enabled": "always"}
    before = {name: (base / name).read_text() for name in wanted}
    for name, value in wanted.items():
        (base / name).write_text(value)
    try:
        yield base
    finally:
        for name, value in before.items():
            chosen = value.split("[")[-1].split("]")[0] if "[" in value else value
            (base / name).write_text(chosen)


def test_collapse(path: str) -> None:
    """khugepaged makes a huge page of what another maps too. On 6.1, where it takes tables away
    without asking anybody, those of the host mm stay."""
    content = os.memfd_create("content")
    os.ftruncate(content, HUGE)
    region = abi.make(path, fill=False)
    abi.create_mapping(region, size=HUGE, flags=FIXED, fd=content)
    window = abi.mmap(region)
    for number in range(PAGES):
        abi.put(window + number * PAGE, page(number))
    tables = info(region).pagetable_bytes
    room = abi.mmap(-1, 2 * HUGE, READ, abi.PRIVATE | abi.ANONYMOUS)
    with collapsing():
        own = abi.mmap(content, HUGE, RW, FIXED, (room + HUGE - 1) & -HUGE)
        abi.touch(own, 1, step=PAGE, count=PAGES)
        with meanwhile(lambda: whole(window), lambda: abi.Child(whole, window).result()):
            missed = abi.settle(lambda: not abi.huge(own), 0, seconds=120)
    assert not missed, "nothing was collapsed"
    whole(window)
    if os.uname().release.startswith("6.1."):
        assert info(region).pagetable_bytes == tables
    abi.munmap(room, 2 * HUGE)
    abi.munmap(window)
    os.close(region)
    os.close(content)


def test_protect_meets_collapse(path: str) -> None:
    """Another who maps the file makes huge pages of it; what PROTECT took stays taken."""
    content = os.memfd_create("content")
    os.ftruncate(content, HUGE)
    region = abi.make(path, fill=False)
    abi.create_mapping(region, size=HUGE, flags=abi.SHARED | abi.FIXED, fd=content)
    window = abi.mmap(region)
    room = abi.mmap(-1, 2 * HUGE, READ, abi.PRIVATE | abi.ANONYMOUS)
    own = abi.mmap(content, HUGE, RW, abi.SHARED | abi.FIXED, (room + HUGE - 1) & -HUGE)
    met = shared()

    def collapse() -> None:
        abi.touch(own, 1, step=PAGE, count=HUGE // PAGE)
        with suppress(OSError):  # the pages are in use by the other
            abi.madvise(own, HUGE, COLLAPSE)
            met[0] = 1
        abi.punch(content, 0, PAGE)

    def protect() -> None:
        abi.touch(window, 1, step=PAGE, count=HUGE // PAGE)
        abi.protect(region, 0, HUGE, READ)
        for at in range(0, HUGE, 16 * PAGE):
            assert abi.code_of(abi.put_safely, window + at, b"x") == errno.EFAULT
        abi.protect(region, 0, HUGE, RW)
        assert abi.code_of(abi.put_safely, window, b"x") == 0

    with meanwhile(collapse):
        for_a_while(protect)
    assert met[0], "nothing was collapsed: the test would not see it"
    abi.munmap(window)
    os.close(region)
    os.close(content)


def test_two_regions_changed_at_once(region: int, window: int, path: str) -> None:
    """Two layout changers and a process in both regions: nobody waits for ever."""
    other = abi.make(f"{path}-2")

    def both() -> None:
        one, two = abi.mmap(region), abi.mmap(other)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.send(b"x" * PAGE)
            with suppress(OSError):
                theirs.recv_into(abi.memory(one + SLOT // 2))
        with suppress(OSError):
            abi.get_safely(two + SLOT // 2, 8)
        abi.munmap(one)
        abi.munmap(two)

    with meanwhile(both, both, layout(other, "unmap")):
        for_a_while(layout(region, "unmap"))
    os.close(other)
    os.unlink(f"{path}-2")


def test_two_windows_of_one_process(region: int, window: int) -> None:
    """Reads of /proc/PID/mem keep the lock of a process while they wait for a layout change.

    The process has the region twice: the change must not ask for that lock a second time.
    """
    places = shared().cast("Q")

    def stay() -> None:
        places[1] = abi.mmap(region, SLOT, READ)
        places[0] = abi.mmap(region)
        abi.forever()

    child = abi.Child(stay)
    while not places[0]:
        time.sleep(0.01)

    def look(place: int) -> Callable[[], None]:
        def once() -> None:
            with open(f"/proc/{child.pid}/mem", "rb", buffering=0) as memory:
                memory.seek(places[place] + 7 * PAGE)
                assert memory.read(PAGE) == page(7)

        return once

    longest = 0.0

    def change() -> None:
        nonlocal longest
        start = time.monotonic()
        layout(region, "map", window)()
        longest = max(longest, time.monotonic() - start)

    with meanwhile(look(0), look(1)):
        for_a_while(change)
    assert longest < 5
    child.kill()


def test_unmapped_in_the_middle_of_a_change(region: int, window: int) -> None:
    """A change has drained one process and waits for another: what the first maps next is its own.

    Its processor must not remember the region there.
    """
    place = 0x100000000000
    state, when = shared(), shared().cast("d")

    def await_state(value: int) -> None:
        while state[0] < value:
            pass

    def first() -> list[bytes]:
        os.sched_setaffinity(0, {0})
        abi.mmap(region, SLOT, RW, FIXED, place)
        state[0] = 1
        await_state(3)
        touched = place + 5 * PAGE
        assert abi.get(touched, 8) == page(5)[:8]
        state[0] = 4
        end = time.perf_counter() + when[1]
        while time.perf_counter() < end:
            pass
        when[0] = time.monotonic()
        abi.munmap(place)
        abi.mmap(-1, SLOT, RW, OVER | 0x4000, place)
        seen = abi.get(touched, 8)
        abi.put(touched, b"mine")
        return [seen, abi.get(touched, 4)]

    def second() -> None:
        await_state(1)
        size = 128 << 20
        abi.mmap(region)
        abi.madvise(memory := abi.anonymous(size), size, 15)
        abi.fill(memory, size)
        with open("/proc/self/clear_refs", "wb", buffering=0) as clear:
            state[0] = 2
            while True:
                clear.write(b"4")  # takes its mmap_lock for long

    met, took, start = 0, 0.02, time.monotonic()
    while met < 3 and time.monotonic() - start < (60 if met else 600):
        state[0], when[1] = 0, random.uniform(0, took)
        children = [abi.Child(first)]
        os.sched_setaffinity(0, {1})
        children.append(abi.Child(second))
        await_state(2)
        state[0] = 3
        await_state(4)
        began = time.monotonic()
        abi.protect(region, SLOT // 2, SLOT // 2, RW)
        ended = time.monotonic()
        os.sched_setaffinity(0, {0, 1})
        assert children[0].result() == [bytes(8), b"mine"]
        met += began < when[0] < ended
        took = max(0.02, ended - began)
        children[1].kill()
    assert met, "never in the middle: the test would not see it"
