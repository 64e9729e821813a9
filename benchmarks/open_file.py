"""The region of a file that others have open already, next to a plain mapping of the file.

Run: ``mshare lab -- python benchmarks/open_file.py``. Rounds of both take turns; the ratio is
what to quote. With ``mshare.mmap`` it comes once for each process and file.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from collections.abc import Callable
from statistics import median

import mshare

SIZE = 16 << 20
ROUNDS, CALLS = 15, 100


def microseconds(call: Callable[[], object]) -> float:
    """Mean time of one call."""
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) / CALLS * 1e6


def main() -> None:
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        file.truncate(SIZE)
        fd = file.fileno()
        first = mshare.mmap(fd, SIZE)
        if not first.shared:
            raise SystemExit("mshare.mmap is plain here: run it in the lab, with the module")
        shared, plain = [], []
        for _ in range(ROUNDS):
            shared.append(microseconds(lambda: mshare.mmap(fd, SIZE).close()))
            plain.append(microseconds(lambda: mmap.mmap(fd, SIZE).close()))
        ratio = median(ours / theirs for ours, theirs in zip(shared, plain, strict=True))
        print(f"mmap.mmap(fd).close()    {median(plain):7.1f} µs")
        print(f"mshare.mmap(fd).close()  {median(shared):7.1f} µs")
        print(f"ratio, median of {ROUNDS} rounds, {os.uname().release}  {ratio:7.2f}")


if __name__ == "__main__":
    main()
