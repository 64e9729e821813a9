"""PROTECT and UNMAP: when the call returns, nobody has the right any more."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from mshare.engines.msharefs import info
from tests.kernel import abi
from tests.kernel.abi import PAGE, READ, RW, SHARED, SLOT, WRITE

SIZE = 4 << 20
CPUS = sorted(os.sched_getaffinity(0))


def notes() -> int:
    """A page that all children share with this process."""
    return abi.mmap(-1, PAGE, RW, SHARED | abi.ANONYMOUS)


def number(address: int) -> int:
    """The number there."""
    return ctypes.c_uint64.from_address(address).value


def count_up(spot: int, note: int) -> None:
    """Store 1, 2, 3, ... and note each after it is stored."""
    target, noted = ctypes.c_uint64.from_address(spot), ctypes.c_uint64.from_address(note)
    while True:
        target.value += 1
        noted.value = target.value


def spin(cpu: int, address: int, note: int, step: Callable[[int, int], None]) -> None:
    """Stay on one CPU and in its TLB."""
    os.sched_setaffinity(0, [cpu])
    noted = ctypes.c_uint64.from_address(note)
    while True:
        step(address, (noted.value + 1) % 256)
        noted.value += 1


def flood(address: int, value: int) -> None:
    """Store in every byte, in one C call."""
    abi.fill(address, SIZE, value)


def sweep(address: int, value: int) -> None:
    """Load every byte, in one C call."""
    abi.touch(address, SIZE)


def wait_for(*spots: int) -> None:
    """Until every number is past 3."""
    assert abi.settle(lambda: sum(number(spot) < 4 for spot in spots), 0) == 0


@pytest.mark.parametrize("attach", [False, True], ids=["inherited", "attached"])
def test_nobody_writes_after_it_returns(region: int, attach: bool) -> None:
    """Of six that store in a loop none gets another one in; all die by SIGSEGV; none was lost."""
    address, note = abi.mmap(region), notes()

    def writer(which: int) -> None:
        window = abi.mmap(region) if attach else address
        count_up(window + which * PAGE, note + which * 8)

    for _ in range(4):
        abi.fill(note, PAGE, 0)
        children = [abi.Child(writer, which) for which in range(6)]
        wait_for(*(note + which * 8 for which in range(6)))
        abi.protect(region, 0, SLOT, READ)
        stored = [number(address + which * PAGE) for which in range(6)]
        assert [child.signal() for child in children] == [signal.SIGSEGV] * 6
        assert [number(address + which * PAGE) for which in range(6)] == stored
        for which, value in enumerate(stored):
            assert value - number(note + which * 8) in (0, 1)
        abi.protect(region, 0, SLOT, RW)
    abi.munmap(address)
    abi.munmap(note, PAGE)


def test_nobody_writes_who_has_a_cpu_alone(region: int) -> None:
    """The same of one on each other CPU: no switch to another process empties its TLB.

    Nor one to the kernel worker that makes the change, which stays on this one.
    """
    here, *others = CPUS
    workers = Path("/sys/devices/virtual/workqueue/cpumask")
    where = workers.read_text()
    address, note = abi.mmap(region), notes()

    def writer(cpu: int) -> None:
        os.sched_setaffinity(0, [cpu])
        count_up(address + cpu * PAGE, note + cpu * 8)

    assert others
    try:
        os.sched_setaffinity(0, [here])
        workers.write_text(f"{1 << here:x}")
        for _ in range(8):
            abi.fill(note, PAGE, 0)
            children = [abi.Child(writer, cpu) for cpu in others]
            wait_for(*(note + cpu * 8 for cpu in others))
            abi.protect(region, 0, SLOT, READ)
            stored = [number(address + cpu * PAGE) for cpu in others]
            assert [child.signal(60) for child in children] == [signal.SIGSEGV] * len(others)
            assert [number(address + cpu * PAGE) for cpu in others] == stored
            abi.protect(region, 0, SLOT, RW)
    finally:
        workers.write_text(where)
        os.sched_setaffinity(0, CPUS)
    abi.munmap(address)
    abi.munmap(note, PAGE)


@pytest.mark.parametrize("end", ["protect", "unmap"])
def test_no_stale_entry_on_any_cpu(region: int, end: str) -> None:
    """A process that spins on each CPU is stopped, by SIGSEGV, wherever its TLB entries are."""
    address, note = abi.mmap(region), notes()
    step = flood if end == "protect" else sweep
    for _ in range(4):
        abi.fill(address, SIZE, 1)
        abi.fill(note, PAGE, 0)
        children = [abi.Child(spin, cpu, address, note + 8 * cpu, step) for cpu in CPUS]
        wait_for(*(note + 8 * cpu for cpu in CPUS))
        if end == "protect":
            abi.protect(region, 0, SIZE, READ)
            content = abi.get(address, SIZE)
        else:
            abi.unmap(region, 0, SIZE)
        swept = [number(note + 8 * cpu) for cpu in CPUS]
        assert [child.signal(60) for child in children] == [signal.SIGSEGV] * len(CPUS)
        for cpu, before in zip(CPUS, swept, strict=True):
            assert number(note + 8 * cpu) <= before + 1
        if end == "protect":
            assert abi.get(address, SIZE) == content
            abi.protect(region, 0, SIZE, RW)
        else:
            abi.create_mapping(region, 0, SIZE)
            assert abi.get(address, SIZE) == bytes(SIZE)
    abi.munmap(address)
    abi.munmap(note, PAGE)


def test_threads_are_told(region: int) -> None:
    """A thread on each CPU that writes through system calls gets EFAULT, and never a late byte."""
    address, note = abi.mmap(region), notes()
    source = os.memfd_create("source")
    # in turn, so that what is stored late is not what is there
    os.write(source, b"late" * (SIZE // 4) + b"LATE" * (SIZE // 4))

    def thread(cpu: int, answers: list[int]) -> None:
        os.sched_setaffinity(0, [cpu])
        noted = ctypes.c_uint64.from_address(note + 8 * cpu)
        try:
            while True:
                done = os.preadv(source, [abi.memory(address, SIZE)], noted.value % 2 * SIZE)
                noted.value += 1
                if done < SIZE:
                    break
        except OSError as error:
            assert error.errno == errno.EFAULT
        answers.append(cpu)

    def process() -> list[int]:
        answers: list[int] = []
        threads = [threading.Thread(target=thread, args=(cpu, answers)) for cpu in CPUS]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        return sorted(answers)

    for _ in range(3):
        abi.fill(note, PAGE, 0)
        child = abi.Child(process)
        wait_for(*(note + 8 * cpu for cpu in CPUS))
        abi.protect(region, 0, SIZE, READ)
        content = abi.get(address, SIZE)
        assert child.result() == CPUS
        assert abi.get(address, SIZE) == content
        abi.protect(region, 0, SIZE, RW)
        abi.fill(address, SIZE, 0)
    os.close(source)
    abi.munmap(address)
    abi.munmap(note, PAGE)


def test_allowed_again(region: int) -> None:
    """Windows from before, inherited ones and new ones write again, and see what was there."""
    address = abi.mmap(region)
    abi.put(address, b"before")
    abi.protect(region, 0, SLOT, READ)
    between = abi.mmap(region)
    assert abi.dies_by(abi.put, address, b"x") == signal.SIGSEGV
    assert abi.dies_by(abi.put, between, b"x") == signal.SIGSEGV
    abi.protect(region, 0, SLOT, RW)
    assert abi.get(address, 6) == b"before"
    for window, word in ((address, b"first"), (between, b"other"), (abi.mmap(region), b"third")):
        abi.Child(abi.put, window, word).result()
        assert abi.get(address, 5) == word
        abi.put(window + PAGE, word)
        assert abi.get(address + PAGE, 5) == word
        if window != address:
            abi.munmap(window)
    abi.munmap(address)


def test_only_the_range(region: int) -> None:
    """Pages before and after it stay writable; what was in it stays."""
    address = abi.mmap(region)
    abi.fill(address, 8 * PAGE, 3)
    abi.protect(region, 3 * PAGE, 2 * PAGE, READ)
    for page in (0, 1, 2, 5, 6, 7, 8):
        abi.put(address + page * PAGE, b"mine")
    for page in (3, 4):
        assert abi.dies_by(abi.put, address + page * PAGE, b"x") == signal.SIGSEGV
        assert abi.get(address + page * PAGE, PAGE) == b"\3" * PAGE
    abi.protect(region, 4 * PAGE, 4 * PAGE, READ)
    assert abi.dies_by(abi.put, address + 7 * PAGE, b"x") == signal.SIGSEGV
    abi.protect(region, 0, SLOT, RW)
    abi.fill(address, 8 * PAGE, 4)
    abi.munmap(address)


def test_holes_are_skipped(path: str) -> None:
    """They are no error and stay holes; what lies around them is protected."""
    fd = abi.make(path, 2 * SLOT, fill=False)
    places = (0, 2 << 20, SLOT - PAGE, SLOT + (5 << 20))
    for place in places:
        abi.create_mapping(fd, place, PAGE)
    address = abi.mmap(fd, 2 * SLOT)
    for place in places:
        abi.put(address + place, b"around")
    mapped = info(fd).mapped_bytes
    abi.protect(fd, 0, 2 * SLOT, READ)
    assert info(fd).mapped_bytes == mapped == len(places) * PAGE
    for place in places:
        assert abi.get(address + place, 6) == b"around"
        assert abi.dies_by(abi.put, address + place, b"x") == signal.SIGSEGV
        for hole in (place + PAGE, SLOT + PAGE):
            assert abi.dies_by(abi.get, address + hole, 1) == signal.SIGSEGV
    abi.protect(fd, 1 << 20, 1 << 20, READ)
    abi.munmap(address, 2 * SLOT)
    os.close(fd)


def test_readers_do_not_notice(region: int, path: str) -> None:
    """A read-only window keeps its tables: no fault after PROTECT, and the content."""
    address = abi.mmap(region)
    abi.fill(address, SIZE, 9)
    reading = abi.mmap(os.open(path, os.O_RDONLY), prot=READ)
    abi.touch(reading, SIZE)
    assert abi.touch(reading, SIZE) == 0
    for prot in (READ, RW):
        abi.protect(region, 0, SLOT, prot)
        assert abi.touch(reading, SIZE) == 0
        assert abi.get(reading, SIZE) == b"\t" * SIZE
    abi.munmap(reading)
    abi.munmap(address)


@pytest.mark.parametrize("huge", ["never", "always"])
def test_huge_pages(path: str, huge: str) -> None:
    """A range inside a huge page is protected on its own, and no byte of it is lost."""
    setting = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"
    with open(setting) as file:
        before = file.read().split("[")[1].split("]")[0]
    with open(setting, "w") as file:
        file.write(huge)
    try:
        fd = abi.make(path)
        address = abi.mmap(fd)
        mapped = abi.meminfo("ShmemPmdMapped")
        abi.fill(address, SIZE, 5)
        if huge == "always":
            assert abi.meminfo("ShmemPmdMapped") >= mapped + (2 << 20)
        abi.protect(fd, 2 << 20, PAGE, READ)
        abi.put(address + (2 << 20) + PAGE, b"\5")
        assert abi.dies_by(abi.put, address + (2 << 20), b"x") == signal.SIGSEGV
        abi.protect(fd, 0, SLOT, READ)
        assert abi.dies_by(abi.put, address, b"x") == signal.SIGSEGV
        assert abi.get(address, SIZE) == b"\5" * SIZE
        abi.protect(fd, 0, SLOT, RW)
        abi.fill(address, SIZE, 6)
        abi.munmap(address)
        os.close(fd)
    finally:
        with open(setting, "w") as file:
            file.write(before)


def test_file_written_before(disk: str, path: str) -> None:
    """What was stored in a mapped file before PROTECT is in the file, and reaches the disk."""
    name = f"{disk}/content"
    content = os.open(name, os.O_RDWR | os.O_CREAT)
    os.ftruncate(content, SIZE)
    fd = abi.make(path, fill=False)
    abi.create_mapping(fd, size=SIZE, flags=SHARED | abi.FIXED, fd=content)
    address = abi.mmap(fd)
    for value in (1, 2):
        abi.fill(address, SIZE, value)
        abi.protect(fd, 0, SIZE, READ)
        assert abi.dies_by(abi.put, address, b"x") == signal.SIGSEGV
        assert os.pread(content, SIZE, 0) == bytes([value]) * SIZE
        os.fsync(content)
        assert on_disk(name) == bytes([value]) * SIZE
        abi.protect(fd, 0, SIZE, RW)
    abi.munmap(address)
    os.close(fd)
    os.close(content)


def on_disk(name: str) -> bytes:
    """A file as the disk has it, past the page cache."""
    fd = os.open(name, os.O_RDONLY | os.O_DIRECT)
    buffer = abi.anonymous(SIZE)
    assert os.preadv(fd, [abi.memory(buffer, SIZE)], 0) == SIZE
    os.close(fd)
    content = abi.get(buffer, SIZE)
    abi.munmap(buffer, SIZE)
    return content


def test_no_store_is_lost_to_writeback(disk: str, path: str) -> None:
    """Writeback takes the right to write away, on each CPU: what comes after is dirty again."""
    name = f"{disk}/content"
    content = os.open(name, os.O_RDWR | os.O_CREAT)
    os.ftruncate(content, SIZE)
    fd = abi.make(path, fill=False)
    abi.create_mapping(fd, size=SIZE, flags=SHARED | abi.FIXED, fd=content)
    address, note = abi.mmap(fd), notes()

    def pinned(cpu: int) -> None:
        os.sched_setaffinity(0, [cpu])
        count_up(address + cpu * PAGE, note + cpu * 8)

    children = [abi.Child(pinned, cpu) for cpu in CPUS]
    wait_for(*(note + cpu * 8 for cpu in CPUS))
    for _ in range(20):
        noted = [number(note + cpu * 8) for cpu in CPUS]
        os.fsync(content)
        disk_now = on_disk_numbers(name)
        for cpu, least in zip(CPUS, noted, strict=True):
            assert disk_now[cpu] >= least
    for child in children:
        child.kill()
    os.fsync(content)
    assert on_disk(name) == abi.get(address, SIZE)
    abi.munmap(address)
    abi.munmap(note, PAGE)
    os.close(fd)
    os.close(content)


def on_disk_numbers(name: str) -> dict[int, int]:
    """The number at the start of each CPU's page, as the disk has it."""
    content = on_disk(name)
    starts = {cpu: content[cpu * PAGE : cpu * PAGE + 8] for cpu in CPUS}
    return {cpu: int.from_bytes(start, "little") for cpu, start in starts.items()}


@pytest.mark.parametrize("prot", [0, WRITE, READ | abi.EXEC, 0x10])
def test_refused_protections(region: int, prot: int) -> None:
    """Only reading, or reading and writing; anything else changes nothing."""
    address = abi.mmap(region)
    with pytest.raises(OSError, match="Errno"):
        abi.protect(region, 0, SLOT, prot)
    abi.put(address, b"still")
    abi.munmap(address)


@pytest.mark.parametrize("pages", [1, 4], ids=["part", "whole"])
def test_sealed_content_stays_readonly(path: str, pages: int) -> None:
    """What nobody may write to any more, PROTECT makes writable nowhere: EACCES."""
    seal_against_new_writers = 0x10
    file = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(file, 4 * PAGE)
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, seal_against_new_writers)
    fd = abi.make(path, fill=False)
    abi.create_mapping(fd, 0, 4 * PAGE, READ, SHARED | abi.FIXED, file)
    for start in range(0, 4, pages):
        with pytest.raises(PermissionError) as caught:
            abi.protect(fd, start * PAGE, pages * PAGE, RW)
        assert caught.value.errno == errno.EACCES
    address = abi.mmap(fd)
    assert abi.get(address, 4 * PAGE) == bytes(4 * PAGE)
    assert abi.dies_by(abi.put, address, b"x") == signal.SIGSEGV
    abi.munmap(address)
    os.close(file)
    os.close(fd)
