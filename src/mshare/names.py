"""Region names, and the lock that makes one creator of a name win."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from mshare.errors import invalid

MAX_NAME = 255
"""Longest name in bytes: what every file system a region can live on accepts."""


def check_name(name: object) -> str:
    """Return ``name`` if it can name a region on every engine.

    :raises TypeError: not a string.
    :raises InvalidValue: ENAMETOOLONG over 255 bytes; EINVAL when empty, not printable
        ASCII, with a slash or NUL, or starting with a dot.
    """
    if not isinstance(name, str):
        raise TypeError(f"a region's name is a string, not {type(name).__name__}")
    if not name:
        raise invalid("a region's name can't be empty", name)
    if not (name.isascii() and name.isprintable()):
        raise invalid("a region's name is printable ASCII, without NUL", name)
    if "/" in name or name[0] == ".":
        raise invalid("a region's name has no slash and does not start with a dot", name)
    if len(name) > MAX_NAME:
        raise invalid(f"a region's name has at most {MAX_NAME} bytes", name, errno.ENAMETOOLONG)
    return name


_mine = threading.local()
"""``names``: what this thread holds the lock for."""


@contextmanager
def creating(name: str) -> Iterator[None]:
    """Let one thread of this user's processes at a time create ``name``; it may enter again.

    Without it, those who create one name together would each reserve its memory before
    all but one of them lose. The lock is for thrift, the file system decides who wins: where
    the lock file can't be had (another user's file stands in its place) creation goes on.
    A killed holder's lock is released by the kernel, when the children it forked meanwhile
    are gone too.
    """
    held = _mine.__dict__.setdefault("names", set())
    if name in held:
        yield
        return
    path = f"/dev/shm/.mshare-lock-{os.geteuid()}"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError:
        yield
        return
    try:
        if os.fstat(fd).st_uid == os.geteuid():
            _lock(fd, name, fcntl.F_WRLCK)
        held.add(name)
        yield
    finally:
        held.discard(name)
        _lock(fd, name, fcntl.F_UNLCK)
        os.close(fd)


def _lock(fd: int, name: str, kind: int) -> None:
    """Take or release the name's byte of the file, for the open file and not the process."""
    flock = struct.pack("hhqqi0q", kind, os.SEEK_SET, zlib.crc32(name.encode()), 1, 0)
    fcntl.fcntl(fd, fcntl.F_OFD_SETLKW, flock)
