"""A FUSE file system with one file, whose server answers reads as a test wants it."""

from __future__ import annotations

import ctypes
import enum
import errno
import os
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tests.kernel import abi

FILE = "file"
_libc = ctypes.CDLL(None, use_errno=True)


class Call(enum.IntEnum):
    """Numbers of the requests."""

    LOOKUP, FORGET, GETATTR, OPEN, READ, RELEASE = 1, 2, 3, 14, 15, 18
    INIT, INTERRUPT, BATCH_FORGET = 26, 36, 42


Answer = Callable[[int], bytes | int | None]
"""What the n-th read gets: data, an errno, or nothing for ever."""


def available() -> bool:
    """Whether this kernel has FUSE."""
    subprocess.run(["modprobe", "-q", "fuse"], check=False)
    return os.path.exists("/dev/fuse")


def _attributes(node: int) -> bytes:
    mode, size = (0o040755, 0) if node == 1 else (0o100666, abi.PAGE)
    numbers = (node, size, size // 512, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, abi.PAGE, 0)
    return struct.pack("=6Q10I", *numbers)


def _serve(fd: int, answer: Answer) -> None:
    """Answer what the kernel asks, until it goes."""
    reads = 0
    while True:
        try:
            request = os.read(fd, 1 << 17)
        except OSError:
            return
        _, call, unique, node = struct.unpack_from("=IIQQ", request)
        code, data = 0, b""
        match call:
            case Call.INIT:
                data = struct.pack("=IIII4xI40x", 7, 31, 1 << 17, 0, 1 << 16)
            case Call.LOOKUP:
                data = struct.pack("=QQQQII", 2, 0, 1000, 1000, 0, 0) + _attributes(2)
            case Call.GETATTR:
                data = struct.pack("=QII", 1000, 0, 0) + _attributes(node)
            case Call.OPEN:
                data = struct.pack("=QII", 1, 0, 0)
            case Call.READ:
                reads += 1
                said = answer(reads)
                if said is None:
                    continue
                code, data = (0, said) if isinstance(said, bytes) else (said, b"")
            case Call.RELEASE:
                pass
            case Call.FORGET | Call.INTERRUPT | Call.BATCH_FORGET:
                continue
            case _:
                code = errno.ENOSYS
        os.write(fd, struct.pack("=IiQ", 16 + len(data), -code, unique) + data)


@contextmanager
def mounted(folder: str, answer: Answer) -> Iterator[str]:
    """The path of the file. At the end whoever waits for an answer is let go."""
    fd = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={fd},rootmode=40000,user_id=0,group_id=0,allow_other"
    if _libc.mount(b"fuse", folder.encode(), b"fuse", 6, options.encode()):
        raise OSError(ctypes.get_errno(), "mount of FUSE")
    server = abi.Child(_serve, fd, answer)
    os.close(fd)
    try:
        yield f"{folder}/{FILE}"
    finally:
        server.kill()
        subprocess.run(["umount", "--lazy", folder], check=True)
