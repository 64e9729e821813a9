"""``mshare map``."""

from __future__ import annotations

import argparse

import mshare
from mshare.cli.arguments import offset, size

SUMMARY = "put a file, or fresh memory, into a region (engine msharefs)"
EXAMPLE = """\
  mshare map features /data/part-2.bin --offset 1G --readonly
  mshare map features - --offset 2G --length 512M"""


def set_argparser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name")
    parser.add_argument("file", help="a path, or - for fresh memory, all zeros")
    parser.add_argument(
        "--offset", type=offset, default="0", metavar="SIZE", help="where in the region (0)"
    )
    parser.add_argument("--length", type=size, metavar="SIZE", help="how much (to the end)")
    parser.add_argument(
        "--file-offset", type=offset, default="0", metavar="SIZE", help="where in the file (0)"
    )
    parser.add_argument("--readonly", action="store_true", help="nobody may write through it")


def main(args: argparse.Namespace) -> int:
    with mshare.attach(args.name) as region:
        region.map(
            None if args.file == "-" else args.file,
            args.offset,
            args.length,
            args.readonly,
            file_offset=args.file_offset,
        )
    return 0
