"""The preload library of ``mshare run``: build it, and look whether a program will load it."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import stat
import struct
import subprocess
from pathlib import Path

from mshare.engines.msharefs import OPEN_MAPPING, Msharefs
from mshare.lab.build import find_sources
from mshare.lab.images import cache_dir
from mshare.lab.packages import apt_command

LIBRARY = "libmshare-run.so"
_FLAGS = ("-std=gnu11", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra")
_SCRIPTS_IN_SCRIPTS = 4
"""As the kernel: an interpreter can be a script in turn, so often and no more."""
_OF_ROOT = Path("/var/cache/mshare")
_PT_INTERP = 3
_LOADER = "ld-linux-x86-64.so.2"


def sources() -> Path:
    """The folder ``preload/`` of this checkout, or of the installed package.

    :raises FileNotFoundError: there is none.
    """
    package = Path(__file__).resolve().parent
    places = (package.parents[1] / "preload", package / "preload")
    for place in places:
        if (place / "calls.c").exists():
            return place
    raise FileNotFoundError(errno.ENOENT, "no sources of the preload library", str(places[0]))


def build() -> Path:
    """The library, built into the cache once for each source text.

    Root's is where all can read it: what root starts may go on as another user.

    :raises FileNotFoundError: no compiler, or no sources.
    :raises OSError: it does not build; the message has the compiler's last lines.
    """
    source, header = sources(), find_sources() / "mshare_uapi.h"
    files = [*sorted(source.glob("*.[ch]")), header]
    digest = hashlib.sha256(" ".join(_FLAGS).encode())
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    shared = not os.geteuid() and not os.environ.get("XDG_CACHE_HOME")
    folder = (_OF_ROOT if shared else cache_dir()) / "preload" / digest.hexdigest()[:16]
    library = folder / LIBRARY
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    if shared:
        for place in (folder, folder.parent, _OF_ROOT):
            place.chmod(0o755)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            fresh = folder / f"{LIBRARY}.new"
            code = [str(file) for file in files if file.suffix == ".c"]
            _compile([*_FLAGS, "-I", str(header.parent), "-o", str(fresh), *code], folder)
            fresh.chmod(0o755)
            fresh.rename(library)
    return library


def _compile(arguments: list[str], folder: Path) -> None:
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    cure = apt_command(["gcc", "libc6-dev"])
    if compiler is None:
        message = f"no C compiler to build the preload library with; try: {cure}"
        raise FileNotFoundError(errno.ENOENT, message, "cc")
    done = subprocess.run([compiler, *arguments], check=False, capture_output=True, text=True)
    if done.returncode:
        lines = "; ".join(done.stderr.strip().splitlines()[-3:])
        message = f"the preload library does not build: {lines}; try: {cure}"
        raise OSError(errno.EIO, message, str(folder))


def check_module(engine: Msharefs) -> None:
    """See that a program could share its mappings. :raises OSError: why not, and what to do."""
    control = f"{engine.directory()}/mshare_info"
    try:
        fd = os.open(control, os.O_RDONLY | os.O_CLOEXEC)
    except PermissionError:
        message = f"no permission to look into {engine.directory()}"
        raise PermissionError(errno.EACCES, message, control) from None
    except OSError:
        check = engine.check()
        raise OSError(errno.ENODEV, check.advice, control) from None
    try:
        fcntl.ioctl(fd, OPEN_MAPPING, struct.pack("=QII", 0, os.O_WRONLY, 0))
    except OSError as error:
        if error.errno != errno.EINVAL:
            cure = "mshare module unload; mshare module load"
            message = f"the loaded module is older than this command; try: {cure}"
            raise OSError(errno.ENODEV, message, control) from None
    finally:
        os.close(fd)


def find_program(name: str) -> str:
    """The file that a shell would run for ``name``.

    :raises FileNotFoundError: there is none.
    :raises PermissionError: it may not be run.
    """
    if "/" in name:
        places = [name]
    else:
        folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
        places = [os.path.join(folder or ".", name) for folder in folders]
    refused = None
    for place in places:
        try:
            mode = os.stat(place).st_mode
        except OSError as error:
            if error.errno == errno.EACCES:
                refused = place
            continue
        if stat.S_ISREG(mode) and os.access(place, os.X_OK):
            return place
        refused = place
    if refused:
        raise PermissionError(errno.EACCES, "may not be run (a folder, or chmod +x)", refused)
    raise FileNotFoundError(errno.ENOENT, "no such program", name)


def check_program(path: str) -> None:
    """See that the program will load the library.

    :raises OSError: ENOEXEC, it will not, and why.
    """
    for _ in range(_SCRIPTS_IN_SCRIPTS):
        with open(path, "rb") as file:
            head = file.read(256)
        if not head.startswith(b"#!"):
            break
        words = head[2:].split(b"\n", 1)[0].split()
        if not words:
            raise _refused("a script that names no interpreter", path)
        interpreter = os.fsdecode(words[0])
        if not os.path.exists(interpreter):
            raise _refused(f"a script whose interpreter {interpreter} is not there", path)
        path = interpreter
    _check_rights(path)
    _check_elf(path, head)


def _refused(why: str, path: str) -> OSError:
    return OSError(errno.ENOEXEC, f"can't be run with shared page tables: {why}", path)


def _check_rights(path: str) -> None:
    """The loader takes no library from who starts a program that gains rights."""
    found = os.stat(path)
    gains = found.st_mode & stat.S_ISUID and found.st_uid != os.getuid()
    gains = gains or (found.st_mode & stat.S_ISGID and found.st_gid != os.getgid())
    if gains:
        cure = "run it as the user and group it belongs to"
        raise _refused(f"it is setuid or setgid, so the loader ignores LD_PRELOAD; {cure}", path)
    if os.getuid() and "security.capability" in os.listxattr(path):
        why = "it has file capabilities, so the loader ignores LD_PRELOAD; run it as root"
        raise _refused(why, path)


def _check_elf(path: str, head: bytes) -> None:
    """An x86-64 program that glibc's loader starts."""
    if not head.startswith(b"\x7fELF"):
        raise _refused("it is neither a program of this machine nor a script with #!", path)
    if len(head) < 64 or head[4] != 2 or struct.unpack_from("<H", head, 18) != (62,):
        raise _refused("it is not for x86-64 with 64 bits", path)
    offset, size, count = (
        *struct.unpack_from("<Q", head, 32),
        *struct.unpack_from("<HH", head, 54),
    )
    with open(path, "rb") as file:
        file.seek(offset)
        table = file.read(size * count)
        for at in range(0, len(table) - 55, size or 1):
            kind, _, place, _, _, length = struct.unpack_from("<IIQQQQ", table, at)
            if kind == _PT_INTERP:
                file.seek(place)
                loader = os.path.basename(file.read(min(length, 4096)).rstrip(b"\0").decode())
                if loader != _LOADER:
                    raise _refused(f"its C library is not glibc (it is started by {loader})", path)
                return
    raise _refused("it is linked statically", path)
