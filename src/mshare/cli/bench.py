"""``mshare bench``, the main job."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from mshare import engines
from mshare.cli.arguments import argument, between
from mshare.cli.output import print_json, print_table, processes, progress_bar, say
from mshare.hugepages import reserved
from mshare.sizes import human, region_size

if TYPE_CHECKING:
    from mshare.bench import Progress, Row

SUMMARY = "let processes share one content through each engine, and show what each cost"
EXAMPLE = """\
  mshare bench --size 2G --processes 8 --plot pagetables.svg
  sudo mshare bench --reserve --repeat 3"""


def set_argparser(parser: argparse.ArgumentParser) -> None:
    names = [engine.name for engine in engines.ENGINES]
    parser.add_argument(
        "--engine", action="append", choices=names, help="measure this one (default: all that work)"
    )
    shared, text = parser.add_mutually_exclusive_group(), "of the float32 array (default 1G)"
    shared.add_argument("--size", type=argument(region_size), default="1G", help=text)
    shared.add_argument("--file", help="share the content of this file instead")
    many = between(int, 1)
    parser.add_argument("--processes", type=many, default=8, metavar="N", help="default 8")
    parser.add_argument(
        "--repeat", type=many, default=1, metavar="N", help="show medians of N runs"
    )
    parser.add_argument(
        "--reserve",
        action="store_true",
        help="as root: reserve the huge pages the run needs, and give them back after it",
    )
    parser.add_argument(
        "--plot", metavar="FILE", help="draw page tables over processes, .svg or .png"
    )
    parser.add_argument("--json", action="store_true", help="bytes and seconds, for programs")


def main(args: argparse.Namespace) -> int:
    from mshare import bench
    from mshare.bench import plot
    from mshare.bench.content import ArrayContent, FileContent

    if args.plot:
        plot.check(args.plot)
    content = FileContent(args.file) if args.file else ArrayContent(args.size)
    with ExitStack() as stack:
        if args.reserve:
            _reserve(stack, content.size)
        names = _usable(args.engine, content.size)
        steps = len(names) * args.repeat * args.processes
        with _progress(steps) as progress:
            rows = bench.run(
                content, names, processes=args.processes, repeat=args.repeat, progress=progress
            )
    if args.json:
        print_json(bench.as_json(rows))
    else:
        _print(rows, args.repeat)
    if args.plot:
        plot.draw(rows, args.plot)
        say(f"wrote {args.plot}")
    return 0 if all(row.content_ok for row in rows) else 3


def _reserve(stack: ExitStack, size: int) -> None:
    """Reserve huge pages; where that can't be done, say so and go on without."""
    try:
        stack.enter_context(reserved(size, say))
    except OSError as error:
        say(f"huge pages not reserved: {error.strerror}")


def _usable(asked: list[str] | None, size: int) -> list[str]:
    """Engines to measure; the ones that don't work are named, or an error if asked for."""
    usable = []
    for engine in engines.ENGINES:
        if asked and engine.name not in asked:
            continue
        check = engine.check(size)
        if check.works:
            usable.append(engine.name)
            continue
        cure = f"; to change it, as root: {check.cure}" if check.cure else ""
        if asked:
            raise OSError(None, f"engine '{engine.name}' can't be measured: {check.why}{cure}")
        say(f"left out: {engine.name}: {check.why}{cure}")
    if not usable:
        raise OSError(None, f"no engine has room for {human(size)}")
    return usable


@contextmanager
def _progress(steps: int) -> Iterator[Progress]:
    with progress_bar(steps) as (bar, task):
        yield lambda text, done: bar.update(task, description=text, completed=done)


def _print(rows: list[Row], repeat: int) -> None:
    first = rows[0]
    title = (
        f"{human(first.size_bytes)} shared by {processes(first.processes)}, Linux {first.kernel}"
    )
    if repeat > 1:
        title += f", medians of {repeat} runs"
    columns = (
        "engine",
        ">page tables,\nfirst process",
        ">each\nfurther one",
        ">faults,\nfirst",
        ">each\nfurther one",
        ">touch all pages,\nfirst",
        ">each\nfurther one",
        ">attach",
        "content",
    )
    print_table(
        columns,
        [
            (
                row.engine,
                human(row.page_table_bytes_first),
                _or_dash(row.page_table_bytes_per_process, human),
                f"{row.faults_first:,}",
                _or_dash(row.faults_per_process, "{:,}".format),
                _milliseconds(row.touch_seconds_first),
                _or_dash(row.touch_seconds_per_process, _milliseconds),
                f"{row.attach_seconds * 1e6:.0f} µs",
                "right" if row.content_ok else "WRONG",
            )
            for row in rows
        ],
        title,
    )
    plain = next((row for row in rows if row.engine == "shm"), None)
    for row in rows:
        if plain and row is not plain and row.touch_seconds_per_process:
            ratio = (plain.touch_seconds_per_process or 0) / row.touch_seconds_per_process
            saved = sum(plain.page_table_bytes) - sum(row.page_table_bytes)
            print(
                f"{row.engine}: a further process touches the content {ratio:.1f} times as fast "
                f"as with shm; {human(saved)} of page tables saved"
            )


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def _or_dash(value: float | None, show: object) -> str:
    return "-" if value is None else str(show(value))  # type: ignore[operator]
