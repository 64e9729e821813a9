"""The main job: many processes, one content, and what each engine makes them pay.

A run creates a region, fills it, starts the workers, and has them attach, touch every page and
check the content, one after the other while all stay alive. So the first worker pays for the
page tables, and what the others pay is the engine's doing.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from statistics import median
from typing import Any

import mshare
from mshare import engines
from mshare.bench.content import Content
from mshare.bench.worker import Cost, serve

Progress = Callable[[str, int], None]
"""Called with what is being done and how many steps are behind it."""


@dataclass(frozen=True)
class Row:
    """What one engine cost. Bytes and seconds; "first" is the first worker.

    The ``per_process`` figures are of the workers after the first (None without any): the worst
    of them for page tables and faults, the median for seconds.
    """

    engine: str
    kernel: str
    size_bytes: int
    processes: int
    page_table_bytes_first: int
    page_table_bytes_per_process: int | None
    faults_first: int
    faults_per_process: int | None
    touch_seconds_first: float
    touch_seconds_per_process: float | None
    attach_seconds: float
    content_ok: bool
    page_table_bytes: list[int]
    """Of each worker in the order they attached (the last run's)."""


def run(
    content: Content,
    names: Sequence[str],
    *,
    processes: int = 8,
    repeat: int = 1,
    progress: Progress = lambda text, done: None,
) -> list[Row]:
    """Measure the engines ``names``, ``repeat`` times in alternating order; rows hold medians."""
    costs: dict[str, list[list[Cost]]] = {name: [] for name in names}
    for turn in range(repeat):
        for name in names if turn % 2 == 0 else reversed(names):
            done = sum(map(len, costs.values())) * processes
            progress(f"{name}: filling the region", done)
            measured = []
            with _region(content, name) as region, _workers(processes) as pipes:
                for number, pipe in enumerate(pipes, 1):
                    progress(f"{name}: worker {number} of {processes}", done + number - 1)
                    pipe.send((region, name, content.sums))
                    measured.append(_answer(pipe))
            costs[name].append(measured)
    return [_row(name, content.size, costs[name]) for name in names]


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as JSON values."""
    return [asdict(row) for row in rows]


def _row(name: str, size: int, runs: list[list[Cost]]) -> Row:
    firsts = [run[0] for run in runs]
    others = [run[1:] for run in runs if run[1:]]

    def worst(field: str) -> int | None:
        if not others:
            return None
        return int(median(max(getattr(cost, field) for cost in run) for run in others))

    return Row(
        engine=name,
        kernel=platform.release(),
        size_bytes=size,
        processes=len(runs[0]),
        page_table_bytes_first=int(median(cost.page_table_bytes for cost in firsts)),
        page_table_bytes_per_process=worst("page_table_bytes"),
        faults_first=int(median(cost.faults for cost in firsts)),
        faults_per_process=worst("faults"),
        touch_seconds_first=median(cost.touch_seconds for cost in firsts),
        touch_seconds_per_process=(
            median(median(cost.touch_seconds for cost in run) for run in others) if others else None
        ),
        attach_seconds=median(cost.attach_seconds for run in runs for cost in run),
        content_ok=all(cost.content_ok for run in runs for cost in run),
        page_table_bytes=[cost.page_table_bytes for cost in runs[-1]],
    )


@contextmanager
def _region(content: Content, engine: str) -> Iterator[str]:
    """A region of ``engine`` with the content, gone afterwards."""
    name = f"bench-{os.getpid()}-{os.urandom(4).hex()}-{engine}"
    region = mshare.create(name, content.size, engine=engine)
    try:
        with region:
            content.fill(memoryview(region))
        yield name
    finally:
        with suppress(FileNotFoundError):
            engines.by_name(engine).unlink(name)


@contextmanager
def _workers(count: int) -> Iterator[list[Connection]]:
    """Pipes to ``count`` live worker processes, which end with the block, however it ends."""
    context = get_context("spawn")
    pipes: list[Connection] = []
    processes: list[SpawnProcess] = []
    try:
        for _ in range(count):
            ours, theirs = context.Pipe()
            pipes.append(ours)
            process = context.Process(target=serve, args=(theirs,), daemon=True)
            processes.append(process)
            process.start()
            theirs.close()
        for pipe in pipes:
            _answer(pipe)
        yield pipes
    except (EOFError, ConnectionError):
        raise ChildProcessError(_death(processes)) from None
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            if process.pid is not None:
                process.join(10)
                process.kill()
                process.join()


def _death(processes: Sequence[SpawnProcess]) -> str:
    """How the worker ended whose pipe is closed."""
    ended = wait([process.sentinel for process in processes], 5)
    for process in processes:
        if process.sentinel in ended:
            process.join(5)
    code = next((each.exitcode for each in processes if each.exitcode is not None), None)
    how = f"by signal {-code}" if code and code < 0 else f"with exit code {code}"
    return f"a worker process died {how}; dmesg may say why"


def _answer(pipe: Connection) -> Any:
    answer = pipe.recv()
    if isinstance(answer, Exception):
        raise answer
    return answer
