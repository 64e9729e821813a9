"""``mshare lab``."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import termios
import tty
from pathlib import Path

from mshare.cli import explain
from mshare.cli.arguments import between, size
from mshare.cli.output import say
from mshare.lab import EXIT_LAB, Options, Result, command_line, run
from mshare.lab.kmsg import kernels_races

SUMMARY = "boot a stock kernel with the module in QEMU and run a command there"
EXAMPLE = "  mshare lab --kernel 6.1 -- mshare bench"

STATUS = """\
mshare lab exits with the command's own status (128+N for signal N), or
70 the kernel log holds a WARNING, BUG, Oops or the like, whatever the command's status;
124 a time limit passed; 125 the lab could not run the command or lost some output"""

_REPORTS_SHOWN = 5
_RACES_SHOWN = 10
_NO_LIMIT = 10**9


def set_argparser(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--kernel", metavar="6.1|6.12|PATH", help="series, bzImage or build tree (newest series)")
    add("--memory", type=size, default="2G", metavar="SIZE", help="of the machine (2G)")
    add("--cpus", type=between(int, 1), default=2, metavar="N", help="of the machine (2)")
    text = "seconds, boot included (600; for a shell none)"
    add("--timeout", type=between(float, 0.1, _NO_LIMIT), metavar="S", help=text)
    add("--accel", choices=("auto", "kvm", "tcg"), default="auto", help="auto: KVM if it boots")
    add("--one-thread", action="store_true", help="emulated processors take turns")
    add("--disk", type=size, metavar="SIZE", help="an empty ext4 disk at /mnt/disk")
    add("--swap", type=size, metavar="SIZE", help="a swap device")
    text = "huge pages of 2 MiB to reserve"
    add("--hugepages", type=between(int, 0), default=0, metavar="N", help=text)
    add("--write", type=Path, metavar="DIR", help="a folder here that the command may write to")
    add("--kernel-args", default="", metavar="ARGS", help="more kernel parameters")
    add("--cpu-model", default="", metavar="MODEL", help="QEMU's name of the processor")
    add("--log", type=Path, metavar="FILE", help="write the kernel log there")
    module = parser.add_mutually_exclusive_group()
    module.add_argument("--module", type=Path, metavar="PATH", help="sources or .ko (kmod/)")
    module.add_argument("--no-module", action="store_true", help="boot without the module")
    add("--dry-run", action="store_true", help="print the QEMU command and stop")
    add("argv", nargs="*", metavar="COMMAND", help="after --; without one, a shell")
    parser.epilog = f"{parser.epilog or ''}\n\n{STATUS}".lstrip()


def main(args: argparse.Namespace) -> int:
    terminal = _terminal() if not args.argv else None
    command = args.argv or [os.environ.get("SHELL", "/bin/sh") if terminal else "/bin/sh"]
    try:
        options = _options(args, terminal)
        if args.dry_run:
            print(shlex.join(command_line(command, options)))
            return 0
        result = _in_terminal(command, options) if terminal else run(command, options, 0, 1, 2)
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:
        say(f"mshare lab: {explain(error)}")
        return EXIT_LAB
    _explain(result, options)
    return result.status


def _options(args: argparse.Namespace, terminal: tuple[int, int] | None) -> Options:
    timeout = args.timeout
    if timeout is None:
        timeout = _NO_LIMIT if terminal else Options.timeout
    return Options(
        kernel=args.kernel,
        memory=args.memory,
        cpus=args.cpus,
        timeout=timeout,
        accel=args.accel,
        one_thread=args.one_thread,
        cpu_model=args.cpu_model,
        module=False if args.no_module else args.module or True,
        disk=args.disk or 0,
        swap=args.swap or 0,
        hugepages=args.hugepages,
        write=args.write,
        kernel_args=args.kernel_args,
        log=args.log,
        terminal=terminal,
    )


def _explain(result: Result, options: Options) -> None:
    """On standard error, what went wrong apart from the command itself."""
    if races := kernels_races(result.log):
        say(
            "mshare lab: races of the kernel with itself, which do not count: "
            f"KCSAN saw {races.total()}, of {len(races)} kinds"
        )
        for title, times in races.most_common(_RACES_SHOWN):
            say(f"{times:6} {title}")
    if result.reports:
        own = result.command_status
        ended = "the command did not end" if own is None else f"the command exited with {own}"
        for report in result.reports[:_REPORTS_SHOWN]:
            say("\n".join(report.lines))
        more = len(result.reports) - _REPORTS_SHOWN
        if more > 0:
            say(f"and {more} more")
        say(f"mshare lab: the kernel log holds a report: {result.reports[0].title}; {ended}")
    elif result.reason and not options.terminal:
        say(result.tail())
    if result.reason:
        say(f"mshare lab: {result.reason}")


def _terminal() -> tuple[int, int] | None:
    """Columns and rows, if there is someone to type."""
    if not (os.isatty(0) and os.isatty(1)):
        return None
    columns, rows = os.get_terminal_size(1)
    return columns, rows


def _in_terminal(command: list[str], options: Options) -> Result:
    """Run with the terminal passing every key on, and put it back."""
    say("mshare lab: Ctrl-] ends the machine")
    sys.stderr.flush()
    saved = termios.tcgetattr(0)
    try:
        tty.setraw(0)
        return run(command, options, 0, 1, 2)
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, saved)
