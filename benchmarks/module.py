"""What the kernel module costs and saves, next to plain shared memory, in one boot.

Run: ``mshare lab --memory 5G --disk 2G -- python benchmarks/module.py [NAME...]``. Counts are
exact; times are ratios of rounds that take turns in this run. Names: attach, touch, protect,
processes, file, reclaim, lifecycle (default: all).
"""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median

import numpy as np

import mshare
from mshare import mapping
from mshare.engines.msharefs import info
from mshare.memory import meminfo

GIB = 1 << 30
PAGE = 4096
DISK = "/mnt/disk"
libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
RW = mapping.PROT_READ | mapping.PROT_WRITE


def timed(call: Callable[[], object]) -> float:
    """Seconds one call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def show(what: str, value: str, target: str = "") -> None:
    """One line of the result."""
    print(f"{what:<58} {value:>16}  {target}", flush=True)


@contextmanager
def region(size: int = GIB) -> Iterator[int]:
    """The descriptor of a region on the module, which is gone afterwards."""
    name = f"benchmark-{os.getpid()}"
    with mshare.create(name, size, engine="msharefs") as made:
        try:
            yield made.fileno()
        finally:
            mshare.unlink(name)


@contextmanager
def plain(size: int = GIB) -> Iterator[int]:
    """The descriptor of a tmpfs file of the same size."""
    fd = os.memfd_create("benchmark")
    os.ftruncate(fd, size)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def mapped(fd: int, size: int = GIB, prot: int = RW) -> Iterator[int]:
    """The address of a mapping of all of ``fd``."""
    address = mapping.mmap(0, size, prot, mapping.MAP_SHARED, fd)
    try:
        yield address
    finally:
        mapping.munmap(address, size)


def memory(address: int, size: int = GIB) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """The bytes there."""
    return np.frombuffer((ctypes.c_ubyte * size).from_address(address), np.uint8)


def read_pages(address: int, size: int = GIB) -> None:
    """Read a byte of each page."""
    np.bitwise_or.reduce(memory(address, size)[::PAGE])


def write_pages(address: int, size: int = GIB) -> None:
    """Write a byte of each page."""
    memory(address, size)[::PAGE] = 1


def faults() -> int:
    """Minor faults of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def attach() -> None:
    """mmap and munmap alone; the cost of a system call through ctypes is taken off both."""

    def rounds(fd: int) -> float:
        start = time.perf_counter()
        for _ in range(50):
            libc.munmap(libc.mmap(0, GIB, RW, mapping.MAP_SHARED, fd, 0), GIB)
        return time.perf_counter() - start

    with region() as shared, plain() as fd:
        for each in (shared, fd):
            with mapped(each) as address:
                write_pages(address, GIB // 2)
        results = [(rounds(shared), rounds(fd), rounds(-1)) for _ in range(21)]
    ratio = median((ours - none) / (theirs - none) for ours, theirs, none in results)
    show("attach + detach of 1 GiB, to mmap + munmap of shm", f"{ratio:.2f}", "at most 5")


def touch() -> None:
    """Time per fault of the first process to touch fresh memory, and of the second."""
    size = GIB // 2

    def one(fd: int, touch: Callable[[int, int], None], prot: int = RW) -> tuple[float, int]:
        with mapped(fd, prot=prot) as address:
            before = faults()
            seconds = timed(lambda: touch(address, size))
            return seconds, faults() - before

    def per_fault(cost: tuple[float, int]) -> float:
        return cost[0] / cost[1]

    firsts, seconds, readers = [], [], []
    for turn in range(6):
        with region() as shared, plain() as fd:
            pair = (shared, fd) if turn % 2 else (fd, shared)
            cost = {each: one(each, write_pages) for each in pair}
            again = {each: one(each, write_pages) for each in pair}
            read = {each: one(each, read_pages, mapping.PROT_READ) for each in pair}
        if turn:
            firsts.append(per_fault(cost[shared]) / per_fault(cost[fd]))
            seconds.append(again[fd][0] / again[shared][0])
            readers.append(per_fault(read[shared]) / per_fault(read[fd]))
    count = cost[shared][1], cost[fd][1], again[shared][1], again[fd][1]
    show("first process, time per fault, to shm", f"{median(firsts):.2f}", "at most 1.3")
    show("  faults over 512 MiB, msharefs and shm", f"{count[0]:,} / {count[1]:,}")
    show("first reader of what is there, time per fault, to shm", f"{median(readers):.2f}")
    show("  faults, msharefs and shm", f"{read[shared][1]:,} / {read[fd][1]:,}")
    show("further process, 512 MiB, times as fast as shm", f"{median(seconds):.1f}", "at least 6")
    show("  faults, msharefs and shm", f"{count[2]:,} / {count[3]:,}", "0")


class Guests:
    """Forked processes that each map a descriptor, touch it, and stay."""

    def __init__(self, count: int, fd: int, prot: int, *, touch: bool = True) -> None:
        self.pids = []
        reading, writing = os.pipe()
        self._go = os.pipe()
        for _ in range(count):
            pid = os.fork()
            if pid == 0:
                self._serve(fd, prot, writing, touch)
            self.pids.append(pid)
        os.close(writing)
        self._done = os.fdopen(reading, "rb")
        self._read(count)
        self.tables = meminfo()["PageTables"]
        os.write(self._go[1], b"g" * count)
        self._read(count)
        self.grown = meminfo()["PageTables"] - self.tables

    def _serve(self, fd: int, prot: int, writing: int, touch: bool) -> None:
        try:
            os.write(writing, b"r")
            os.read(self._go[0], 1)
            address = mapping.mmap(0, GIB, prot, mapping.MAP_SHARED, fd)
            if touch:
                read_pages(address)
            os.write(writing, b"r")
            signal.pause()
        finally:
            os._exit(1)

    def _read(self, count: int) -> None:
        if len(self._done.read(count)) < count:
            raise ChildProcessError("a process died")

    def end(self) -> None:
        """Kill them all."""
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)
        for pid in self.pids:
            os.waitpid(pid, 0)
        self._done.close()
        for fd in self._go:
            os.close(fd)


def protect() -> None:
    """PROTECT under 64 attached processes, to one process's own mprotect of as much."""
    results = []
    with region() as shared, plain() as fd, mapped(shared) as ours, mapped(fd) as theirs:
        name = f"benchmark-{os.getpid()}"
        guests = Guests(64, shared, RW)
        try:
            with mshare.attach(name) as made:
                for _ in range(5):
                    write_pages(ours)
                    write_pages(theirs)
                    down = timed(lambda: made.protect(0, GIB, readonly=True))
                    own = timed(lambda: libc.mprotect(theirs, GIB, mapping.PROT_READ))
                    made.protect(0, GIB, readonly=False)
                    libc.mprotect(theirs, GIB, RW)
                    results.append(down / own)
        finally:
            guests.end()
    ratio = median(results)
    show("PROTECT of 1 GiB, 64 attached, to one own mprotect", f"{ratio:.2f}", "at most 3")


def processes(count: int = 256) -> None:
    """Page tables of many processes over one GiB."""
    grown = {}
    for kind, make in (("msharefs", region), ("shm", plain)):
        with make() as fd, mapped(fd) as address:
            write_pages(address)
            guests = Guests(count, fd, RW)
            grown[kind] = guests.grown / count / 1024
            guests.end()
    show(
        f"page tables per process, {count} processes, msharefs",
        f"{grown['msharefs']:.1f} KiB",
        "16",
    )
    show("  and shm", f"{grown['shm']:.1f} KiB")


@contextmanager
def region_of_file() -> Iterator[tuple[int, int]]:
    """Descriptors of a region and of the file of 1 GiB, on the disk, that it shows."""
    path = f"{DISK}/benchmark"
    name = f"benchmark-{os.getpid()}"
    with open(path, "wb") as out:
        for _ in range(GIB >> 24):
            out.write(os.urandom(1 << 16) * 256)
        os.fsync(out.fileno())
    try:
        with open(path, "rb") as content:
            mshare.create(name, backing=content.fileno(), engine="msharefs").close()
            with mshare.attach(name, readonly=True) as made:
                yield made.fileno(), content.fileno()
    finally:
        mshare.unlink(name)
        os.unlink(path)


def file(count: int = 34) -> None:
    """Page tables of readers of one file on a disk file system."""
    grown = {}
    with region_of_file() as (shared, content):
        for kind, fd in (("msharefs", shared), ("mmap", content)):
            with mapped(fd, prot=mapping.PROT_READ) as address:
                read_pages(address)
                guests = Guests(count, fd, mapping.PROT_READ)
                grown[kind] = guests.grown / count / 1024
                guests.end()
    show(f"page tables per reader of a file, {count} readers", f"{grown['msharefs']:.1f} KiB", "16")
    show("  and with mmap", f"{grown['mmap']:.1f} KiB")


class Group:
    """A memory cgroup, to be charged for content and to be reclaimed from."""

    def __init__(self) -> None:
        root = Path("/sys/fs/cgroup")
        (root / "cgroup.subtree_control").write_text("+memory")
        self._folder = root / f"benchmark-{os.getpid()}"
        self._folder.mkdir()

    def run(self, work: Callable[[], object]) -> None:
        """Do it in a process of the group."""
        pid = os.fork()
        if pid == 0:
            try:
                (self._folder / "cgroup.procs").write_text("0")
                work()
            finally:
                os._exit(0)
        os.waitpid(pid, 0)

    def charged(self) -> int:
        """Bytes."""
        return int((self._folder / "memory.current").read_text())

    def reclaim(self) -> None:
        """All that can be."""
        while self.charged() > GIB >> 5:
            with suppress(BlockingIOError):
                (self._folder / "memory.reclaim").write_text(str(self.charged()))

    def remove(self) -> None:
        """Nobody is in it."""
        self._folder.rmdir()


def reclaim(few: int = 1, many: int = 256, rounds: int = 3) -> None:
    """Take 1 GiB of a file's pages from under few and under many processes."""

    def once(fd: int, count: int, *, touch: bool) -> tuple[float, int]:
        def fill() -> None:
            with mapped(fd, prot=mapping.PROT_READ) as address:
                read_pages(address)

        group.run(fill)
        charged = group.charged()
        if charged < GIB:
            raise RuntimeError(f"{charged} bytes are charged to the group, not 1 GiB")
        guests = Guests(count, fd, mapping.PROT_READ, touch=touch)
        before = info(shared).flushes
        seconds = timed(group.reclaim)
        flushes = info(shared).flushes - before
        guests.end()
        return seconds, flushes

    group = Group()
    with region_of_file() as (shared, content):
        os.posix_fadvise(content, 0, GIB, os.POSIX_FADV_DONTNEED)
        ours, flushes = [], []
        for _ in range(rounds):
            small, large = (once(shared, count, touch=False) for count in (few, many))
            ours.append(large[0] / small[0])
            flushes.append((small[1], large[1]))
        alone, crowd = (once(content, count, touch=True)[0] for count in (few, many >> 3))
    group.remove()
    show(f"reclaim of 1 GiB, {many} attached, to {few}", f"{median(ours):.2f}", "at most 1.3")
    show("  flushes", " / ".join(f"{each:,}" for each in flushes[-1]))
    show(f"  the same with mmap, {many >> 3} processes, to {few}", f"{crowd / alone:.2f}")
    show(f"  msharefs, to mmap with {few}", f"{small[0] / alone:.2f}")


def lifecycle(count: int = 1000) -> None:
    """What is left of many regions and of many killed processes."""
    fields = ("PageTables", "Shmem", "Slab")

    def now() -> dict[str, int]:
        with open("/proc/sys/vm/drop_caches", "w") as file:
            file.write("3")
        time.sleep(2)
        return {field: meminfo()[field] for field in fields}

    def work(regions: int, killed: int) -> None:
        for number in range(regions):
            with mshare.create(f"many-{number}", 1 << 20, engine="msharefs") as made:
                memoryview(made)[0] = 1
            mshare.unlink(f"many-{number}")
        with region() as fd:
            own = info(fd).attachments
            for start in range(0, killed, 100):
                guests = Guests(min(100, killed - start), fd, RW, touch=False)
                guests.end()
            deadline = time.monotonic() + 10
            while info(fd).attachments > own and time.monotonic() < deadline:
                time.sleep(0.1)
            left = info(fd).attachments - own
            show(f"attachments left of {killed} killed processes", str(left), "0")

    work(20, 20)
    before = now()
    work(count, count)
    after = now()
    for field in fields:
        show(
            f"{field} after {count} regions and kills",
            f"{(after[field] - before[field]) >> 10:+} KiB",
        )


ALL = (attach, touch, protect, processes, file, reclaim, lifecycle)


def main() -> None:
    """Run the measurements that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="which (all)")
    wanted = parser.parse_args().names
    if not os.path.exists("/sys/fs/mshare/mshare_info"):
        sys.exit("the kernel module is not loaded; run this in the lab: mshare lab -- ...")
    print(f"Linux {platform.release()}, {os.cpu_count()} processors")
    for measure in ALL:
        if not wanted or measure.__name__ in wanted:
            measure()


if __name__ == "__main__":
    main()
