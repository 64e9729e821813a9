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


def load(path: Path) -> np.ndarray[Any, Any]:
    """The array in a .npy file, without a copy. It keeps the file mapped."""
    with open(path, "rb") as file:
        version = np.lib.format.read_magic(file)
        read_header = getattr(np.lib.format, f"read_array_header_{version[0]}_{version[1]}")
        shape, fortran, dtype = read_header(file)
        memory = mshare.mmap(file.fileno(), 0, access=mshare.ACCESS_READ)
        order = "F" if fortran else "C"
        return np.ndarray(shape, dtype, memory, file.tell(), order=order)


def search(path: Path, value: int) -> int:
    """Where in the sorted array a value is, in another process."""
    return int(np.searchsorted(load(path), value))


def main() -> None:
    """Search one file in four processes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sorted.npy"
        np.save(path, np.arange(0, 3_000_000, 3))
        with multiprocessing.get_context("spawn").Pool(4) as pool:
            found = pool.starmap(search, [(path, 3 * n) for n in (0, 1, 500_000, 999_999)])
        assert found == [0, 1, 500_000, 999_999]
    print("found all four")


if __name__ == "__main__":
    main()
