"""Check the models with SPIN: each scenario holds, and each broken one is found broken.

``python spec/check.py`` runs all, ``--quick`` those of a few seconds, and
``--show SYMBOL`` prints the counterexample of a broken one, step by step.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

SPEC = Path(__file__).parent


class Scenario(NamedTuple):
    """One run of the checker over a model."""

    model: str
    symbols: tuple[str, ...]
    broken: str = ""
    slow: bool = False
    why: str = ""


SCENARIOS = [
    Scenario("share.pml", ("WITH_LAYOUT",)),
    Scenario("share.pml", ("WITH_RECLAIM",)),
    Scenario("share.pml", ("WITH_EXIT", "WITH_RECLAIM", "WITH_ADVICE")),
    Scenario("share.pml", ("WITH_LAYOUT", "WITH_EXIT"), slow=True),
    Scenario("share.pml", ("WITH_LAYOUT",), "BREAK_FLUSH", why="no flush after the drain"),
    Scenario("share.pml", ("WITH_LAYOUT",), "BREAK_DRAIN", why="drain without the guest's lock"),
    Scenario("share.pml", ("WITH_LAYOUT",), "BREAK_FREEZE", why="faults do not wait"),
    Scenario("share.pml", ("WITH_LAYOUT",), "BREAK_ORDER", why="freed before it is unreachable"),
    Scenario("share.pml", ("WITH_ADVICE",), "BREAK_NOTIFIER", why="no ungraft before a zap"),
    Scenario("share.pml", ("WITH_EXIT",), "BREAK_RELEASE", why="no ungraft before exit"),
    Scenario("share.pml", ("WITH_RECLAIM",), "BREAK_HOST_FLUSH", why="flush of the host alone"),
    Scenario("seed.pml", (), "S1", why="unlocks the lock of current->mm, which is not held"),
    Scenario("seed.pml", (), "S2", why="reads a table that the host has freed"),
    Scenario("seed.pml", (), "S3", why="marks another mapping than it made"),
    Scenario("seed.pml", (), "S4", why="two paths change one VMA under two locks"),
]


def run(command: list[str], folder: Path) -> str:
    """Output of a command that must not fail."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stdout}{done.stderr}")
    return done.stdout


def check(scenario: Scenario, show: bool = False) -> tuple[int, int]:
    """Errors found and states visited. Exhaustive: a search cut short is an error of its own."""
    symbols = [f"-D{symbol}" for symbol in (*scenario.symbols, scenario.broken) if symbol]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copy(SPEC / scenario.model, folder)
        run(["spin", "-a", *symbols, scenario.model], folder)
        run(["cc", "-O2", "-w", "-DSAFETY", "-DCOLLAPSE", "-o", "pan", "pan.c"], folder)
        output = run(["./pan", "-m100000", "-n"], folder)
        if show:
            print(run(["spin", "-t", "-p", "-g", *symbols, scenario.model], folder))
    if not scenario.broken and "Search not completed" in output:
        sys.exit(f"{scenario}: the search was cut short")
    errors = re.search(r"errors: (\d+)", output)
    states = re.search(r"(\d+) states, stored", output)
    assert errors and states, output
    return int(errors[1]), int(states[1])


def main() -> int:
    """Run the scenarios; 1 when one is not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="leave out what takes a minute")
    parser.add_argument("--show", metavar="SYMBOL", help="print that counterexample")
    args = parser.parse_args()
    if not shutil.which("spin"):
        print("SPIN is not installed; try: apt-get install spin", file=sys.stderr)
        return 1
    wrong = 0
    for scenario in SCENARIOS:
        if (args.show and scenario.broken != args.show) or (args.quick and scenario.slow):
            continue
        errors, states = check(scenario, bool(args.show))
        good = (errors > 0) == bool(scenario.broken)
        wrong += not good
        found = f"found: {scenario.why}" if errors else "holds"
        verdict = found if good else f"WRONG: {errors} errors"
        names = " ".join((*scenario.symbols, scenario.broken)).strip()
        print(f"{scenario.model:10} {names:40} {states:>12,} states  {verdict}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
