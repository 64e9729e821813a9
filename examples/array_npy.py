"""A .npy file: mapped by many processes, which then share its page tables.

Saved: with the kernel module, page tables and faults of each process but the first, by
``mshare.mmap`` instead of ``np.load(mmap_mode="r")``. The data is in memory once either way: that
is the page cache. Without the module the two are the same.

Not saved: pages that come from the disk have to be read once. An ``np.load`` without ``mmap_mode``
makes a copy in each process.
"""

import multiprocessing
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import mshare
from mshare import pagetables


def load(path: Path) -> np.ndarray[Any, Any]:
    """The array in a .npy file, without a copy. It keeps the file mapped."""
    with open(path, "rb") as file:
        version = np.lib.format.read_magic(file)
        read_header = getattr(np.lib.format, f"read_array_header_{version[0]}_{version[1]}")
        shape, fortran, dtype = read_header(file)
        memory = mshare.mmap(file.fileno(), 0, access=mshare.ACCESS_READ)
        order = "F" if fortran else "C"
        return np.ndarray(shape, dtype, memory, file.tell(), order=order)


def load_mapped(path: Path) -> np.ndarray[Any, Any]:
    """The same by NumPy alone: page tables are each process's own."""
    return np.load(path, mmap_mode="r")


WAYS = {"mshare.mmap": load, 'np.load(mmap_mode="r")': load_mapped, "np.load": np.load}


def search(path: Path, way: str, value: int) -> tuple[int, int, int, int]:
    """Look through the sorted array; where a value is, and what that cost this process."""
    own, tables = pagetables.own(), pagetables.process()
    with pagetables.Faults() as faults:
        array = WAYS[way](path)
        found = int(np.count_nonzero(array < value))
    return found, pagetables.own() - own, pagetables.process() - tables, faults.minor


def main() -> None:
    """Search one file of 64 MiB in two processes, in each of three ways."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sorted.npy"
        np.save(path, np.arange(0, 3 << 23, 3))
        with open(path, "rb") as file:
            shared = mshare.mmap(file.fileno(), 0, access=mshare.ACCESS_READ).shared
        print(f"64 MiB, the second process; page tables shared by mshare.mmap: {shared}")
        print(f"{'':<26}{'own memory':>14}{'page tables':>14}{'faults':>10}")
        figures = {}
        for way in WAYS:
            context = multiprocessing.get_context("spawn")
            with context.Pool(1) as first, context.Pool(1) as second:
                assert first.apply(search, [path, way, 3 << 20])[0] == 1 << 20
                found, own, tables, faults = second.apply(search, [path, way, 3 << 20])
            assert found == 1 << 20
            print(f"{way:<26}{own / (1 << 20):>10.1f} MiB{tables / 1024:>10.0f} KiB{faults:>10,}")
            figures[way] = own, tables
    assert figures["np.load"][0] > 64 << 20 > 8 * figures["mshare.mmap"][0]
    assert not shared or figures["mshare.mmap"][1] < figures['np.load(mmap_mode="r")'][1] / 2
    print("found in all ways")


if __name__ == "__main__":
    main()
