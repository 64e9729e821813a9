"""multiprocessing.Pool: send an array to workers once, as a name.

Saved: the pickles, which are a name instead of the data, and a copy of the data in each worker;
with engine ``msharefs`` also page tables and faults of each worker.

Not saved: what a worker computes is its own memory. And what forked workers merely inherit is
shared by fork already, until it is written to; Python objects (lists, dicts, strings) are written
to by their reference counts alone, so workers grow as they look at them. mshare does not change
that. What helps is to hold the data in an array.
"""

import multiprocessing
import pickle

import numpy as np

import mshare
from mshare import pagetables

MIB = 1 << 20
words = [f"word {number}" for number in range(200_000)]
"""Some 13 MiB of Python objects, which forked workers inherit."""


def total(sent: bytes) -> tuple[float, int, int]:
    """Unpack an argument, as a pool does, and work on it: the sum, and what it cost this worker."""
    own, tables = pagetables.own(), pagetables.process()
    array = pickle.loads(sent)
    result = float(array.sum())
    return result, pagetables.own() - own, pagetables.process() - tables


def look(_: int) -> int:
    """Look at inherited objects, change none; how much memory became this worker's own."""
    own = pagetables.own()
    assert sum(len(word) for word in words) == 2_088_890
    return pagetables.own() - own


def main() -> None:
    """Sum an array of 64 MiB in a worker; then let one look at what it inherited."""
    data = np.arange(64 * MIB // 8, dtype="float64")
    array = mshare.share(data)
    array.flags.writeable = False  # the workers may read only
    print(f"{'64 MiB to a worker':<28}{'pickle, bytes':>14}{'own memory':>13}{'page tables':>13}")
    figures = []
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        by_name = f"as a name, engine {array.engine}"
        for how, argument in (("as data", data), (by_name, array)):
            sent = pickle.dumps(argument)
            result, own, tables = pool.apply(total, [sent])
            assert result == data.sum()
            print(f"{how:<28}{len(sent):>14,}{own / MIB:>9.1f} MiB{tables / 1024:>9.0f} KiB")
            figures.append((len(sent), own))
    assert figures[0][0] > 64 * MIB and figures[0][1] > 60 * MIB
    assert figures[1][0] < 1000 and figures[1][1] < 4 * MIB
    with multiprocessing.get_context("fork").Pool(1) as pool:
        grown = pool.apply(look, [0])
    assert grown > 8 * MIB
    print(
        f"not saved: a forked worker that looked at a list of strings grew by {grown / MIB:.1f} MiB"
    )
    print("the sum is right")


if __name__ == "__main__":
    main()
