"""What the workers share and check: a known array, or any file."""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from mshare.errors import invalid
from mshare.sizes import PAGE_SIZE, round_up

if TYPE_CHECKING:
    import numpy.typing as npt

BLOCK = 1 << 20


def checksums(memory: memoryview) -> npt.NDArray[np.uint64]:
    """The sum of the 8-byte words of each MiB of ``memory``, which is whole pages."""
    words = np.frombuffer(memory, np.uint64)
    per_block = BLOCK // 8
    whole = len(words) // per_block * per_block
    sums: npt.NDArray[np.uint64] = words[:whole].reshape(-1, per_block).sum(axis=1)
    if whole == len(words):
        return sums
    return np.append(sums, words[whole:].sum())


class Content(ABC):
    """Bytes to share: ``size`` is whole pages, the rest of the last one zeros."""

    size: int

    @abstractmethod
    def block(self, start: int, length: int) -> bytes | npt.NDArray[Any]:
        """``length`` bytes from ``start`` on, or fewer at the end."""

    @cached_property
    def sums(self) -> npt.NDArray[np.uint64]:
        """The checksums, from the content itself and not from a region that holds it."""
        sums = []
        for start in range(0, self.size, BLOCK):
            length = min(BLOCK, self.size - start)
            block = bytes(self.block(start, length)).ljust(length, b"\0")
            sums.append(checksums(memoryview(block)))
        return np.concatenate(sums)

    def fill(self, memory: memoryview) -> None:
        """Write the content to the start of ``memory``."""
        target = np.frombuffer(memory, np.uint8)
        for start in range(0, self.size, BLOCK):
            block = np.frombuffer(self.block(start, min(BLOCK, self.size - start)), np.uint8)
            target[start : start + len(block)] = block


class ArrayContent(Content):
    """A float32 array whose element ``i`` is ``i % 65521``."""

    def __init__(self, size: int):
        self.size = round_up(size, PAGE_SIZE)

    def block(self, start: int, length: int) -> npt.NDArray[np.float32]:
        index = np.arange(start // 4, (start + length) // 4, dtype=np.int64)
        return (index % 65521).astype(np.float32)


class FileContent(Content):
    """The bytes of a regular file.

    :raises OSError: it can't be read.
    :raises InvalidValue: EINVAL when it is empty or not a regular file.
    """

    def __init__(self, path: str):
        if not os.path.isfile(path):
            if os.path.exists(path):
                raise invalid("not a regular file", path)
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        self._path = path
        length = os.stat(path).st_size
        if not length:
            raise invalid("the file is empty", path)
        self.size = round_up(length, PAGE_SIZE)

    def block(self, start: int, length: int) -> bytes:
        with open(self._path, "rb", buffering=0) as file:
            return os.pread(file.fileno(), length, start)
