"""The storm's schedule. What it finds about the module it finds in the lab: ``make storm``."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.storm.__main__ import build
from tests.storm.control import SEATS, Control
from tests.storm.crew import MAIN
from tests.storm.hazards import HAZARDS, plan


@pytest.fixture(scope="module")
def worker() -> Path:
    """The C program."""
    return build()


def schedule(worker: Path, seed: int, actions: tuple[str, ...]) -> list[str]:
    """The steps of one life."""
    command: list[str | Path] = [worker, "plan", "", "0", str(seed), "", *actions]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def test_seed_is_the_schedule(worker: Path) -> None:
    """The same seed gives the same steps with the same draws, another one gives others."""
    actions = plan([]).actions
    first = schedule(worker, 7, actions)
    assert len(first) >= 20
    assert first == schedule(worker, 7, actions)
    assert first != schedule(worker, 8, actions)


@pytest.mark.parametrize("name", HAZARDS)
def test_hazard_alone(worker: Path, name: str) -> None:
    """A hazard alone does what it names and what every worker does, and no more."""
    alone = plan([name])
    done = {line.split()[1] for seed in range(8) for line in schedule(worker, seed, alone.actions)}
    assert done == set(HAZARDS[name].actions) | {"attach", "detach", "spin", "probe"}


def test_all_together() -> None:
    """Without a choice every action, role, disturbance and kind of layout change takes part."""
    everything = plan([])
    for hazard in HAZARDS.values():
        assert set(hazard.actions) <= set(everything.actions)
        assert set(hazard.roles) <= everything.roles
        assert set(hazard.disturbances) <= everything.disturbances
        assert set(hazard.layout) <= set(everything.layout)
    assert everything.kill


def test_control_is_the_same_in_both_languages(worker: Path, tmp_path: Path) -> None:
    """A C process finds the number of workers where Python put it, and its seat."""
    control = Control(tmp_path / "control", worker, 5)
    command: list[str | Path] = [worker, "sit", control.path, str(MAIN), "1", ""]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "5\n"
    pid, step, action = control.seat(MAIN)
    assert (pid > 0, step, action) == (True, 3, "sit")
    assert control.beats(MAIN) == 1
    assert control.counts()["poisoned"] == 9
    assert control.finding.startswith("a test (process 127, seed 1, step 3: sit)")
    assert control.stop
    assert MAIN < SEATS
