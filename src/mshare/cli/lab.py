"""``mshare lab``: boot a stock kernel with the module and run a command there."""

import argparse
import os
import shlex
import signal
import sys
import termios
import tty
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from mshare.lab import EXIT_LAB, EXIT_REPORT, Options, Result, command_line, run
from mshare.sizes import parse_size

SUMMARY = "boot a stock kernel with the module in QEMU and run a command there"
EXAMPLE = "mshare lab --kernel 6.1 -- mshare doctor"

_REPORTS_SHOWN = 5
_ESCAPE_HINT = "mshare lab: Ctrl-] ends the machine"


def set_argparser(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add = parser.add_argument
    parser.epilog = (
        "Exit status: the command's (128+N for signal N); 70 the kernel log holds a WARNING, BUG, "
        "Oops or the like; 124 a time limit passed; 125 the lab could not run the command."
    )
    add("--kernel", metavar="6.1|6.12|PATH", help="series, bzImage or build tree (newest)")
    add("--memory", type=parse_size, default="2G", metavar="SIZE", help="memory (2G)")
    add("--cpus", type=int, default=2, metavar="N", help="processors (2)")
    add("--timeout", type=float, metavar="S", help="seconds, boot included (600; a shell: none)")
    add("--accel", choices=("auto", "kvm", "tcg"), default="auto", help="auto: KVM if it works")
    add("--disk", type=parse_size, default=0, metavar="SIZE", help="an ext4 disk at /mnt/disk")
    add("--swap", type=parse_size, default=0, metavar="SIZE", help="a swap device")
    add("--hugepages", type=int, default=0, metavar="N", help="huge pages of 2 MiB to reserve")
    add("--write", type=Path, metavar="DIR", help="folder of the host that COMMAND may write to")
    add("--kernel-args", default="", metavar="ARGS", help="more kernel parameters")
    add("--cpu-model", default="", metavar="MODEL", help="processor for QEMU (max,la57=off)")
    add("--log", type=Path, metavar="FILE", help="write the kernel log there")
    module = parser.add_mutually_exclusive_group()
    module.add_argument("--module", type=Path, metavar="PATH", help="sources or .ko (kmod/)")
    module.add_argument("--no-module", action="store_true", help="boot without the module")
    add("--dry-run", action="store_true", help="print the QEMU command and stop")
    add("command", nargs="*", metavar="COMMAND", help="after --; without: a shell")


def main(args: argparse.Namespace) -> int:
    """Run it; the exit status is described in the help text."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    interactive = not args.command and os.isatty(0) and os.isatty(1)
    shell = os.environ.get("SHELL", "/bin/sh") if interactive else "/bin/sh"
    command = args.command or [shell]
    timeout = args.timeout
    if timeout is None:
        timeout = float(10**9) if interactive else Options.timeout
    options = Options(
        kernel=args.kernel,
        memory=args.memory,
        cpus=args.cpus,
        timeout=timeout,
        accel=args.accel,
        cpu_model=args.cpu_model,
        module=False if args.no_module else args.module or True,
        disk=args.disk,
        swap=args.swap,
        hugepages=args.hugepages,
        write=args.write,
        kernel_args=args.kernel_args,
        log=args.log,
        terminal=_terminal_size() if interactive else None,
    )
    try:
        if args.dry_run:
            print(shlex.join(command_line(command, options)))
            return 0
        if interactive:
            print(_ESCAPE_HINT, file=sys.stderr)
            result = _raw(lambda: run(command, options, stdin=0, stdout=1, stderr=2))
        else:
            result = run(command, options, stdin=0, stdout=1, stderr=2)
    except BrokenPipeError:
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (OSError, ValueError) as error:
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        name = getattr(error, "filename", None)
        print(f"mshare lab: {f'{name}: ' if name else ''}{text}", file=sys.stderr)
        return EXIT_LAB
    _explain(result)
    return result.status


def _explain(result: Result) -> None:
    """On standard error, what went wrong apart from the command itself."""
    if result.reports:
        own = result.command_status
        ended = f"the command exited with {own}" if own is not None else "the command did not end"
        count = len(result.reports)
        print(f"mshare lab: {count} report(s) in the kernel log; {ended}", file=sys.stderr)
        for report in result.reports[:_REPORTS_SHOWN]:
            print(*report.lines, sep="\n", file=sys.stderr)
        if count > _REPORTS_SHOWN:
            print(f"mshare lab: and {count - _REPORTS_SHOWN} more", file=sys.stderr)
    if result.reason:
        if result.status != EXIT_REPORT:
            print(result.tail(), file=sys.stderr)
        print(f"mshare lab: {result.reason}", file=sys.stderr)


def _terminal_size() -> tuple[int, int]:
    columns, rows = os.get_terminal_size(1)
    return columns, rows


def _raw(action: Callable[[], Result]) -> Result:
    """Run with the terminal passing every key on, and put it back."""
    saved = termios.tcgetattr(0)
    try:
        tty.setraw(0)
        return action()
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, saved)


def _end(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
