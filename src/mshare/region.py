"""Regions: named memory that any number of processes attach to."""

from __future__ import annotations

import builtins
import errno
import fcntl
import math
import operator
import os
import stat as st
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex

from mshare import engines, mapping
from mshare.buffer import Exporter
from mshare.engines import Engine, Stat
from mshare.engines.base import DEFAULT_MODE, exists
from mshare.errors import about, invalid
from mshare.names import check_name, creating
from mshare.sizes import PAGE_SIZE, region_size, round_up

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

PathOrFd = str | os.PathLike[str] | int


class Region(Exporter):
    """An attachment to a region: its memory in this process, with the buffer protocol.

    Made by :func:`create` and :func:`attach`. Everything that looks into the memory
    (memoryviews, NumPy arrays) keeps it mapped; closing or losing this object never pulls it
    from under them. Leaving ``with`` closes and never unlinks. Pickling keeps name, engine and
    options; unpickling attaches again.
    """

    _fd = -1

    def __init__(self, name: str, engine: Engine, fd: int, *, readonly: bool, address: int | None):
        """Attach to the open region ``fd``, which then belongs to this object."""
        self._fd = fd
        try:
            info = os.fstat(fd)
            if not st.S_ISREG(info.st_mode) or not info.st_size:
                raise invalid("what has this name is not a region", name)
            self._name, self._engine, self._readonly = name, engine, readonly
            self._fixed = address
            self._whole, self._mode = info.st_size, st.S_IMODE(info.st_mode)
            self._size = engine.extent(fd, self._whole)
            self._address = engine.place(fd, self._whole, readonly=readonly, address=address)
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
        offset: int = 0,
        order: Literal["C", "F"] = "C",
    ) -> np.ndarray[Any, Any]:
        """A NumPy array over the region's memory, without a copy.

        The array keeps the memory mapped, whatever becomes of this object; it is read-only
        if the attachment is.

        :param shape: elements; by default one axis of all that fit from ``offset`` on.
        :param offset: bytes from the start of the region.
        :raises TypeError: not a data type, or one that holds Python objects.
        :raises ValueError: outside the region, or the region is closed.
        """
        import numpy as np

        view = memoryview(self)
        kind = np.dtype(dtype)
        if kind.hasobject or not kind.itemsize:
            raise TypeError(f"a region can't hold elements of dtype '{kind}'")
        if order not in ("C", "F"):
            raise invalid("order is 'C' or 'F'", order)
        if not 0 <= offset < self._size:
            raise invalid(f"the offset is outside the region of {self._size} bytes", offset)
        if shape is None:
            shape = (self._size - offset) // kind.itemsize
        axes = shape if isinstance(shape, Iterable) else (shape,)
        lengths = tuple(operator.index(length) for length in axes)
        needed = math.prod(lengths) * kind.itemsize
        if any(length < 0 for length in lengths):
            raise invalid("a length in the shape is negative", lengths)
        if offset + needed > self._size:
            have = f"the region has {self._size - offset} bytes from offset {offset}"
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
        """Remove the region's name; see :func:`unlink`."""
        self._engine.unlink(self._name)

    def close(self) -> None:
        """Let go of the region. Live views keep the memory until the last of them dies."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            del self._b_target
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
        if self._fd >= 0:
            os.close(self._fd)

    def __len__(self) -> int:
        return self._size

    def __reduce__(self) -> tuple[Callable[..., Region], tuple[Any, ...]]:
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


def _reattach(name: str, readonly: bool, engine: str, address: int | None) -> Region:
    return attach(name, readonly=readonly, engine=engine, address=address)


def create(
    name: str,
    size: SupportsIndex | str | None = None,
    mode: int | None = None,
    *,
    backing: PathOrFd | None = None,
    engine: str | None = None,
    address: int | None = None,
    locked: bool = False,
    fill: Callable[[Region], object] | None = None,
) -> Region:
    """Create a region and attach it for reading and writing.

    :param size: bytes, or a string such as ``"4G"``; whole pages of 4096 bytes. An engine with
        larger pages rounds it up: ``Region.size`` says what there is.
    :param mode: permission bits, exactly as given (no umask); 0600 by default.
    :param backing: a regular file, by path or open descriptor, to be the region's content; then
        size and permission are the file's. Read-only where only reading is allowed.
    :param engine: an engine's name; by default ``MSHARE_ENGINE``, else the best that works.
    :param address: attach here; by default an address the engine likes.
    :param locked: take all memory now and never move it, as a process needs that gives its
        window to a virtual machine. Counts against RLIMIT_MEMLOCK.
    :param fill: called with the region before it has its name, so that nobody sees it half
        filled. If it fails, or its process dies, there is no region. Others of this user who
        create the name meanwhile wait for it.
    :raises FileExistsError: the name is taken.
    :raises OSError: ENOSPC when the memory is not there, now rather than later; EOPNOTSUPP where
        the engine can't lock.
    :raises ValueError: a bad name, size or mode (an ``OSError`` with errno too).
    """
    check_name(name)
    engines.asked(engine)
    if backing is not None:
        if fill is not None:
            raise TypeError("a region over a file has the file's content; leave out fill")
        return _create_over(name, size, mode, backing, engine, address, locked=locked)
    if size is None:
        raise TypeError("a region needs a size, or backing= a file")
    bytes_ = region_size(size)
    mode = _check_mode(DEFAULT_MODE if mode is None else mode)
    with about(name):
        with creating(name):
            if engines.holder(name):
                raise exists(name)
            best = engines.best(engine, bytes_, locked=locked)

            def filled(fd: int) -> None:
                if fill is not None:
                    with Region(name, best, os.dup(fd), readonly=False, address=None) as region:
                        fill(region)

            best.create(name, bytes_, mode, locked=locked, fill=filled)
        return _attach_created(name, best, address)


def _create_over(
    name: str,
    size: SupportsIndex | str | None,
    mode: int | None,
    backing: PathOrFd,
    engine: str | None,
    address: int | None,
    *,
    locked: bool,
) -> Region:
    if size is not None or mode is not None:
        raise invalid("a region over a file has the file's size and mode; leave them out", name)
    file = backing if isinstance(backing, int) else os.fspath(backing)
    with about(name):
        with creating(name):
            if engines.holder(name):
                raise exists(name)
            chosen = engines.best(engine, over_file=True, locked=locked)
            chosen.create_over(name, file, locked=locked)
        return _attach_created(name, chosen, address, maybe_readonly=True)


def _attach_created(
    name: str, engine: Engine, address: int | None, *, maybe_readonly: bool = False
) -> Region:
    """Attach a region just made; if that fails, nothing of it remains."""
    readonly = False
    try:
        try:
            fd = engine.open(name, readonly=False)
        except OSError as error:
            if not maybe_readonly or error.errno not in (errno.EACCES, errno.EROFS):
                raise
            readonly = True
            fd = engine.open(name, readonly=True)
        return Region(name, engine, fd, readonly=readonly, address=address)
    except BaseException:
        with suppress(OSError):
            engine.unlink(name)
        raise


def _check_mode(mode: object) -> int:
    if not isinstance(mode, int) or isinstance(mode, bool):
        raise TypeError(f"mode is an integer such as 0o640, not {type(mode).__name__}")
    if not 0 <= mode <= 0o777:
        raise invalid("mode is permission bits, 0 to 0o777", oct(mode))
    return mode


def attach(
    name: str | int,
    readonly: bool = False,
    *,
    engine: str | None = None,
    address: int | None = None,
) -> Region:
    """Attach a region that exists.

    :param name: its name, or an open descriptor of it (as another process may have sent); the
        descriptor stays the caller's.
    :param engine: where to look; by default ``MSHARE_ENGINE``, else everywhere.
    :param address: attach here, where nothing may be mapped; by default the engine chooses.
    :raises FileNotFoundError: no such region.
    :raises PermissionError: its mode bits forbid it.
    """
    if isinstance(name, int):
        return _attach_fd(name, readonly, address)
    check_name(name)
    with about(name):
        found, fd = engines.open_region(name, engine, readonly=readonly)
        return Region(name, found, fd, readonly=readonly, address=address)


def _attach_fd(fd: int, readonly: bool, address: int | None) -> Region:
    access = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
    name = os.path.basename(os.readlink(f"/proc/self/fd/{fd}")).removesuffix(" (deleted)")
    if access == os.O_WRONLY or (access == os.O_RDONLY and not readonly):
        raise PermissionError(errno.EACCES, "the descriptor is not open for this access", name)
    with about(name):
        owner = next((each for each in engines.ENGINES if each.owns(fd)), engines.ENGINES[-1])
        copy = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
        return Region(name, owner, copy, readonly=readonly, address=address)


def unlink(name: str, *, engine: str | None = None) -> None:
    """Remove the region's name. Its memory goes when the last attachment does.

    :raises FileNotFoundError: no such region.
    :raises PermissionError: it belongs to another user.
    """
    check_name(name)
    try:
        with about(name):
            found = engines.find(name, engine)
            found.unlink(name)
    except FileNotFoundError as error:
        if error.filename == name:
            raise
        raise engines.missing(name) from None
    except PermissionError as error:
        message = "only its owner or root can remove the region"
        raise PermissionError(error.errno, message, name) from None


def stat(name: str, *, engine: str | None = None) -> Stat:
    """Size, memory, owner and mode of a region. :raises FileNotFoundError: no such region."""
    check_name(name)
    with about(name):
        return engines.find(name, engine).stat(name)


def list(engine: str | None = None) -> builtins.list[Stat]:
    """Every region on this machine, by name; with ``engine``, those it holds."""
    chosen = engines.by_name(engine) if engine else None
    found = [
        region for each in ((chosen,) if chosen else engines.ENGINES) for region in each.list()
    ]
    return sorted(found, key=lambda region: (region.name, region.engine))
