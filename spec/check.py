"""Check the models with SPIN: each scenario holds, and each broken one is found broken.

``python spec/check.py`` runs all, ``--quick`` those of a few seconds, and
``--show SYMBOL`` prints the counterexample of a broken one, step by step.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

SPEC = Path(__file__).parent


class Scenario(NamedTuple):
    """One run of the checker over a model."""

    model: str
    symbols: str = ""
    broken: str = ""
    why: str = ""
    slow: bool = False
    ends: bool = False
    """Check that whatever has begun ends, with weak fairness, and not only what is reached."""


class Result(NamedTuple):
    """What the checker found."""

    errors: int
    states: int
    seconds: float
    steps: str


SHARE, RIGHTS, LIFE = "share.pml", "rights.pml", "life.pml"
LOCKED, SEED = "locked.pml", "seed.pml"

HELD = "ONE_CPU WITH_LAYOUT WITH_PATIENCE WITH_HOLDER"
"""A guest's lock is held until a fault of another has ended."""

BORN_FROZEN = "ACCESSES=0 ONE_CPU ONE_GUEST WITH_LAYOUT WITH_PATIENCE WITH_ATTACH WITH_REMOTE"
"""A fault by a new window, which may keep the lock that the freeze still has to ask for."""

HOLDS = [
    Scenario(SHARE, "WITH_LAYOUT", slow=True),
    Scenario(SHARE, "WITH_RECLAIM"),
    Scenario(SHARE, "WITH_EXIT WITH_RECLAIM", slow=True),
    Scenario(SHARE, "ONE_CPU WITH_LAYOUT WITH_RECLAIM", slow=True),
    Scenario(SHARE, "ONE_CPU WITH_LAYOUT WITH_ATTACH", slow=True),
    Scenario(SHARE, "ONE_CPU WITH_LAYOUT WITH_ATTACH WITH_FORK"),
    Scenario(SHARE, "ONE_CPU WITH_LAYOUT WITH_UNMAP WITH_KILL", slow=True),
    Scenario(SHARE, "ONE_CPU WITH_LAYOUT WITH_WALKER", slow=True),
    Scenario(SHARE, "ONE_CPU WITH_LAYOUT WITH_EXIT WITH_REAPER", slow=True),
    Scenario(SHARE, "ONE_CPU WITH_LAYOUT WITH_REMOTE", slow=True),
    Scenario(SHARE, "ONE_CPU ONE_GUEST WITH_LAYOUT WITH_REMOTE", slow=True),
    Scenario(SHARE, "ONE_CPU ONE_GUEST WITH_LAYOUT WITH_MREMAP"),
    Scenario(SHARE, "ONE_CPU WITH_ADVICE WITH_WALKER WITH_UNMAP"),
    # not in place of those before: with the timer, a deadlock comes to an end
    Scenario(SHARE, "WITH_LAYOUT WITH_PATIENCE", slow=True),
    Scenario(SHARE, "ONE_CPU WITH_LAYOUT WITH_PATIENCE"),
    Scenario(SHARE, "ONE_CPU WITH_LAYOUT WITH_PATIENCE WITH_ATTACH", slow=True),
    Scenario(SHARE, "ONE_CPU WITH_LAYOUT WITH_PATIENCE WITH_UNMAP WITH_KILL", slow=True),
    Scenario(SHARE, "ONE_CPU WITH_LAYOUT WITH_PATIENCE WITH_WALKER", slow=True),
    Scenario(SHARE, "ONE_CPU ONE_GUEST WITH_LAYOUT WITH_PATIENCE WITH_REMOTE", slow=True),
    Scenario(SHARE, "ONE_CPU WITH_LAYOUT", ends=True),
    Scenario(SHARE, "ONE_CPU WITH_ADVICE WITH_RECLAIM", ends=True),
    Scenario(SHARE, "ONE_CPU WITH_EXIT WITH_REAPER", ends=True),
    Scenario(SHARE, HELD, slow=True, ends=True),
    Scenario(SHARE, BORN_FROZEN, slow=True, ends=True),
    Scenario(RIGHTS),
    Scenario(LIFE),
    Scenario(LOCKED),
]

INVARIANTS = {
    1: [
        Scenario(SHARE, "ONE_CPU WITH_ADVICE", "BREAK_NOTIFIER", "no ungraft before a zap"),
        Scenario(SHARE, "ONE_CPU WITH_ADVICE", "BREAK_INVALIDATING", "a fault grafts during a zap"),
        Scenario(SHARE, "ONE_CPU WITH_EXIT", "BREAK_RELEASE", "no ungraft before exit"),
    ],
    2: [
        Scenario(SHARE, "ONE_CPU WITH_LAYOUT", "BREAK_FLUSH", "no flush of a drained guest"),
        Scenario(SHARE, "WITH_LAYOUT", "BREAK_ORDER", "freed before it is unreachable"),
        Scenario(SHARE, "ONE_CPU WITH_RECLAIM", "BREAK_HOST_FLUSH", "no flush after the host's"),
    ],
    3: [
        Scenario(SHARE, "ONE_CPU WITH_LAYOUT WITH_WALKER", "BREAK_DRAIN", "drain without the lock"),
        Scenario(SHARE, "ONE_CPU WITH_LAYOUT WITH_WALKER", "BREAK_VMA_LOCK", "nor the VMA's lock"),
        Scenario(SHARE, "WITH_LAYOUT", "BREAK_FREEZE", "faults do not wait"),
        Scenario(
            SHARE,
            "ONE_CPU WITH_LAYOUT WITH_ATTACH",
            "BREAK_BORN",
            "a new window not frozen",
            slow=True,
        ),
        Scenario(SHARE, "ONE_CPU WITH_ADVICE WITH_WALKER", "BREAK_BLANK", "an entry back to none"),
        Scenario(
            SHARE,
            "ONE_CPU WITH_LAYOUT WITH_PATIENCE WITH_ATTACH",
            "BREAK_ANEW",
            "a freeze goes on after lost patience",
            slow=True,
        ),
        Scenario(
            SHARE,
            "ONE_CPU WITH_LAYOUT WITH_PATIENCE",
            "BREAK_CANCEL",
            "patience is lost during the change",
        ),
    ],
    4: [
        Scenario(SHARE, "ONE_CPU WITH_LAYOUT", "BREAK_LOCK_ORDER", "the host's lock taken first"),
        Scenario(
            SHARE,
            "ONE_CPU ONE_GUEST WITH_LAYOUT WITH_REMOTE",
            "BREAK_PASS",
            "a lock asked for twice",
            slow=True,
        ),
    ],
    5: [
        Scenario(RIGHTS, "", "BREAK_VIEW", "a reader on the writable view"),
        Scenario(RIGHTS, "", "BREAK_HOST_RIGHTS", "the host's mapping not asked"),
        Scenario(RIGHTS, "", "BREAK_MKWRITE", "the kernel makes an entry writable by itself"),
        Scenario(RIGHTS, "", "BREAK_PROTECT_FLUSH", "no flush in PROTECT"),
    ],
    6: [Scenario(RIGHTS, "", "BREAK_SHARED", "a private mapping in the host")],
    7: [
        Scenario(RIGHTS, "", "BREAK_CHARGE", "the host, which has no owner, asks first"),
        Scenario(RIGHTS, "", "BREAK_PRESENT", "it asks for what is gone again"),
    ],
    8: [
        Scenario(LIFE, "", "BREAK_WINDOW", "a window does not hold the region"),
        Scenario(LIFE, "", "BREAK_CREATOR", "the region goes with its creator"),
    ],
    9: [
        Scenario(LIFE, "", "BREAK_OWNER", "files do not hold the module"),
        Scenario(LIFE, "", "BREAK_FORGET", "unloaded with guests known"),
    ],
}
"""Of each invariant in docs/how-it-works.md, what breaks when it is not kept."""

LIMITS = [
    Scenario(SHARE, HELD, "BREAK_PATIENCE", "a fault waits for the lock of another", ends=True),
    Scenario(
        SHARE,
        BORN_FROZEN,
        "BREAK_PATIENCE",
        "a fault and the freeze wait for each other",
        slow=True,
        ends=True,
    ),
    Scenario(LOCKED, "", "BREAK_PIN", "reclaim takes a page"),
    Scenario(LOCKED, "", "BREAK_FILE", "the owner of a file takes a page"),
    Scenario(LOCKED, "", "BREAK_HALF", "what cannot be unmapped is unpinned"),
    Scenario(LOCKED, "", "BREAK_KEEPS", "UNMAP does not ask for windows"),
    Scenario(LOCKED, "", "BREAK_ASKED", "it asks before the freeze"),
    Scenario(LOCKED, "", "BREAK_BORN", "a new window not frozen"),
    Scenario(LOCKED, "", "BREAK_ATTACH", "a virtual machine and a movable region"),
    Scenario(LOCKED, "", "BREAK_KIND", "a movable mapping in a locked region"),
    Scenario(LOCKED, "", "BREAK_LAYOUT", "the kind asked before the lock", slow=True),
]
"""Of the limits in docs/how-it-works.md: who a change holds up, and a second MMU."""

SEED_RACES = [
    Scenario(SEED, "", "S1", "unlocks the lock of current->mm, which is not held"),
    Scenario(SEED, "", "S2", "reads a table that the host has freed"),
    Scenario(SEED, "", "S3", "marks another mapping than it made"),
    Scenario(SEED, "", "S4", "two paths change one VMA under two locks"),
]

SCENARIOS = [
    *HOLDS,
    *(one for each in INVARIANTS.values() for one in each),
    *LIMITS,
    *SEED_RACES,
]


def run(command: list[str], folder: Path) -> str:
    """Output of a command that must not fail."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
    return done.stdout


def check(scenario: Scenario, show: bool = False) -> Result:
    """Search all states.

    :raises RuntimeError: the search was cut short, which is no answer.
    """
    names = (*scenario.symbols.split(), scenario.broken, "FAIR" if scenario.ends else "")
    symbols = [f"-D{symbol}" for symbol in names if symbol]
    kind = ["-DNFAIR=3"] if scenario.ends else ["-DSAFETY", "-DNOCLAIM"]
    if show and not scenario.ends:
        kind.append("-DBFS")  # finds the shortest
    search = ["-a", "-f"] if scenario.ends else []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copy(SPEC / scenario.model, folder)
        start = time.monotonic()
        run(["spin", "-a", *symbols, scenario.model], folder)
        # to optimize takes longer than it saves
        run(["cc", "-O0", "-w", *kind, "-DCOLLAPSE", "-o", "pan", "pan.c"], folder)
        output = run(["./pan", *search, "-m1000000", "-n"], folder)
        seconds = time.monotonic() - start
        errors = re.search(r"errors: (\d+)", output)
        states = re.search(r"(\d+) states, stored", output)
        cut = "Search not completed" in output or "too small" in output
        if not errors or not states or (cut and errors[1] == "0"):
            raise RuntimeError(f"{scenario}: the search was cut short\n{output}")
        steps = ""
        if show and int(errors[1]):
            steps = run(["spin", "-t", "-p", "-g", *symbols, scenario.model], folder)
    return Result(int(errors[1]), int(states[1]), seconds, steps)


def main() -> int:
    """Run the scenarios; 1 when one is not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="leave out what takes longer")
    parser.add_argument("--show", metavar="SYMBOL", help="print that counterexample")
    args = parser.parse_args()
    if not shutil.which("spin"):
        print("SPIN is not installed; try: apt-get install spin", file=sys.stderr)
        return 1
    chosen = [
        one
        for one in SCENARIOS
        if not (args.show and one.broken != args.show) and not (args.quick and one.slow)
    ]
    if not chosen:
        print(f"no variant is called {args.show}", file=sys.stderr)
        return 2
    owner = {one: number for number, each in INVARIANTS.items() for one in each}
    wrong = states = 0
    start = time.monotonic()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda one: check(one, bool(args.show)), chosen)
        for scenario, result in zip(chosen, results, strict=True):
            good = (result.errors > 0) == bool(scenario.broken)
            wrong += not good
            states += result.states
            found = "ends" if scenario.ends else "holds"
            if scenario.broken:
                found = f"found: {scenario.why}"
            if scenario in owner:
                found = f"{owner[scenario]} {found}"
            verdict = found if good else f"WRONG: {result.errors} errors"
            names = " ".join((scenario.symbols, scenario.broken)).strip()
            print(
                f"{result.steps}{scenario.model:10} {names:60} {result.states:>11,} states "
                f"{result.seconds:5.1f} s  {verdict}",
                flush=True,
            )
    spent = os.times()
    print(
        f"{len(chosen)} scenarios, {states:,} states, {time.monotonic() - start:.0f} s "
        f"({spent.children_user + spent.children_system:.0f} s of processor time)"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
