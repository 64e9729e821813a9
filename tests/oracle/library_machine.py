"""The library on one engine and the model of it, in step."""

from __future__ import annotations

import os
import pickle
import signal
import tempfile
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule

import mshare
from mshare import engines
from tests.kernel import abi
from tests.oracle.library import (
    BAD_NAMES,
    BAD_SIZES,
    FILE,
    SIZES,
    Facts,
    LibraryMount,
    LibraryProcess,
)
from tests.oracle.machine import Comparing, seldom
from tests.oracle.memory import FILE_SIZE, PAGE, SLOT, Closed, Readonly
from tests.oracle.setting import NOBODY
from tests.oracle.worker import Pool, Worker, outcome

PROCESSES = 3
ROOM = 64 << 20
"""Bytes that regions may hold together, so that ENOSPC is not reached by chance."""

small = st.integers(0, 15)
process = st.integers(0, PROCESSES - 1)
name = st.sampled_from("abc")
size = st.sampled_from([*SIZES, PAGE, 2 << 20, 4 << 20])
byte = st.integers(1, 255)
at = st.sampled_from([0, 8, PAGE, 2 * PAGE, 3 * PAGE - 8, (2 << 20) - 8, 2 << 20, -8])
part = st.sampled_from([0, 0, 1, 2, 3, 512, 1023, -1, SLOT // PAGE])
length = st.sampled_from([1, 1, 2, 3, 512])


class LibraryWorker(Worker):
    """The calls, by the library."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.engine, _, self.prefix = self.folder.partition(":")
        self.regions: dict[int, mshare.Region] = {}
        self.views: dict[int, Any] = {}

    def _name(self, name: str) -> str:
        return name if name in BAD_NAMES else f"{self.prefix}{name}"

    def create(self, handle: int, name: str, size: int | str, mode: int) -> None:
        self.regions[handle] = mshare.create(self._name(name), size, mode, engine=self.engine)

    def attach_by_name(self, handle: int, name: str, readonly: bool) -> None:
        self.regions[handle] = mshare.attach(self._name(name), readonly)

    def attach_by_descriptor(self, handle: int, other: int, readonly: bool) -> None:
        self.regions[handle] = mshare.attach(self.regions[other].fileno(), readonly)

    def unpickle(self, handle: int, other: int) -> None:
        found = pickle.loads(pickle.dumps(self.regions[other]))
        _ = found.name  # the first use of one that is gone says why
        self.regions[handle] = found

    def close_region(self, handle: int) -> None:
        self.regions[handle].close()

    def forget(self, handle: int) -> None:
        del self.regions[handle]

    def attempt(self, call: str, args: tuple[Any, ...]) -> Any:
        """A ValueError without an errno is what a closed region answers."""
        try:
            return super().attempt(call, args)
        except OSError:
            raise
        except ValueError as error:
            raise Closed(str(error)) from None

    def look(self, view: int, handle: int) -> None:
        """Views of both kinds: memoryviews and arrays."""
        region = self.regions[handle]
        self.views[view] = region.asarray() if view % 2 else memoryview(region)

    def drop(self, view: int) -> None:
        del self.views[view]

    def facts(self, handle: int) -> tuple[int, int, bool, bool]:
        region = self.regions[handle]
        assert len(region) == region.size
        return region.size, 0, region.readonly, region.closed

    def read(self, view: int, offset: int = 0) -> bytes:  # type: ignore[override]
        return bytes(self.views[view][offset : offset + 8])

    def write(self, view: int, offset: int = 0, data: bytes = b"") -> None:
        target = self.views[view]
        readonly = not target.flags.writeable if view % 2 else target.readonly
        try:
            target[offset : offset + 8] = np.frombuffer(data, "uint8") if view % 2 else data
        except (TypeError, ValueError):
            assert readonly
            raise Readonly from None

    def end(self, view: int, offset: int, data: bytes) -> str | None:
        """The signal a child gets that does the same."""
        work: Callable[..., Any] = self.write if data else self.read
        number = abi.dies_by(*((work, view, offset, data) if data else (work, view, offset)))
        return None if number is None else signal.Signals(number).name

    def mappings(self) -> int:
        with open("/proc/self/maps") as file:
            return sum(self.prefix in line for line in file)

    def remove(self, name: str) -> None:
        mshare.unlink(self._name(name))

    def stat(self, name: str) -> tuple[int, int, int, int | None]:
        found = mshare.stat(self._name(name))
        assert found.engine == self.engine
        return found.size, found.mode, found.uid, found.resident

    def list(self) -> list[str]:
        found = [each.name for each in mshare.list(self.engine)]
        return [each.removeprefix(self.prefix) for each in found if each.startswith(self.prefix)]

    def map(
        self, handle: int, file: bool, offset: int, length: int | None, readonly: bool, at: int
    ) -> None:
        source = self.sources[FILE] if file else None
        self.regions[handle].map(source, offset, length, readonly, file_offset=at)

    def unmap_part(self, handle: int, offset: int, length: int) -> None:
        self.regions[handle].unmap(offset, length)

    def protect_part(self, handle: int, offset: int, length: int, readonly: bool) -> None:
        self.regions[handle].protect(offset, length, readonly=readonly)


class LibraryPool(Pool):
    """Processes that use the library. The folder is the engine and what names begin with."""

    def listdir(self) -> list[str]:
        """The names."""
        engine, _, prefix = self.folder.partition(":")
        found = [each.name for each in mshare.list(engine)]
        return [each.removeprefix(prefix) for each in found if each.startswith(prefix)]

    def begin(self) -> None:
        """No process, and the file as it is at first."""
        self.finish()
        os.ftruncate(self.sources[FILE], 0)
        os.ftruncate(self.sources[FILE], FILE_SIZE)

    def finish(self) -> None:
        """End every process, and remove every name."""
        for number in list(self.pids):
            self.kill(number)
        for name in self.listdir():
            mshare.unlink(self.folder.partition(":")[2] + name)


class Library:
    """One engine, and a file to map."""

    def __init__(self, engine: str) -> None:
        found = engines.by_name(engine)
        self.facts = Facts(engine, found.granule, found.reserves, engine == "msharefs")
        self.prefix = f"oracle-{os.getpid()}-"
        self.file = os.open(tempfile.gettempdir(), os.O_TMPFILE | os.O_RDWR)
        self.engine = LibraryPool(f"{engine}:{self.prefix}", {FILE: self.file}, LibraryWorker)

    def model(self, wrong: type[LibraryProcess] | None) -> LibraryMount:
        """The model of the engine."""
        return LibraryMount(self.facts, wrong)

    def close(self) -> None:
        """The file goes."""
        os.close(self.file)


def without_memory(found: tuple[int, int, int, int]) -> tuple[int, int, int, None]:
    """A region of which nobody knows how much is in memory."""
    return (*found[:3], None)


class LibraryMachine(Comparing):
    """create, attach, views, layout calls and names, in several processes of two users."""

    setting: ClassVar[Library]
    wrong: ClassVar[type[LibraryProcess] | None] = None

    def __init__(self) -> None:
        super().__init__()
        self.model = self.setting.model(self.wrong)
        for number in range(PROCESSES):
            self.both(None, "spawn", number, NOBODY if number == 2 else 0)

    def of(self, number: int) -> LibraryProcess:
        """A process of the model."""
        found = self.model.processes[number]
        assert isinstance(found, LibraryProcess)
        return found

    def new(self, kind: int = 0) -> int:
        """A handle nobody has: odd for arrays."""
        self.handles += 2
        return self.handles + kind

    def region(self, number: int, which: int) -> int | None:
        """An attachment of a process."""
        return self.pick(which, self.of(number).regions)

    def view(self, number: int, which: int) -> int | None:
        """A view of a process."""
        return self.pick(which, self.of(number).views)

    @initialize(size=size, mode=st.sampled_from([0o600, 0o644, 0o666]))
    def begin(self, size: int | str, mode: int) -> None:
        """One region in two processes, with a view each."""
        self.create(0, "a", size, mode)
        self.attach(1, "a", False)
        for number in range(2):
            self.look(number, 0, number)

    @rule(p=process, name=name, size=size, mode=st.sampled_from([0o600, 0o644, 0o666, 0o640]))
    def create(self, p: int, name: str, size: int | str, mode: int) -> None:
        """A region, if the name is free."""
        held = sum(region.size for region in self.model.alive())
        if not self.setting.facts.reserves or held < ROOM:
            self.both(p, "create", self.new(), name, size, mode)

    @rule(
        p=process, name=st.sampled_from(["c", "c", *BAD_NAMES]),
        size=st.sampled_from([PAGE, *BAD_SIZES]), mode=st.sampled_from([0o600, -1, 0o1000]),
    )  # fmt: skip
    def create_anything(self, p: int, name: str, size: int | str, mode: int) -> None:
        """A bad name, size or mode."""
        if (name, size, mode) != ("c", PAGE, 0o600):
            self.both(p, "create", self.new(), name, size, mode)

    @rule(p=process, name=name, readonly=st.booleans())
    def attach(self, p: int, name: str, readonly: bool) -> None:
        """By name."""
        self.both(p, "attach_by_name", self.new(), name, readonly)

    @rule(p=process, which=small, readonly=st.booleans())
    def attach_by_descriptor(self, p: int, which: int, readonly: bool) -> None:
        """By descriptor, also after the unlink."""
        if (other := self.region(p, which)) is not None:
            self.both(p, "attach_by_descriptor", self.new(), other, readonly)

    @rule(p=process, which=small)
    def unpickle(self, p: int, which: int) -> None:
        """By pickle."""
        if (other := self.region(p, which)) is not None:
            self.both(p, "unpickle", self.new(), other)

    @rule(p=process, name=st.sampled_from(sorted(BAD_NAMES)),
          call=st.sampled_from(["attach_by_name", "remove", "stat"]))  # fmt: skip
    def bad_name(self, p: int, name: str, call: str) -> None:
        """Refused by every call."""
        args = (self.new(), name, False) if call == "attach_by_name" else (name,)
        self.both(p, call, *args)

    @rule(p=process, which=small, call=st.sampled_from(["close_region", "forget"]))
    def close(self, p: int, which: int, call: str) -> None:
        """Its views stay."""
        if (handle := self.region(p, which)) is not None:
            self.both(p, call, handle)
            for position in range(len(self.of(p).views)):
                self.access(p, position, which * PAGE, b"")
            self.both(p, "mappings")

    @rule(p=process, which=small, kind=st.integers(0, 1))
    def look(self, p: int, which: int, kind: int) -> None:
        """A memoryview or an array."""
        if (handle := self.region(p, which)) is not None:
            self.both(p, "look", self.new(kind), handle)

    @rule(p=process, which=small)
    def drop(self, p: int, which: int) -> None:
        """A view dies."""
        if (view := self.view(p, which)) is not None:
            self.both(p, "drop", view)

    @rule(p=process, which=small)
    def facts(self, p: int, which: int) -> None:
        """Size, readonly, closed."""
        if (handle := self.region(p, which)) is not None:
            self.both(p, "facts", handle)

    @rule(p=process)
    def mappings(self, p: int) -> None:
        """What the process has mapped is what somebody looks at."""
        self.both(p, "mappings")

    @rule(p=process, which=small, at=at)
    def read(self, p: int, which: int, at: int) -> None:
        """Through a view."""
        self.access(p, which, at, b"")

    @rule(p=process, which=small, at=at, byte=byte)
    def write(self, p: int, which: int, at: int, byte: int) -> None:
        """Through a view."""
        self.access(p, which, at, bytes([byte] * 8))

    def access(self, p: int, which: int, at: int, data: bytes) -> None:
        """The same bytes, or the same signal in a child."""
        view = self.view(p, which)
        if view is None:
            return
        attachment = self.of(p).views[view]
        offset = at % attachment.size
        call, args = ("write", (view, offset, data)) if data else ("read", (view, offset))
        expected = outcome(getattr(self.of(p), call), *args)
        if expected[0] == "signal":
            self.later(p, "end", (view, offset, data), ("value", expected[1]))
        else:
            self.later(p, call, args, expected)

    @rule(p=process, which=small, byte=byte, at=at)
    def everywhere(self, p: int, which: int, byte: int, at: int) -> None:
        """What is written is read through every view of the region in every process."""
        view = self.view(p, which)
        if view is None:
            return
        self.access(p, which, at, bytes([byte] * 8))
        region, offset = self.of(p).views[view].window.region, at % self.of(p).views[view].size
        for number in self.model.processes:
            for position, each in enumerate(self.of(number).views.values()):
                if each.window.region is region and offset < each.size:
                    self.access(number, position, offset, b"")

    @rule(p=process, name=name)
    def unlink(self, p: int, name: str) -> None:
        """Its owner's, and root's."""
        self.both(p, "remove", name)

    @rule(p=process, name=name)
    def stat(self, p: int, name: str) -> None:
        """Size, mode, owner; memory where it is exact."""
        expected = outcome(self.of(p).stat, name)
        exact = expected[0] != "value" or expected[1][3] is not None
        self.later(p, "stat", (name,), expected, None if exact else without_memory)

    @rule(p=process)
    def list(self, p: int) -> None:
        """All names."""
        self.both(p, "list")

    @rule(
        p=process, which=small, file=st.booleans(), offset=part, readonly=st.booleans(),
        length=st.sampled_from([1, 2, 3, 512, None]), at=st.sampled_from([0, 0, 1, 7, 8, -1]),
        shift=st.sampled_from([0] * 9 + [1]),
    )  # fmt: skip
    def map(
        self, p: int, which: int, file: bool, offset: int, length: int | None, readonly: bool,
        at: int, shift: int,
    ) -> None:  # fmt: skip
        """A file or fresh memory into a region."""
        if (handle := self.region(p, which)) is not None:
            size = length and length * PAGE
            start, place = offset * PAGE + shift, at * PAGE if file else 0
            if place >= 0:
                self.both(p, "map", handle, file, start, size, readonly, place)

    @rule(p=process, which=small, offset=part, length=length, shift=st.sampled_from([0] * 9 + [1]))
    def unmap(self, p: int, which: int, offset: int, length: int, shift: int) -> None:
        """A hole."""
        if (handle := self.region(p, which)) is not None:
            self.both(p, "unmap_part", handle, offset * PAGE + shift, length * PAGE)

    @rule(p=process, which=small, offset=part, length=length, readonly=st.booleans())
    def protect(self, p: int, which: int, offset: int, length: int, readonly: bool) -> None:
        """Forbid or allow writing."""
        if (handle := self.region(p, which)) is not None:
            self.both(p, "protect_part", handle, offset * PAGE, length * PAGE, readonly)

    @rule(p=process, q=process, now=seldom)
    def fork(self, p: int, q: int, now: bool) -> None:
        """A child has its parent's regions and views."""
        if p != q and now:
            self.both(None, "kill", q)
            self.both(None, "fork", p, q)

    @rule(p=process, now=seldom)
    def restart(self, p: int, now: bool) -> None:
        """A process is killed, and takes nothing with it."""
        if not now:
            return
        user = self.of(p).user
        self.both(None, "kill", p)
        self.both(None, "spawn", p, user)
