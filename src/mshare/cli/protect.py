"""``mshare protect``."""

from __future__ import annotations

import argparse

import mshare
from mshare.cli.arguments import offset, size

SUMMARY = "forbid or allow writing to a part of a region, in all processes (engine msharefs)"
EXAMPLE = "  mshare protect features 0 1G --readonly"


def set_argparser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name")
    parser.add_argument("offset", type=offset, help="where in the region")
    parser.add_argument("length", type=size, help="how much")
    right = parser.add_mutually_exclusive_group(required=True)
    right.add_argument("--readonly", action="store_true", help="nobody may write there any more")
    right.add_argument("--writable", action="store_true", help="writable attachments may again")


def main(args: argparse.Namespace) -> int:
    with mshare.attach(args.name) as region:
        region.protect(args.offset, args.length, readonly=args.readonly)
    return 0
