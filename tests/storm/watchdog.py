"""A process that sees when another one no longer moves, and reports it. Nothing hangs silently."""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from tests.storm.control import SEATS, Control
from tests.storm.crew import MAIN


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _state(folder: Path) -> str:
    return next(
        (line.split()[1] for line in _read(folder / "status").splitlines() if "State:" in line), ""
    )


def _show(pid: int) -> str:
    """Every thread of a process: state and where in the kernel it is."""
    text = ""
    for task in sorted(Path(f"/proc/{pid}/task").glob("*")):
        text += f"  {task.name} {_read(task / 'comm').strip()} {_state(task)}\n"
        text += "".join(f"    {line}\n" for line in _read(task / "stack").splitlines())
    return text


def report(control: Control, stuck: list[int], seconds: float) -> str:
    """What is known of the seats that stopped, and of everything that waits for ever."""
    text = f"no sign of life for {seconds:.0f} s:\n"
    for seat in stuck:
        pid, step, action = control.seat(seat)
        text += f"process {seat}, pid {pid}, step {step}, {action}\n{_show(pid)}"
    text += "all that wait without being killable:\n"
    for folder in Path("/proc").glob("[0-9]*"):
        if _state(folder) == "D":
            text += _show(int(folder.name))
    for key in "wl":
        with suppress(OSError):
            Path("/proc/sysrq-trigger").write_text(key)
    return text


def watch(control: Control, limit: float) -> int:
    """Fork the watchdog; its pid. It ends all when somebody makes no step for ``limit`` seconds."""
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    seen: dict[int, tuple[tuple[int, int], float]] = {}
    while os.getppid() == parent:
        time.sleep(2)
        now = time.monotonic()
        stuck = []
        for seat in range(SEATS):
            owner = control.seat(seat)[0]
            mark = (owner, control.beats(seat))
            if not owner or seat not in seen or seen[seat][0] != mark:
                seen[seat] = (mark, now)
            elif now - seen[seat][1] > limit and os.path.exists(f"/proc/{owner}"):
                stuck.append(seat)
        if stuck:
            print(report(control, stuck, limit), file=sys.stderr, flush=True)
            control.find(f"hang of {', '.join(map(str, stuck))}")
            if MAIN in stuck:
                os.kill(parent, signal.SIGKILL)
            break
    os._exit(0)
