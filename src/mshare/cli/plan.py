"""``mshare plan``."""

from __future__ import annotations

import argparse

from mshare import cost
from mshare.cli.arguments import argument, between, size
from mshare.cli.output import print_json, print_table, processes
from mshare.errors import invalid
from mshare.sizes import HUGE_PAGE, MAX_SIZE, PAGE_SIZE, human, parse_size, round_up

SUMMARY = "reckon what each engine would cost: page tables and faults"
EXAMPLE = "  mshare plan --size 300G --processes 1500"

_NOTES = {
    "msharefs": "one set of page tables",
    "hugetlb": "huge pages, reserved; tables shared for each whole GiB",
    "shm": "shared memory, and any file mapped MAP_SHARED; tables not shared",
    "private": "a copy in each process",
}


def set_argparser(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--size", type=argument(_size), required=True, help="of the memory that is shared")
    add("--processes", type=between(int, 1), required=True, metavar="N", help="that use all of it")
    text = "4K (default), or 2M: huge pages in shm"
    sizes = PAGE_SIZE, HUGE_PAGE
    add("--page-size", type=size, choices=sizes, default="4K", metavar="SIZE", help=text)
    add("--access", choices=("read", "write"), default="read", help="of the processes (read)")
    add("--json", action="store_true", help="bytes, for programs")


def _size(text: str) -> int:
    """Whole pages that a process can map."""
    number = parse_size(text)
    if number > MAX_SIZE:
        raise invalid(f"larger than a process can map ({human(MAX_SIZE)})", text)
    return round_up(number, PAGE_SIZE)


def main(args: argparse.Namespace) -> int:
    writing = args.access == "write"
    rows = cost.plan(args.size, args.processes, page_size=args.page_size, writing=writing)
    if args.json:
        print_json(
            {
                "size_bytes": args.size,
                "processes": args.processes,
                "page_size_bytes": args.page_size,
                "access": args.access,
                "engines": [
                    {
                        "engine": row.engine,
                        "page_table_bytes": row.page_tables,
                        "page_table_bytes_once": row.once,
                        "page_table_bytes_per_process": row.per_process,
                        "vmpte_bytes": row.vmpte,
                        "faults_first": row.faults_first,
                        "faults_further": row.faults_further,
                        "faults": row.faults_first + (args.processes - 1) * row.faults_further,
                        "content_bytes": row.content,
                    }
                    for row in rows
                ],
            }
        )
        return 0
    columns = (
        "engine",
        ">page tables\nin all",
        ">of that, each\nprocess",
        ">faults,\nfirst",
        ">each\nfurther one",
        ">content",
    )
    print_table(
        columns,
        [
            (
                row.engine,
                human(row.page_tables),
                human(row.per_process),
                f"{row.faults_first:,}",
                f"{row.faults_further:,}",
                human(row.content),
            )
            for row in rows
        ],
        f"{human(args.size)} in {processes(args.processes)}, each {args.access}s every page",
    )
    for row in rows:
        print(f"{row.engine}: {_NOTES[row.engine]}")
    return 0
