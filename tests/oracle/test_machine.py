"""The library on each engine does what the model says; and a machine finds a wrong model out."""

from __future__ import annotations

import pytest

from mshare.engines import Engine
from tests.oracle import wrong
from tests.oracle.library_machine import Library, LibraryMachine
from tests.oracle.machine import Machine
from tests.oracle.model import Process
from tests.oracle.run import run
from tests.oracle.setting import Modelled

SEED, STEPS = 13, 4_000
ENOUGH = 30_000
"""Steps within which a wrong model must be found out; most are in the first hundreds."""


def test_library(engine: Engine) -> None:
    """In processes of two users every call of the library comes to what the model says."""
    setting = Library(engine.name)
    try:
        print(f"seed {SEED}: {run(LibraryMachine, setting, STEPS, SEED)} steps on {engine.name}")
    finally:
        setting.close()


def test_model_agrees_with_itself() -> None:
    """Two copies of the model never differ, so what differs elsewhere is the engine."""
    assert run(Machine, Modelled(), STEPS, SEED) > STEPS // 2


@pytest.mark.parametrize("kind", wrong.RAW)
def test_wrong_model_of_the_abi(kind: type[Process]) -> None:
    """A model with one rule of the ABI wrong is found out."""
    with pytest.raises(AssertionError, match="the model says"):
        run(Machine, Modelled(), ENOUGH, SEED, shrink=False, wrong=kind)


@pytest.mark.parametrize("kind", wrong.LIBRARY)
def test_wrong_model_of_the_library(kind: type[Process]) -> None:
    """A model with one rule of the library wrong is found out, on a real engine."""
    setting = Library("shm")
    try:
        with pytest.raises(AssertionError, match="the model says"):
            run(LibraryMachine, setting, ENOUGH, SEED, shrink=False, wrong=kind)
    finally:
        setting.close()
