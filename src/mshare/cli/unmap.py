"""``mshare unmap``."""

from __future__ import annotations

import argparse

import mshare
from mshare.sizes import parse_offset

SUMMARY = "take a part out of a region; touching it is then SIGSEGV (engine msharefs)"
EXAMPLE = "  mshare unmap features 1G 512M"


def set_argparser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name")
    parser.add_argument("offset", help="where in the region")
    parser.add_argument("length", help="how much")


def main(args: argparse.Namespace) -> int:
    with mshare.attach(args.name) as region:
        region.unmap(parse_offset(args.offset), args.length)
    return 0
