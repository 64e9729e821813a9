"""The machine that makes the same calls in the model and on a kernel, and compares.

Hypothesis chooses the calls. Arguments are small numbers that mean something only together with
the state (the third descriptor this process has), so that most calls do something and a failing
run shrinks. Each comparison is a step.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, ClassVar, TypeVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from tests.oracle import model
from tests.oracle.memory import (
    ADVICE,
    ANONYMOUS,
    EXEC,
    FILE_SIZE,
    FIXED,
    LOCKED,
    MAX_SIZE,
    NOREPLACE,
    NORESERVE,
    PAGE,
    PRIVATE,
    READ,
    RW,
    SHARED,
    SLOT,
    TMPFILE,
    WRITE,
    Mapping,
    Region,
    Window,
)
from tests.oracle.model import Mount
from tests.oracle.setting import NOBODY, Setting
from tests.oracle.worker import NOMINAL, Call, Outcome, outcome

T = TypeVar("T")
ELSEWHERE, ARENA, WISHES = 8 << 40, 16 << 40, 24 << 40
"""Where other mappings and windows with a chosen address go, in every process."""
MOST_SLOTS = 4
"""Of a window, so that there is room for it."""
MOST_LOCKED = 1024
"""Pages that are locked at once, so that memory is not short."""
MAY_LOCK = 2048
"""Pages that a user may lock, at first."""
PROCESSES = 3
BATCH = 100
"""Calls the engine makes at a time."""
BAD = -1
"""A handle that nothing has."""

small = st.integers(0, 15)
process = st.integers(0, PROCESSES - 1)
name = st.sampled_from("abc")
mode = st.sampled_from([0o600, 0o644, 0o666, 0o000, 0o640])
page = st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7, 511, 512, 513, -1, SLOT // PAGE, SLOT // PAGE - 1])
length = st.sampled_from([1, 2, 3, 8, 512, 1024, SLOT // PAGE, SLOT // PAGE + 1, 2 * SLOT // PAGE])
near, few = st.sampled_from([0, 1, 2, 3, 8, 511, 512, 513]), st.sampled_from([1, 1, 2, 8, 512])
byte = st.integers(1, 255)
slot = st.integers(0, 7)
one_access = st.tuples(
    process, small, page, st.sampled_from([0, 8, PAGE - 8]),
    st.sampled_from(["direct", "call", "call"]), st.sampled_from([0, 0, *range(1, 256)]),
)  # fmt: skip
"""Process, window, page, byte in it, how, and what to store or 0 to load."""
seldom = st.integers(0, 3).map(lambda number: not number)
advice = st.sampled_from(sorted(ADVICE))
source = st.sampled_from(["memfd", "memfd", "memfd-ro", "tmpfs", "disk", "disk-ro", "sealed"])
any_source = st.sampled_from(
    ["memfd", "memfd-ro", "memfd-wo", "disk", "disk-wo", "sealed", "pipe", "device", "folder",
     "huge", "info", "closed"]
)  # fmt: skip
other_memory = st.sampled_from(["anonymous", "segment"])
odd = st.sampled_from([0, 1, 100, PAGE, SLOT, SLOT - PAGE, 4 * SLOT, 1 << 62, (1 << 64) - PAGE])
size_of_region = st.sampled_from(
    [SLOT, 2 * SLOT, 2 * SLOT, 4 * SLOT, 0, PAGE, SLOT + PAGE, -SLOT, MAX_SIZE, MAX_SIZE + SLOT,
     1 << 62]
)  # fmt: skip
access_to_file = st.sampled_from([os.O_RDONLY] * 3 + [os.O_RDWR] * 3 + [os.O_WRONLY])
opening = st.sampled_from(
    [os.O_RDWR | os.O_CREAT, os.O_RDWR | os.O_CREAT, os.O_RDWR | os.O_CREAT | os.O_EXCL,
     os.O_RDONLY | os.O_CREAT, os.O_RDWR, os.O_RDWR, os.O_RDONLY, os.O_RDONLY, os.O_WRONLY,
     os.O_RDWR | os.O_TRUNC, os.O_PATH]
)  # fmt: skip


def filled(region: Region) -> bool:
    """Whether there is content whose layout can be changed."""
    return bool(region.layout.extents) and not region.of


def without_faults(found: tuple[Any, int]) -> tuple[Any, int]:
    """An access of which nobody knows how many faults it takes."""
    return found[0], 0


def only(exact: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """The fields that are exact."""
    return {key: found[key] for key in exact}


class Comparing(RuleBasedStateMachine):
    """Makes each call in the model and on the engine, and compares.

    The model is asked at once, the engine in batches: nothing the machine does depends on it.
    """

    steps: ClassVar[int] = 0
    """Comparisons so far, of all machines."""
    setting: ClassVar[Any]
    """What the calls are made on."""
    model: Mount

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.expected: list[tuple[Outcome, Callable[[Any], Any] | None]] = []
        self.handles = 0
        self.later(None, "begin", (), ("value", None))

    def both(self, number: int | None, call: str, *args: Any) -> Outcome:
        """One call on both sides; what the model says."""
        side = self.model if number is None else self.model.processes[number]
        expected = outcome(getattr(side, call), *args)
        self.later(number, call, args, expected)
        return expected

    def later(
        self,
        number: int | None,
        call: str,
        args: tuple[Any, ...],
        expected: Outcome,
        see: Callable[[Any], Any] | None = None,
    ) -> None:
        """A call that the engine will make, and what has to come of it: ``see`` of its value."""
        self.calls.append((number, call, args))
        self.expected.append((expected, see))
        if len(self.calls) >= BATCH:
            self.compare()

    def compare(self) -> None:
        """Have the engine make the calls, and compare each."""
        calls, self.calls = self.calls, []
        wanted, self.expected = self.expected, []
        answers = self.setting.engine.run(calls)
        for (number, call, args), (expected, see), actual in zip(
            calls, wanted, answers, strict=False
        ):
            Comparing.steps += 1
            seen = ("value", see(actual[1])) if see and actual[0] == "value" else actual
            who = "" if number is None else f" by {number}"
            assert expected == seen, (
                f"{call}{args}{who}: the model says {expected}, the engine {seen}"
            )
        assert len(answers) == len(calls)

    def teardown(self) -> None:
        """What is left to compare."""
        try:
            self.compare()
        finally:
            self.setting.engine.run([(None, "finish", ())])

    def pick(self, number: int, things: Iterable[T]) -> T | None:
        """One of what there is."""
        found = list(things)
        return found[number % len(found)] if found else None


class Machine(Comparing):
    """The raw ABI: files, ioctls, windows, memory, in several processes of two users."""

    setting: ClassVar[Setting]
    """What the calls are made on."""
    wrong: ClassVar[type[model.Process] | None] = None
    """Another model of a process, to see that it is found out."""

    def __init__(self) -> None:
        super().__init__()
        self.model = self.setting.model(self.wrong)
        for number in range(PROCESSES):
            self.spawn(number, NOBODY if number == 2 else 0)

    def spawn(self, number: int, user: int) -> None:
        """A process, with a limit that is known."""
        self.both(None, "spawn", number, user)
        self.both(number, "limit_locked", MAY_LOCK * PAGE)

    def teardown(self) -> None:
        """Without processes and names nothing is left of any region."""
        self.later(None, "finish", (), ("value", None))
        self.later(None, "statfs", (), ("value", 0))
        super().teardown()

    def access(
        self, number: int, window: Window | Mapping, how: str, call: str, *args: Any
    ) -> Outcome:
        """Load or store: the same bytes or the same signal; and no fault where none can be."""
        process = self.model.processes[number]
        direct = how == "direct"
        if direct and process.end_of(args[0], call == "store"):
            return self.both(number, "end_of", args[0], call == "store")
        expected = outcome(getattr(process, call), *args)
        see: Callable[[Any], Any] | None = None
        wanted: Outcome = "error", "EFAULT"
        watch = BAD
        if expected[0] == "value":
            found, may_fault = expected[1] if call == "load" else (None, expected[1])
            wanted = "value", (found, 0)
            if may_fault:
                see = without_faults
            elif isinstance(window, Window):
                watch = self.watch(process, window)
        self.later(number, "access", (direct, watch, *args), wanted, see)
        return expected

    @staticmethod
    def watch(process: model.Process, window: Window) -> int:
        """A descriptor to ask for the count of faults with, if there is one."""
        for handle, file in process.descriptors.items():
            if file.region is window.region and not file.path_only:
                return handle
        return BAD

    # Choosing.

    def descriptor(
        self, number: int, which: int, fits: Callable[[Region], object] | None = None
    ) -> tuple[int, int]:
        """A process that has a descriptor, this one if it has, and a descriptor.

        One of a region that fits, if there is one; and now and then none.
        """
        if which == 15:
            return number, BAD
        for wanted in (fits, None):
            for each in (number, *range(PROCESSES)):
                files = self.model.processes[each].descriptors
                good = [
                    handle
                    for handle, file in files.items()
                    if not wanted or (file.region and wanted(file.region))
                ]
                if (found := self.pick(which, good)) is not None:
                    return each, found
        return number, BAD

    def window(self, number: int, which: int) -> tuple[int, Window | None]:
        """A process that has a window, this one if it has, and a window."""
        for each in (number, *range(PROCESSES)):
            if found := self.pick(which, self.model.processes[each].windows):
                return each, found
        return number, None

    def other(self, number: int, which: int) -> tuple[int, Mapping | None]:
        """The same for other memory."""
        for each in (number, *range(PROCESSES)):
            if found := self.pick(which, self.model.processes[each].others):
                return each, found
        return number, None

    def control(self, number: int, which: int) -> int:
        """A descriptor of ``mshare_info``, and now and then another or none."""
        descriptors = self.model.processes[number].descriptors
        if which >= 14:
            return self.pick(which, descriptors) or BAD
        for handle, file in descriptors.items():
            if not file.region:
                return handle
        self.both(number, "open", handle := self.new(), "mshare_info", os.O_RDONLY, 0)
        return handle

    def address(self, window: Window | Mapping, number: int) -> int:
        """The address of a page of a window."""
        return window.address + (number * PAGE) % window.size

    def new(self) -> int:
        """A handle nobody has."""
        self.handles += 1
        return self.handles

    def probe(self, region: Region | None, start: int, end: int) -> None:
        """Load and store where a range begins and ends and next to it, by two windows."""
        windows = [
            (number, each)
            for number, process in self.model.processes.items()
            for each in process.windows
            if each.region is region
        ]
        for number, window in windows[:: max(1, len(windows) - 1)][:2]:
            for position in (start, end - PAGE, end, start - PAGE):
                address = position - window.offset + window.address
                if window.address <= address < window.end:
                    self.access(number, window, "call", "load", address, 8)
                    data = bytes([self.handles % 255 + 1] * 8)
                    self.access(number, window, "call", "store", address, data)

    def change(self, p: int, call: str, handle: int, at: int, size: int, *args: Any) -> None:
        """A layout change, and a look at what it did."""
        if self.both(p, call, handle, at, size, *args)[0] == "value":
            region = self.model.processes[p].descriptors[handle].region
            self.probe(region, at, at + size)

    # Rules.

    @initialize(slots=st.integers(1, 2), prot=st.sampled_from([READ, RW]), locked=seldom)
    def begin(self, slots: int, prot: int, locked: bool) -> None:
        """One region with content, in two processes."""
        handle = self.new()
        self.both(0, "open", handle, "a", os.O_RDWR | os.O_CREAT, 0o644)
        self.both(0, "ftruncate", handle, slots * SLOT)
        flags = SHARED | FIXED | ANONYMOUS | (LOCKED if locked else 0)
        self.both(0, "create_mapping", handle, 0, 512 * PAGE, 0, RW, flags, "closed")
        self.both(None, "send", 0, handle, 1)
        self.attach(0, handle, slots * SLOT, RW, SHARED | FIXED, ARENA, 0)
        self.attach(1, handle, slots * SLOT, prot, SHARED, 0, 0)

    @rule(
        p=process, slots=st.integers(1, 2), mode=mode, at=page, size=length, link=small, now=seldom
    )  # fmt: skip
    def make(self, p: int, slots: int, mode: int, at: int, size: int, link: int, now: bool) -> None:
        """A region with content, made without a name, and perhaps given one."""
        if not now:
            return
        handle = self.new()
        self.both(p, "open", handle, TMPFILE, os.O_RDWR, mode)
        self.both(p, "fallocate", handle, 0, 0, slots * SLOT)
        start = self.place(p, handle, at)
        flags = SHARED | FIXED | ANONYMOUS
        self.both(p, "create_mapping", handle, start, size * PAGE, 0, RW, flags, "closed")
        if link < 3 and p != 2:
            self.both(p, "link", handle, "abc"[link])
        self.attach(p, handle, slots * SLOT, RW, SHARED, 0, 0)

    @rule(p=process, which=small, prot=st.sampled_from([RW, RW, READ]))
    def attach_whole(self, p: int, which: int, prot: int) -> None:
        """A window of all that a region has."""
        p, handle = self.descriptor(p, which)
        file = self.model.processes[p].descriptors.get(handle)
        if file and file.region and file.region.size and not file.path_only:
            size = min(file.region.size, MOST_SLOTS * SLOT)
            self.attach(p, handle, size, prot, SHARED, 0, 0)

    @rule(p=process, name=name, flags=opening, mode=mode)
    def open(self, p: int, name: str, flags: int, mode: int) -> None:
        """A region by name, which may not be there, and a window of it."""
        handle = self.new()
        self.both(p, "open", handle, name, flags, mode)
        self.attach(p, handle, SLOT, RW if mode & 4 else READ, SHARED, 0, 0)

    @rule(p=process, mode=mode)
    def open_without_name(self, p: int, mode: int) -> None:
        """O_TMPFILE."""
        self.both(p, "open", self.new(), TMPFILE, os.O_RDWR, mode)

    @rule(p=process, flags=st.sampled_from([os.O_RDONLY, os.O_RDWR, os.O_PATH]))
    def open_control(self, p: int, flags: int) -> None:
        """The file that OPEN_FILE and OPEN_MAPPING are made on, and all else is refused on."""
        self.both(p, "open", self.new(), "mshare_info", flags, 0)

    @rule(
        p=process, fd=small,
        flags=st.sampled_from([os.O_RDWR, os.O_RDWR, os.O_RDONLY, os.O_WRONLY, os.O_PATH]),
    )  # fmt: skip
    def open_again(self, p: int, fd: int, flags: int) -> None:
        """With other rights than the descriptor has."""
        p, handle = self.descriptor(p, fd)
        self.both(p, "open_again", self.new(), handle, flags)

    @rule(p=process, fd=small)
    def close(self, p: int, fd: int) -> None:
        """One descriptor less."""
        p, handle = self.descriptor(p, fd)
        self.both(p, "close", handle)

    @rule(p=process, fd=small, size=size_of_region)
    def ftruncate(self, p: int, fd: int, size: int) -> None:
        """A size, or none."""
        p, handle = self.descriptor(p, fd)
        self.both(p, "ftruncate", handle, size)

    @rule(p=process, fd=small, mode=st.sampled_from([0, 0, 0, 1, 3]), at=odd, size=size_of_region)
    def fallocate(self, p: int, fd: int, mode: int, at: int, size: int) -> None:
        """The same by fallocate, mostly from 0."""
        at = at if at in (PAGE, SLOT) else 0
        p, handle = self.descriptor(p, fd)
        self.both(p, "fallocate", handle, mode, at, size)

    @rule(p=process, fd=small, what=st.sampled_from(["read", "write"]))
    def read_or_write(self, p: int, fd: int, what: str) -> None:
        """Which a region does not have."""
        p, handle = self.descriptor(p, fd)
        self.both(p, what, handle)

    @rule(p=process, fd=small)
    def fstat(self, p: int, fd: int) -> None:
        """Size, mode, names, owner."""
        p, handle = self.descriptor(p, fd)
        self.both(p, "fstat", handle)

    @rule(p=process, fd=small, mode=mode)
    def fchmod(self, p: int, fd: int, mode: int) -> None:
        """By its owner, or not."""
        p, handle = self.descriptor(p, fd)
        self.both(p, "fchmod", handle, mode)

    @rule(p=process, fd=small, name=name)
    def link(self, p: int, fd: int, name: str) -> None:
        """A name for a descriptor."""
        p, handle = self.descriptor(p, fd)
        self.link_as_root(p, handle, name)

    def link_as_root(self, p: int, handle: int, name: str) -> None:
        """By root: of others fs.protected_hardlinks asks more than the file system does."""
        if not self.model.processes[p].user:
            self.both(p, "link", handle, name)

    @rule(p=process, name=name)
    def unlink(self, p: int, name: str) -> None:
        """One name less."""
        self.both(p, "unlink", name)

    @rule(p=process, old=name, new=name)
    def rename(self, p: int, old: str, new: str) -> None:
        """Over a name that may be taken."""
        self.both(p, "rename", old, new)

    @rule(
        p=process, fd=small, at=page, size=length,
        prot=st.sampled_from([RW, RW, READ]), extra=st.sampled_from([0, NORESERVE]),
    )  # fmt: skip
    def map_memory(self, p: int, fd: int, at: int, size: int, prot: int, extra: int) -> None:
        """Anonymous memory in place of what is there."""
        self.create(p, fd, at, size, 0, prot, SHARED | FIXED | ANONYMOUS | extra, "closed")

    @rule(
        p=process, fd=small, at=page, size=length, offset=st.integers(0, 9),
        prot=st.sampled_from([RW, RW, READ]), source=source,
    )  # fmt: skip
    def map_file(
        self, p: int, fd: int, at: int, size: int, offset: int, prot: int, source: str
    ) -> None:
        """A file in place of what is there, longer or shorter than the range."""
        self.create(p, fd, at, size, offset * PAGE, prot, SHARED | FIXED, source)

    def create(
        self, p: int, fd: int, at: int, size: int, offset: int, prot: int, flags: int, source: str
    ) -> None:
        """CREATE_MAPPING of pages, counted from the region's end if negative."""
        p, handle = self.descriptor(p, fd)
        start, size = self.place(p, handle, at), size * PAGE
        self.change(p, "create_mapping", handle, start, size, offset, prot, flags, source)

    def place(self, p: int, handle: int, at: int) -> int:
        """Where a page is in a region; negative counts from its end."""
        file = self.model.processes[p].descriptors.get(handle)
        last = file.region.size - PAGE if file and file.region else 0
        return at * PAGE if at >= 0 else max(last, 0)

    @rule(
        p=process, fd=small, at=odd, size=odd, offset=odd,
        prot=st.sampled_from([READ, RW, RW, 0, WRITE, EXEC | READ, 8]),
        flags=st.sampled_from([
            SHARED | FIXED, SHARED | FIXED, SHARED | FIXED | ANONYMOUS, SHARED | ANONYMOUS,
            PRIVATE | FIXED | ANONYMOUS, FIXED | ANONYMOUS, SHARED | FIXED | 0x40,
            SHARED | FIXED | LOCKED, SHARED | FIXED | ANONYMOUS | LOCKED,
        ]),
        source=any_source, valid=st.integers(0, 3),
    )  # fmt: skip
    def map_anything(
        self, p: int, fd: int, at: int, size: int, offset: int, prot: int, flags: int,
        source: str, valid: int,
    ) -> None:  # fmt: skip
        """Arguments that are mostly wrong, also all but one right."""
        if valid != 0:
            at, size = 0, 4 * PAGE
        if valid > 1:
            offset = 0
        if valid > 2:
            prot = prot if prot in (READ, RW) else READ
        if flags & LOCKED and size <= MOST_SLOTS * SLOT:
            size = min(size, MOST_LOCKED * PAGE)
        p, handle = self.descriptor(p, fd)
        self.change(p, "create_mapping", handle, at, size, offset, prot, flags, source)

    @rule(
        p=st.sampled_from([0, 1, 2, 2]), fd=small, at=near, size=few, offset=st.integers(0, 4),
        prot=st.sampled_from([RW, RW, READ]), source=st.one_of(source, st.just("memory")),
        limit=st.sampled_from([0, 1, 8, MAY_LOCK, MAY_LOCK]), alone=seldom,
    )  # fmt: skip
    def lock(
        self, p: int, fd: int, at: int, size: int, offset: int, prot: int, source: str, limit: int,
        alone: bool,
    ) -> None:  # fmt: skip
        """Locked content, mostly in a region that is locked or empty, with windows or without."""
        if fd < 12:
            handle = self.lockable(p, fd, fill=False)
        else:
            p, handle = self.descriptor(p, fd)
        if alone:
            self.leave(p, handle)
        self.both(p, "limit_locked", limit * PAGE)
        flags = SHARED | FIXED | LOCKED
        if source == "memory":
            offset, flags = 0, flags | ANONYMOUS
        args = at * PAGE, size * PAGE, offset * PAGE, prot, flags, source
        self.change(p, "create_mapping", handle, *args)
        if not alone:
            self.attach(p, handle, SLOT, prot, SHARED, 0, 0)

    def lockable(self, number: int, which: int, *, fill: bool) -> int:
        """A descriptor of a locked region, or of a new one, with content and a window if wanted."""
        files = self.model.processes[number].descriptors.items()
        good = [handle for handle, file in files if file.region and file.region.locked]
        if (found := self.pick(which, good)) is not None:
            return found
        self.both(number, "open", handle := self.new(), TMPFILE, os.O_RDWR, 0o600)
        self.both(number, "ftruncate", handle, 2 * SLOT)
        if fill:
            flags = SHARED | FIXED | ANONYMOUS | LOCKED
            self.both(number, "create_mapping", handle, 0, 8 * PAGE, 0, RW, flags, "closed")
            self.attach(number, handle, SLOT, RW, SHARED, 0, 0)
        return handle

    @rule(
        p=process, fd=small, at=near, size=few, prot=st.sampled_from([READ, RW]),
        call=st.sampled_from(["unmap", "protect"]), alone=seldom,
    )  # fmt: skip
    def change_locked(
        self, p: int, fd: int, at: int, size: int, prot: int, call: str, alone: bool
    ) -> None:
        """What is locked goes and changes only when nobody has a window."""
        handle = self.lockable(p, fd, fill=True)
        if alone:
            self.leave(p, handle)
        args = (prot,) if call == "protect" else ()
        self.change(p, call, handle, at * PAGE, size * PAGE, *args)

    def leave(self, number: int, handle: int) -> None:
        """All windows of a region go."""
        file = self.model.processes[number].descriptors.get(handle)
        for each, process in self.model.processes.items():
            for window in list(process.windows):
                if file and file.region is window.region:
                    self.both(each, "munmap", window.address, window.size)

    @rule(p=process, fd=small, at=page, size=length)
    def unmap(self, p: int, fd: int, at: int, size: int) -> None:
        """A hole in place of what is there."""
        p, handle = self.descriptor(p, fd, filled)
        self.change(p, "unmap", handle, self.place(p, handle, at), size * PAGE)

    @rule(
        p=process, fd=small, at=page, size=length,
        prot=st.sampled_from([READ, READ, READ, RW, RW, RW, 0, WRITE, EXEC | READ]),
        reserved=st.sampled_from([0, 0, 0, 0, 0, 0, 0, 1]),
    )  # fmt: skip
    def protect(self, p: int, fd: int, at: int, size: int, prot: int, reserved: int) -> None:
        """Forbid or allow writing."""
        p, handle = self.descriptor(p, fd, filled)
        start = self.place(p, handle, at)
        self.change(p, "protect", handle, start, size * PAGE, prot, reserved)

    @rule(p=process, fd=small, at=odd, size=odd, call=st.sampled_from(["unmap", "protect"]))
    def odd_range(self, p: int, fd: int, at: int, size: int, call: str) -> None:
        """A range that is mostly wrong."""
        p, handle = self.descriptor(p, fd)
        self.both(p, call, handle, at, size, *([READ] if call == "protect" else []))

    @rule(p=process, fd=small, room=st.sampled_from([128, 128, 128, 256, 111, 104, 32, 16, 15, 0]))
    def info(self, p: int, fd: int, room: int) -> None:
        """Every field that is exact, and what does not fit is left alone."""
        p, handle = self.descriptor(p, fd)
        self.compare_info(p, handle, room)

    def compare_info(self, p: int, handle: int, room: int = 128) -> None:
        """INFO, as far as it is exact."""
        expected = outcome(self.model.processes[p].info, handle, room)
        if expected[0] == "value":
            exact = {key: value for key, value in expected[1].items() if value is not None}
            expected = "value", exact
            self.later(p, "info", (handle, room), expected, partial(only, exact))
        else:
            self.later(p, "info", (handle, room), expected)

    @rule(p=process, fd=small, number=st.sampled_from([0x40107809, 0x7803, 0x5401]))
    def ioctl(self, p: int, fd: int, number: int) -> None:
        """A call that there is not."""
        p, handle = self.descriptor(p, fd)
        self.both(p, "ioctl", handle, number)

    @rule(
        p=process, fd=small, slots=st.integers(1, 2), prot=st.sampled_from([RW, RW, READ, WRITE]),
        flags=st.sampled_from([SHARED, SHARED | FIXED, SHARED | NOREPLACE]), at=slot,
        offset=st.sampled_from([0, 0, 0, SLOT]),
    )  # fmt: skip
    def mmap(
        self, p: int, fd: int, slots: int, prot: int, flags: int, at: int, offset: int
    ) -> None:
        """A window, if the region is large enough."""
        place = ARENA + at * SLOT if flags & (FIXED | NOREPLACE) else 0
        p, handle = self.descriptor(p, fd)
        self.attach(p, handle, slots * SLOT, prot, flags, place, offset)

    @rule(
        p=process, fd=small, prot=st.sampled_from([RW, READ, 0, EXEC | READ, RW | EXEC]),
        size=st.sampled_from([SLOT, SLOT - 100, 0, PAGE, SLOT + PAGE, 4 * SLOT, 32 << 40, 1 << 47]),
        flags=st.sampled_from([SHARED, SHARED | FIXED, SHARED | NOREPLACE, PRIVATE, 0]),
        at=slot, shift=st.sampled_from([0, 0, 0, PAGE, 100]),
        offset=st.sampled_from([0, 0, 0, PAGE, SLOT, 100, 1 << 62]),
    )  # fmt: skip
    def mmap_anything(
        self, p: int, fd: int, size: int, prot: int, flags: int, at: int, shift: int, offset: int
    ) -> None:
        """Arguments of which one or more are mostly wrong."""
        # a wish that is granted is not to be in the way of what has to be at its address
        place = (ARENA if flags & (FIXED | NOREPLACE) else WISHES) + at * SLOT + shift
        p, handle = self.descriptor(p, fd)
        self.attach(p, handle, size, prot, flags, place, offset)

    def attach(
        self, p: int, handle: int, size: int, prot: int, flags: int, address: int, offset: int
    ) -> None:
        """mmap, and look at what address it gave and what page tables it took."""
        file = self.model.processes[p].descriptors.get(handle)
        if file and file.region and file.region.size >= size > MOST_SLOTS * SLOT:
            return
        args = handle, size, prot, flags, address, offset
        expected = outcome(self.model.processes[p].mmap, *args)
        nominal = 0
        if expected[0] == "value":
            if not flags & (FIXED | NOREPLACE):
                nominal = expected[1].address = NOMINAL + self.new() * 8 * SLOT
            expected = "value", (0, True)
        self.later(p, "mmap", (*args, nominal), expected)

    @rule(p=process, which=small, part=st.sampled_from(["all"] * 4 + ["head", "tail", "page"]))
    def munmap(self, p: int, which: int, part: str) -> None:
        """A window, or a part of it."""
        p, window = self.window(p, which)
        if window:
            self.both(p, "munmap", *self.range_of(window, part))

    def range_of(self, window: Window, part: str) -> tuple[int, int]:
        """A window, or some of it."""
        match part:
            case "head":
                return window.address, window.size // 2
            case "tail":
                return window.address + window.size // 2, window.size // 2
            case "page":
                return window.address + PAGE, PAGE
            case _:
                return window.address, window.size

    @rule(p=process, at=slot, slots=st.integers(1, 4), call=st.sampled_from(["munmap", "cover"]))
    def clear(self, p: int, at: int, slots: int, call: str) -> None:
        """A range with any number of windows, whole and in part."""
        start, size = ARENA + at * SLOT, slots * SLOT
        process = self.model.processes[p]
        if call == "cover" and not process.touched(start, start + size):
            return
        self.both(p, call, start, size)

    @rule(
        p=process, which=small, at=slot, shift=st.sampled_from([0, 0, 0, 0, 0, PAGE, 100]),
        flags=st.sampled_from([3, 3, 3, 3, 1, 2, 5, 7]),
        part=st.sampled_from(["all"] * 5 + ["head", "tail", "page"]),
        change=st.sampled_from([0, 0, 0, 0, 0, PAGE, SLOT, -PAGE]),
    )  # fmt: skip
    def mremap(
        self, p: int, which: int, at: int, shift: int, flags: int, part: str, change: int
    ) -> None:
        """To another place, of all or a part, to more or less."""
        p, window = self.window(p, which)
        if window:
            address, size = self.range_of(window, part)
            new = size + change
            if new <= 0:
                return
            target = ARENA + at * SLOT + shift
            self.both(p, "mremap", address, size, new, flags, target)

    @rule(
        p=process, which=small, part=st.sampled_from(["all", "head", "page"]),
        prot=st.sampled_from([READ, RW, 0, READ | EXEC]),
    )  # fmt: skip
    def mprotect(self, p: int, which: int, part: str, prot: int) -> None:
        """Refused."""
        p, window = self.window(p, which)
        if window:
            self.both(p, "mprotect", *self.range_of(window, part), prot)

    @rule(p=process, which=small, number=page, size=st.sampled_from([1, 2, 3, 8]), advice=advice)
    def madvise(self, p: int, which: int, number: int, size: int, advice: str) -> None:
        """On some pages."""
        p, window = self.window(p, which)
        if window:
            start = self.address(window, number)
            self.both(p, "madvise", start, min(size * PAGE, window.end - start), advice)

    @rule(
        p=process, which=small,
        advice=st.sampled_from(sorted(set(ADVICE) - {"POPULATE_READ", "POPULATE_WRITE"})),
    )  # fmt: skip
    def madvise_all(self, p: int, which: int, advice: str) -> None:
        """On a whole window."""
        p, window = self.window(p, which)
        if window:
            self.both(p, "madvise", window.address, window.size, advice)

    @rule(p=process, which=small, number=page, size=st.sampled_from([1, 2, 8]))
    def mlock(self, p: int, which: int, number: int, size: int) -> None:
        """Some pages."""
        p, window = self.window(p, which)
        if window:
            start = self.address(window, number)
            self.both(p, "mlock", start, min(size * PAGE, window.end - start))

    @rule(accesses=st.lists(one_access, min_size=1, max_size=8))
    def use(self, accesses: list[tuple[int, int, int, int, str, int]]) -> None:
        """Loads and stores, by instructions and by the kernel."""
        for p, which, number, at, how, byte in accesses:
            found, window = self.window(p, which)
            if window:
                address = self.address(window, number) + at
                if byte:
                    self.access(found, window, how, "store", address, bytes([byte] * 8))
                else:
                    self.access(found, window, how, "load", address, 8)

    @rule(p=process, which=small, byte=byte)
    def compare_all(self, p: int, which: int, byte: int) -> None:
        """A store is seen at once through every window of every process."""
        p, window = self.window(p, which)
        if not window:
            return
        address, data = window.address, bytes([byte] * 8)
        if self.access(p, window, "call", "store", address, data)[0] != "value":
            return
        place = window.offset
        for number, process in self.model.processes.items():
            for each in process.windows:
                if each.region is window.region and each.offset <= place < each.offset + each.size:
                    self.access(number, each, "call", "load", each.address + place - each.offset, 8)

    @rule(p=st.integers(0, 1), q=process, which=small, number=page)
    def load_of_another(self, p: int, q: int, which: int, number: int) -> None:
        """Another process's window, by process_vm_readv."""
        q, window = self.window(q, which)
        if window:
            address = self.address(window, number)
            expected = outcome(self.model.load_of, p, q, address, 8)
            if expected[0] == "signal":
                expected = "error", "EFAULT"
            self.later(None, "load_of", (p, q, address, 8), expected)

    @rule(
        p=process, q=process, which=small, source=st.one_of(source, any_source),
        access=access_to_file,
    )  # fmt: skip
    def open_file(self, p: int, q: int, which: int, source: str, access: int) -> None:
        """The region of a file, for two who ask."""
        for number in (p, q):
            self.ask(number, "open_file", self.control(number, which), source, access)

    @rule(
        p=process, which=small, at=st.sampled_from([0, 0, 0, 1, 2, 8]), access=access_to_file,
        reserved=st.sampled_from([0] * 9 + [1]), window=seldom,
    )  # fmt: skip
    def open_mapping(
        self, p: int, which: int, at: int, access: int, reserved: int, window: bool
    ) -> None:
        """The region of what is mapped somewhere, or not, and a window of it."""
        found: Mapping | Window | None
        p, found = self.window(p, which) if window else self.other(p, which)
        address = (found.address if found else ELSEWHERE) + at * PAGE
        self.ask(p, "open_mapping", self.control(p, which), address, access, reserved)

    def ask(
        self, p: int, call: str, control: int, what: int | str, access: int, *more: int
    ) -> None:
        """OPEN_FILE or OPEN_MAPPING, a window of the region, and a look into it."""
        handle = self.new()
        if self.both(p, call, handle, control, what, access, *more)[0] == "value":
            self.attach(p, handle, SLOT, RW if access == os.O_RDWR else READ, SHARED, 0, 0)
            self.probe(self.model.processes[p].descriptors[handle].region, 0, PAGE)
            self.compare_info(p, handle)

    @rule(
        p=process, fd=small, name=name,
        call=st.sampled_from(
            ["create_mapping", "unmap", "protect", "link", "open_again", "ftruncate"]
        ),
    )  # fmt: skip
    def change_region_of_file(self, p: int, fd: int, name: str, call: str) -> None:
        """Its layout, name, rights and size stay as they are."""
        p, handle = self.descriptor(p, fd, lambda region: region.of)
        match call:
            case "create_mapping":
                flags = SHARED | FIXED | ANONYMOUS
                self.both(p, call, handle, 0, PAGE, 0, READ, flags, "closed")
            case "unmap":
                self.both(p, call, handle, 0, PAGE)
            case "protect":
                self.both(p, call, handle, 0, PAGE, READ)
            case "link":
                self.link_as_root(p, handle, name)
            case "open_again":
                self.both(p, call, self.new(), handle, os.O_RDWR)
            case "ftruncate":
                self.both(p, call, handle, MAX_SIZE)

    @rule(
        p=process, number=st.integers(0, 2), source=st.one_of(source, other_memory),
        size=st.integers(1, 9), prot=st.sampled_from([READ, RW]), offset=st.sampled_from([0, 0, 1]),
        flags=st.sampled_from([SHARED] * 5 + [PRIVATE]), access=access_to_file,
    )  # fmt: skip
    def mmap_other(
        self, p: int, number: int, source: str, size: int, prot: int, offset: int, flags: int,
        access: int,
    ) -> None:  # fmt: skip
        """A file or other memory, mapped without msharefs, and the region of it."""
        address = ELSEWHERE + number * SLOT
        offset = 0 if source in ("anonymous", "segment") else offset * PAGE
        flags = SHARED if source == "segment" else flags
        self.both(p, "mmap_other", address, source, size * PAGE, prot, flags, offset)
        self.ask(p, "open_mapping", self.control(p, 0), address, access)
        self.look(*self.other(p, number), size, "direct")

    @rule(p=process, number=st.integers(0, 2))
    def munmap_other(self, p: int, number: int) -> None:
        """It is mapped no longer; a region of it stays."""
        self.both(p, "munmap_other", ELSEWHERE + number * SLOT)

    @rule(
        p=process, which=small, number=st.integers(0, 9), byte=st.sampled_from([0, 0, 1, 99]),
        how=st.sampled_from(["direct", "call"]),
    )  # fmt: skip
    def use_other(self, p: int, which: int, number: int, byte: int, how: str) -> None:
        """What is stored by a mapping is in the region, and the other way round."""
        self.look(*self.other(p, which), number, how, byte)

    def look(self, p: int, mapping: Mapping | None, number: int, how: str, byte: int = 0) -> None:
        """Load or store in a page of other memory."""
        if mapping and mapping.shared:
            address = self.address(mapping, number)
            what = ("store", bytes([byte] * 8)) if byte else ("load", 8)
            self.access(p, mapping, how, what[0], address, what[1])

    @rule(p=process, source=st.sampled_from(["memfd", "tmpfs", "disk"]), number=small, byte=byte)
    def file_write(self, p: int, source: str, number: int, byte: int) -> None:
        """Into a file, not through a region."""
        self.both(p, "file_write", source, number * PAGE, bytes([byte] * 8))

    @rule(p=process, source=st.sampled_from(["memfd", "tmpfs", "disk"]), number=small)
    def file_read(self, p: int, source: str, number: int) -> None:
        """What was stored through a region is in the file."""
        self.both(p, "file_read", source, number * PAGE, 8)

    @rule(
        p=process, source=st.sampled_from(["memfd", "tmpfs", "disk"]),
        size=st.sampled_from([0, 1, 3, FILE_SIZE // PAGE, 16]),
    )  # fmt: skip
    def file_resize(self, p: int, source: str, size: int) -> None:
        """A file that becomes shorter or longer under a region."""
        self.both(p, "file_resize", source, size * PAGE)
        content = self.model.sources[source].content
        for region in self.model.alive():
            for each in region.layout.extents:
                end = each.start + size * PAGE - each.offset
                if each.content is content and each.start <= end <= each.end:
                    self.probe(region, max(end - PAGE, 0), end)
                    return

    @rule(p=process, q=process, now=seldom)
    def fork(self, p: int, q: int, now: bool) -> None:
        """One process dies and a child of another takes its number."""
        if p != q and now:
            self.both(None, "kill", q)
            self.both(None, "fork", p, q)

    @rule(p=process, now=seldom)
    def restart(self, p: int, now: bool) -> None:
        """One process is killed, and a new one has nothing."""
        if not now:
            return
        user = self.model.processes[p].user
        self.both(None, "kill", p)
        self.spawn(p, user)

    @rule(p=process, q=process, fd=small)
    def send(self, p: int, q: int, fd: int) -> None:
        """A descriptor goes to another process."""
        handle = self.pick(fd, self.model.processes[p].descriptors)
        if handle is not None and p != q:
            self.both(None, "send", p, handle, q)

    @rule()
    def mount(self) -> None:
        """The names there are; and memory is that of regions somebody can still reach."""
        self.both(None, "listdir")
        expected = self.model.statfs()
        if expected is not None:
            self.later(None, "statfs", (), ("value", expected))
