"""Run a machine for a number of steps from a seed."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, Phase, Verbosity, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.oracle.machine import Comparing

STEPS_PER_RUN = 60


def run(
    machine: type[Comparing],
    setting: object,
    steps: int,
    number: int,
    *,
    shrink: bool = True,
    **body: Any,
) -> int:
    """Make at least about ``steps`` comparisons, the same for one seed; how many they were.

    :raises AssertionError: model and kernel differ. Notes have the calls, as few as were found.
    """
    before = Comparing.steps
    phases = [Phase.generate, Phase.shrink] if shrink else [Phase.generate]
    chosen = settings(
        max_examples=max(1, steps // STEPS_PER_RUN),
        stateful_step_count=STEPS_PER_RUN,
        database=None,
        deadline=None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.normal,
        print_blob=False,
    )
    subject = seed(number)(type(machine.__name__, (machine,), {"setting": setting, **body}))
    run_state_machine_as_test(subject, settings=chosen)
    return Comparing.steps - before
