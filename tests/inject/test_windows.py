"""Windows: mmap, faults, fork, mremap, madvise, munmap, exit."""

from __future__ import annotations

import errno
import faulthandler
import os
import signal
from collections.abc import Iterator

import pytest

from mshare.engines.msharefs import info
from tests.inject.inject import ENOUGH, Caller, answer, check, standing
from tests.inject.inject import place as placed
from tests.kernel import abi
from tests.kernel.abi import PAGE, READ, RW, SLOT
from tests.kernel.test_lifetime import nothing_left
from tests.kernel.test_races import meanwhile

SLOTS = 3
SPOT = 0x6000_0000_0000
"""An address where a test maps windows, SLOTS of them from here on, and OTHER for another."""
OTHER = SPOT + (16 << 30)
LOW = SLOT
"""Below everything else of a process."""
FIXED = abi.SHARED | abi.FIXED
OVER = abi.PRIVATE | abi.ANONYMOUS | abi.FIXED | 0x4000
WAIT_NOT_REAPED = os.WEXITED | os.WNOWAIT


def mark(slot: int) -> bytes:
    """What a slot starts with."""
    return b"slot %d" % slot


def shows(window: int, slots: int = SLOTS) -> None:
    """All marks are there."""
    for slot in range(slots):
        assert abi.get_safely(window + slot * SLOT, 6) == mark(slot)


@pytest.fixture
def wide(path: str) -> Iterator[int]:
    """A region of several slots, marked; every window is gone at the end, with its grafts."""
    fd = abi.make(path, SLOTS * SLOT)
    window = abi.mmap(fd, SLOTS * SLOT)
    for slot in range(SLOTS):
        abi.put(window + slot * SLOT, mark(slot))
    abi.munmap(window, SLOTS * SLOT)
    yield fd
    now = info(fd)
    assert (now.attachments, now.grafts) == (0, now.ungrafts)
    os.close(fd)


@pytest.mark.parametrize("prot", [READ, RW], ids=["reading", "writing"])
@pytest.mark.parametrize("slots", [1, SLOTS])
@pytest.mark.parametrize("first", [True, False], ids=["first", "another"])
def test_mmap(wide: int, prot: int, slots: int, first: bool) -> None:
    """A window that cannot be made is not there; the first of a process or one more."""
    keep = None if first else abi.mmap(wide)
    size = slots * SLOT
    before = standing(wide)

    def undo(window: int) -> None:
        shows(window, slots)
        if prot == RW:
            abi.put_safely(window, mark(0))
        abi.munmap(window, size)

    def same(code: int) -> None:
        assert standing(wide) == before

    def all_of_it() -> None:
        check(Caller, lambda: abi.mmap(wide, size, prot), undo, same)

    all_of_it()
    if keep:
        abi.munmap(keep)


def test_first_window_of_a_process(wide: int) -> None:
    """The notifier of a new process: it fails or works, and leaves nothing."""

    def attach(nth: int) -> tuple[int, bool]:
        with placed(Caller) as where:
            outcome = where.run(nth, lambda: abi.mmap(wide, SLOTS * SLOT))
            if not outcome.errno:
                shows(outcome.value)
            shows(abi.mmap(wide, SLOTS * SLOT))
            return outcome.errno, outcome.injected

    before = standing(wide)
    with nothing_left(30):
        for nth in range(1, 100):
            code, injected = abi.Child(attach, nth).result()
            assert code in ((0, errno.ENOMEM) if injected else (0,))
            assert standing(wide) == before
            if not injected:
                break
    assert 5 < nth < 99


def whole_or_gone(wide: int) -> None:
    """The window at the spot is as it was, or nothing is there."""
    now = answer(abi.get_safely, SPOT, 6)
    assert now in (mark(0), "EFAULT")
    assert info(wide).attachments == (now == mark(0))


def test_over_an_old_window(wide: int) -> None:
    """mmap with MAP_FIXED over a window: the new one, the old one, or a gap; never half of one."""
    abi.mmap(wide, SLOT, RW, FIXED, SPOT)

    def put_over() -> int:
        return abi.mmap(wide, SLOT, RW, FIXED, SPOT, SLOT)

    def undo(window: int) -> None:
        assert abi.get_safely(window, 6) == mark(1)
        assert info(wide).attachments == 1
        abi.mmap(wide, SLOT, RW, FIXED, SPOT)

    check(Caller, put_over, undo, lambda code: whole_or_gone(wide))
    abi.munmap(SPOT)


def test_other_memory_over_a_window(wide: int) -> None:
    """The same with private memory over it."""
    abi.mmap(wide, SLOT, RW, FIXED, SPOT)

    def undo(window: int) -> None:
        assert abi.get_safely(SPOT, 6) == bytes(6)
        assert info(wide).attachments == 0
        abi.mmap(wide, SLOT, RW, FIXED, SPOT)

    check(
        Caller,
        lambda: abi.mmap(-1, SLOT, RW, OVER, SPOT),
        undo,
        lambda code: whole_or_gone(wide),
    )
    abi.munmap(SPOT)


@pytest.mark.parametrize("write", [False, True], ids=["load", "store"])
@pytest.mark.parametrize("how", ["access", "call", "populate"])
def test_first_touch(wide: int, write: bool, how: str) -> None:
    """A page that nobody touched: the access goes through in the end, a call may be refused."""
    window = abi.mmap(wide, SLOTS * SLOT)
    spot = window + SLOT + (64 << 20)
    calls = {
        ("access", False): lambda: abi.get(spot, 6),
        ("access", True): lambda: abi.put(spot, b"touch!"),
        ("call", False): lambda: abi.get_safely(spot, 6),
        ("call", True): lambda: abi.put_safely(spot, b"touch!"),
        ("populate", False): lambda: abi.madvise(spot, 4 * PAGE, 22),
        ("populate", True): lambda: abi.madvise(spot, 4 * PAGE, 23),
    }
    stored = b"touch!" if write and how != "populate" else bytes(6)

    def fresh() -> None:
        abi.unmap(wide, SLOT + (64 << 20), 2 << 20)
        abi.create_mapping(wide, SLOT + (64 << 20), 2 << 20)

    def undo(result: object) -> None:
        assert abi.get(spot, 6) == stored
        shows(window)
        fresh()

    def same(code: int) -> None:
        assert how != "access"
        assert abi.get(spot, 6) == bytes(6)
        shows(window)

    fresh()
    check(Caller, calls[how, write], undo, same, (errno.ENOMEM, errno.EFAULT))
    abi.munmap(window, SLOTS * SLOT)


@pytest.mark.parametrize("write", [False, True], ids=["load", "store"])
def test_first_touch_of_a_disk(path: str, disk: str, write: bool) -> None:
    """A page of a file that has to be read, or given a block."""
    size = 64 * PAGE
    fd = abi.make(path, fill=False)
    file = os.open(f"{disk}/file", os.O_RDWR | os.O_CREAT)
    abi.create_mapping(fd, 0, size, flags=FIXED, fd=file)
    window = abi.mmap(fd)

    def fresh() -> None:
        os.ftruncate(file, 0)
        os.ftruncate(file, size)
        if not write:
            os.pwrite(file, b"there!" + bytes(size - 6), 0)
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)

    def undo(result: object) -> None:
        assert abi.get(window, 6) == b"there!"
        fresh()

    def same(code: int) -> None:
        assert abi.get_safely(window, 6) == (bytes(6) if write else b"there!")

    def touch() -> None:
        if write:
            abi.put_safely(window, b"there!")
        else:
            abi.get_safely(window, 6)

    fresh()
    check(Caller, touch, undo, same, (errno.ENOMEM, errno.EFAULT))
    abi.munmap(window)
    os.close(file)
    os.close(fd)


def test_touch_after_the_tables_went(wide: int) -> None:
    """madvise(DONTNEED) takes the tables out of the process; the next access brings them back."""
    window = abi.mmap(wide, SLOTS * SLOT)

    def same(code: int) -> None:
        shows(window)

    def undo(result: object) -> None:
        shows(window)

    check(Caller, lambda: abi.madvise(window, SLOTS * SLOT, 4), undo, same, least=0)

    def again(result: object) -> None:
        shows(window)
        abi.madvise(window, SLOTS * SLOT, 4)

    check(Caller, lambda: abi.get(window, 6), again, same, least=0)
    abi.munmap(window, SLOTS * SLOT)


@pytest.mark.parametrize("changing", [False, True], ids=["still", "changing"])
def test_fork(wide: int, changing: bool) -> None:
    """The child has the window, or its first access is SIGBUS; or there is no child.

    fork copies mappings in the order of their addresses, so these come first, and what the kernel
    allocates for all the others need not be walked.
    """
    window = abi.mmap(wide, SLOTS * SLOT, RW, FIXED, LOW)
    ro = abi.mmap(wide, SLOT, READ, FIXED, LOW + SLOTS * SLOT)
    seen = {"dead": 0, "whole": 0}

    def look() -> None:
        faulthandler.disable()
        for address in (window, window + SLOT, window + 2 * SLOT, ro):
            if abi.get(address, 4) != b"slot":
                os._exit(1)
        os._exit(0)

    def fork() -> int:
        pid = os.fork()
        if pid == 0:
            look()
        return pid

    def undo(pid: int) -> None:
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status in (0, -signal.SIGBUS)
        seen["dead" if status else "whole"] += 1
        after(0)

    def after(code: int) -> None:
        shows(window)
        # those of who makes the changes too
        assert info(wide).attachments == 2 * (1 + changing)

    def turn() -> None:
        abi.protect(wide, SLOT // 2, SLOT // 2, READ)
        abi.protect(wide, SLOT // 2, SLOT // 2, RW)

    with meanwhile(*[turn] * changing):
        check(Caller, fork, undo, after, until=120, times=2 if changing else ENOUGH)
    assert seen["whole"] > 0
    assert seen["dead"] > 0
    abi.munmap(ro)
    abi.munmap(window, SLOTS * SLOT)


def test_mremap(wide: int) -> None:
    """A window is moved, or is where it was, and works there.

    When the kernel has no memory to unmap the old place it leaves what was there, whatever it is.
    """
    size = SLOTS * SLOT
    abi.mmap(wide, size, RW, FIXED, SPOT)
    old: object = None

    def move() -> int:
        return abi.mremap(SPOT, size, size, 3, OTHER)

    def undo(window: int) -> None:
        nonlocal old
        assert window == OTHER
        shows(window)
        abi.put_safely(window, mark(0))
        old = answer(abi.get_safely, SPOT, 6)
        assert old in ("EFAULT", mark(0))
        assert info(wide).attachments == 1 + (old != "EFAULT")
        abi.mremap(OTHER, size, size, 3, SPOT)

    def same(code: int) -> None:
        shows(SPOT)
        abi.put_safely(SPOT, mark(0))
        assert answer(abi.get_safely, OTHER, 6) == "EFAULT"
        assert info(wide).attachments == 1

    check(Caller, move, undo, same)
    assert old == "EFAULT"  # of the last, in whose way was nothing
    abi.munmap(SPOT, size)


def test_mremap_over_a_window(wide: int) -> None:
    """The same, over a window that is there."""
    abi.mmap(wide, SLOT, RW, FIXED, SPOT)
    abi.mmap(wide, SLOT, RW, FIXED, OTHER, SLOT)

    def undo(window: int) -> None:
        assert abi.get_safely(OTHER, 6) == mark(0)
        assert answer(abi.get_safely, SPOT, 6) in (mark(0), "EFAULT")
        abi.mmap(wide, SLOT, RW, FIXED, SPOT)
        abi.mmap(wide, SLOT, RW, FIXED, OTHER, SLOT)

    def same(code: int) -> None:
        assert abi.get_safely(SPOT, 6) == mark(0)
        now = answer(abi.get_safely, OTHER, 6)
        assert now in (mark(1), "EFAULT")
        assert info(wide).attachments == 1 + (now == mark(1))

    check(Caller, lambda: abi.mremap(SPOT, SLOT, SLOT, 3, OTHER), undo, same)
    abi.munmap(SPOT)
    abi.munmap(OTHER)


def test_munmap(wide: int) -> None:
    """A window is gone, or whole."""
    size = SLOTS * SLOT
    abi.mmap(wide, size, RW, FIXED, SPOT)

    def undo(result: object) -> None:
        assert answer(abi.get_safely, SPOT, 6) == "EFAULT"
        assert info(wide).attachments == 0
        abi.mmap(wide, size, RW, FIXED, SPOT)

    def same(code: int) -> None:
        shows(SPOT)
        assert info(wide).attachments == 1

    check(Caller, lambda: abi.munmap(SPOT, size), undo, same, least=0)
    abi.munmap(SPOT, size)


def test_exit(wide: int) -> None:
    """A process with windows ends without memory: it leaves nothing."""
    reading, writing = os.pipe()

    def end(nth: int) -> None:
        shows(abi.mmap(wide, SLOTS * SLOT))
        shows(abi.mmap(wide, prot=READ), 1)
        os.read(reading, 1)
        fd = os.open("/proc/thread-self/fail-nth", os.O_WRONLY)
        os.pwrite(fd, str(nth).encode(), 0)
        os._exit(0)

    def ended(nth: int) -> bool:
        child = abi.Child(end, nth)
        counter = os.open(f"/proc/{child.pid}/fail-nth", os.O_RDONLY)
        os.write(writing, b".")
        os.waitid(os.P_PID, child.pid, WAIT_NOT_REAPED)
        left = int(os.pread(counter, 16, 0))
        os.close(counter)
        assert child.signal() is None
        assert info(wide).attachments == 0
        return left == 0

    ended(1)
    with nothing_left(60):
        for nth in range(1, 200):
            if not [ended(nth) for _ in range(4)].count(True):
                break
    assert nth < 199
    now = info(wide)
    assert now.grafts == now.ungrafts
    os.close(reading)
    os.close(writing)


def test_others_go_on(wide: int) -> None:
    """Failures of one process, with others that attach, fault and see every byte."""
    size = SLOTS * SLOT

    def guest() -> None:
        window = abi.mmap(wide, size)
        shows(window)
        abi.fill(window + SLOT + (1 << 20), 16 * PAGE)
        abi.madvise(window, size, 4)
        shows(window)
        abi.munmap(window, size)

    def undo(window: int) -> None:
        shows(window)
        abi.munmap(window, size)

    def nothing(code: int) -> None:
        """The others check."""

    with meanwhile(guest, guest):
        check(Caller, lambda: abi.mmap(wide, size), undo, nothing)
