"""One worker process: attach, touch every page, check the content, stay alive."""

from __future__ import annotations

import signal
import time
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

import mshare
from mshare import pagetables
from mshare.bench.content import checksums
from mshare.sizes import PAGE_SIZE

if TYPE_CHECKING:
    import numpy.typing as npt


class Cost(NamedTuple):
    """What a worker paid. Faults and seconds are of the touch loop alone."""

    page_table_bytes: int
    faults: int
    touch_seconds: float
    attach_seconds: float
    content_ok: bool


def serve(pipe: Connection) -> None:
    """Answer requests to measure a region, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    touch(np.zeros(2 * PAGE_SIZE, np.uint8))
    regions = []
    pipe.send(None)
    while True:
        try:
            name, engine, sums = pipe.recv()
        except EOFError:
            return
        try:
            region, cost = measure(name, engine, sums)
            regions.append(region)
            pipe.send(cost)
        except Exception as error:
            pipe.send(error)


def measure(name: str, engine: str, sums: npt.NDArray[np.uint64]) -> tuple[mshare.Region, Cost]:
    """Attach the region read-only and measure; it stays attached."""
    before = pagetables.process()
    start = time.perf_counter()
    region = mshare.attach(name, readonly=True, engine=engine)
    attach_seconds = time.perf_counter() - start
    memory = region.asarray(np.uint8)
    with pagetables.Faults() as faults:
        start = time.perf_counter()
        touch(memory)
        touch_seconds = time.perf_counter() - start
    after = pagetables.process()
    found = checksums(memoryview(region))
    ok = np.array_equal(found[: len(sums)], sums) and not found[len(sums) :].any()
    return region, Cost(after - before, faults.minor, touch_seconds, attach_seconds, bool(ok))


def touch(memory: npt.NDArray[np.uint8]) -> None:
    """Read one byte of every page."""
    np.bitwise_or.reduce(memory[::PAGE_SIZE])
