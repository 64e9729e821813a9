"""``mshare unmap``."""

from __future__ import annotations

import argparse

import mshare
from mshare.cli.arguments import offset, size

SUMMARY = "take a part out of a region; touching it is then SIGSEGV (engine msharefs)"
EXAMPLE = "  mshare unmap features 1G 512M"


def set_argparser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name")
    parser.add_argument("offset", type=offset, help="where in the region")
    parser.add_argument("length", type=size, help="how much")


def main(args: argparse.Namespace) -> int:
    with mshare.attach(args.name) as region:
        region.unmap(args.offset, args.length)
    return 0
