"""Calls that change the layout, with failures in the caller and in the kernel worker."""

from __future__ import annotations

import errno
import fcntl
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from mshare.engines.msharefs import info
from tests.inject.inject import Caller, Where, Workers, answer, check, standing
from tests.inject.inject import place as placed
from tests.kernel import abi
from tests.kernel.abi import PAGE, READ, RW, SLOT

MIB = 1 << 20
SIZE = 2 * MIB
"""What a test changes, from AT on: the middle of a mapping."""
AT = 4 * MIB
FIXED, LOCKED = abi.SHARED | abi.FIXED, 0x2000
BOTH = pytest.mark.parametrize("where", [Caller, Workers])
OLD, NEW, ZERO = b"before", b"after.", bytes(6)


@dataclass
class Place:
    """A region, with a window of either kind, and marks in and around the range."""

    fd: int
    rw: int
    ro: int

    def mark(self) -> None:
        for at in (0, AT - PAGE, AT, AT + SIZE - PAGE, AT + SIZE):
            abi.put(self.rw + at, OLD)

    def around(self) -> None:
        """What lies around the range is as it was, to read and to write."""
        for at in (0, AT - PAGE, AT + SIZE):
            for window in (self.rw, self.ro):
                assert abi.get_safely(window + at, 6) == OLD
            abi.put_safely(self.rw + at, OLD)

    def within(self) -> set[object]:
        """What both windows show in the range."""
        return {
            answer(abi.get_safely, window + at, 6)
            for at in (AT, AT + SIZE - PAGE)
            for window in (self.rw, self.ro)
        }

    def rights(self) -> set[object]:
        """What a store in the range through the writable window gives."""
        found = set()
        for at in (AT, AT + SIZE - PAGE):
            content = answer(abi.get_safely, self.rw + at, 6)
            store = content if isinstance(content, bytes) else OLD
            found.add(answer(abi.put_safely, self.rw + at, store))
        return found


@pytest.fixture
def place(path: str) -> Iterator[Place]:
    """A region of anonymous memory, marked."""
    fd = abi.make(path)
    made = Place(fd, abi.mmap(fd), abi.mmap(fd, prot=READ))
    made.mark()
    yield made
    for window in (made.rw, made.ro):
        abi.munmap(window)
    now = info(fd)
    assert (now.attachments, now.grafts) == (0, now.ungrafts)
    os.close(fd)


def file_of(folder: str, content: bytes = NEW) -> int:
    """A file of SIZE."""
    fd = os.open(f"{folder}/file", os.O_RDWR | os.O_CREAT, 0o600)
    for at in (0, SIZE - PAGE):
        os.pwrite(fd, content, at)
    os.ftruncate(fd, SIZE)
    return fd


def replaced(place: Place, where: type[Where], call: Callable[[], None], new: bytes) -> None:
    """Walk a call that puts ``new`` into the range, in place of marked memory."""
    before = standing(place.fd)
    changed = info(place.fd).layout_changes

    def undo(result: object) -> None:
        nonlocal changed
        assert place.within() == {new}
        assert standing(place.fd) == before
        place.around()
        abi.create_mapping(place.fd, AT, SIZE)
        place.mark()
        changed = info(place.fd).layout_changes

    def same(code: int) -> None:
        # refused outside the region: as it was. Later: as it was, or a hole in both views
        now = place.within()
        hole = now == {"EFAULT"} and info(place.fd).layout_changes > changed
        assert now == {OLD} or hole
        assert info(place.fd).mapped_bytes == SLOT - SIZE * hole
        assert hole or place.rights() == {None}
        place.around()

    check(where, call, undo, same, least=int(where is Workers))


@BOTH
def test_anonymous_over_content(place: Place, where: type[Where]) -> None:
    """New memory in place of old: done, or as it was, or a hole."""
    replaced(place, where, lambda: abi.create_mapping(place.fd, AT, SIZE), ZERO)


@BOTH
def test_file_over_content(place: Place, where: type[Where], tmpfs: str) -> None:
    """A file of tmpfs; when it is gone from the region nothing holds it."""
    file = file_of(tmpfs)
    replaced(
        place, where, lambda: abi.create_mapping(place.fd, AT, SIZE, flags=FIXED, fd=file), NEW
    )
    os.close(file)


@BOTH
def test_file_of_a_disk_over_content(place: Place, where: type[Where], disk: str) -> None:
    """A file of ext4, for reading."""
    file = file_of(disk)
    os.fsync(file)
    replaced(
        place,
        where,
        lambda: abi.create_mapping(place.fd, AT, SIZE, READ, FIXED, file),
        NEW,
    )
    os.close(file)


@BOTH
@pytest.mark.parametrize("kind", ["anonymous", "file"])
def test_into_a_hole(path: str, where: type[Where], kind: str, tmpfs: str) -> None:
    """The first content of a region: there, or the hole that it was."""
    fd, file = abi.make(path, fill=False), file_of(tmpfs)
    window = abi.mmap(fd)
    before = standing(fd)
    flags = FIXED | (abi.ANONYMOUS if kind == "anonymous" else 0)

    def undo(result: object) -> None:
        assert abi.get_safely(window + AT, 6) == (ZERO if kind == "anonymous" else NEW)
        abi.unmap(fd, AT, SIZE)
        assert standing(fd) == before

    def same(code: int) -> None:
        assert standing(fd) == before
        assert answer(abi.get_safely, window + AT, 6) == "EFAULT"

    check(
        where,
        lambda: abi.create_mapping(fd, AT, SIZE, flags=flags, fd=file),
        undo,
        same,
    )
    abi.munmap(window)
    os.close(file)
    os.close(fd)


@BOTH
def test_locked(path: str, where: type[Where]) -> None:
    """Memory that never moves: all of it is there and counted, or none."""
    fd, size = abi.make(path, fill=False), 4 * PAGE
    before = standing(fd)

    def undo(result: object) -> None:
        assert info(fd).locked_bytes == size
        abi.unmap(fd, AT, size)
        same(0)

    def same(code: int) -> None:
        assert info(fd).locked_bytes == 0
        assert standing(fd) == before

    flags = FIXED | abi.ANONYMOUS | LOCKED
    check(where, lambda: abi.create_mapping(fd, AT, size, flags=flags), undo, same)
    os.close(fd)


def test_trial_leaves_no_mapping(path: str) -> None:
    """Before a file replaces anything it is mapped elsewhere; that mapping goes, whatever fails.

    A memfd can be sealed against writing only while nobody maps it so.
    """
    fd = abi.make(path, fill=False)
    held = [os.memfd_create("content", os.MFD_ALLOW_SEALING)]

    def anew() -> None:
        fcntl.fcntl(held[0], fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        os.close(held[0])
        held[0] = os.memfd_create("content", os.MFD_ALLOW_SEALING)

    def undo(result: object) -> None:
        abi.unmap(fd, AT, SIZE)
        anew()

    check(
        Workers,
        lambda: abi.create_mapping(fd, AT, SIZE, flags=FIXED, fd=held[0]),
        undo,
        lambda code: anew(),
    )
    os.close(held[0])
    os.close(fd)


@BOTH
def test_unmap(place: Place, where: type[Where]) -> None:
    """A hole, or as it was, or a hole for writers and the next call takes the rest."""

    def undo(result: object) -> None:
        assert place.within() == {"EFAULT"}
        assert info(place.fd).mapped_bytes == SLOT - SIZE
        place.around()
        abi.create_mapping(place.fd, AT, SIZE)
        place.mark()

    def same(code: int) -> None:
        assert place.within() in ({OLD}, {OLD, "EFAULT"})
        place.around()

    call = functools.partial(abi.unmap, place.fd, AT, SIZE)
    check(where, call, undo, same, least=int(where is Workers))


@pytest.mark.parametrize("to", [READ, RW], ids=["less", "more"])
def test_protect(place: Place, to: int) -> None:
    """A part of a mapping is mapped anew: rights old or new, content there.

    The caller allocates nothing for it, and for a mapping as a whole the worker neither.
    """
    back = RW if to == READ else READ
    allowed = {READ: {"EFAULT"}, RW: {None}}

    def whole() -> None:
        """One mapping, with the rights from before: what is changed is a part of it."""
        abi.create_mapping(place.fd, 0, SLOT)
        place.mark()
        abi.protect(place.fd, 0, SLOT, back)

    def content() -> None:
        assert place.within() == {OLD}
        assert info(place.fd).mapped_bytes == SLOT
        for mark in (0, AT - PAGE, AT + SIZE):
            assert abi.get_safely(place.rw + mark, 6) == OLD
            assert {answer(abi.put_safely, place.rw + mark, OLD)} == allowed[back]

    def undo(result: object) -> None:
        content()
        assert place.rights() == allowed[to]
        whole()

    def same(code: int) -> None:
        content()
        assert place.rights() == allowed[back]

    whole()
    check(Workers, lambda: abi.protect(place.fd, AT, SIZE, to), undo, same)


@pytest.mark.parametrize("cache", ["vm_area_struct", "maple_node", None])
@pytest.mark.parametrize("size", [SIZE, SLOT], ids=["part", "whole"])
def test_nothing_works_for_a_while(place: Place, cache: str | None, size: int) -> None:
    """Not one allocation but all of a kind fail, or of any: what is left is as the ABI says."""
    at = AT if size == SIZE else 0
    calls: dict[str, tuple[Callable[[], None], list[set[object]]]] = {
        "map": (lambda: abi.create_mapping(place.fd, at, size), [{OLD}, {"EFAULT"}]),
        "unmap": (lambda: abi.unmap(place.fd, at, size), [{OLD}, {OLD, "EFAULT"}]),
        "protect": (lambda: abi.protect(place.fd, at, size, READ), [{OLD}]),
    }
    done: dict[str, set[object]] = {"map": {ZERO}, "unmap": {"EFAULT"}, "protect": {OLD}}
    refused = 0
    for name, (call, left) in calls.items():
        with placed(Workers) as workers:
            assert isinstance(workers, Workers)
            with workers.starved(cache):
                code = answer(call)
        refused += code == "ENOMEM"
        assert (code, place.within()) == (None, done[name]) or (
            code == "ENOMEM" and place.within() in left
        )
        if size == SIZE:
            place.around()
        call()
        assert place.within() == done[name] or (name == "protect" and code == "ENOMEM")
        abi.create_mapping(place.fd, at, size)
        place.mark()
    assert refused or (cache, size) == ("vm_area_struct", SLOT)


def test_sync(path: str, disk: str) -> None:
    """fsync of a region: the file has what was stored, or the caller is told."""
    fd, file = abi.make(path, fill=False), file_of(disk)
    abi.create_mapping(fd, AT, SIZE, flags=FIXED, fd=file)
    window = abi.mmap(fd)

    def sync() -> None:
        os.fsync(fd)

    def undo(result: object) -> None:
        abi.put(window + AT, NEW)

    check(Caller, sync, undo, lambda code: None, (errno.ENOMEM, errno.EIO))
    abi.munmap(window)
    os.close(file)
    os.close(fd)
