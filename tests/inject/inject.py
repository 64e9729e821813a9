"""Make the Nth allocation fail that the kernel makes for a call, for N from 1 on.

The kernel has a countdown for each thread, ``fail-nth``: each allocation of slab memory or of
pages takes one off, and the one that brings it to 0 fails. It is set before the call and read
after it. When some is left the call has made fewer allocations, and the walk is at its end.

What a layout change does runs on a kernel worker: then the countdown is that of the workers.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mshare.engines.msharefs import info
from tests.conftest import skip
from tests.kernel import abi
from tests.kernel.test_lifetime import module_users, nothing_left

KNOBS = "/sys/kernel/debug"
MNT_DETACH = 2
MOST = 2000
"""More allocations than a call makes that is walked to its end."""
TIMES = int(os.environ.get("MSHARE_INJECT_TIMES", "20"))
"""How often each allocation fails: what leaks one object each time is then found."""
ENOUGH = 8
"""With fewer, slab caches have too much of their own come and go: they are not looked at."""

_libc = ctypes.CDLL(None, use_errno=True)


def every_allocation() -> None:
    """Let ``fail-nth`` count all of them, and the log stay quiet."""
    for kind in ("failslab", "fail_page_alloc"):
        knobs = Path(KNOBS) / kind
        (knobs / "ignore-gfp-wait").write_text("N")
        (knobs / "verbose").write_text("0")
    pages = Path(KNOBS) / "fail_page_alloc"
    (pages / "ignore-gfp-highmem").write_text("N")
    (pages / "min-order").write_text("0")


def mount(kind: str, folder: str, options: str = "") -> None:
    """mount(2)."""
    data = options.encode() if options else None
    name = kind.encode()
    if _libc.mount(name, folder.encode(), name, ctypes.c_ulong(0), data):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), folder)


def umount(folder: str, flags: int = 0) -> None:
    """umount2(2)."""
    if _libc.umount2(folder.encode(), flags):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), folder)


@dataclass
class Outcome:
    """What a call did: its result, or its errno; and whether an allocation was made to fail."""

    value: Any
    errno: int
    injected: bool


class Caller:
    """The allocations of the calling thread."""

    def __init__(self) -> None:
        self._fd = os.open(f"/proc/self/task/{threading.get_native_id()}/fail-nth", os.O_RDWR)

    def run(self, nth: int, call: Callable[[], Any]) -> Outcome:
        """Make the call with its ``nth`` allocation failing."""
        value, code = None, 0
        os.pwrite(self._fd, str(nth).encode(), 0)
        try:
            value = call()
        except OSError as error:
            code = error.errno or -1
        left = int(os.pread(self._fd, 16, 0))
        os.pwrite(self._fd, b"0", 0)
        return Outcome(value, code, left == 0)

    def close(self) -> None:
        os.close(self._fd)


class Workers:
    """The allocations of the kernel workers that do the module's work, and perhaps others'.

    Whichever of them takes the work, its own countdown runs.
    """

    def __init__(self) -> None:
        self._fds: dict[str, int] = {}
        self._known: set[str] = set()

    def _find(self) -> bool:
        """Open those that are new; whether there are some."""
        there = set(os.listdir("/proc"))
        new = False
        for pid in there - self._known:
            with suppress(OSError):
                if pid.isdigit() and Path(f"/proc/{pid}/comm").read_text().startswith("kworker/u"):
                    self._fds[pid] = os.open(f"/proc/{pid}/fail-nth", os.O_RDWR)
                    new = True
        self._known = there
        return new

    def _set(self, nth: int) -> None:
        for pid, fd in list(self._fds.items()):
            try:
                os.pwrite(fd, str(nth).encode(), 0)
            except OSError:
                os.close(self._fds.pop(pid))

    def _left(self) -> list[int]:
        found = []
        for fd in self._fds.values():
            with suppress(OSError):
                found.append(int(os.pread(fd, 16, 0)))
        return found

    def run(self, nth: int, call: Callable[[], Any]) -> Outcome:
        """Make the call with the ``nth`` allocation of its worker failing."""
        value, code = None, 0
        self._find()
        self._set(nth)
        try:
            value = call()
        except OSError as error:
            code = error.errno or -1
        left = self._left()
        self._set(0)
        # a worker that was born meanwhile may have done the work, with no countdown
        return Outcome(value, code, 0 in left or self._find())

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)

    @contextmanager
    def starved(self, cache: str | None) -> Iterator[None]:
        """Every allocation from a slab cache, or from any, fails for every worker in the block."""
        self._find()
        knobs = Path(KNOBS) / "failslab"
        settings = {"task-filter": "Y", "times": "-1", "probability": "100"}
        mark = Path(f"/sys/kernel/slab/{cache}/failslab")
        if cache:
            settings = {"cache-filter": "Y"} | settings
            if not mark.stat().st_mode & 0o200:
                skip("this kernel marks no slab cache once it is booted")
        try:
            for pid in self._fds:
                Path(f"/proc/{pid}/make-it-fail").write_text("1")
            if cache:
                mark.write_text("1")
            for name, value in settings.items():
                (knobs / name).write_text(value)
            yield
        finally:
            for name in reversed(settings):
                (knobs / name).write_text("0")
            if cache:
                mark.write_text("0")
            for pid in self._fds:
                with suppress(OSError):
                    Path(f"/proc/{pid}/make-it-fail").write_text("0")


Where = Caller | Workers
WALKS: list[tuple[str, type[Where], Walk]] = []
"""What was walked, for the report at the end."""


@dataclass
class Walk:
    """How far the walks of a test went: calls that failed by errno, and that got over it."""

    calls: int = 0
    injected: int = 0
    failed: dict[int, int] = field(default_factory=dict)
    last: int = 0

    def __str__(self) -> str:
        errors = ", ".join(f"{os.strerror(code)}: {n}" for code, n in self.failed.items())
        return f"allocations {self.last}, calls {self.calls}, injected {self.injected} ({errors})"


@contextmanager
def place(kind: type[Where]) -> Iterator[Where]:
    """One of the two, closed after the block."""
    where = kind()
    try:
        yield where
    finally:
        where.close()


def walk(
    where: Where,
    call: Callable[[], Any],
    done: Callable[[Any], None],
    failed: Callable[[int], None],
    *,
    times: int = 1,
    until: int | None = None,
) -> Walk:
    """Fail each allocation of ``call`` in turn, until it makes no more; each ``times`` times.

    :param until: the last one to fail, of a call that makes many that are not about mshare.
    :param done: undoes what a call that succeeded did, with what it returned.
    :param failed: checks what a call that failed left, with its errno.
    """
    told = Walk()
    for nth in range(1, (until or MOST) + 1):
        reached = False
        for _ in range(times):
            outcome = where.run(nth, call)
            told.calls += 1
            told.injected += outcome.injected
            reached |= outcome.injected
            if outcome.errno:
                assert outcome.injected, f"allocation {nth}: errno {outcome.errno} of itself"
                told.failed[outcome.errno] = told.failed.get(outcome.errno, 0) + 1
                failed(outcome.errno)
                # the same call, with nothing in its way
                done(call())
            else:
                done(outcome.value)
        if not reached:
            return told
        told.last = nth
    assert until, f"more than {MOST} allocations"
    return told


def answer(call: Callable[..., Any], *args: Any) -> Any:
    """What the call returns, or its errno's name."""
    try:
        return call(*args)
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def standing(fd: int | None = None, folder: str = abi.MOUNT) -> tuple[Any, ...]:
    """What a call that failed must leave as it was: names, references, and the region's layout."""
    names = sorted(os.listdir(folder))
    if fd is None:
        return names, module_users()
    now = info(fd)
    layout = (now.region_size, now.attachments, now.mapped_bytes, now.mapped_end)
    return names, module_users(), layout


def check(
    kind: type[Where],
    call: Callable[[], Any],
    done: Callable[[Any], None],
    failed: Callable[[int], None],
    errors: Container[int] = (errno.ENOMEM,),
    until: int | None = None,
    least: int = 1,
    times: int = TIMES,
) -> None:
    """Walk once, then again with every failure often enough for a leak to show.

    :param errors: what the ABI says the call may fail with.
    :param least: so many allocations it makes at least; 0 if it may make none.
    :param times: fewer, of a call that takes a second.
    """
    times = min(times, TIMES)

    def told(code: int) -> None:
        assert code in errors, os.strerror(code)
        failed(code)

    with place(kind) as where:
        walk(where, call, done, told, until=until)
        with nothing_left(3 * times if times >= ENOUGH else 0):
            walked = walk(where, call, done, told, times=times, until=until)
    assert walked.last >= least, "no allocation was made to fail"
    WALKS.append((current_test(), kind, walked))


def current_test() -> str:
    return os.environ["PYTEST_CURRENT_TEST"].split("::")[-1].split(" ")[0]
