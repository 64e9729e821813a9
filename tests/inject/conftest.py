"""Tests that make the kernel's allocations fail.

They run in the lab, on a kernel built for it: ``mshare lab --kernel debug-6.12 -- pytest
tests/inject``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.inject import inject
from tests.kernel import abi
from tests.kernel.conftest import disk, path, region

__all__ = ["disk", "path", "region"]

if not (os.path.isdir(f"{inject.KNOBS}/failslab") and os.path.exists(f"{abi.MOUNT}/mshare_info")):
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def _every_allocation() -> None:
    """All kinds of allocation count."""
    inject.every_allocation()


@pytest.fixture
def tmpfs(tmp_path: os.PathLike[str]) -> Iterator[str]:
    """A tmpfs of its own: it can be unmounted at the end, so nothing holds a file of it."""
    folder = os.fspath(tmp_path)
    inject.mount("tmpfs", folder)
    yield folder
    try:
        inject.umount(folder)
    except OSError:
        inject.umount(folder, inject.MNT_DETACH)  # what comes after must not stumble over it
        raise


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How far each walk went."""
    for test, kind, told in inject.WALKS:
        terminalreporter.write_line(f"{test} [{kind.__name__.lower()}]: {told}")
