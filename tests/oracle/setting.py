"""What a machine runs on: a mount of msharefs of its own, and files to map; or a model of it."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import tempfile
from typing import Any, Protocol

from mshare.memory import meminfo
from tests.oracle import memory, model
from tests.oracle.memory import FILE_SIZE, Content, Source
from tests.oracle.model import Mount
from tests.oracle.worker import Call, Outcome, Pool, outcome

NOBODY = 65534
F_ADD_SEALS, FUTURE_WRITE = 1033, 0x10
_libc = ctypes.CDLL(None, use_errno=True)


class Engine(Protocol):
    """What the machine drives beside the model."""

    def run(self, calls: list[Call]) -> list[Outcome]:
        """Make calls, and say what each came to."""


class Setting(Protocol):
    """How a machine gets its engine and the model of it."""

    @property
    def engine(self) -> Engine:
        """The engine."""

    def model(self, process: type[model.Process] | None) -> Mount:
        """The model of the same, at its start."""


def sources() -> dict[str, Source]:
    """The model of the files of `Kernel`."""
    found = {}
    for name in ("memfd", "tmpfs", "disk"):
        content = Content(FILE_SIZE)
        found[name] = Source(content)
        found[f"{name}-ro"] = Source(content, writable=False)
        found[f"{name}-wo"] = Source(content, readable=False)
    found["sealed"] = Source(Content(FILE_SIZE), sealed=True)
    for name in ("pipe", "folder", "info"):
        found[name] = Source(None, writable=False)
    for name in ("device", "huge"):
        found[name] = Source(None)
    return found


class Kernel:
    """The module: a mount of its own, and descriptors of files that every process inherits."""

    def __init__(self, disk: str = "/mnt/disk") -> None:
        self.scratch = tempfile.mkdtemp(prefix="oracle-")
        self.folder = f"{self.scratch}/mount"
        os.mkdir(self.folder)
        os.chmod(self.scratch, 0o755)
        result = _libc.mount(b"msharefs", self.folder.encode(), b"msharefs", 0, None)
        if result:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), self.folder)
        fields = meminfo()
        self.memory = fields["MemTotal"] + fields["SwapTotal"]
        old = os.uname().release.startswith("6.1.")
        self.over_a_part = errno.ENOMEM if old else errno.EINVAL
        self.sources: dict[str, int] = {}
        self._file("memfd", os.memfd_create("oracle"))
        self._file("tmpfs", os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR))
        self._file("disk", os.open(disk, os.O_TMPFILE | os.O_RDWR))
        sealed = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
        os.ftruncate(sealed, FILE_SIZE)
        fcntl.fcntl(sealed, F_ADD_SEALS, FUTURE_WRITE)
        self.pipe = os.pipe()
        self.sources |= {
            "sealed": sealed,
            "pipe": self.pipe[0],
            "device": os.open("/dev/zero", os.O_RDWR),
            "folder": os.open(self.scratch, os.O_RDONLY),
            "huge": os.memfd_create("huge", os.MFD_HUGETLB),
            "info": os.open(f"{self.folder}/mshare_info", os.O_RDONLY),
        }
        self.engine = Pool(self.folder, self.sources)

    def _file(self, name: str, fd: int) -> None:
        path = f"/proc/self/fd/{fd}"
        self.sources[name] = fd
        self.sources[f"{name}-ro"] = os.open(path, os.O_RDONLY)
        self.sources[f"{name}-wo"] = os.open(path, os.O_WRONLY)

    def model(self, process: type[model.Process] | None) -> Mount:
        """The model of it."""
        return Mount(sources(), self.memory, self.over_a_part, process)

    def close(self) -> None:
        """Unmount, which is EBUSY if anything is left open or mapped."""
        for fd in (*self.sources.values(), self.pipe[1]):
            os.close(fd)
        if _libc.umount2(self.folder.encode(), 0):
            code = ctypes.get_errno()
            raise OSError(code, "a region is still in use after its last user is gone")
        shutil.rmtree(self.scratch)


class Modelled:
    """The model in place of a kernel: whether a machine finds out a model that is wrong."""

    memory = 1 << 32

    def __init__(self) -> None:
        self.engine = Simulated()

    def model(self, process: type[model.Process] | None) -> Mount:
        """The model to compare with."""
        return Mount(sources(), self.memory, process=process)


class Simulated:
    """A `Mount` with the calls of a `Pool`."""

    mount: Mount

    def run(self, calls: list[Call]) -> list[Outcome]:
        """What a pool would answer."""
        return [outcome(self._call, *call) for call in calls]

    def _call(self, number: int | None, call: str, args: tuple[Any, ...]) -> Any:
        if call == "begin":
            self.mount = Mount(sources(), Modelled.memory)
            return None
        if call == "finish":
            for each in list(self.mount.processes):
                self.mount.kill(each)
            self.mount.names.clear()
            return None
        try:
            if number is None:
                return getattr(self.mount, call)(*args)
            return self._by(self.mount.processes[number], call, *args)
        except StopIteration:
            return "no window there"
        except memory.Fault:
            memory.refuse(errno.EFAULT)

    @staticmethod
    def _by(process: model.Process, call: str, *args: Any) -> Any:
        match call:
            case "mmap":
                window = process.mmap(*args[:6])
                window.address = args[6] or window.address
                return 0, True
            case "access" if isinstance(args[3], int):
                return process.load(*args[2:])[0], 0
            case "access":
                process.store(*args[2:])
                return None, 0
            case _:
                return getattr(process, call)(*args)
