"""``mshare doctor``."""

from __future__ import annotations

import argparse
import platform

from mshare import engines
from mshare.cli.arguments import argument
from mshare.cli.output import print_json
from mshare.sizes import PAGE_SIZE, human, region_size

SUMMARY = "show which engines work here, why not, and the command that changes it"
EXAMPLE = "  mshare doctor --size 4G"


def set_argparser(parser: argparse.ArgumentParser) -> None:
    text = "of the region you want (default: one page)"
    parser.add_argument("--size", type=argument(region_size), help=text)
    parser.add_argument("--json", action="store_true", help="for programs")


def main(args: argparse.Namespace) -> int:
    size = args.size or PAGE_SIZE
    asked = engines.asked(None)
    checks = {engine.name: engine.check(size) for engine in engines.ENGINES}
    able = [name for name in ([asked.name] if asked else checks) if checks[name].works]
    best = able[0] if able else None
    if args.json:
        print_json(
            {
                "kernel": platform.release(),
                "size_bytes": size,
                "best": best,
                "engines": [
                    {
                        "engine": engine.name,
                        "summary": engine.summary,
                        **checks[engine.name]._asdict(),
                    }
                    for engine in engines.ENGINES
                ],
            }
        )
    else:
        what = f"a region of {human(size)}" if args.size else "regions"
        print(f"Linux {platform.release()}, engines for {what}, best first:")
        if asked:
            print(f"MSHARE_ENGINE allows {asked.name} alone")
        for engine in engines.ENGINES:
            _show(engine, checks[engine.name], engine.name == best)
    return 0 if best else 1


def _show(engine: engines.Engine, check: engines.Check, best: bool) -> None:
    chosen = ", and is chosen" if best else ""
    state = f"works{chosen}" if check.works else "does not work"
    print(f"\n{engine.name}: {state} ({engine.summary})")
    print(f"  {check.why}")
    if check.cure:
        print(f"  to change it, as root: {check.cure}")
    for note in check.notes:
        print(f"  note: {note}")
