"""Regions of files and of mappings: OPEN_FILE and OPEN_MAPPING, in the caller and in the worker."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from functools import partial

import pytest

from mshare.engines.msharefs import info
from tests.inject.inject import Caller, Where, Workers, check, standing
from tests.kernel import abi
from tests.kernel.abi import ANONYMOUS, PAGE, READ, RW, SHARED
from tests.kernel.test_dropin import open_file, open_mapping

SIZE = 4 << 20
BOTH = pytest.mark.parametrize("where", [Caller, Workers])
ROOM = (errno.ENOMEM, errno.ENOSPC, errno.ENFILE)


def seen(region: int) -> None:
    """The region has the content, and is let go."""
    window = abi.mmap(region, prot=READ)
    assert abi.get_safely(window + SIZE - PAGE, 6) == b"there!"
    abi.munmap(window)
    os.close(region)


def walked(where: type[Where], call: Callable[[], int]) -> None:
    """A region that cannot be made is not there, and holds nothing; the next one can."""
    before = standing()

    def same(code: int) -> None:
        assert standing() == before

    check(where, call, seen, same, ROOM)
    assert standing() == before


@BOTH
@pytest.mark.parametrize("access", [os.O_RDONLY, os.O_RDWR], ids=["reading", "writing"])
def test_file(where: type[Where], access: int, disk: str) -> None:
    """The region of a file, made anew each time."""
    file = os.open(f"{disk}/file", os.O_RDWR | os.O_CREAT)
    os.pwrite(file, b"there!" + bytes(PAGE - 6), SIZE - PAGE)
    walked(where, partial(open_file, file, access))
    os.close(file)


@BOTH
def test_mapping(where: type[Where]) -> None:
    """The region of memory that has no descriptor."""
    address = abi.mmap(-1, SIZE, RW, SHARED | ANONYMOUS)
    abi.put(address + SIZE - PAGE, b"there!")
    walked(where, partial(open_mapping, address))
    abi.munmap(address, SIZE)


def test_region_that_is_there(disk: str) -> None:
    """Who comes later finds the region, whatever fails, or is refused without a change to it."""
    file = os.open(f"{disk}/file", os.O_RDWR | os.O_CREAT)
    os.pwrite(file, b"there!" + bytes(PAGE - 6), SIZE - PAGE)
    first = open_file(file, os.O_RDWR)
    before = standing(first)

    def same(code: int) -> None:
        assert standing(first) == before

    def found(region: int) -> None:
        assert os.path.sameopenfile(region, first)
        seen(region)
        assert info(first).attachments == 0

    check(Caller, partial(open_file, file, os.O_RDWR), found, same, ROOM)
    os.close(first)
    os.close(file)
