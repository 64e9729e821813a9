"""``mshare.share``: an array as a region, in one call, that is sent to other processes by name."""

from __future__ import annotations

import uuid
from contextlib import suppress
from multiprocessing.util import Finalize
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mshare.engines import by_name
from mshare.errors import Gone
from mshare.region import Region
from mshare.regions import attach, create
from mshare.sizes import PAGE_SIZE, round_up

_Array = np.ndarray[Any, np.dtype[Any]]
_AFTER_CHILDREN = -100
"""When multiprocessing has waited for the children of a process that ends, which may still attach;
it does this in forked workers too, which end without atexit."""


class SharedArray(_Array):
    """An array in a region. Pickled, it and its slices are a name; the copy attaches the region.

    What is computed from it is an array or a number as any other, in this process's own memory.
    """

    __slots__ = ("_region",)
    _region: Region | None

    def __array_finalize__(self, source: object) -> None:
        """Keep the region for what looks into it; a masked array between has it as its base."""
        while isinstance(source, np.ndarray) and not isinstance(source, SharedArray):
            source = source.base
        region = source._region if isinstance(source, SharedArray) else None
        # a transposed array gets its strides after this, so only its start is known
        if region and not 0 <= _start(self) - region.address <= region.size:
            region = None
        self._region = region

    def __array_wrap__(self, array: _Array, context: Any = None, return_scalar: bool = True) -> Any:
        """The result of a ufunc. NumPy 1 does not say whether to make a number of it."""
        result: Any = super().__array_wrap__(array, context)
        if result is self or result._region:
            return result
        return result[()] if return_scalar else result.view(np.ndarray)

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        if isinstance(found, SharedArray) and not found._region:
            return found.view(np.ndarray)
        return found

    @property
    def name(self) -> str | None:
        """The name of the region this looks into; None for an array in memory of its own."""
        region = self._inside()
        return region.name if region else None

    @property
    def engine(self) -> str | None:
        """The name of the engine that holds it; None for an array in memory of its own."""
        region = self._inside()
        return region.engine if region else None

    def _inside(self) -> Region | None:
        """The region that holds all of this array."""
        region = self._region
        if region is None or region.closed:
            return None
        low, high = _bounds(self)
        held = region.address <= low and high <= region.address + region.size
        return region if held else None

    def __reduce__(self) -> tuple[Any, ...]:
        region = self._inside()
        if region is None:
            return tuple(self.view(np.ndarray).__reduce__())
        offset = _start(self) - region.address
        where = region.name, not self.flags.writeable, region.engine
        return _look, (where, self.dtype, self.shape, self.strides, offset)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return self.__reduce__()


def _start(array: _Array) -> int:
    """The address of its first element."""
    return int(array.__array_interface__["data"][0])


def _bounds(array: _Array) -> tuple[int, int]:
    """The addresses of its first byte and after its last."""
    low = high = _start(array)
    if array.size:
        steps = [(n - 1) * step for n, step in zip(array.shape, array.strides, strict=True)]
        low += sum(step for step in steps if step < 0)
        high += sum(step for step in steps if step > 0) + array.itemsize
    return low, high


def _look(
    where: tuple[str, bool, str],
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    offset: int,
) -> SharedArray | Gone:
    """What was pickled, in this process."""
    name, readonly, engine = where
    try:
        region = attach(name, readonly=readonly, engine=engine)
    except OSError as error:
        return Gone(error)
    whole = memoryview(region)
    return _over(region, np.ndarray(shape, dtype, whole, offset, strides))


def _over(region: Region, array: _Array) -> SharedArray:
    shared = array.view(SharedArray)
    shared._region = region
    return shared


def plain(array: npt.ArrayLike) -> _Array:
    """The array as one that a region can hold. :raises TypeError: there is none."""
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError("a masked array is two: share its data and its mask")
    found = np.asarray(array)
    if found.dtype.hasobject:
        raise TypeError(f"a region can't hold elements of dtype '{found.dtype}'")
    return found


def share(
    array: npt.ArrayLike,
    name: str | None = None,
    *,
    mode: int | None = None,
    engine: str | None = None,
) -> SharedArray:
    """Copy an array into a new region, and return the array that is there.

    It can be written to, by every process it is sent to (as an argument of a pool, say): the
    pickle is a name. Set ``array.flags.writeable = False`` before to send it for reading only.

    :param name: for the region; it stays until :func:`mshare.unlink`. Without one the region gets
        a name of its own, which goes with the last array over it in this process, or with the
        process. Who has attached it by then keeps it.
    :param mode, engine: as for :func:`mshare.create`.
    :raises TypeError: the elements are Python objects, or some are masked.
    :raises FileExistsError: the name is taken.
    :raises OSError: as :func:`mshare.create`.
    """
    source = plain(array)
    chosen = f"share-{uuid.uuid4().hex}" if name is None else name
    size = max(round_up(source.nbytes, PAGE_SIZE), PAGE_SIZE)
    order: Literal["C", "F"] = "C"
    if source.flags.f_contiguous and not source.flags.c_contiguous:
        order = "F"

    def over(region: Region) -> _Array:
        return np.ndarray(source.shape, source.dtype, memoryview(region), order=order)

    region = create(
        chosen, size, mode, engine=engine, fill=lambda region: np.copyto(over(region), source)
    )
    if name is None:
        Finalize(region, _unlink, (chosen, region.engine), exitpriority=_AFTER_CHILDREN)
    return _over(region, over(region))


def _unlink(name: str, engine: str) -> None:
    """Remove a region's name. Finalize calls it in the process that made the region only."""
    with suppress(OSError):
        by_name(engine).unlink(name)
