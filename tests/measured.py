"""Processes that attach a region and touch all of it, and what that cost each of them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

ADDRESS = 1 << 45
"""A part of the address space that nothing else uses, and a multiple of 512 GiB."""

_WORKER = f"""
import json, sys
import numpy as np
import mshare
from mshare import pagetables
from mshare.bench.worker import touch

def store(memory):
    memory[::4096] = 1

name, engine, how = sys.argv[1:]
work = store if how == "write" else touch
work(np.zeros(1 << 20, np.uint8))
pagetables.process()
print(0, flush=True)
sys.stdin.readline()
before = pagetables.process()
region = mshare.attach(name, readonly=how == "read", engine=engine, address={ADDRESS})
memory = region.asarray()
with pagetables.Faults() as faults:
    work(memory)
print(json.dumps([pagetables.process() - before, faults.minor]), flush=True)
sys.stdin.read()
"""


class Measured(NamedTuple):
    """One process: growth of VmPTE in bytes, minor faults of the touch loop."""

    vmpte: int
    faults: int


@contextmanager
def measured(name: str, engine: str, how: str, processes: int) -> Iterator[list[Measured]]:
    """Have processes touch the region ``name`` one after the other; all live for the block."""
    with ExitStack() as stack:
        workers = []
        for _ in range(processes):
            command = [sys.executable, "-c", _WORKER, name, engine, how]
            worker = stack.enter_context(
                subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            )
            stack.callback(worker.kill)
            workers.append(worker)
        for worker in workers:
            _answer(worker)
        found = []
        for worker in workers:
            assert worker.stdin
            worker.stdin.write("go\n")
            worker.stdin.flush()
            found.append(Measured(*_answer(worker)))
        yield found


def _answer(worker: subprocess.Popen[str]) -> list[int]:
    assert worker.stdout
    line = worker.stdout.readline()
    assert line, "the worker died"
    answer = json.loads(line)
    return answer if isinstance(answer, list) else []
