"""PyTorch's DataLoader on the CPU: workers read one data set.

Saved: with ``num_workers`` a Dataset is inherited or pickled by each worker. A shared array is
passed as a name, so the data is in memory once, also with workers that are spawned; with engine
``msharefs`` page tables and faults of each worker are saved too. Batches still go to the main
process through PyTorch's own shared memory.

Not saved: a Dataset that holds Python lists grows in forked workers as they look at it, because
reference counts are written. That is not helped by mshare; put the data into an array.
"""

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

import mshare


class Rows(Dataset[torch.Tensor]):
    """The rows of a shared array; as every tensor over memory it may write to, not read-only."""

    def __init__(self, array: mshare.SharedArray) -> None:
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, number: int) -> torch.Tensor:
        return torch.from_numpy(self.array[number].view(np.ndarray))


def main() -> None:
    """Load 1,000 rows by two workers."""
    array = mshare.share(np.arange(64_000, dtype="float32").reshape(1_000, 64))
    loader = DataLoader(Rows(array), batch_size=50, num_workers=2, multiprocessing_context="spawn")
    total = sum(float(batch.double().sum()) for batch in loader)
    assert total == 64_000 * 63_999 / 2
    print("every row came")


if __name__ == "__main__":
    main()
