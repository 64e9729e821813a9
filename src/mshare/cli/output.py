"""What commands print: tables for people, JSON for programs, messages on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID


def console(width: int | None = None, *, stderr: bool = False) -> Console:
    """Where rich writes. A reader that goes away is an error, as it is for ``print``."""
    from rich.console import Console

    class Pipe(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    return Pipe(width=width, stderr=stderr, highlight=False, markup=False, emoji=False)


def print_json(value: Any) -> None:
    """Print ``value`` as indented JSON."""
    print(json.dumps(value, indent=2))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str = "") -> None:
    """Print a table; columns whose heading starts with ``>`` are right-aligned."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=title or None, title_justify="left", pad_edge=False)
    for column in columns:
        right = column.startswith(">")
        table.add_column(
            column.removeprefix(">"), justify="right" if right else "left", overflow="fold"
        )
    for row in rows:
        table.add_row(*row)
    width = None if sys.stdout.isatty() else 200
    console(width).print(table)


def processes(number: int) -> str:
    """``"1 process"``, ``"1,500 processes"``."""
    return f"{number:,} {'process' if number == 1 else 'processes'}"


@contextmanager
def progress_bar(steps: int | None = None) -> Iterator[tuple[Progress, TaskID]]:
    """A bar on standard error, if that is a terminal, with what is being done beside it."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    shown = console(stderr=True)
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=shown, transient=True, disable=not shown.is_terminal) as bar:
        yield bar, bar.add_task("", total=steps)


def say(text: str) -> None:
    """A message for the user that is not the result."""
    print(text, file=sys.stderr, flush=True)
