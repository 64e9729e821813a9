"""What the kernel itself takes for regions is charged to who made it take it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress

import pytest

from tests.kernel import abi
from tests.kernel.abi import PAGE, READ, RW, SLOT
from tests.kernel.test_lifetime import Slab

MIB = 1 << 20
NORESERVE = 0x4000
AHEAD = 64 * PAGE * (os.cpu_count() or 1)
"""What a group may have been charged ahead: each processor takes 64 pages at once."""


def taken() -> int:
    """Memory the kernel has for itself and its page tables, and uses."""
    slab = Slab()
    slab.shrink()
    slab.close()
    return abi.meminfo("Slab") + abi.meminfo("PageTables") + abi.meminfo("Percpu")


def regions(folder: str, count: int) -> None:
    """Regions with a size, held by their names alone."""
    for number in range(count):
        fd = os.open(f"{folder}/{number}", os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(fd, SLOT)
        os.close(fd)


def empty(folder: str, count: int) -> None:
    """Regions without a size."""
    for number in range(count):
        os.close(os.open(f"{folder}/{number:0100}", os.O_RDWR | os.O_CREAT, 0o600))


def folders(folder: str, count: int) -> None:
    """Folders."""
    for number in range(count):
        os.mkdir(f"{folder}/{number:0100}")


def links(folder: str, count: int) -> None:
    """Further names of one region."""
    os.close(os.open(f"{folder}/first", os.O_RDWR | os.O_CREAT, 0o600))
    for number in range(count):
        os.link(f"{folder}/first", f"{folder}/{number:0100}")


def pieces(folder: str, count: int) -> None:
    """Mappings in a region, none of which is a neighbour of the next."""
    fd = os.open(f"{folder}/region", os.O_RDWR | os.O_CREAT, 0o600)
    os.ftruncate(fd, SLOT)
    for number in range(count):
        abi.create_mapping(fd, number * 2 * PAGE, PAGE)


def windows(folder: str, count: int) -> None:
    """Wide windows on a region, and the upper tables they need."""
    fd = os.open(f"{folder}/region", os.O_RDWR | os.O_CREAT, 0o600)
    os.ftruncate(fd, 1 << 40)
    for _ in range(count):
        abi.mmap(fd, 1 << 40)


def tables(folder: str, count: int) -> None:
    """A page of content in each slot: tables of the host, and those a window of zeros asks for."""
    fd = os.open(f"{folder}/region", os.O_RDWR | os.O_CREAT, 0o600)
    os.ftruncate(fd, count * SLOT)
    flags = abi.SHARED | abi.FIXED | abi.ANONYMOUS | NORESERVE
    abi.create_mapping(fd, size=count * SLOT, flags=flags)
    for prot in (RW, READ):
        abi.munmap(abi.mmap(fd, count * SLOT, prot), count * SLOT)


MAKERS: dict[Callable[[str, int], None], int] = {
    regions: 300,
    empty: 3000,
    folders: 3000,
    links: 8000,
    pieces: 2000,
    windows: 60,
    tables: 600,
}


def clean(folder: str) -> None:
    for name in os.listdir(folder):
        (os.rmdir if os.path.isdir(f"{folder}/{name}") else os.unlink)(f"{folder}/{name}")


@pytest.mark.parametrize("maker", MAKERS, ids=lambda maker: maker.__name__)
def test_it_is_charged(path: str, maker: Callable[[str, int], None]) -> None:
    """What the machine has less, the group has more."""
    os.mkdir(path)
    with abi.cgroup("maker") as folder:
        machine, group = [0, 0], [0, 0]

        def measured() -> None:
            maker(path, 1)
            clean(path)
            machine[0], group[0] = taken(), abi.current(folder)
            maker(path, MAKERS[maker])
            machine[1], group[1] = taken(), abi.current(folder)
            grown, charged = machine[1] - machine[0], group[1] - group[0]
            assert grown > 4 * AHEAD, grown
            assert charged + AHEAD > grown * 9 // 10, (charged, grown)

        try:
            abi.within(folder, measured).result()
        finally:
            clean(path)
            os.rmdir(path)


@pytest.mark.parametrize("maker", [regions, folders], ids=lambda maker: maker.__name__)
def test_it_is_limited(path: str, maker: Callable[[str, int], None]) -> None:
    """A group at its limit gets an error or is killed; the machine has lost no more."""
    os.mkdir(path)
    most = 16 * MIB
    finished = abi.memory(abi.mmap(-1, PAGE, RW, abi.SHARED | abi.ANONYMOUS))

    def greedy() -> None:
        with suppress(MemoryError, OSError):
            maker(path, 100_000)
            finished[0] = 1

    with abi.cgroup("maker", **{"max": str(most), "swap.max": "0"}) as folder:
        before = taken()
        assert abi.within(folder, greedy).signal() in (None, signal.SIGKILL)
        assert not finished[0]
        assert taken() - before < most + most // 4
        os.close(abi.make(f"{path}-other"))
        os.unlink(f"{path}-other")
        clean(path)
    os.rmdir(path)
