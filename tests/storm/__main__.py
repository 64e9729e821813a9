"""``python -m tests.storm``: run it in the lab, with a disk and swap.

    python -m tests.storm --build
    mshare lab --memory 2G --disk 1G --swap 512M --timeout 1500 -- \
        .venv/bin/python -m tests.storm --duration 20m
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from tests.storm import books, disturb, watchdog
from tests.storm.control import Control
from tests.storm.crew import MAIN, Crew
from tests.storm.hazards import ELSEWHERE, HAZARDS, Plan, plan

_SHM, _DISK = Path("/dev/shm/storm"), Path("/mnt/disk/storm")
_PROGRESS = 30
#: Seconds after which something of everything must have happened, and of what is rare.
_ENOUGH, _LONG = 120, 600
_SUBREAPER = 36
_FLAGS = ["-D_GNU_SOURCE", "-O2", "-pthread", "-Wall", "-Wextra", "-Wno-unused-parameter"]


def _seconds(text: str) -> float:
    unit = {"s": 1, "m": 60, "h": 3600}.get(text[-1])
    return float(text[:-1]) * unit if unit else float(text)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.storm", description=__doc__)
    parser.add_argument("--duration", type=_seconds, default=180, metavar="TIME", help="20m, 90s")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(32))
    parser.add_argument("--hazard", action="append", default=[], choices=HAZARDS, metavar="NAME")
    parser.add_argument("--processes", type=int, default=16, metavar="2..64")
    parser.add_argument("--hang", type=_seconds, default=600, help="without a sign of life")
    parser.add_argument("--build", action="store_true", help="compile its C program, and no more")
    parser.add_argument("--list", action="store_true", help="the hazards")
    parser.add_argument("--json", action="store_true", help="totals for a program")
    options = parser.parse_args()
    if not 2 <= options.processes <= 64:
        parser.error("2 to 64 processes")
    return options


def build() -> Path:
    """The C program, where it is older than its source. In an emulated machine that is slow."""
    folder = Path(__file__).parent
    worker = folder.parents[1] / "build" / "storm-worker"
    sources = sorted(folder.glob("*.c"))
    newest = max(path.stat().st_mtime for path in [*sources, folder / "storm.h"])
    if not worker.exists() or worker.stat().st_mtime < newest:
        worker.parent.mkdir(exist_ok=True)
        subprocess.run(["gcc", *_FLAGS, "-o", worker, *sources], check=True)
    return worker


def _hog_mib() -> int:
    """So much that the rest has to be reclaimed, and that swap has room for it."""
    values = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, value = line.split(":")
        values[name] = int(value.split()[0]) >> 10
    return max(64, values["MemAvailable"] - 96 + values["SwapFree"] // 4)


def _say(crew: Crew, control: Control, start: float) -> None:
    counts = {"lives": crew.lives, "kills": crew.kills, "now": len(crew.members)}
    text = " ".join(f"{name} {value}" for name, value in (counts | control.counts()).items())
    print(f"{time.monotonic() - start:5.0f} s: {text}", flush=True)


def _blow(crew: Crew, control: Control, duration: float) -> None:
    """Until the time is over or something was found."""
    start = time.monotonic()
    told = start
    crew.start()
    while not control.stop and time.monotonic() < start + duration:
        crew.turn()
        control.beat(MAIN, "main", os.getpid())
        if time.monotonic() > told + _PROGRESS:
            told += _PROGRESS
            _say(crew, control, start)
        time.sleep(0.05)
    if control.finding:
        print(f"found after {time.monotonic() - start:.1f} s", flush=True)


def _close(crew: Crew, control: Control, hang: float) -> None:
    """Everybody goes; then the content is whole and nothing is attached."""
    if not crew.end(hang):
        seats = [member.seat for member in crew.members.values()]
        print(watchdog.report(control, seats, hang), file=sys.stderr, flush=True)
        control.find(f"processes {seats} do not end")
    if control.finding:
        return
    control.stop = False
    pid = crew.spawn(0, "verify", [""], None)
    del crew.members[pid]
    if os.waitpid(pid, 0)[1]:
        control.find("the content could not be verified")
    deadline = time.monotonic() + 20
    while any(books.attachments().values()) and time.monotonic() < deadline:
        time.sleep(0.2)
    if any(books.attachments().values()):
        control.find(f"windows are left: {books.attachments()}")


def _idle(chosen: Plan, control: Control, before: dict[str, int], duration: float) -> list[str]:
    """What did not happen once, though it was asked for: then nothing was found of it either."""
    wanted = {"attaches", "checks", "stores"}
    if chosen.layout:
        wanted |= {"layout_changes", "refused"}
    for action, name in (("fork", "forks"), ("move", "moves"), ("smaps", "walks")):
        if action in chosen.actions:
            wanted.add(name)
    may_register = "io-uring" in chosen.actions and not os.uname().release.startswith("6.1.")
    if may_register and duration >= _LONG:
        wanted.add("registered")
    counts, after = control.counts(), disturb.events()
    idle = {name for name in wanted if not counts[name]}
    idle |= {name for name in before.keys() & chosen.disturbances if after[name] == before[name]}
    return sorted(idle - set(_impossible(chosen)))


def _impossible(chosen: Plan) -> dict[str, str]:
    """What cannot happen on this machine, and why."""
    if "numa" in chosen.disturbances and disturb.nodes() < 2:
        return {"numa": "this machine has one node; --kernel-args numa=fake=2 gives it two"}
    return {}


def _remove() -> None:
    for path in Path(books.MOUNT).glob("storm-*"):
        path.unlink()
    for folder in (_SHM, _DISK):
        shutil.rmtree(folder, ignore_errors=True)


def _storm(options: argparse.Namespace, worker: Path) -> int:
    chosen = plan(options.hazard)
    control = Control(Path("/dev/shm/storm-control"), worker, options.processes)
    disturb.make_groups()
    # what it touches first is charged to the workers' group, and reclaimed from there
    environment = {"STORM_CGROUP": str(disturb.WORKERS)}
    command: list[str | Path] = [worker, "setup", control.path, "0", "0", ""]
    subprocess.run(command, check=True, env=environment)
    # too little memory is for the workers: who watches them stays
    Path("/proc/self/oom_score_adj").write_text("-1000")
    settings = disturb.Settings(chosen.disturbances, options.hang)
    dog = watchdog.watch(control, options.hang)
    crew = Crew(worker, control, chosen, options.seed, options.processes, _hog_mib())
    start, events = time.monotonic(), disturb.events()
    try:
        _blow(crew, control, options.duration)
        _close(crew, control, options.hang)
        idle = _idle(chosen, control, events, options.duration)
        if idle and not control.finding and options.duration >= _ENOUGH:
            control.find(f"nothing came of: {', '.join(idle)}")
    finally:
        settings.restore()
        # it ends by itself after a report
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(dog, signal.SIGKILL)
            os.waitpid(dog, 0)
        disturb.remove_groups()
        control.path.unlink()
    _say(crew, control, start)
    totals = {"seed": options.seed, "seconds": round(time.monotonic() - start)}
    totals |= {"lives": crew.lives, "kills": crew.kills} | control.counts()
    if options.json:
        print(json.dumps(totals | {"finding": control.finding or None}))
    if control.finding:
        print(f"FOUND: {control.finding}", file=sys.stderr, flush=True)
    return 1 if control.finding else 0


def main() -> int:
    """The exit status: 0 if nothing was found and nothing is left."""
    options = _arguments()
    if options.list:
        for name, hazard in HAZARDS.items():
            print(f"{name:14} {hazard.text}")
        for name, text in ELSEWHERE.items():
            print(f"({name}: {text})")
        return 0
    if options.build:
        build()
        return 0
    for path in (Path(books.MOUNT) / "mshare_info", Path("/mnt/disk/lost+found")):
        if not path.exists():
            print(f"{path} is missing: run this by mshare lab --disk 1G", file=sys.stderr)
            return 2
    names = " ".join(options.hazard) or "all hazards"
    print(
        f"{os.uname().release}: {names}, {options.processes} processes, "
        f"{options.duration:.0f} s, --seed {options.seed}",
        flush=True,
    )
    for what, why in _impossible(plan(options.hazard)).items():
        print(f"not tried: {what}: {why}", flush=True)
    Path("/proc/sys/kernel/core_pattern").write_text("/dev/shm/storm/core")
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    worker = build()
    before = books.count()
    status = _storm(options, worker)
    _remove()
    after, left = books.settle(before, 60)
    for name in before:
        print(f"{name}: {before[name]} before, {after[name]} after")
    for line in left:
        print(f"LEFT: {line}", file=sys.stderr)
    users = books.module_users()
    if users:
        print(f"LEFT: {users} references to the module", file=sys.stderr)
    print("nothing found" if not (status or left or users) else "FAILED", flush=True)
    return 1 if status or left or users else 0


if __name__ == "__main__":
    sys.exit(main())
