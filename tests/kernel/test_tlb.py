"""No access through a dead translation, whatever takes a page out of the tables, on any CPU.

A process stays on each CPU and keeps the TLB entries of its pages in use. In some it stores 1, 2,
3, ... and loads back what it stored; in others it expects what was announced to be there, or more.
A page is then taken away. Who goes on through an entry from before stores where nobody looks, or
loads what is old. The test itself looks and stores through the kernel, past its own TLB.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

import pytest

from tests.kernel import abi
from tests.kernel.abi import PAGE, READ, RW, SHARED, SLOT
from tests.kernel.test_memory import PROCESS_VM_WRITEV, reclaim
from tests.kernel.test_protect import CPUS, count_up, notes, number, wait_for

EACH = 16
"""Pages of each process, and pages that all of them read."""
PAGES = EACH * (max(CPUS) + 2)
ALL_READ = range(EACH * (max(CPUS) + 1), PAGES)
STOP, ANNOUNCED = 62, 63
"""Where on the board they are; what each process is past is at the number of its CPU."""
WORDS = PAGE // 8
ROUNDS = 10
SOFT_OFFLINE = 101
DETACHES = 5


def own(cpu: int) -> range:
    """The pages that the process on this CPU stores in."""
    return range(EACH * cpu, EACH * (cpu + 1))


def use(cpu: int, writing: int, reading: int, note: int) -> int:
    """Load and store until told to stop; the number of turns."""
    os.sched_setaffinity(0, [cpu])
    stored, loaded = (abi.memory(at, PAGES * PAGE).cast("Q") for at in (writing, reading))
    board = abi.memory(note).cast("Q")
    for turn in count(1):
        for page in own(cpu):
            assert stored[page * WORDS] == turn - 1, f"page {page} lost a store"
            stored[page * WORDS] = turn
        board[cpu] = turn
        least = board[ANNOUNCED]
        for page in ALL_READ:
            assert loaded[page * WORDS] >= least, f"page {page} is old"
        if board[STOP]:
            break
    return turn


def store(address: int, value: int) -> None:
    """Store a number as the kernel does for another process."""
    word = ctypes.c_uint64(value)
    ours, theirs = abi.vector(ctypes.addressof(word), 8), abi.vector(address, 8)
    assert abi.syscall(PROCESS_VM_WRITEV, os.getpid(), ours[0], 1, theirs[0], 1, 0) == 8


def load(address: int) -> int:
    """Load a number as the kernel does for another process."""
    return int.from_bytes(abi.get_safely(address, 8), "little")


@contextmanager
def in_use_on_each_cpu(path: str, region: int) -> Iterator[tuple[int, Callable[[], None]]]:
    """Processes that use a window on each CPU; this one's window, and a check of all stores."""
    note, window = notes(), abi.mmap(region)
    board = abi.memory(note).cast("Q")
    reader = os.open(path, os.O_RDONLY)
    reading = abi.mmap(reader, prot=READ)
    os.close(reader)
    children = [abi.Child(use, cpu, window, reading, note) for cpu in CPUS]

    def check() -> None:
        for page in ALL_READ:
            store(window + page * PAGE, board[ANNOUNCED] + 1)
        board[ANNOUNCED] += 1
        wanted = {cpu: board[cpu] + 2 for cpu in CPUS}
        behind = abi.settle(lambda: sum(board[cpu] < wanted[cpu] for cpu in CPUS), 0, 60)
        assert not behind, "one has ended: its result says why"
        for cpu in CPUS:
            least = board[cpu]
            for page in own(cpu):
                assert load(window + page * PAGE) >= least, f"a store in page {page} was lost"

    try:
        wait_for(*(note + 8 * cpu for cpu in CPUS))
        yield window, check
    finally:
        board[STOP] = 1
        answers = [child.result() for child in children]
    assert min(answers) > ROUNDS
    abi.munmap(reading)
    abi.munmap(window)
    abi.munmap(note, PAGE)


def counted(event: str) -> int:
    """How often the kernel has counted an event of /proc/vmstat."""
    lines = Path("/proc/vmstat").read_text().splitlines()
    return int(dict(map(str.split, lines))[event])


def test_reclaim(region: int, path: str) -> None:
    """Pages go to swap."""
    before = counted("pswpout")
    with abi.cgroup("reclaimed") as folder:
        abi.within(folder, lambda: abi.fill(abi.mmap(region), PAGES * PAGE, 0)).result()
        with in_use_on_each_cpu(path, region) as (_, check):
            for _ in range(ROUNDS):
                reclaim(folder, PAGES * PAGE)
                check()
        abi.unmap(region, 0, SLOT)
    assert counted("pswpout") - before > PAGES


def test_reclaim_of_a_file(disk: str, path: str) -> None:
    """Pages of a file go back to the disk."""
    file = os.open(f"{disk}/content", os.O_RDWR | os.O_CREAT)
    os.ftruncate(file, PAGES * PAGE)
    region = abi.make(path, fill=False)
    abi.create_mapping(region, size=PAGES * PAGE, flags=SHARED | abi.FIXED, fd=file)
    before = counted("pgsteal_file")
    with abi.cgroup("reclaimed") as folder:
        abi.within(folder, lambda: abi.fill(abi.mmap(region), PAGES * PAGE, 0)).result()
        with in_use_on_each_cpu(path, region) as (_, check):
            for _ in range(ROUNDS):
                os.fsync(file)
                reclaim(folder, PAGES * PAGE)
                check()
        abi.unmap(region, 0, PAGES * PAGE)
        os.close(file)
        os.unlink(f"{disk}/content")
    assert counted("pgsteal_file") - before > PAGES // 4
    os.close(region)


def test_migration(region: int, path: str) -> None:
    """Pages move to other memory; nothing uses what they leave."""
    before = counted("pgmigrate_success")
    with in_use_on_each_cpu(path, region) as (window, check):
        for _ in range(ROUNDS):
            for page in range(PAGES):
                # busy with another processor's fault, say
                with suppress(OSError):
                    abi.madvise(window + page * PAGE, PAGE, SOFT_OFFLINE)
            check()
    assert counted("pgmigrate_success") - before > PAGES


def test_file_cut_short(disk: str, path: str) -> None:
    """Each process gets in no store after the call has returned, and dies by SIGBUS."""
    file = os.open(f"{disk}/content", os.O_RDWR | os.O_CREAT)
    os.ftruncate(file, SLOT)
    region = abi.make(path, fill=False)
    abi.create_mapping(region, flags=SHARED | abi.FIXED, fd=file)
    window, note = abi.mmap(region), notes()

    def pinned(cpu: int) -> None:
        os.sched_setaffinity(0, [cpu])
        count_up(window + cpu * PAGE, note + cpu * 8)

    for _ in range(4):
        abi.fill(note, PAGE, 0)
        children = [abi.Child(pinned, cpu) for cpu in CPUS]
        wait_for(*(note + 8 * cpu for cpu in CPUS))
        os.ftruncate(file, 0)
        noted = [number(note + 8 * cpu) for cpu in CPUS]
        assert [child.signal(60) for child in children] == [signal.SIGBUS] * len(CPUS)
        # the note of the last store may come after it
        assert all(
            number(note + 8 * cpu) - least < 2 for cpu, least in zip(CPUS, noted, strict=True)
        )
        os.ftruncate(file, SLOT)
        assert abi.get(window, PAGES * PAGE) == bytes(PAGES * PAGE)
    abi.munmap(window)
    abi.munmap(note, PAGE)
    os.close(region)
    os.close(file)


_libc = ctypes.CDLL(None)
_libc.lfind.restype = ctypes.c_void_p
_SAME = ctypes.cast(_libc.strcmp, ctypes.c_void_p)


def sees(word: bytes, address: int, patience: ctypes.c_size_t) -> bool:
    """Whether ``word`` appears there before patience is 0.

    All in one call of C that loads again and again, so the CPU has no reason to switch: lfind looks
    at ``patience`` elements, of no size, so each is the same.
    """
    found: int | None = _libc.lfind(
        word, ctypes.c_void_p(address), ctypes.byref(patience), ctypes.c_size_t(0), _SAME
    )
    return found is not None


@pytest.mark.parametrize("end", ["unmapped", "mapped over", "moved"])
def test_thread_of_a_detached_window(region: int, end: str) -> None:
    """A thread on another CPU sees nothing of the region once the call has returned."""

    def process() -> bool:
        window, other = abi.mmap(region), abi.mmap(region)
        spot = 5 * PAGE
        abi.put(other + spot, b"early\0")
        patience = ctypes.c_size_t(1 << 62)
        answers: list[bool] = []

        def look() -> None:
            os.sched_setaffinity(0, [CPUS[-1]])
            answers.append(sees(b"late", window + spot, patience))

        os.sched_setaffinity(0, [CPUS[0]])
        thread = threading.Thread(target=look)
        thread.start()
        time.sleep(0.1)
        if end == "unmapped":
            abi.munmap(window)
        elif end == "mapped over":
            over = abi.PRIVATE | abi.ANONYMOUS | abi.FIXED
            assert abi.mmap(-1, SLOT, RW, over, window) == window
        else:
            place = abi.mmap(-1, 2 * SLOT, READ, abi.PRIVATE | abi.ANONYMOUS)
            abi.mremap(window, SLOT, SLOT, 3, (place + SLOT - 1) & -SLOT)
        abi.put(other + spot, b"late\0")
        time.sleep(0.1)
        patience.value = 0
        thread.join()
        return answers[0]

    for _ in range(DETACHES):
        child = abi.Child(process)
        if end == "mapped over":
            assert child.result() is False
        else:
            assert child.signal() == signal.SIGSEGV
