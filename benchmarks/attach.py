"""Attach plus close of one region, next to the same with multiprocessing.shared_memory.

Run: ``python benchmarks/attach.py [--size 2G] [--engine hugetlb]``. Rounds of both take turns;
the ratio is what to quote. Also shows what ``import mshare`` adds to ``import mmap``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.shared_memory import SharedMemory
from statistics import median

import mshare
from mshare.sizes import parse_size

ROUNDS, CALLS = 21, 500


def microseconds(call: Callable[[], None]) -> float:
    """Mean time of one call."""
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) / CALLS * 1e6


def imports(module: str) -> float:
    """Milliseconds of a Python process that imports ``module``."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="2G")
    parser.add_argument("--engine", default="shm")
    args = parser.parse_args()
    name = f"benchmark-attach-{os.getpid()}"
    standard = SharedMemory(name, create=True, size=parse_size(args.size))
    region = mshare.create(name, args.size, engine=args.engine)
    try:
        ours, theirs = [], []
        for _ in range(ROUNDS):
            theirs.append(microseconds(lambda: SharedMemory(name).close()))
            ours.append(microseconds(lambda: mshare.attach(name).close()))
        ratio = median(our / their for our, their in zip(ours, theirs, strict=True))
        print(f"SharedMemory(name).close()  {median(theirs):6.1f} µs")
        print(f"mshare.attach(name).close() {median(ours):6.1f} µs on {args.engine}")
        print(f"ratio, median of {ROUNDS} rounds {ratio:9.2f}")
    finally:
        region.unlink()
        standard.close()
        standard.unlink()
    rounds = [(imports("mshare"), imports("mmap")) for _ in range(ROUNDS)]
    extra = median(ours - theirs for ours, theirs in rounds)
    print(f"import mshare, over import mmap {extra:.0f} ms")


if __name__ == "__main__":
    main()
