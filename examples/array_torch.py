"""PyTorch's DataLoader: worker processes that read one array.

Saved: workers that are spawned get the dataset as a name, where they would get a copy of an array
each. (PyTorch puts tensors, though not arrays, into shared memory by itself; page tables are not
shared then.) With engine ``msharefs`` page tables and faults of each worker are saved too, also of
forked ones, which inherit an array without a copy in any case.

Not saved: a dataset that is made of Python objects. Forked workers inherit it, and each copies it
bit by bit as it looks at it, because the reference count is in the object. mshare does not change
that; put the data into arrays. And batches are made by each worker, in memory of PyTorch's.
"""

import multiprocessing
from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

import mshare
from mshare import pagetables

MIB = 1 << 20
ROWS, COLUMNS = 16_384, 1024


class Rows(Dataset):
    """The rows of an array, each as a tensor."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, row: int) -> torch.Tensor:
        return torch.from_numpy(np.array(self.array[row]))  # a copy: tensors can be written


def epoch(data: Dataset | Sequence[str], method: str) -> tuple[float, int, int]:
    """Read it all by two workers: the sum; and the most own memory and page tables of a worker."""
    loader = DataLoader(
        data, batch_size=len(data) // 64, num_workers=2, multiprocessing_context=method
    )
    total, own, tables = 0.0, 0, 0
    for number, batch in enumerate(loader):
        total += sum(map(len, batch)) if isinstance(batch, list) else float(batch.double().sum())
        if number == len(loader) - 3:
            workers = [each.pid for each in multiprocessing.active_children()]
            own = max(pagetables.own(pid) for pid in workers)
            tables = max(pagetables.process(pid) for pid in workers)
    return total, own, tables


def main() -> None:
    """Read an array of 64 MiB, as it is and shared, by new and by forked workers; and strings."""
    data = np.random.default_rng(1).integers(0, 9, (ROWS, COLUMNS)).astype("float32")
    array = mshare.share(data)
    array.flags.writeable = False
    print(f"a worker that has read a dataset of 64 MiB; the engine is {array.engine}")
    print(f"{'':<40}{'own memory':>14}{'page tables':>14}")
    figures = {}
    for method in ("spawn", "fork"):
        for how, each in (("array", data), ("shared array", array)):
            total, own, tables = epoch(Rows(each), method)
            assert total == data.sum(dtype="float64")
            print(f"{f'{method}, {how}':<40}{own / MIB:>10.1f} MiB{tables / 1024:>10.0f} KiB")
            figures[method, how] = own
    texts = [f"text {number}" for number in range(ROWS * 48)]
    total, own, tables = epoch(texts, "fork")
    assert total == sum(map(len, texts))
    print(
        f"{'not saved: fork, Python strings':<40}{own / MIB:>10.1f} MiB{tables / 1024:>10.0f} KiB"
    )
    assert figures["spawn", "array"] - figures["spawn", "shared array"] > 56 * MIB
    assert own - figures["fork", "array"] > 8 * MIB
    print("every epoch read the same")


if __name__ == "__main__":
    main()
