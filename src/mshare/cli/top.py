"""``mshare top``."""

from __future__ import annotations

import argparse
import json
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mshare.cli.arguments import between
from mshare.cli.output import console, print_json
from mshare.sizes import human
from mshare.watch import Snapshot, rates, snapshot

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

SUMMARY = "watch regions, page tables, and the programs with most of them; q ends it"
EXAMPLE = "  mshare top\n  mshare top --once --json"

_WIDTH = 80
_FRAME_LINES = 7
"""Lines of a frame that are neither a region nor a program."""


def set_argparser(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    seconds = between(float, 0.1, 3600)
    add("--interval", type=seconds, default=2.0, metavar="SECONDS", help="between looks (2)")
    add("--once", action="store_true", help="show one interval and end")
    add("--programs", type=between(int, 1), default=10, metavar="N", help="how many to show (10)")
    add("--json", action="store_true", help="bytes, for programs; a line for each interval")


def main(args: argparse.Namespace) -> int:
    if args.once:
        before = snapshot()
        time.sleep(args.interval)
        after = snapshot()
        if args.json:
            print_json(_values(before, after, args.programs))
        else:
            console(_WIDTH).print(_frame(before, after, None, args.programs))
    elif args.json:
        for before, after in _looks(args.interval, _sleep):
            print(json.dumps(_values(before, after, args.programs)), flush=True)
    elif sys.stdout.isatty():
        _live(args.interval, args.programs)
    else:
        for before, after in _looks(args.interval, _sleep):
            console(_WIDTH).print(_frame(before, after, None, args.programs))
            sys.stdout.flush()
    return 0


def _looks(interval: float, wait: Callable[[float], bool]) -> Iterator[tuple[Snapshot, Snapshot]]:
    """A moment and the one before it, each ``interval``, until ``wait`` says that is enough."""
    before = snapshot()
    while not wait(interval):
        after = snapshot()
        yield before, after
        before = after


def _sleep(seconds: float) -> bool:
    time.sleep(seconds)
    return False


def _live(interval: float, programs: int) -> None:
    """On the whole screen until q, which is as it was afterwards."""
    from rich.live import Live

    screen = console()
    with _keys() as wait, Live(console=screen, screen=True, auto_refresh=False) as live:
        first = snapshot()
        live.update(_frame(first, first, screen.height, programs), refresh=True)
        for before, after in _looks(interval, wait):
            live.update(_frame(before, after, screen.height, programs), refresh=True)


@contextmanager
def _keys() -> Iterator[Callable[[float], bool]]:
    """A function that waits some seconds and is true when q was pressed meanwhile."""
    if not os.isatty(0):
        yield _sleep
        return

    def wait(seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if select.select([0], [], [], left)[0]:
                typed = os.read(0, 64)
                if not typed or b"q" in typed.lower():
                    return True
        return False

    saved = termios.tcgetattr(0)
    try:
        tty.setcbreak(0)
        yield wait
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, saved)


def _frame(before: Snapshot, after: Snapshot, height: int | None, programs: int) -> Group:
    """What is shown; with ``height``, not more lines than that."""
    from rich.console import Group
    from rich.text import Text

    share = 100 * after.page_tables / after.memory
    regions = sorted(after.regions, key=lambda region: region.size, reverse=True)
    room = len(regions) if height is None else max(height - _FRAME_LINES - programs, 1)
    if height is not None:
        programs = max(min(programs, height - _FRAME_LINES - min(room, len(regions))), 1)
    heading = f"{time.strftime('%H:%M:%S')}  page tables {human(after.page_tables)}"
    heading += f", {share:.1f} % of memory; {after.processes:,} processes"
    hidden = len(regions) - room
    rest = f"and {hidden} smaller regions" if hidden > 0 else ""
    per_second = rates(before, after)
    shown = _table(
        "region", "engine", ">size", ">memory", ">users", ">tables", ">faults/s", ">flush/s"
    )
    for region in regions[:room]:
        rate = per_second[region.name, region.engine]
        shown.add_row(
            region.name,
            region.engine,
            human(region.size),
            _or_dash(region.resident, human),
            _or_dash(region.attachments, "{:,}".format),
            _or_dash(region.page_tables, human),
            _or_dash(rate.faults, "{:,.0f}".format),
            _or_dash(rate.flushes, "{:,.0f}".format),
        )
    if not regions:
        shown.add_row("none")
    users = _table("program", ">processes", ">page tables", ">largest", ">PID")
    for program in after.programs[:programs]:
        users.add_row(
            program.name,
            f"{program.processes:,}",
            human(program.page_tables),
            human(program.largest),
            str(program.pid),
        )
    return Group(Text(heading, no_wrap=True, overflow="ellipsis"), Text(), shown, Text(rest), users)


def _table(*columns: str) -> Table:
    """A table whose first column gives way; headings that start with ``>`` are right-aligned."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, expand=True, header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(
            column.removeprefix(">"),
            justify="right" if column.startswith(">") else "left",
            no_wrap=True,
            overflow="ellipsis",
            ratio=None if number else 1,
        )
    return table


def _or_dash(value: Any, show: Callable[[Any], str]) -> str:
    return "-" if value is None else show(value)


def _values(before: Snapshot, after: Snapshot, programs: int) -> dict[str, Any]:
    per_second = rates(before, after)
    return {
        "time": time.time(),
        "interval_seconds": after.taken - before.taken,
        "page_table_bytes": after.page_tables,
        "memory_bytes": after.memory,
        "processes": after.processes,
        "regions": [
            {
                "name": region.name,
                "engine": region.engine,
                "size_bytes": region.size,
                "resident_bytes": region.resident,
                "attachments": region.attachments,
                "page_table_bytes": region.page_tables,
                "faults": region.faults,
                "faults_per_second": per_second[region.name, region.engine].faults,
                "flushes": region.flushes,
                "flushes_per_second": per_second[region.name, region.engine].flushes,
            }
            for region in after.regions
        ],
        "programs": [
            {
                "program": program.name,
                "processes": program.processes,
                "page_table_bytes": program.page_tables,
                "largest_bytes": program.largest,
                "largest_pid": program.pid,
            }
            for program in after.programs[:programs]
        ],
    }
