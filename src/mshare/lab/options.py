"""From what the caller wants to a session that is ready to run."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mshare.lab import qemu
from mshare.lab.build import build_module, find_sources
from mshare.lab.guest import Guest, guest_environment
from mshare.lab.images import cache_dir
from mshare.lab.kernels import find_kernel, needed_modules
from mshare.lab.packages import apt_command
from mshare.lab.session import Result, Session

MINIMUM_MEMORY = 256 << 20


@dataclass(frozen=True)
class Options:
    """What to boot; memory, ``disk`` and ``swap`` in bytes, limits in seconds.

    ``kernel`` is a series, a path, or ``None`` for the newest installed; ``module`` is ``True``
    for the one of this checkout, a folder of sources, a ``.ko`` file, or ``False``. ``write`` is
    a folder of the host that the command may write to. ``one_thread`` has emulated processors take
    turns, for a machine that shares the host's with others. ``terminal`` is ``(columns, rows)`` for
    an interactive command.
    """

    kernel: str | None = None
    memory: int = 2 << 30
    cpus: int = 2
    timeout: float = 600.0
    boot_timeout: float = 300.0
    accel: str = "auto"
    one_thread: bool = False
    cpu_model: str = ""
    module: bool | Path = True
    disk: int = 0
    swap: int = 0
    hugepages: int = 0
    write: Path | None = None
    kernel_args: str = ""
    cwd: Path | None = None
    env: Mapping[str, str] | None = None
    log: Path | None = None
    terminal: tuple[int, int] | None = None


def run(
    command: Sequence[str],
    options: Options | None = None,
    stdin: int | bytes = b"",
    stdout: int | None = None,
    stderr: int | None = None,
) -> Result:
    """Boot a kernel and run ``command`` there as root, in the caller's current directory.

    ``stdin`` is a descriptor or the bytes themselves. ``stdout`` and ``stderr`` are descriptors
    that the streams are passed to as they come, or ``None`` to have them in the result.

    :raises FileNotFoundError: a part is not installed; the message has the command that does it.
    :raises OSError: the module does not build, or KVM was demanded and does not work.
    :raises ValueError: an option is out of range, or the kernel is none.
    """
    options = options or Options()
    with _session(command, options) as session:
        session.stdin, session.stdout, session.stderr = stdin, stdout, stderr
        result = _boot(session, options.log)
        if result.emulator_failed and session.machine.accel == "tcg":
            print("mshare lab: the machine did not boot; booting it again", file=sys.stderr)
            result = _boot(dataclasses.replace(session), options.log)
        return result


def _boot(session: Session, log: Path | None) -> Result:
    if log is None:
        return session.run()
    with log.open("wb", buffering=0) as file:
        session.log = file.fileno()
        return session.run()


def command_line(command: Sequence[str], options: Options | None = None) -> list[str]:
    """The QEMU command that :func:`run` would start, with file numbers made up."""
    with _session(command, options or Options()) as session:
        names = ("console", "ctl", "tty") if session.guest.terminal else _CHANNELS
        channels = [(name, fd) for fd, name in enumerate(names, 10)]
        return qemu.command_line(session.machine, "INITRAMFS", channels, session.disks)


_CHANNELS = ("console", "ctl", "out", "err", "in")


@contextlib.contextmanager
def _session(command: Sequence[str], options: Options) -> Iterator[Session]:
    """All but the boot: find the parts, build the module, make the disks."""
    if options.memory < MINIMUM_MEMORY:
        raise ValueError(f"the guest needs {MINIMUM_MEMORY >> 20} MiB of memory at least")
    if options.cpus < 1 or not options.timeout > 0:
        raise ValueError("processors and time are positive numbers")
    if options.hugepages < 0:
        raise ValueError("the number of huge pages is 0 or more")
    qemu.find_qemu()
    kernel = find_kernel(options.kernel)
    module: Path | None = None
    if isinstance(options.module, Path) and options.module.suffix == ".ko":
        module = options.module
        if not module.exists():
            raise FileNotFoundError(errno.ENOENT, "no such module", str(module))
    elif options.module:
        source = _sources() if options.module is True else options.module
        module = build_module(kernel, source.resolve())
    accel, note = qemu.choose_accel(options.accel, kernel)
    if note:
        print(f"mshare lab: {note}", file=sys.stderr)
    cwd = options.cwd or Path.cwd()
    written = options.write.resolve() if options.write else None
    if written and not written.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(written))
    with contextlib.ExitStack() as stack:
        disks = []
        for name, size in (("disk", options.disk), ("swap", options.swap)):
            if size:
                disks.append((name, _blank_file(stack, size)))
        if options.disk:
            _make_ext4(disks[0][1])
        guest = Guest(
            command=command,
            cwd=cwd,
            environment=guest_environment(os.environ if options.env is None else options.env),
            shown=[cwd, *_own_folders()],
            module=module,
            modules=needed_modules(kernel, bool(disks)),
            terminal=options.terminal,
            disk=bool(options.disk),
            swap=bool(options.swap),
            written=written,
        )
        machine = qemu.Machine(
            kernel=kernel,
            memory=options.memory,
            cpus=options.cpus,
            accel=accel,
            one_thread=options.one_thread,
            cpu_model=options.cpu_model,
            kernel_args=options.kernel_args,
            hugepages=options.hugepages,
            written=written,
        )
        yield Session(
            machine=machine,
            guest=guest,
            timeout=options.timeout,
            boot_timeout=options.boot_timeout,
            disks=disks,
        )


def _sources() -> Path:
    try:
        return find_sources()
    except FileNotFoundError as error:
        hint = f"{error.strerror}; say where with --module, or do without with --no-module"
        raise FileNotFoundError(errno.ENOENT, hint, error.filename) from None


def _own_folders() -> list[Path]:
    """The checkout or installation this runs from, and its interpreter's."""
    package = Path(__file__).resolve().parents[1]
    checkout = package.parents[1]
    own = checkout if (checkout / "pyproject.toml").exists() else package
    return [own, Path(sys.prefix), Path(sys.base_prefix)]


def _blank_file(stack: contextlib.ExitStack, size: int) -> int:
    """A sparse file of ``size`` bytes without a name, so that nothing is left of it."""
    folder = cache_dir()
    folder.mkdir(parents=True, exist_ok=True)
    fd = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    os.truncate(fd, size)
    return fd


def _make_ext4(fd: int) -> None:
    command = ["mke2fs", "-q", "-F", "-t", "ext4", f"/proc/self/fd/{fd}"]
    try:
        done = subprocess.run(
            command,
            check=False,
            pass_fds=(fd,),
            capture_output=True,
            text=True,
            env=os.environ | {"PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"},
        )
    except FileNotFoundError:
        wanted = apt_command(["e2fsprogs"])
        raise FileNotFoundError(errno.ENOENT, f"not installed; try: {wanted}", "mke2fs") from None
    if done.returncode:
        raise OSError(errno.EIO, f"cannot make a file system: {done.stderr.strip()}", "mke2fs")
