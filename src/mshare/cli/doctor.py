"""``mshare doctor``."""

from __future__ import annotations

import argparse
import platform

from mshare import engines, module
from mshare.cli.output import print_json
from mshare.sizes import PAGE_SIZE, human, region_size

SUMMARY = "show which engines work here, why not, and the command that changes it"
EXAMPLE = "  mshare doctor --size 4G"


def set_argparser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", help="of the region you want (default: one page)")
    parser.add_argument("--json", action="store_true", help="for programs")


def main(args: argparse.Namespace) -> int:
    size = region_size(args.size) if args.size else PAGE_SIZE
    checks = {engine.name: engine.check(size) for engine in engines.ENGINES}
    if not checks["msharefs"].works:
        checks["msharefs"] = _module_check(checks["msharefs"])
    best = next((name for name, check in checks.items() if check.works), None)
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
        for engine in engines.ENGINES:
            _show(engine, checks[engine.name], engine.name == best)
    return 0 if best else 1


def _module_check(check: engines.Check) -> engines.Check:
    """Why the module does not serve here: the first obstacle, and the others as notes."""
    problems = module.status().problems
    if not problems:
        return check
    (why, cure), *others = problems
    return engines.Check(False, why, cure, tuple(f"{what}; then: {how}" for what, how in others))


def _show(engine: engines.Engine, check: engines.Check, best: bool) -> None:
    chosen = ", and is chosen" if best else ""
    state = f"works{chosen}" if check.works else "does not work"
    print(f"\n{engine.name}: {state} ({engine.summary})")
    print(f"  {check.why}")
    if check.cure:
        print(f"  to change it, as root: {check.cure}")
    for note in check.notes:
        print(f"  note: {note}")
