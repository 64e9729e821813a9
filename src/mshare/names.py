"""Region names, and the lock that makes one creator of a name win."""

from __future__ import annotations

import errno
import fcntl
import os
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


@contextmanager
def creating(name: str) -> Iterator[None]:
    """Let one process of this user at a time create ``name``.

    Without it, processes that create one name together would each reserve its memory before
    all but one of them lose. The lock is for thrift, the file system decides who wins: where
    the lock file can't be had (another user's file stands in its place) creation goes on.
    A killed holder's lock is released by the kernel.
    """
    path = f"/dev/shm/.mshare-lock-{os.geteuid()}"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError:
        yield
        return
    try:
        if os.fstat(fd).st_uid == os.geteuid():
            fcntl.lockf(fd, fcntl.LOCK_EX, 1, zlib.crc32(name.encode()))
        yield
    finally:
        os.close(fd)
