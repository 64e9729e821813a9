"""``mshare run``."""

from __future__ import annotations

import argparse
import errno
import os

from mshare import engines, preload
from mshare.cli import explain
from mshare.cli.arguments import size
from mshare.cli.output import say
from mshare.engines.msharefs import Msharefs

SUMMARY = "run a program whose large shared mappings then share page tables"
EXAMPLE = """\
  mshare run -- /usr/lib/postgresql/15/bin/postgres -D /srv/data
  mshare run --verbose --min-size 16M -- python3 service.py"""

NOTES = """\
The program and all it starts get a preload library (LD_PRELOAD). Large shared memory that one of
them maps, anonymous, of System V, a memfd or a file, it then sees through the kernel module. The
program needs no change, and what can't be shared stays as it is: docs/unmodified-programs.md

exit codes: the program's own, for mshare run becomes it. Before that: 1 nothing can be shared
here, a message says why; 2 wrong usage; 126 the program can't be run, or takes no preload
library; 127 there is no such program"""


def set_argparser(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    limit = "leave smaller mappings alone (64M)"
    add("--min-size", type=size, default="64M", metavar="SIZE", help=limit)
    add("--verbose", action="store_true", help="say on standard error what is shared, what not")
    add("--fallback", action="store_true", help="run it all the same where nothing can be shared")
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--print", action="store_true", help="print the environment, and run nothing")
    text = "the program and its arguments, after --"
    way.add_argument("argv", nargs="*", default=[], metavar="PROGRAM", help=text)
    parser.epilog = f"{(parser.epilog or '').split('exit codes')[0]}{NOTES}"


def main(args: argparse.Namespace) -> int:
    if args.print:
        for name, value in _environment(args.min_size, verbose=args.verbose).items():
            print(f"{name}='{value}'")
        return 0
    try:
        program = preload.find_program(args.argv[0])
    except FileNotFoundError as error:
        return _stop(error, 127)
    except PermissionError as error:
        return _stop(error, 126)
    environment = dict(os.environ)
    try:
        preload.check_program(program)
        environment |= _environment(args.min_size, verbose=args.verbose)
    except OSError as error:
        if not args.fallback:
            return _stop(error, 126 if error.errno == errno.ENOEXEC else 1)
        _stop(error, 0)
    try:
        os.execve(program, args.argv, environment)
    except OSError as error:
        return _stop(error, 126)


def _environment(size: int, *, verbose: bool) -> dict[str, str]:
    """What makes programs load the library. :raises OSError: nothing can be shared here."""
    engine = engines.by_name(Msharefs.name)
    assert isinstance(engine, Msharefs)
    preload.check_module(engine)
    library = str(preload.build())
    if set(library) & set(" :$"):
        message = "no path for LD_PRELOAD; set XDG_CACHE_HOME to a folder without blanks"
        raise OSError(errno.EINVAL, message, library)
    others = [name for name in os.environ.get("LD_PRELOAD", "").split(":") if name]
    return {
        "LD_PRELOAD": ":".join([*others, library] if library not in others else others),
        "MSHARE_RUN_MIN": str(size),
        "MSHARE_RUN_VERBOSE": str(int(verbose)),
    }


def _stop(error: OSError, code: int) -> int:
    say(f"mshare run: {explain(error)}")
    return code
