"""``mshare module``."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from mshare import module
from mshare.cli.output import print_json, say

SUMMARY = "build, install, load and unload the kernel module, or say what stands in the way"
EXAMPLE = "  mshare module status\n  sudo mshare module load"

ACTIONS = {
    "build": "build the module for the running kernel and print where it is",
    "install": "install it for good (DKMS if available)",
    "load": "load it, built here if not installed, and mount msharefs",
    "unload": "unmount and unload; says who still uses it",
    "status": "loaded, mounted, signing, headers; what to do about what is missing",
}


def set_argparser(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, text in ACTIONS.items():
        action = actions.add_parser(name, help=text, description=text)
        if name in ("build", "install", "load"):
            action.add_argument("--source", type=Path, metavar="DIR", help="sources (kmod/)")
        elif name == "status":
            action.add_argument("--json", action="store_true", help="for programs")


def main(args: argparse.Namespace) -> int:
    match args.action:
        case "build":
            print(module.build(args.source))
        case "install":
            print(module.install(args.source))
        case "load":
            print(module.load(args.source))
        case "unload":
            print(module.unload())
        case _:
            return _status(args.json)
    return 0


def _status(json: bool) -> int:
    """0 if the module is loaded and mounted, else 1."""
    found = module.status()
    if json:
        problems = [{"what": what, "cure": cure} for what, cure in found.problems]
        print_json(asdict(found) | {"problems": problems})
    else:
        supported = "supported" if found.kernel_supported else "not supported"
        print(f"kernel      {found.kernel} ({supported})")
        print(f"headers     {found.headers or 'not installed'}")
        print(f"installed   {found.installed or 'no'}")
        print(f"DKMS        {_yes(found.dkms)}")
        print(f"loaded      {_loaded(found)}")
        print(f"mounted     {_yes(found.mounted)}")
        print(f"Secure Boot {_yes(found.secure_boot)}")
        print(f"lockdown    {found.lockdown or 'not in this kernel'}")
        print(f"signature   {'enforced' if found.signature_enforced else 'not enforced'}")
        for what, cure in found.problems:
            say(f"{what}\n  to change it: {cure}")
    return 0 if found.loaded and found.mounted else 1


def _loaded(found: module.Status) -> str:
    if not found.loaded:
        return "no"
    return f"yes, version {found.version or 'unknown'}, used {found.users or 0} times"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
