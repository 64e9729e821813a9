"""``mshare ls``."""

from __future__ import annotations

import argparse
import pwd

import mshare
from mshare import engines
from mshare.cli.output import print_json, print_table
from mshare.sizes import human

SUMMARY = "list the regions of this machine"
EXAMPLE = "  mshare ls --json"


def set_argparser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engine", choices=[engine.name for engine in engines.ENGINES])
    parser.add_argument("--json", action="store_true", help="sizes in bytes, for programs")


def main(args: argparse.Namespace) -> int:
    regions = mshare.list(args.engine)
    if args.json:
        print_json([region._asdict() for region in regions])
    elif regions:
        columns = ("name", "engine", ">size", ">in memory", "mode", "owner", "content")
        print_table(columns, map(_row, regions))
    return 0


def _row(region: mshare.Stat) -> tuple[str, ...]:
    return (
        region.name,
        region.engine,
        human(region.size),
        "" if region.resident is None else human(region.resident),
        f"{region.mode:04o}",
        owner(region.uid),
        region.broken or region.backing or "memory",
    )


def owner(uid: int) -> str:
    """The user's name, or the number of one without a name."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
