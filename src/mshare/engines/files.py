"""Files that are put into regions, and the file systems that files are on."""

from __future__ import annotations

import errno
import fcntl
import os
import stat as st

from mshare.errors import RUN_OUT, invalid

READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
READ_WRITE = os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK


def mounted(device: int) -> tuple[str, str]:
    """The type and the options of the file system that is this device; empty if it isn't known.

    :raises OSError: no descriptor or memory to look.
    """
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        with open("/proc/self/mountinfo", errors="surrogateescape") as mounts:
            for line in mounts:
                if line.split()[2] == number:
                    kind, *_, options = line.rpartition(" - ")[2].split()
                    return kind, options
    except OSError as error:
        if error.errno in RUN_OUT:
            raise
    return "", ""


def open_content(path: str) -> int:
    """Open a file to be shared: for writing if that is allowed.

    :raises OSError: with the path, as open(2).
    """
    try:
        try:
            return os.open(path, READ_WRITE)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EROFS, errno.EISDIR):
                raise
            return os.open(path, READ)
    except OSError as error:
        message = f"the file for the region: {error.strerror}"
        raise OSError(error.errno, message, path) from None


def check_content(fd: int, file: str | int) -> tuple[os.stat_result, bool]:
    """The status of the open ``file``, and whether it is open for reading only.

    :raises InvalidValue: not a regular file, or empty.
    """
    try:
        info = os.fstat(fd)
    except OSError as error:
        raise OSError(error.errno, f"the file for the region: {error.strerror}", file) from None
    if not st.S_ISREG(info.st_mode):
        raise invalid("a region can only be put over a regular file", file)
    if not info.st_size:
        raise invalid("a region can't be put over an empty file", file)
    return info, fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
