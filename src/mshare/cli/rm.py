"""``mshare rm``."""

from __future__ import annotations

import argparse
import sys

import mshare
from mshare import engines
from mshare.cli import explain

SUMMARY = "remove regions; who is attached keeps the memory until it closes"
EXAMPLE = "  mshare rm features labels"


def set_argparser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="+")
    parser.add_argument("--engine", choices=[engine.name for engine in engines.ENGINES])


def main(args: argparse.Namespace) -> int:
    code = 0
    for name in args.name:
        try:
            mshare.unlink(name, engine=args.engine)
        except (OSError, ValueError) as error:
            print(f"mshare rm: {explain(error)}", file=sys.stderr)
            code = 1
    return code
