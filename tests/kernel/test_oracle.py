"""The module does what the reference model says, call by call, in several processes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.oracle import wrong
from tests.oracle.library_machine import Library, LibraryMachine
from tests.oracle.machine import Machine
from tests.oracle.run import run
from tests.oracle.setting import Kernel

SEED, STEPS = 13, 2_000
ENOUGH = 30_000
"""Steps within which a wrong model must be found out."""


@pytest.fixture
def kernel(disk: str) -> Iterator[Kernel]:
    """A mount of its own; at the end nothing keeps it from being unmounted."""
    setting = Kernel(disk)
    yield setting
    setting.close()


def test_abi(kernel: Kernel) -> None:
    """Values, errno, signals, INFO, sizes, names and lifetimes are those of the model."""
    print(f"seed {SEED}: {run(Machine, kernel, STEPS, SEED)} steps")


def test_library() -> None:
    """The library on msharefs is that of the other engines, and can change layouts."""
    setting = Library("msharefs")
    try:
        print(f"seed {SEED}: {run(LibraryMachine, setting, STEPS // 2, SEED)} steps")
    finally:
        setting.close()


def test_wrong_model(kernel: Kernel) -> None:
    """A model whose PROTECT ignores its range is found out."""
    with pytest.raises(AssertionError, match="the model says"):
        run(Machine, kernel, ENOUGH, SEED, shrink=False, wrong=wrong.ProtectsAll)
