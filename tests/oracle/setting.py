"""What a machine runs on: a mount of msharefs of its own, and files to map; or a model of it."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any, Protocol

from mshare.memory import meminfo
from tests.oracle import model
from tests.oracle.model import Content, Mount, Source
from tests.oracle.worker import TABLES_PER_WINDOW, Pool

FILE_SIZE = 8 * model.PAGE
NOBODY = 65534
F_ADD_SEALS, FUTURE_WRITE = 1033, 0x10
_libc = ctypes.CDLL(None, use_errno=True)


class Engine(Protocol):
    """What the machine drives beside the model."""

    @property
    def pids(self) -> Mapping[int, int]:
        """The process behind each number."""

    def call(self, number: int, call: str, *args: Any) -> Any:
        """Have a process make a call."""

    def statfs(self) -> int | None:
        """Bytes in use."""

    def finish(self) -> None:
        """End every process."""


class Setting(Protocol):
    """How a machine gets its engine and the model of it."""

    tables: int
    """Page-table bytes a window may cost a process."""

    def engine(self) -> Engine:
        """A new engine without processes."""

    def model(self, process: type[model.Process] | None) -> Mount:
        """The model of the same."""

    def clear(self) -> None:
        """Remove all names."""


def _sources() -> dict[str, Source]:
    """The model of `Kernel.sources`."""
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

    tables = TABLES_PER_WINDOW

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

    def _file(self, name: str, fd: int) -> None:
        path = f"/proc/self/fd/{fd}"
        self.sources[name] = fd
        self.sources[f"{name}-ro"] = os.open(path, os.O_RDONLY)
        self.sources[f"{name}-wo"] = os.open(path, os.O_WRONLY)

    def engine(self) -> Pool:
        """Files as they are at first, and no process."""
        for name in ("memfd", "tmpfs", "disk"):
            os.ftruncate(self.sources[name], 0)
            os.ftruncate(self.sources[name], FILE_SIZE)
        return Pool(self.folder, self.sources)

    def model(self, process: type[model.Process] | None) -> Mount:
        """The model of it."""
        return Mount(_sources(), self.memory, process)

    def clear(self) -> None:
        """Remove all names."""
        for name in set(os.listdir(self.folder)) - {"mshare_info"}:
            os.unlink(f"{self.folder}/{name}")

    def close(self) -> None:
        """Unmount, which is EBUSY if anything is left open or mapped."""
        for fd in (*self.sources.values(), self.pipe[1]):
            os.close(fd)
        if _libc.umount2(self.folder.encode(), 0):
            code = ctypes.get_errno()
            raise OSError(code, "a region is still in use after its last user is gone")
        shutil.rmtree(self.scratch)


class Modelled:
    """The model in place of a kernel: what a machine finds in a model, and how fast it is."""

    tables = TABLES_PER_WINDOW

    def engine(self) -> Simulated:
        """A model that is driven as a kernel."""
        self.current = Simulated(Mount(_sources(), 1 << 32))
        return self.current

    def model(self, process: type[model.Process] | None) -> Mount:
        """Another, to compare with."""
        return Mount(_sources(), 1 << 32, process)

    def clear(self) -> None:
        """Remove all names."""
        self.current.mount.names.clear()


class Simulated:
    """A `Mount` with the calls of a `Pool`."""

    def __init__(self, mount: Mount) -> None:
        self.mount = mount
        self.spawn, self.fork, self.kill, self.send = (
            mount.spawn, mount.fork, mount.kill, mount.send,
        )  # fmt: skip
        self.statfs, self.listdir = mount.statfs, mount.listdir
        self.next = 100 << 40

    @property
    def pids(self) -> dict[int, int]:
        """A process is its number."""
        return {number: number for number in self.mount.processes}

    def finish(self) -> None:
        """End every process."""
        for number in list(self.mount.processes):
            self.mount.kill(number)

    def call(self, number: int, call: str, *args: Any) -> Any:
        """What a worker would answer."""
        try:
            return self._call(self.mount.processes[number], call, *args)
        except model.Fault:
            model.refuse(errno.EFAULT)

    def _call(self, process: model.Process, call: str, *args: Any) -> Any:
        result: Any
        match call:
            case "mmap":
                window = process.mmap(*args)
                if not window.address:
                    self.next -= 8 * model.SLOT
                    window.address = self.next
                result = window.address, 0
            case "faults":
                result = 0
            case "load" | "load_by_call":
                result = process.load(*args)[0]
            case "load_of":
                result = self.mount.processes[args[0]].load(*args[1:])[0]
            case "store" | "store_by_call":
                process.store(*args)
                result = None
            case "end_of":
                result = self._end_of(process, *args)
            case _:
                result = getattr(process, call)(*args)
        return result

    def _end_of(self, process: model.Process, address: int, write: bool) -> int | None:
        try:
            process.window(address).access(address, write=write)
        except model.Fault as fault:
            return fault.signal
        return None
