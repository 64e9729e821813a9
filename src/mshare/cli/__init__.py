"""The command ``mshare``: one file a sub-command, this one to choose among them.

A sub-command's file has ``SUMMARY``, ``EXAMPLE``, ``set_argparser(parser)`` and
``main(args) -> exit code``. What it can't do it raises, and this file tells the user.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from types import FrameType
from typing import Any, NoReturn

import mshare

COMMANDS = (
    "create",
    "ls",
    "stat",
    "rm",
    "cp-in",
    "map",
    "unmap",
    "protect",
    "bench",
    "doctor",
    "advise",
    "plan",
    "top",
    "export",
    "run",
    "module",
    "lab",
)

EXIT_CODES = """\
exit codes: 0 done; 1 it could not be done, a message says why; 2 wrong usage;
3 content was found wrong (bench); 129, 130 and 143 interrupted, no region half made;
141 the reader of the output went away"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line with every sub-command."""
    parser = argparse.ArgumentParser(
        prog="mshare",
        description="Memory shared between processes, page tables too.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mshare {mshare.__version__}")
    parser.add_argument(
        "--print-completion",
        choices=("bash", "zsh", "tcsh"),
        action=_Completion,
        help="print a completion script for this shell",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module: Any = import_module(f"mshare.cli.{name.replace('-', '_')}")
        command = commands.add_parser(
            name,
            help=module.SUMMARY,
            description=module.SUMMARY,
            epilog=f"example:\n{module.EXAMPLE}\n\n{EXIT_CODES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.set_argparser(command)
        command.set_defaults(main=module.main)
    return parser


class _Completion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *args: Any, **_: Any) -> NoReturn:
        import shtab

        print(shtab.complete(parser, args[1]))
        parser.exit()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    command = "mshare"
    try:
        try:
            args = build_parser().parse_args(arguments)
            command = f"mshare {args.command}"
            code: int = args.main(args)
        except SystemExit:
            _flush()
            raise
        _flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _discard_output()
        return 141
    except (OSError, ValueError, TypeError) as error:
        print(f"{command}: {explain(error)}", file=sys.stderr)
        return 1


def _flush() -> None:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _discard_output()
        message = f"all is done, but can't be told: {error.strerror}"
        raise OSError(error.errno, message, "standard output") from None


def _discard_output() -> None:
    """Let what is still to be written go nowhere, or Python would complain at its end."""
    with open(os.devnull, "wb") as null:
        os.dup2(null.fileno(), sys.stdout.fileno())


def explain(error: Exception) -> str:
    """The error as a line for people: what, the message, what to do."""
    if isinstance(error, OSError) and error.strerror:
        thing = "" if error.filename is None else f"{error.filename!r}: "
        return thing + error.strerror
    return str(error)


def run(arguments: Sequence[str] | None = None) -> NoReturn:
    """The entry point of the command."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGHUP, end)
    _open_missing()
    sys.exit(main(arguments))


def _open_missing() -> None:
    """Open /dev/null for standard streams that are closed, lest a region get their number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            fd = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(fd, True)
            setattr(sys, name, open(fd, mode))  # noqa: SIM115
