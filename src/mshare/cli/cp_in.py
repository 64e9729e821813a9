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
from mshare.cli.arguments import argument
from mshare.cli.output import progress_bar
from mshare.errors import invalid
from mshare.sizes import PAGE_SIZE, human, region_size, round_up

SUMMARY = "copy a file or standard input into a region, made if it is not there"
EXAMPLE = """\
  mshare cp-in features features.npy
  zstdcat features.zst | mshare cp-in features - --size 4G"""
_HOW = """\
A new region is there when all of the input is in it, and not before. In a region that was there the
input is put at the beginning, in sight of all who have it, and what is behind it stays."""
_CHUNK = 8 << 20


def set_argparser(parser: argparse.ArgumentParser) -> None:
    parser.description = f"{SUMMARY}\n\n{_HOW}"
    parser.add_argument("name")
    parser.add_argument("file", help="a file, or - for standard input")
    text = "size of the region to make (default: what the file needs)"
    parser.add_argument("--size", type=argument(region_size), help=text)
    parser.add_argument("--engine", choices=[engine.name for engine in engines.ENGINES])


def main(args: argparse.Namespace) -> int:
    with _source(args) as source:
        length, copied = _length(source), 0

        def fill(region: mshare.Region) -> None:
            nonlocal copied
            if length is not None and length > region.size:
                raise _too_large(region, human(length))
            copied = _copy(source, region, length)
            if length is not None and copied < length:
                message = f"the input ended after {copied} of {length} bytes"
                raise OSError(errno.EIO, message, args.file)

        try:
            region = mshare.attach(args.name, engine=args.engine)
        except FileNotFoundError:
            size = args.size or _needed(length, args.name)
            region = mshare.create(args.name, size, engine=args.engine, fill=fill)
        else:
            with region:
                _check_size(region, args.size)
                fill(region)
    region.close()
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


def _needed(length: int | None, name: str) -> int:
    if length is None:
        raise invalid("give --size: the input's length is not known", name)
    return round_up(max(length, 1), PAGE_SIZE)


def _check_size(region: mshare.Region, size: int | None) -> None:
    """See that a region which was there has the size that was asked for."""
    if size is None:
        return
    if region.size not in (size, round_up(size, engines.by_name(region.engine).granule)):
        message = f"it is there with {human(region.size)}; leave --size out, or remove it first"
        raise FileExistsError(errno.EEXIST, message, region.name)


def _copy(source: BinaryIO, region: mshare.Region, length: int | None) -> int:
    """Copy all of ``source``; the number of bytes."""
    memory, copied = memoryview(region), 0
    with progress_bar(length) as (bar, task):
        while chunk := source.read(_CHUNK):
            if copied + len(chunk) > region.size:
                raise _too_large(region, "the input")
            memory[copied : copied + len(chunk)] = chunk
            copied += len(chunk)
            bar.update(task, description=human(copied), completed=copied)
    return copied


def _too_large(region: mshare.Region, what: str) -> OSError:
    message = f"{what} does not fit: the region has {human(region.size)}"
    return OSError(errno.ENOSPC, message, region.name)
