"""``mshare create``."""

from __future__ import annotations

import argparse

import mshare
from mshare import engines
from mshare.cli.arguments import argument
from mshare.errors import invalid
from mshare.regions import check_mode
from mshare.sizes import human, region_size

SUMMARY = "create a region"
EXAMPLE = "  mshare create features 4G --mode 0640"


def set_argparser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name")
    parser.add_argument(
        "size", type=argument(region_size), nargs="?", help="bytes, or a number and K, M, G, T or P"
    )
    text = "permission bits in octal (default 0600)"
    parser.add_argument("--mode", type=argument(_mode), help=text)
    parser.add_argument("--backing", metavar="FILE", help="a file to be the region's content")
    parser.add_argument("--locked", action="store_true", help="all in memory now, and never moved")
    parser.add_argument("--engine", choices=[engine.name for engine in engines.ENGINES])


def main(args: argparse.Namespace) -> int:
    if args.size is None and args.backing is None:
        raise invalid("give a size, or --backing and a file", args.name)
    with mshare.create(
        args.name,
        args.size,
        args.mode,
        backing=args.backing,
        engine=args.engine,
        locked=args.locked,
    ) as region:
        print(f"{region.name}: {human(region.size)} on engine {region.engine}")
    return 0


def _mode(text: str) -> int:
    try:
        return check_mode(int(text, 8))
    except ValueError:
        raise invalid("a mode is an octal number such as 0640", text) from None
