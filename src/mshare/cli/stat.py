"""``mshare stat``."""

from __future__ import annotations

import argparse
from datetime import datetime

import mshare
from mshare import engines
from mshare.cli.ls import owner
from mshare.cli.output import print_json
from mshare.sizes import human

SUMMARY = "show one region"
EXAMPLE = "  mshare stat features"

_BYTES = (
    "alignment",
    "pagetable_bytes",
    "resident_bytes",
    "mapped_bytes",
    "mapped_end",
    "locked_bytes",
)


def set_argparser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name")
    parser.add_argument("--engine", choices=[engine.name for engine in engines.ENGINES])
    parser.add_argument("--json", action="store_true", help="sizes in bytes, for programs")


def main(args: argparse.Namespace) -> int:
    region = mshare.stat(args.name, engine=args.engine)
    counters = engines.by_name(region.engine).counters(region.name)
    if args.json:
        print_json(region._asdict() | ({"counters": counters} if counters else {}))
        return 0
    created = datetime.fromtimestamp(region.created).astimezone()
    lines = {
        "name": region.name,
        "engine": f"{region.engine} ({engines.by_name(region.engine).summary})",
        "size": f"{human(region.size)} ({region.size} bytes)",
        "in memory": "not known" if region.resident is None else human(region.resident),
        "mode": f"{region.mode:04o}",
        "owner": f"{owner(region.uid)} (uid {region.uid}, gid {region.gid})",
        "created": f"{created:%Y-%m-%d %H:%M:%S %z}",
        "content": region.backing or "memory",
    }
    if region.broken:
        lines["broken"] = f"{region.broken}; remove it: mshare rm {region.name}"
    for field, count in counters.items():
        if field not in ("flags", "region_size"):
            shown = human(count) if field in _BYTES else f"{count:,}"
            lines[field.removesuffix("_bytes").replace("_", " ")] = shown
    for key, value in lines.items():
        print(f"{key + ':':<16}{value}")
    return 0
