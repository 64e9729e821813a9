"""multiprocessing.Pool: send an array to workers once, as a name.

Saved: the pickles, which are a name instead of the data, and a copy of the data in each worker;
with engine ``msharefs`` also page tables and faults of each worker.

Not saved: what a worker computes is its own memory. And an array that forked workers merely
inherit is shared by fork already, until it is written to; Python objects (lists, dicts, strings)
are written to by their reference counts alone, so workers that inherit many of them grow as they
look at them. mshare does not change that. What helps is to hold the data in an array.
"""

import multiprocessing

import numpy as np

import mshare


def total(array: mshare.SharedArray, start: int, stop: int) -> float:
    """Work on a part of the array, in a worker."""
    return float(array[start:stop].sum())


def main() -> None:
    """Sum 1,000,000 numbers by four workers, which write nothing."""
    array = mshare.share(np.arange(1_000_000, dtype="float64"))
    array.flags.writeable = False  # the workers may read only
    parts = [(array, start, start + 250_000) for start in range(0, 1_000_000, 250_000)]
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        assert sum(pool.starmap(total, parts)) == 499_999_500_000
    print("the sum is right")


if __name__ == "__main__":
    main()
