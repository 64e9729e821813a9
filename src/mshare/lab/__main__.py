"""``python -m mshare.lab``: the same as ``mshare lab``."""

from __future__ import annotations

import argparse
import signal
import sys

from mshare.cli import lab


def _end(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)


def _main() -> int:
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGHUP, _end)
    parser = argparse.ArgumentParser(
        prog="mshare lab",
        description=lab.SUMMARY,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    lab.set_argparser(parser)
    try:
        return lab.main(parser.parse_args())
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 141


if __name__ == "__main__":
    sys.exit(_main())
