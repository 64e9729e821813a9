"""``mshare cp-in``."""

from __future__ import annotations

import argparse
import errno
import os
import shutil
import sys
import tempfile
from typing import BinaryIO

import mshare
from mshare import engines
from mshare.errors import invalid
from mshare.sizes import PAGE_SIZE, human, parse_size, round_up

SUMMARY = "copy a file or standard input into a region, made if it is not there"
EXAMPLE = """\
  mshare cp-in features features.npy
  zstdcat features.zst | mshare cp-in features - --size 4G"""
_CHUNK = 8 << 20


def set_argparser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name")
    parser.add_argument("file", help="a file, or - for standard input")
    parser.add_argument("--size", help="size of the region to make (default: what the file needs)")
    parser.add_argument("--engine", choices=[engine.name for engine in engines.ENGINES])


def main(args: argparse.Namespace) -> int:
    with _source(args) as source:
        length = _length(source)
        needed = None if length is None else round_up(max(length, 1), PAGE_SIZE)
        region, made = _target(args, needed)
        try:
            with region:
                if length is not None and length > region.size:
                    raise _too_large(region, human(length))
                copied = _copy(source, region, length)
                if length is not None and copied < length:
                    message = f"the input ended after {copied} of {length} bytes"
                    raise OSError(errno.EIO, message, args.file)
        except BaseException:
            if made:
                region.unlink()
            raise
    print(f"{args.name}: {copied} bytes copied into {human(region.size)} on {region.engine}")
    return 0


def _source(args: argparse.Namespace) -> BinaryIO:
    """The file to copy; standard input of unknown length is kept in a file first."""
    if args.file != "-":
        if os.path.isdir(args.file):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), args.file)
        return open(args.file, "rb", buffering=0)
    if _length(sys.stdin.buffer) is not None or args.size or _exists(args):
        return sys.stdin.buffer
    spool = tempfile.TemporaryFile()  # noqa: SIM115
    shutil.copyfileobj(sys.stdin.buffer, spool, _CHUNK)
    spool.seek(0)
    return spool


def _exists(args: argparse.Namespace) -> bool:
    try:
        mshare.stat(args.name, engine=args.engine)
    except FileNotFoundError:
        return False
    return True


def _length(source: BinaryIO) -> int | None:
    """Bytes left in a regular file; None for a pipe."""
    if not source.seekable() or not os.path.isfile(f"/proc/self/fd/{source.fileno()}"):
        return None
    return os.fstat(source.fileno()).st_size - source.tell()


def _target(args: argparse.Namespace, needed: int | None) -> tuple[mshare.Region, bool]:
    """The region to fill, and whether it was made for this."""
    try:
        return mshare.attach(args.name, engine=args.engine), False
    except FileNotFoundError:
        size = parse_size(args.size) if args.size else needed
        if size is None:
            raise invalid("give --size: the input's length is not known", args.name) from None
        return mshare.create(args.name, size, engine=args.engine), True


def _copy(source: BinaryIO, region: mshare.Region, length: int | None) -> int:
    """Copy all of ``source``; the number of bytes."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    memory, copied = memoryview(region), 0
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("copy", total=length)
        while chunk := source.read(_CHUNK):
            if copied + len(chunk) > region.size:
                raise _too_large(region, "the input")
            memory[copied : copied + len(chunk)] = chunk
            copied += len(chunk)
            bar.update(task, completed=copied)
    return copied


def _too_large(region: mshare.Region, what: str) -> OSError:
    message = f"{what} does not fit: the region has {human(region.size)}"
    return OSError(errno.ENOSPC, message, region.name)
