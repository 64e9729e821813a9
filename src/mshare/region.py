"""An attachment to a region: its memory in this process."""

from __future__ import annotations

import math
import operator
import os
import stat as st
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex

from mshare import mapping
from mshare.buffer import Exporter
from mshare.engines import Engine, Stat, missing
from mshare.errors import Gone, invalid
from mshare.sizes import PAGE_SIZE, region_size, round_up

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

PathOrFd = str | os.PathLike[str] | int


class _Closing:
    """Closes a descriptor when it goes."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if self.fd >= 0:
            close(self.fd)


class Region(Exporter):
    """An attachment to a region: its memory in this process, with the buffer protocol.

    Made by :func:`create` and :func:`attach`. Everything that looks into the memory
    (memoryviews, NumPy arrays) keeps it mapped; closing or losing this object never pulls it
    from under them. Leaving ``with`` closes and never unlinks. Pickling keeps name, engine and
    options; unpickling attaches again, and what can't be attached raises why when it is used.
    """

    _fd = -1
    _last: _Closing | None = None

    def __init__(
        self,
        name: str,
        engine: Engine,
        fd: int,
        *,
        readonly: bool,
        address: SupportsIndex | None,
    ) -> None:
        """Attach to the open region ``fd``, which then belongs to this object."""
        self._fd = fd
        try:
            self._info = info = os.fstat(fd)
            if not st.S_ISREG(info.st_mode) or not info.st_size:
                raise invalid("what has this name is not a region", name)
            self._name, self._engine, self._readonly = name, engine, readonly
            self._whole, self._mode = info.st_size, st.S_IMODE(info.st_mode)
            self._size = engine.extent(fd, self._whole)
            self._address = engine.place(fd, name, self._whole, readonly=readonly, address=address)
            self._fixed = None if address is None else self._address
            self._b_target = mapping.own(self._address, self._size, self._whole, readonly=readonly)
        except BaseException:
            self._fd = -1
            os.close(fd)
            raise

    @property
    def name(self) -> str:
        """The name it was attached by; another region may have it after an unlink."""
        return self._name

    @property
    def size(self) -> int:
        """Bytes."""
        return self._size

    @property
    def mode(self) -> int:
        """Mode bits of the region when it was attached."""
        return self._mode

    @property
    def readonly(self) -> bool:
        """Whether this attachment can't write."""
        return self._readonly

    @property
    def engine(self) -> str:
        """Name of the engine that holds the region."""
        return self._engine.name

    @property
    def address(self) -> int:
        """Where the region starts in this process."""
        return self._address

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._fd < 0

    def fileno(self) -> int:
        """The descriptor of the region's file, which can be sent to another process.

        :raises ValueError: the region is closed.
        """
        if self._fd < 0:
            raise ValueError(f"the region '{self._name}' is closed")
        return self._fd

    def asarray(
        self,
        dtype: npt.DTypeLike = "uint8",
        shape: SupportsIndex | Iterable[SupportsIndex] | None = None,
        offset: SupportsIndex = 0,
        order: Literal["C", "F"] = "C",
    ) -> np.ndarray[Any, Any]:
        """A NumPy array over the region's memory, without a copy.

        The array keeps the memory mapped, whatever becomes of this object; it is read-only
        if the attachment is.

        :param shape: elements. One axis may be -1: as many as fit from ``offset`` on, which is
            also the default.
        :param offset: bytes from the start of the region.
        :raises TypeError: not a data type, or one that holds Python objects.
        :raises ValueError: outside the region, or the region is closed.
        """
        import numpy as np

        self.fileno()
        offset = operator.index(offset)
        view = memoryview(self)
        kind = np.dtype(dtype)
        if kind.hasobject or not kind.itemsize:
            raise TypeError(f"a region can't hold elements of dtype '{kind}'")
        if order not in ("C", "F"):
            raise invalid("order is 'C' or 'F'", order)
        if not 0 <= offset < self._size:
            raise invalid(f"the offset is outside the region of {self._size} bytes", offset)
        axes = shape if isinstance(shape, Iterable) else (-1 if shape is None else shape,)
        lengths = tuple(operator.index(length) for length in axes)
        room = self._size - offset
        each = -math.prod(lengths) * kind.itemsize
        if each > 0 and lengths.count(-1) == 1:
            axis = lengths.index(-1)
            lengths = (*lengths[:axis], max(room // each, 1), *lengths[axis + 1 :])
        needed = math.prod(lengths) * kind.itemsize
        if any(length < 0 for length in lengths):
            raise invalid("a length in the shape is negative", lengths)
        if needed > room:
            have = f"the region has {room} bytes from offset {offset}"
            raise invalid(f"the array needs {needed} bytes, {have}", lengths)
        return np.ndarray(lengths, kind, buffer=view, offset=offset, order=order)

    def stat(self) -> Stat:
        """What the engine shows for the region this is attached to, also after an unlink."""
        return self._engine.stat_open(self.fileno(), self._name)

    def map(
        self,
        file: PathOrFd | None,
        offset: int = 0,
        length: SupportsIndex | str | None = None,
        readonly: bool = False,
        *,
        file_offset: int = 0,
    ) -> None:
        """Put ``length`` bytes of a file from ``file_offset`` into the region at ``offset``.

        In place of what is there, for every process. Offsets are whole pages of 4096 bytes.

        :param file: a path, an open descriptor, or None for fresh memory, all zeros.
        :param length: by default to the file's end, or with None to the region's.
        :param readonly: nobody may write to it through the region.
        :raises OSError: EOPNOTSUPP where the engine can't (see ``mshare doctor``), or the file
            can't be shared; EACCES without the right to write.
        """
        self._check_layout(offset, 0)
        with _opened(file, readonly=readonly) as fd:
            if length is not None:
                size = region_size(length)
            elif fd is None:
                size = self._whole - offset
            else:
                size = round_up(os.fstat(fd).st_size, PAGE_SIZE) - file_offset
            if file_offset < 0 or file_offset % PAGE_SIZE or size <= 0:
                raise invalid("not a range of whole pages of the file", (file_offset, size))
            self._check_layout(offset, size)
            self._engine.map(
                self.fileno(), self._name, fd, offset, size, file_offset, readonly=readonly
            )

    def unmap(self, offset: int, length: SupportsIndex | str) -> None:
        """Take away what is mapped at ``offset``; touching it is then SIGSEGV, for everybody.

        :raises OSError: EOPNOTSUPP where the engine can't; EACCES without the right to write.
        """
        size = region_size(length)
        self._check_layout(offset, size)
        self._engine.unmap(self.fileno(), self._name, offset, size)

    def protect(self, offset: int, length: SupportsIndex | str, *, readonly: bool) -> None:
        """Forbid or allow writing to a part of the region.

        When it returns no process can write there any more, or every writable attachment can.

        :raises OSError: EOPNOTSUPP where the engine can't; EACCES without the right to write.
        """
        size = region_size(length)
        self._check_layout(offset, size)
        self._engine.protect(self.fileno(), self._name, offset, size, readonly=readonly)

    def _check_layout(self, offset: int, size: int) -> None:
        if offset < 0 or offset % PAGE_SIZE or offset + size > self._whole:
            raise invalid(f"not whole pages inside the region of {self._whole} bytes", offset)

    def unlink(self) -> None:
        """Remove the region's name; see :func:`unlink`.

        :raises FileNotFoundError: the name is gone, or another region has it.
        """
        from mshare.regions import unlink

        if not self._engine.leads_to(self._name, self._info):
            raise missing(self._name)
        unlink(self._name, engine=self.engine)

    def close(self) -> None:
        """Let go of the region. Live views keep the memory until the last of them dies."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            del self._b_target
            if self._last:
                self._last.fd = -1
            os.close(fd)

    def __enter__(self) -> Region:
        self.fileno()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # in two steps, as mapping._memory_type: other finalizers of the same garbage may look in
        if self._fd >= 0:
            self._last = _Closing(self._fd)

    def __len__(self) -> int:
        return self._size

    def __reduce__(self) -> tuple[Callable[..., Region | Gone], tuple[Any, ...]]:
        return _reattach, (self._name, self._readonly, self.engine, self._fixed)

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"at {self._address:#x}"
        access = "read-only" if self._readonly else "read-write"
        return (
            f"<mshare.Region '{self._name}' {self._size} bytes, {self.engine}, {access}, {state}>"
        )


@contextmanager
def _opened(file: PathOrFd | None, *, readonly: bool) -> Iterator[int | None]:
    """A descriptor of ``file`` for the length of the block; one that was given stays open."""
    if file is None or isinstance(file, int):
        yield file
        return
    access = os.O_RDONLY if readonly else os.O_RDWR
    fd = os.open(file, access | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        yield fd
    finally:
        os.close(fd)


def _reattach(name: str, readonly: bool, engine: str, address: int | None) -> Region | Gone:
    from mshare.regions import attach

    try:
        return attach(name, readonly=readonly, engine=engine, address=address)
    except OSError as error:
        return Gone(error)
