"""Build the module for a kernel, out of the checkout, once per kernel and source text."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from mshare.lab.images import cache_dir
from mshare.lab.kernels import Kernel
from mshare.lab.packages import PACKAGES, apt_command

SOURCE_SUFFIXES = {".c", ".h", ".S"}
SOURCE_NAMES = {"Kbuild", "Makefile", "Kconfig", "dkms.conf"}
KEPT = 8


def find_sources() -> Path:
    """The folder ``kmod/`` of this checkout, or of the installed package.

    :raises FileNotFoundError: there is none.
    """
    package = Path(__file__).resolve().parents[1]
    places = (package.parents[1] / "kmod", package / "kmod")
    for place in places:
        if _makefile(place):
            return place
    raise FileNotFoundError(errno.ENOENT, "no module sources here", str(places[0]))


def build_module(kernel: Kernel, source: Path) -> Path:
    """Build the module in ``source`` for ``kernel`` in the cache; return the ``.ko`` file.

    Warnings of the compiler go to standard error, for they show once only.

    :raises FileNotFoundError: no headers for this kernel, no make, or no module in ``source``.
    :raises OSError: the build failed; the message has the compiler's last lines.
    """
    if not _makefile(source):
        raise FileNotFoundError(errno.ENOENT, "no Kbuild or Makefile in this folder", str(source))
    if kernel.build is None:
        raise FileNotFoundError(
            errno.ENOENT,
            f"no headers; try: {apt_command([f'linux-headers-{kernel.release}'])}",
            f"/lib/modules/{kernel.release}/build",
        )
    files = _source_files(source)
    folder = cache_dir() / "modules" / kernel.release / _digest(kernel, source, files)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stamp = folder / "done"
        if not stamp.exists():
            for file in files:
                target = folder / file.relative_to(source)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
            stamp.write_text(_make(kernel.build, folder).name)
            _prune(folder.parent)
        os.utime(folder)
        return folder / stamp.read_text()


def _make(build: Path, folder: Path) -> Path:
    command = ["make", "-C", str(build), f"M={folder}", f"-j{os.cpu_count() or 1}", "modules"]
    try:
        done = subprocess.run(
            command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    except FileNotFoundError:
        raise FileNotFoundError(
            errno.ENOENT, f"not installed; try: {apt_command(PACKAGES)}", "make"
        ) from None
    if done.returncode:
        lines = "\n".join(done.stdout.splitlines()[-40:])
        raise OSError(errno.ENOEXEC, f"the module does not build:\n{lines}\n", str(folder))
    warned = [line for line in done.stdout.splitlines() if "warning:" in line.lower()]
    if warned:
        print(*warned, sep="\n", file=sys.stderr)
    modules = sorted(folder.glob("*.ko"))
    if len(modules) != 1:
        raise OSError(errno.ENOEXEC, f"built {len(modules)} modules, not one", str(folder))
    return modules[0]


def _makefile(source: Path) -> bool:
    return (source / "Kbuild").exists() or (source / "Makefile").exists()


def _source_files(source: Path) -> list[Path]:
    return sorted(
        path
        for path in source.rglob("*")
        if path.is_file()
        and not path.name.endswith(".mod.c")
        and (path.suffix in SOURCE_SUFFIXES or path.name in SOURCE_NAMES)
    )


def _digest(kernel: Kernel, source: Path, files: list[Path]) -> str:
    """Changes with any source file, and with the kernel tree it is built against."""
    digest = hashlib.sha256(str(kernel.build).encode())
    for name in (".config", "Module.symvers"):
        path = (kernel.build or Path()) / name
        if path.exists():
            digest.update(f"{path.stat().st_size} {path.stat().st_mtime_ns}".encode())
    for file in files:
        digest.update(str(file.relative_to(source)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _prune(folder: Path) -> None:
    """Keep the builds used last."""
    entries = sorted(folder.iterdir(), key=_used)
    for entry in entries[:-KEPT]:
        shutil.rmtree(entry, ignore_errors=True)


def _used(build: Path) -> float:
    """When; at no time if another lab has removed it by now."""
    try:
        return build.stat().st_mtime
    except FileNotFoundError:
        return 0
