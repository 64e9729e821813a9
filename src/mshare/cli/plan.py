"""``mshare plan``."""

from __future__ import annotations

import argparse

from mshare import cost
from mshare.cli.output import print_json, print_table
from mshare.errors import invalid
from mshare.sizes import MAX_SIZE, PAGE_SIZE, human, parse_size, round_up

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
    add("--size", required=True, help="of the memory that is shared")
    add("--processes", type=int, required=True, metavar="N", help="that use all of it")
    add("--page-size", default="4K", metavar="SIZE", help="4K (default), or 2M: huge pages in shm")
    add("--access", choices=("read", "write"), default="read", help="of the processes (read)")
    add("--json", action="store_true", help="bytes, for programs")


def main(args: argparse.Namespace) -> int:
    size = parse_size(args.size)
    if size > MAX_SIZE:
        raise invalid(f"larger than a process can map ({human(MAX_SIZE)})", args.size)
    page_size = parse_size(args.page_size)
    size = round_up(size, PAGE_SIZE)
    rows = cost.plan(size, args.processes, page_size=page_size, writing=args.access == "write")
    if args.json:
        print_json(
            {
                "size_bytes": size,
                "processes": args.processes,
                "page_size_bytes": page_size,
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
        f"{human(size)} in {args.processes:,} processes, each {args.access}s every page",
    )
    for row in rows:
        print(f"{row.engine}: {_NOTES[row.engine]}")
    return 0
