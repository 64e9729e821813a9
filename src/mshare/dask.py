"""``mshare.dask``: a dataset once on each node of a Dask cluster, the same array for all workers.

The first worker on a node loads it into a region; the region gets its name when it is whole.
Others wait on the lock of :func:`mshare.create`, which the kernel releases when its holder dies,
and attach. Each holds a shared ``flock`` of the region: who can get an exclusive one at its end is
the last, and removes the name.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import io
import logging
import math
import os
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from distributed import Worker, WorkerPlugin

from mshare import engines
from mshare.arrays import plain
from mshare.engines.base import DEFAULT_MODE
from mshare.errors import invalid
from mshare.memory import available
from mshare.names import check_name, creating
from mshare.region import Region
from mshare.regions import attach, check_mode, create
from mshare.sizes import PAGE_SIZE, human, round_up

Array = np.ndarray[Any, np.dtype[Any]]

logger = logging.getLogger("distributed.worker.mshare")
_CHUNK = 16 << 20
_MAX_HEADER = 1 << 16


class Dataset(WorkerPlugin):
    """An array that is once on each node; ``client.register_plugin`` puts it there.

    A task that was given the dataset finds the array in :attr:`array`, for reading. The dataset
    travels without it.

    :param name: of the plugin, with which ``client.unregister_worker_plugin`` removes it.
    :param source: the path of a ``.npy`` file, or a function without arguments that returns the
        array. Each node opens or calls it once.
    :param mode, engine: as for :func:`mshare.create`.
    :raises TypeError: the source is neither, or the mode no integer.
    :raises InvalidValue: EINVAL for a bad name or mode, or an engine that there is not.
    """

    def __init__(
        self,
        name: str,
        source: str | os.PathLike[str] | Callable[[], npt.ArrayLike],
        *,
        mode: int = DEFAULT_MODE,
        engine: str | None = None,
    ) -> None:
        self.name, self.mode, self._engine = check_name(name), check_mode(mode), engine
        if engine is not None:
            engines.by_name(engine)
        if not callable(source) and not isinstance(source, str | os.PathLike):
            kind = type(source).__name__
            message = f"a source is the path of a .npy file or a function, not {kind}; for an array"
            raise TypeError(f"{message} write lambda: array")
        self._source = source if callable(source) else os.fspath(source)
        self.region = check_name(f"{name}-{uuid.uuid4().hex[:12]}")
        """The region's name on each node: another dataset, later, has another one."""

    @property
    def array(self) -> Array:
        """The array, read-only, in a worker that has it. :raises RuntimeError: this has not."""
        return self._held().array

    @property
    def engine(self) -> str:
        """The name of the engine that holds it here. :raises RuntimeError: this has it not."""
        return self._held().region.engine

    def _held(self) -> _Held:
        held = _all.get(self.region)
        if held is None:
            raise RuntimeError(
                f"dataset '{self.name}' is not in this process: client.register_plugin(...) puts "
                "it into workers; if that was done, the worker's log says what failed"
            )
        return held

    async def setup(self, worker: Worker) -> None:
        """Load or attach it; the worker goes on to answer meanwhile."""
        await asyncio.to_thread(self._enter, worker.id)

    async def teardown(self, worker: Worker) -> None:
        """Let go of it; the last worker on the node removes it."""
        await asyncio.to_thread(self._leave, worker.id)

    def _enter(self, worker: object) -> None:
        with _lock:
            held = _all.get(self.region)
            if held is None:
                region = self._attached()
                held = _all[self.region] = _Held(region, _read(region))
                logger.info("%s: attached, %s", self.name, _engine_note(region))
            held.workers.add(worker)

    def _leave(self, worker: object) -> None:
        with _lock:
            held = _all.get(self.region)
            if held is None:
                return
            held.workers.discard(worker)
            if held.workers:
                return
            del _all[self.region]
            with held.region as region:
                try:
                    fcntl.flock(region.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return
                if _has_its_name(region):
                    region.unlink()
                    logger.info("%s: removed, this was its last worker here", self.name)

    def _attached(self) -> Region:
        """The region, held so that nobody removes it; loaded if it is not there."""
        while True:
            holder = engines.holder(self.region)
            if holder is None:
                with creating(self.region):
                    if engines.holder(self.region) is None:
                        try:
                            self._load()
                        except FileExistsError as error:
                            if error.filename != self.region:
                                raise
                continue
            with suppress(FileNotFoundError):
                region = attach(self.region, readonly=True, engine=holder.name)
                fcntl.flock(region.fileno(), fcntl.LOCK_SH)
                if _has_its_name(region):
                    return region
                region.close()

    def _load(self) -> None:
        """Make the region, the content of a ``.npy`` file."""
        start = time.monotonic()
        if callable(self._source):
            logger.info("%s: loading", self.name)
            array = plain(self._source())
            header = _header_of(array)
            size = self._create(len(header) + array.nbytes, lambda to: _fill(to, header, array))
        else:
            with open(self._source, "rb", buffering=0) as file:
                length = _length(file, self._source)
                logger.info("%s: loading %s from %s", self.name, human(length), self._source)
                size = self._create(length, lambda to: self._copy(file, memoryview(to)[:length]))
        logger.info("%s: %s loaded in %.1f s", self.name, human(size), time.monotonic() - start)

    def _create(self, length: int, fill: Callable[[Region], None]) -> int:
        size, free = round_up(length, PAGE_SIZE), available()
        if size > free.bytes and not engines.best(self._engine, size).reserves:
            message = f"no room for the region: {free} free, {human(size)} are needed"
            raise OSError(errno.ENOSPC, message, self.region)
        create(self.region, size, self.mode, engine=self._engine, fill=fill).close()
        return size

    def _copy(self, file: io.RawIOBase, memory: memoryview) -> None:
        file.seek(0)
        done, said = 0, time.monotonic()
        while done < len(memory):
            count = file.readinto(memory[done : done + _CHUNK])
            if not count:
                message = f"the file became shorter: it ends after {done} of {len(memory)} bytes"
                raise OSError(errno.ENODATA, message, self._source)
            done += count
            if time.monotonic() - said > 10:
                said = time.monotonic()
                logger.info("%s: %d %% loaded", self.name, 100 * done // len(memory))


@dataclass
class _Held:
    """What this process has of a dataset: workers can be several in one process."""

    region: Region
    array: Array
    workers: set[object] = field(default_factory=set)


_all: dict[str, _Held] = {}
_lock = threading.Lock()
"""Held while a dataset is loaded, attached or let go of."""


def _has_its_name(region: Region) -> bool:
    """Whether the region is still the one that its name leads to."""
    with suppress(FileNotFoundError):
        path = f"{engines.by_name(region.engine).directory()}/{region.name}"
        return os.path.samestat(os.stat(path), os.fstat(region.fileno()))
    return False


def _engine_note(region: Region) -> str:
    """Which engine holds it; if page tables of small pages are not shared, why."""
    best = engines.by_name("msharefs")
    note = f"{human(region.size)} on engine {region.engine}"
    if region.engine == best.name:
        return note
    check = best.check()
    why = "another engine was chosen" if check.works else check.why
    return f"{note} ({best.name} would share page tables, but {why})"


class _Header(NamedTuple):
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]
    offset: int
    """Where the elements start."""

    @property
    def length(self) -> int:
        return self.offset + math.prod(self.shape) * self.dtype.itemsize


def _parse(file: BinaryIO, path: str) -> _Header:
    """What stands before the elements. :raises InvalidValue: this is no ``.npy`` file."""
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    try:
        version = np.lib.format.read_magic(file)
        if version not in readers:
            raise ValueError(f"version {version[0]}.{version[1]} of the format")
        return _Header(*readers[version](file), file.tell())
    except ValueError as error:
        raise invalid(f"not a .npy file that can be shared: {error}", path) from None


def _length(file: io.RawIOBase, path: str) -> int:
    """Bytes of a ``.npy`` file up to the end of its array, all of which it has."""
    header = _parse(io.BytesIO(file.read(_MAX_HEADER) or b""), path)
    if header.dtype.hasobject:
        raise TypeError(f"a region can't hold elements of dtype '{header.dtype}': {path}")
    size = os.fstat(file.fileno()).st_size
    if size < header.length:
        message = f"the file was cut short: it has {size} bytes, its array ends at {header.length}"
        raise OSError(errno.ENODATA, message, path)
    return header.length


def _header_of(array: Array) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_2_0(file, np.lib.format.header_data_from_array_1_0(array))
    return file.getvalue()


def _read(region: Region) -> Array:
    """The array in the region."""
    memory = memoryview(region)
    header = _parse(io.BytesIO(memory[:_MAX_HEADER]), region.name)
    order: Literal["C", "F"] = "F" if header.fortran else "C"
    return np.ndarray(header.shape, header.dtype, memory, header.offset, order=order)


def _fill(region: Region, header: bytes, array: Array) -> None:
    memoryview(region)[: len(header)] = header
    np.copyto(_read(region), array)
