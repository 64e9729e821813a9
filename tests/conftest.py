"""Fixtures: an engine at a time, names that clean up after themselves, another user."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pytest

import mshare
from mshare import engines, hugepages
from mshare.sizes import SLOT_SIZE

NOBODY = 65534
HUGE_BYTES = 2 * SLOT_SIZE
"""Huge pages the tests may use, in bytes."""

LAB = os.path.exists("/sys/fs/mshare/mshare_info")
"""Whether the kernel module is here: then its engine is the one to test."""

SubPython = Callable[..., "subprocess.CompletedProcess[str]"]


def skip(reason: str) -> None:
    """Skip a test this machine can't run; with ``MSHARE_TEST_STRICT=1`` (CI) that is a failure."""
    if os.environ.get("MSHARE_TEST_STRICT") == "1":
        pytest.fail(f"this machine must be able to run every test, but: {reason}")
    pytest.skip(reason)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """In the lab, what failed is said at once: the machine may not get as far as the summary."""
    if LAB and report.failed:
        print(f"\n{report.nodeid}\n{report.longreprtext}", file=sys.stderr, flush=True)


@pytest.fixture
def root() -> None:
    """Only as root."""
    if os.geteuid():
        skip("needs root")


@pytest.fixture(scope="session", autouse=True)
def _huge_pages() -> Iterator[None]:
    """As root, the huge pages the tests of hugetlb need; in the lab there are none of those."""
    with ExitStack() as stack:
        if not os.geteuid() and not LAB:
            with suppress(OSError):
                stack.enter_context(hugepages.reserved(HUGE_BYTES, lambda text: None))
        yield


@pytest.fixture(scope="session", autouse=True)
def _interrupts() -> None:
    """Ctrl-C works in the programs of the tests, also where a shell ran these in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def started(*args: Any, **kwargs: Any) -> Iterator[subprocess.Popen[Any]]:
    """A program, as :class:`subprocess.Popen` has it; it does not outlive a test that fails."""
    with subprocess.Popen(*args, **kwargs) as program:
        try:
            yield program
        finally:
            program.kill()


@pytest.fixture(scope="session", autouse=True)
def _environment() -> None:
    """No engine is chosen, and rich does not take a pipe for a terminal."""
    for name in ("MSHARE_ENGINE", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        os.environ.pop(name, None)


@pytest.fixture(params=["msharefs"] if LAB else ["hugetlb", "shm"])
def engine(request: pytest.FixtureRequest) -> engines.Engine:
    """Each engine in turn; msharefs where the kernel module is, in the lab, and only there."""
    found = engines.by_name(request.param)
    check = found.check()
    if not check.works:
        skip(f"engine {found.name}: {check.why}")
    return found


@pytest.fixture
def hugetlb() -> engines.Engine:
    """The engine hugetlb, with huge pages for a whole slot and more."""
    found = engines.by_name("hugetlb")
    check = found.check(SLOT_SIZE)
    if not check.works:
        skip(f"engine hugetlb: {check.why}")
    return found


@pytest.fixture
def name() -> Iterator[str]:
    """A name nobody uses; what has it, or starts with it, goes at the end of the test."""
    chosen = f"test-{uuid.uuid4().hex[:12]}"
    yield chosen
    for region in mshare.list():
        if region.name.startswith(chosen):
            mshare.unlink(region.name)


@pytest.fixture
def python() -> SubPython:
    """Run a Python program in a new process that turns warnings into errors."""

    def run(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        path = os.path.dirname(os.path.dirname(mshare.__file__))
        return subprocess.run(
            [sys.executable, "-W", "error", "-c", code, *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", **environment},
            capture_output=True,
            text=True,
            timeout=300 if LAB else 120,
            check=False,
        )

    return run


@pytest.fixture
def as_nobody(root: None, python: SubPython) -> SubPython:
    """Run a Python program as another user, who may not be able to read Python's own files."""

    def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        modules = "mshare.hugepages, mshare.pagetables, os, sys"
        become = f"import {modules}; os.setgroups([]); os.setuid({NOBODY})"
        return python(f"{become}\n{code}", *arguments)

    return run
