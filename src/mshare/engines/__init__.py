"""The engines, best first, and the choice among them.

A name is one region on a machine, whichever engine holds it.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress

from mshare.engines.answers import Check, Stat
from mshare.engines.base import Engine
from mshare.engines.hugetlb import Hugetlb
from mshare.engines.msharefs import Msharefs
from mshare.engines.shm import Shm
from mshare.errors import RUN_OUT, invalid
from mshare.sizes import PAGE_SIZE

ENGINES: tuple[Engine, ...] = (Msharefs(), Hugetlb(), Shm())
_search = tuple(sorted(ENGINES, key=lambda engine: engine.scans))
"""Where a name is looked up: first the engine that had the last one."""

__all__ = ["ENGINES", "Check", "Engine", "Stat", "best", "by_name", "find", "holder", "open_region"]


def by_name(name: object) -> Engine:
    """The engine called ``name``. :raises InvalidValue: EINVAL when there is none."""
    for engine in ENGINES:
        if engine.name == name:
            return engine
    names = ", ".join(engine.name for engine in ENGINES)
    raise invalid(f"no such engine; there are {names}", name)


def asked(engine: str | None) -> Engine | None:
    """The engine asked for by argument or by ``MSHARE_ENGINE``; None leaves the choice free."""
    name = engine or os.environ.get("MSHARE_ENGINE")
    return by_name(name) if name else None


def best(
    engine: str | None, size: int = PAGE_SIZE, *, over_file: bool = False, locked: bool = False
) -> Engine:
    """The engine for a new region of ``size`` bytes: the one asked for, or the best that works.

    When none works, the last: its error says why.
    """
    chosen = asked(engine)
    if chosen:
        return chosen
    for candidate in ENGINES:
        able = (candidate.maps_files or not over_file) and (candidate.locks or not locked)
        if able and candidate.works(size):
            return candidate
    return ENGINES[-1]


def holder(name: str) -> Engine | None:
    """The engine that holds the region ``name``, or None.

    :raises OSError: nobody can tell, for want of descriptors or memory.
    """
    for engine in _search:
        try:
            engine.stat(name)
        except OSError as error:
            if error.errno in RUN_OUT:
                raise
        else:
            return engine
    return None


def find(name: str, engine: str | None = None) -> Engine:
    """The engine that holds the region ``name``.

    :raises FileNotFoundError: none does, or not the one asked for.
    """
    chosen = asked(engine)
    found = holder(name)
    if found is None or (chosen and found is not chosen):
        if chosen:
            with suppress(OSError):
                chosen.stat(name)
                return chosen
        raise missing(name, chosen)
    return found


def open_region(name: str, engine: str | None, *, readonly: bool) -> tuple[Engine, int]:
    """Open the region ``name``: its engine and a descriptor.

    :raises FileNotFoundError: no such region.
    :raises PermissionError: this user may not attach it so.
    """
    global _search
    chosen = asked(engine)
    for candidate in (chosen,) if chosen else _search:
        try:
            fd = candidate.open(name, readonly=readonly)
            if candidate is not _search[0]:
                _search = (candidate, *(each for each in _search if each is not candidate))
            return candidate, fd
        except FileNotFoundError as error:
            if error.filename == name:
                raise
        except PermissionError as error:
            if error.filename == name:
                raise
            message = f"no permission to {'read' if readonly else 'read and write'} the region"
            with suppress(OSError):
                message += f" (mode {candidate.stat(name).mode:04o})"
            raise PermissionError(errno.EACCES, message, name) from None
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise
    raise missing(name, chosen)


def missing(name: str, engine: Engine | None = None) -> FileNotFoundError:
    """The exception for a name nobody holds."""
    where = f" on engine '{engine.name}'" if engine else ""
    message = f"no such region{where}; mshare ls shows those there are"
    return FileNotFoundError(errno.ENOENT, message, name)
