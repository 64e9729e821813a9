"""What it is for: one set of page tables, and no faults for who comes later."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mshare.engines.msharefs import info
from tests.kernel import abi
from tests.kernel.abi import PAGE, READ, SLOT

TOUCHED = 64 << 20
HUGE = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")


def attach_and_touch(path: str, prot: int, size: int = TOUCHED) -> tuple[int, int]:
    """Faults and growth of VmPTE, in a process that attaches anew."""
    fd = os.open(path, os.O_RDWR if prot & abi.WRITE else os.O_RDONLY)
    before = abi.page_tables()
    address = abi.mmap(fd, os.fstat(fd).st_size, prot)
    faults = abi.touch(address, size)
    return faults, abi.page_tables() - before


@pytest.mark.parametrize("prot", [READ, abi.RW])
def test_second_process_pays_nothing(region: int, path: str, prot: int) -> None:
    """After the first, no fault over 16,384 pages, and 12 KiB of tables at most."""
    address = abi.mmap(region, prot=abi.RW)
    abi.fill(address, TOUCHED)
    abi.munmap(address)
    first, _ = abi.Child(attach_and_touch, path, prot).result()
    assert first == 0 if prot == abi.RW else first <= TOUCHED // PAGE // 16 + 2
    for _ in range(3):
        faults, grown = abi.Child(attach_and_touch, path, prot).result()
        assert faults == 0
        assert grown <= 12 << 10


def test_numa_balancing_leaves_windows_alone(region: int) -> None:
    """The scanner that looks for pages far from their users takes no window apart."""
    window = abi.mmap(region)
    plain = abi.mmap(-1, TOUCHED, abi.RW, abi.PRIVATE | abi.ANONYMOUS)
    for address in (window, plain):
        abi.fill(address, TOUCHED)
    before, scanned = info(region).ungrafts, scans()
    done = threading.Event()
    # of one thread alone it leaves the pages alone
    other = threading.Thread(target=done.wait, daemon=True)
    other.start()
    with numa_balancing():
        end = time.monotonic() + 60
        while scans() < scanned + 2 * TOUCHED // PAGE and time.monotonic() < end:
            abi.touch(window, TOUCHED)
            abi.touch(plain, TOUCHED)
    done.set()
    other.join()
    assert scans() > scanned, "nothing was scanned: the test would not see it"
    assert info(region).ungrafts == before
    abi.munmap(window)
    abi.munmap(plain, TOUCHED)


def scans() -> int:
    """Entries that the scanner has changed since boot."""
    lines = Path("/proc/vmstat").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("numa_pte_updates "))


@contextmanager
def numa_balancing() -> Iterator[None]:
    """The scanner at work, as often as it can."""
    debug = Path("/sys/kernel/debug/sched/numa_balancing")
    wanted = {Path("/proc/sys/kernel/numa_balancing"): "1"}
    wanted |= {debug / f"scan_{name}_ms": "100" for name in ("delay", "period_min", "period_max")}
    before = {file: file.read_text() for file in wanted}
    try:
        for file, value in wanted.items():
            file.write_text(value)
        yield
    finally:
        for file, value in before.items():
            file.write_text(value)


def test_growth_does_not_depend_on_size(path: str) -> None:
    """A window of 64 slots costs a process no more tables than one of one."""
    fd = abi.make(path, 64 * SLOT, fill=False)
    for slot in range(64):
        abi.create_mapping(fd, slot * SLOT, 2 << 20)
    address = abi.mmap(fd, 64 * SLOT)
    for slot in range(64):
        abi.put(address + slot * SLOT, b"x")

    def spread() -> tuple[int, int]:
        before = abi.page_tables()
        window = abi.mmap(fd, 64 * SLOT)
        return abi.touch(window, PAGE, SLOT, 64), abi.page_tables() - before

    faults, grown = abi.Child(spread).result()
    assert faults == 0
    assert grown <= 12 << 10
    abi.munmap(address, 64 * SLOT)
    os.close(fd)


def test_fork_inherits(region: int) -> None:
    """Children have the attachment, pay nothing and take no fault, also theirs."""
    address = abi.mmap(region)
    abi.fill(address, TOUCHED)
    tables = abi.page_tables()

    def grandchild() -> int:
        return abi.touch(address, TOUCHED)

    def child() -> tuple[int, int, int]:
        faults = abi.touch(address, TOUCHED)
        return faults, abi.Child(grandchild).result(), abi.page_tables()

    faults, below, grown = abi.Child(child).result()
    assert (faults, below) == (0, 0)
    assert grown <= tables + (12 << 10)
    assert info(region).attachments == 1
    abi.munmap(address)


def test_many_processes(region: int, path: str) -> None:
    """PageTables grows by at most 16 KiB a process for the region, however many there are."""
    address = abi.mmap(region)
    abi.fill(address, TOUCHED)
    ready, go = os.pipe()

    def worker(attach: bool) -> None:
        if attach:
            abi.touch(abi.mmap(os.open(path, os.O_RDWR)), TOUCHED)
        os.write(go, b".")
        abi.forever()

    def herd(attach: bool) -> int:
        before = abi.meminfo("PageTables")
        children = [abi.Child(worker, attach) for _ in range(24)]
        for _ in children:
            os.read(ready, 1)
        grown = abi.meminfo("PageTables") - before
        for child in children:
            child.kill()
        return grown

    abi.munmap(address)
    plain, sharing = herd(False), herd(True)
    assert sharing - plain <= 24 * (16 << 10)
    assert info(region).attachments == 0


def test_mremap_moves_the_window(region: int) -> None:
    """To any aligned address, with the content, and no fault after."""
    address = abi.mmap(region)
    abi.fill(address, TOUCHED)
    target = 11 << 40
    assert abi.mremap(address, SLOT, SLOT, 3, target) == target
    assert abi.touch(target, TOUCHED) == 0
    assert abi.dies_by(abi.get, address, 1) == signal.SIGSEGV
    with pytest.raises(OSError, match="Invalid"):
        abi.mremap(target, SLOT, SLOT, 3, (12 << 40) + PAGE)
    assert abi.get(target, 2) == b"\7\7"
    assert info(region).attachments == 1
    abi.munmap(target)
    assert info(region).attachments == 0


def test_two_regions_and_one_twice(region: int, path: str) -> None:
    """In one process: each is itself."""
    second = abi.make(f"{path}-b")
    os.unlink(f"{path}-b")
    one, again, other = abi.mmap(region), abi.mmap(region), abi.mmap(second)
    abi.put(one, b"one")
    abi.put(other, b"other")
    assert abi.get(again, 3) == b"one"
    assert abi.get(other, 5) == b"other"
    abi.munmap(one)
    assert abi.get(again, 3) == b"one"
    for address in (again, other):
        abi.munmap(address)
    os.close(second)


@pytest.mark.parametrize("setting", ["advise", "always"])
def test_huge_pages_are_shared(path: str, setting: str) -> None:
    """Where shared memory may have huge pages the region has them, one leaf for all."""
    before = HUGE.read_text().split("[")[1].split("]")[0]
    HUGE.write_text(setting)
    try:
        fd = abi.make(path)
        address = abi.mmap(fd)
        abi.fill(address, TOUCHED)
        with open("/proc/self/smaps") as file:
            text = file.read()
        block = text[text.index(path) :].split("VmFlags")[0]
        line = next(line for line in block.splitlines() if "ShmemPmdMapped" in line)
        assert int(line.split()[1]) >= (TOUCHED >> 10) // 2
        assert abi.Child(attach_and_touch, path, abi.RW).result()[0] == 0
        child = abi.Child(lambda: abi.put(address + 5, b"huge"))
        child.result()
        assert abi.get(address + 5, 4) == b"huge"
        abi.munmap(address)
        os.close(fd)
    finally:
        HUGE.write_text(before)


def test_file_on_disk(disk: str, path: str) -> None:
    """A file is shared like memory; what is written reaches the disk."""
    file = f"{disk}/content"
    with open(file, "wb") as out:
        out.write(bytes(range(256)) * (TOUCHED // 256))
    fd, content = abi.make(path, fill=False), os.open(file, os.O_RDWR)
    abi.create_mapping(fd, size=TOUCHED, flags=abi.SHARED | abi.FIXED, fd=content)
    abi.Child(attach_and_touch, path, READ).result()
    for _ in range(2):
        faults, grown = abi.Child(attach_and_touch, path, READ).result()
        assert faults == 0
        assert grown <= 12 << 10
    address = abi.mmap(fd)
    assert abi.get(address + PAGE, 3) == b"\0\1\2"
    abi.put(address + PAGE, b"written")
    abi.put(address + TOUCHED - PAGE, b"twice")
    os.fsync(content)
    abi.put(address + TOUCHED - PAGE, b"again")
    os.fsync(content)
    with open("/proc/sys/vm/drop_caches", "w") as drop:
        drop.write("1")
    direct = os.open(file, os.O_RDONLY | os.O_DIRECT)
    buffer = abi.anonymous(PAGE)
    os.preadv(direct, [abi.memory(buffer)], PAGE)
    assert abi.get(buffer, 7) == b"written"
    os.preadv(direct, [abi.memory(buffer)], TOUCHED - PAGE)
    assert abi.get(buffer, 5) == b"again"
    for each in (fd, content, direct):
        os.close(each)
    abi.munmap(address)


@pytest.mark.parametrize("call", ["msync", "fsync"])
def test_stores_are_synced(disk: str, path: str, call: str) -> None:
    """msync of the window and fsync of the region write the mapped file to its disk."""
    size = 4 << 20
    Path(f"{disk}/content").write_bytes(bytes(size))
    fd, content = abi.make(path, fill=False), os.open(f"{disk}/content", os.O_RDWR)
    os.fsync(content)
    abi.create_mapping(fd, 64 * PAGE, size, flags=abi.SHARED | abi.FIXED, fd=content)
    device = os.fstat(content).st_dev
    numbers = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat")

    def written() -> int:
        return int(numbers.read_text().split()[6]) * 512

    address = abi.mmap(fd)
    os.sync()
    abi.fill(address + 64 * PAGE, size)
    before = written()
    if call == "fsync":
        os.fsync(fd)
    else:
        abi.syscall(26, address, SLOT, 4)
    assert written() - before >= size
    abi.munmap(address)
    os.close(fd)
    os.close(content)


def test_file_on_an_overlay(disk: str, path: str) -> None:
    """What overlayfs shows is a file of another file system, and is mapped as that."""
    for folder in ("lower", "upper", "work", "merged"):
        os.mkdir(f"{disk}/{folder}")
    Path(f"{disk}/lower/content").write_bytes(b"x" * (4 * PAGE))
    options = f"lowerdir={disk}/lower,upperdir={disk}/upper,workdir={disk}/work"
    mount = ["mount", "-t", "overlay", "-o", options, "overlay", f"{disk}/merged"]
    subprocess.run(mount, check=True)
    try:
        for flags, prot in ((os.O_RDONLY, READ), (os.O_RDWR, abi.RW)):
            fd, content = abi.make(path, fill=False), os.open(f"{disk}/merged/content", flags)
            fixed = abi.SHARED | abi.FIXED
            abi.create_mapping(fd, size=4 * PAGE, flags=fixed, prot=prot, fd=content)
            address = abi.mmap(fd)
            assert abi.get(address + 3 * PAGE, 1) == b"x"
            if prot == abi.RW:
                abi.put(address, b"written")
                assert Path(f"{disk}/merged/content").read_bytes()[:7] == b"written"
            abi.munmap(address)
            os.close(fd)
            os.unlink(path)
            os.close(content)
    finally:
        subprocess.run(["umount", f"{disk}/merged"], check=True)


@pytest.mark.parametrize("prot", [READ, abi.RW])
def test_file_on_tmpfs(path: str, prot: int) -> None:
    """Its content and the region are the same pages; later processes take no fault."""
    content = os.memfd_create("content")
    os.write(content, b"begin" + bytes(TOUCHED - 5))
    fd = abi.make(path, fill=False)
    before = abi.meminfo("Shmem")
    abi.create_mapping(fd, size=TOUCHED, flags=abi.SHARED | abi.FIXED, fd=content, prot=prot)
    address = abi.mmap(fd)
    assert abi.get(address, 5) == b"begin"
    abi.Child(attach_and_touch, path, READ).result()
    assert abi.Child(attach_and_touch, path, READ).result()[0] == 0
    if prot == abi.RW:
        abi.put(address + TOUCHED - 5, b"store")
        assert os.pread(content, 5, TOUCHED - 5) == b"store"
    os.pwrite(content, b"write", PAGE)
    assert abi.get(address + PAGE, 5) == b"write"
    assert abi.meminfo("Shmem") < before + (1 << 20)
    abi.munmap(address)
    os.close(fd)
    os.close(content)


def test_workers_on_a_read_only_file(disk: str, path: str) -> None:
    """Mapped from a descriptor for reading: 16 workers, one set of tables, no fault after one."""
    file = f"{disk}/content"
    Path(file).write_bytes(b"c" * TOUCHED)
    content = os.open(file, os.O_RDONLY)
    fd = abi.make(path, fill=False)
    flags = abi.SHARED | abi.FIXED
    abi.create_mapping(fd, size=TOUCHED, flags=flags, fd=content, prot=READ)
    abi.Child(attach_and_touch, path, READ).result()
    tables = info(fd).pagetable_bytes
    workers = [abi.Child(attach_and_touch, path, READ) for _ in range(16)]
    for faults, grown in [worker.result() for worker in workers]:
        assert faults == 0
        assert grown <= 12 << 10
    assert info(fd).pagetable_bytes == tables
    os.close(fd)
    os.close(content)


def test_truncated_file(disk: str, path: str) -> None:
    """Past the new end SIGBUS, before it the content; grown again it is there."""
    file = f"{disk}/content"
    Path(file).write_bytes(b"x" * (4 * PAGE))
    fd, content = abi.make(path, fill=False), os.open(file, os.O_RDWR)
    abi.create_mapping(fd, size=4 * PAGE, flags=abi.SHARED | abi.FIXED, fd=content)
    address = abi.mmap(fd)
    assert abi.get(address + 3 * PAGE, 1) == b"x"
    os.ftruncate(content, PAGE)
    assert abi.get(address, 1) == b"x"
    assert abi.dies_by(abi.get, address + 3 * PAGE, 1) == signal.SIGBUS
    os.ftruncate(content, 4 * PAGE)
    assert abi.get(address + 3 * PAGE, 1) == b"\0"
    abi.munmap(address)
    os.close(fd)
    os.close(content)


def test_one_fault_counts_once(region: int) -> None:
    """First touch of 256 pages of anonymous memory: 256 faults, not twice as many."""
    address = abi.mmap(region)
    before = abi.minor_faults()
    for page in range(256):
        abi.put(address + page * PAGE, b"x")
    # the interpreter may need a few pages of its own
    assert 256 <= abi.minor_faults() - before <= 256 + 64
    abi.munmap(address)
