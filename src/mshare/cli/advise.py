"""``mshare advise``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager

from mshare import advice, pagetables
from mshare.advice import Advice, Progress, Target
from mshare.cli.arguments import between, size
from mshare.cli.output import print_json, processes, progress_bar
from mshare.sizes import human

SUMMARY = "find what many processes map here, what its page tables cost, and what to change"
EXAMPLE = "  mshare advise\n  sudo mshare advise --min 100M --json"

_HOW = """\
Counts shared mappings; memory that forked processes have in common is private and no case for
sharing. Page tables are counted in /proc/PID/pagemap: exactly in mappings of up to 1 GiB, in
larger ones from a sample if there are many, and never more than VmPTE. What would be saved is
with the engine msharefs, or by better alignment on hugetlbfs. As a user: your own processes; as
root: all."""


def set_argparser(parser: argparse.ArgumentParser) -> None:
    parser.description = f"{SUMMARY}\n\n{_HOW}"
    add = parser.add_argument
    add(
        "--min", type=size, default="1M", metavar="SIZE", help="leave out what would save less (1M)"
    )
    add(
        "--limit",
        type=between(int, 1),
        default=10,
        metavar="N",
        help="show so many, best first (10)",
    )
    add("--json", action="store_true", help="bytes, for programs")


def main(args: argparse.Namespace) -> int:
    with _progress() as progress:
        found = advice.scan(args.min, progress)
    targets = found.targets[: args.limit]
    if args.json:
        print_json(
            {
                "page_table_bytes_machine": int(pagetables.system()),
                "processes_read": found.read,
                "processes_unreadable": found.unreadable,
                "found": len(found.targets),
                "targets": [_values(target) for target in targets],
            }
        )
        return 0
    for number, target in enumerate(targets, 1):
        _show(number, target)
    _sum_up(found, len(targets), args.min)
    return 0


def _values(target: Target) -> dict[str, object]:
    return {
        "kind": target.kind,
        "path": target.path,
        "processes": len(target.pids),
        "pids": target.pids,
        "programs": target.programs,
        "size_bytes": target.size,
        "resident_bytes": target.resident,
        "page_table_bytes": target.page_tables,
        "saves_bytes": target.saves,
        "change": target.change,
    }


def _show(number: int, target: Target) -> None:
    programs = ", ".join(f"{name} ({count})" for name, count in list(target.programs.items())[:3])
    more = len(target.programs) - 3
    print(f"{number}. {target.path}")
    print(f"   saves {human(target.saves)} of {human(target.page_tables)} of page tables")
    print(
        f"   {target.kind}, {human(target.size)} mapped, {human(target.resident)} resident, "
        f"{processes(len(target.pids))}"
    )
    programs += f" and {more} more" if more > 0 else ""
    print(f"   programs: {programs}, such as PID {target.pids[0]}")
    print(f"   change: {target.change}\n")


def _sum_up(found: Advice, shown: int, minimum: int) -> None:
    if not shown:
        print(f"nothing found whose page tables would be {human(minimum)} less when shared")
    elif shown < len(found.targets):
        print(f"{len(found.targets) - shown} more: mshare advise --limit {len(found.targets)}")
    whole = human(pagetables.system())
    print(f"looked at {processes(found.read)}; page tables of all processes here: {whole}")
    if found.unreadable:
        how = "not even root may" if not os.geteuid() else "run it as root"
        print(f"could not be looked at: {found.unreadable:,} ({how})")


@contextmanager
def _progress() -> Iterator[Progress]:
    with progress_bar() as (bar, task):
        yield lambda text, done, total: bar.update(
            task, description=text, completed=done, total=total
        )
