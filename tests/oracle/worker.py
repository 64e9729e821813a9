"""Real processes for the machine: the same calls as `model.Process`, made to the kernel.

`Pool` is to the kernel what `model.Mount` is to the model. Each worker is a process that the
pool drives over a socket. A worker that dies where it should not, or does not answer, is a
difference like any other.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import pickle
import signal
import socket
import struct
import traceback
from contextlib import suppress
from typing import Any, NoReturn

from mshare.engines.msharefs import INFO
from mshare.engines.msharefs import info as all_of_info
from tests.kernel import abi
from tests.oracle.model import ADVICE, NORESERVE, PAGE, SLOT, TMPFILE, Closed, Readonly

CLONE, CLONE_PARENT, PRCTL, DUMPABLE = 56, 0x8000, 157, 4
ADVICE_NUMBERS = {
    "DONTNEED": 4, "FREE": 8, "REMOVE": 9, "DONTFORK": 10, "DOFORK": 11, "MERGEABLE": 12,
    "DODUMP": 17, "WIPEONFORK": 18, "COLD": 20, "PAGEOUT": 21, "POPULATE_READ": 22,
    "POPULATE_WRITE": 23, "COLLAPSE": 25, "WILLNEED": 3,
}  # fmt: skip
TABLES_PER_WINDOW = 16 << 10
"""Page-table bytes a process may pay for a window, of whatever size: what lies above a slot."""
PATIENCE = 60
"""Seconds until a call counts as one that never returns."""
_with_gil = ctypes.PyDLL(None, use_errno=True)
_with_gil.syscall.restype = ctypes.c_long


class Died(Exception):
    """A worker was killed by a signal, or hangs."""


class Worker:
    """The calls, made in the process that has this object."""

    def __init__(self, channel: socket.socket, folder: str, sources: dict[str, int]) -> None:
        self.channel = channel
        self.folder = folder
        self.sources = sources
        self.fds: dict[int, int] = {}
        self.outgoing: list[int] = []
        self.reading, self.writing = os.pipe()

    def serve(self) -> NoReturn:
        """Answer until killed."""
        try:
            while True:
                message, fds, _, _ = socket.recv_fds(self.channel, 1 << 16, 1)
                if not message:
                    break
                call, args = pickle.loads(message)
                answer: tuple[str, Any]
                try:
                    if fds:
                        args = (*args, fds[0])
                    answer = "value", self.attempt(call, args)
                except OSError as error:
                    answer = "error", error.errno
                except (Closed, Readonly) as refusal:
                    answer = "refused", refusal
                except Exception:
                    answer = "broken", traceback.format_exc()
                outgoing, self.outgoing = self.outgoing, []
                socket.send_fds(self.channel, [pickle.dumps(answer)], outgoing)
        finally:
            os._exit(1)

    def attempt(self, call: str, args: tuple[Any, ...]) -> Any:
        """Make one call."""
        return getattr(self, call)(*args)

    # What the pool asks for.

    def fork(self, channel: int) -> int:
        """A child of the pool's, with all this one has, on the other channel."""
        flags = CLONE_PARENT | signal.SIGCHLD
        pid: int = _with_gil.syscall(CLONE, flags, 0, 0, 0, 0)
        if pid:
            os.close(channel)
            return abi._check(pid)
        ctypes.pythonapi.PyOS_AfterFork_Child()
        self.channel.close()
        self.channel = socket.socket(fileno=channel)
        os.close(self.reading)
        os.close(self.writing)
        self.reading, self.writing = os.pipe()
        return self.serve()

    def become(self, user: int) -> None:
        """Give up root. It stays readable for who may read its memory."""
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
        abi.syscall(PRCTL, DUMPABLE, 1)

    def give(self, handle: int) -> None:
        """Send a descriptor with the answer."""
        self.outgoing = [self.fds[handle]]

    def take(self, handle: int, fd: int) -> None:
        """Keep a descriptor that came with the call."""
        self.fds[handle] = fd

    def _fd(self, handle: int) -> int:
        return self.fds.get(handle, -1)

    def _path(self, name: str) -> str:
        return self.folder if name == TMPFILE else f"{self.folder}/{name}"

    # The calls of model.Process.

    def open(self, handle: int, name: str, flags: int, mode: int) -> None:
        flags |= os.O_TMPFILE if name == TMPFILE else 0
        self.fds[handle] = os.open(self._path(name), flags, mode)

    def close(self, handle: int) -> None:
        os.close(self._fd(handle))
        del self.fds[handle]

    def ftruncate(self, handle: int, size: int) -> None:
        os.ftruncate(self._fd(handle), size)

    def fallocate(self, handle: int, mode: int, offset: int, size: int) -> None:
        abi.syscall(285, self._fd(handle), mode, offset, size)

    def read(self, handle: int) -> None:
        os.read(self._fd(handle), 1)

    def write(self, handle: int) -> None:
        os.write(self._fd(handle), b"x")

    def fstat(self, handle: int) -> tuple[int, int, int, int]:
        info = os.fstat(self._fd(handle))
        return info.st_size, info.st_mode & 0o7777, info.st_nlink, info.st_uid

    def fchmod(self, handle: int, mode: int) -> None:
        os.fchmod(self._fd(handle), mode)

    def link(self, handle: int, name: str) -> None:
        folder = os.open(self.folder, os.O_PATH)
        try:
            path = f"/proc/self/fd/{self._fd(handle)}"
            os.link(path, name, dst_dir_fd=folder, follow_symlinks=True)
        finally:
            os.close(folder)

    def unlink(self, name: str) -> None:
        os.unlink(self._path(name))

    def rename(self, old: str, new: str) -> None:
        os.rename(self._path(old), self._path(new))

    def create_mapping(
        self, handle: int, at: int, size: int, offset: int, prot: int, flags: int, source: str
    ) -> None:
        fd = self.sources.get(source, -1)
        abi.create_mapping(self._fd(handle), at, size, prot, flags, fd, offset)

    def unmap(self, handle: int, at: int, size: int) -> None:
        abi.unmap(self._fd(handle), at, size)

    def protect(self, handle: int, at: int, size: int, prot: int, reserved: int = 0) -> None:
        args = struct.pack("=QQII", at, size, prot, reserved)
        fcntl.ioctl(self._fd(handle), abi.PROTECT, args)

    def info(self, handle: int, room: int = 128) -> dict[str, int]:
        answer = fcntl.ioctl(self._fd(handle), INFO, struct.pack("=I124x", room))
        size, flags = struct.unpack_from("=II", answer)
        names = ("region_size", "alignment", "attachments", "grafts", "ungrafts", "faults",
                 "flushes", "layout_changes", "pagetable_bytes", "resident_bytes",
                 "mapped_bytes", "mapped_end")  # fmt: skip
        fields = dict(zip(names, struct.unpack_from("=12Q", answer, 8), strict=True))
        fields["in_place"] = fields["grafts"] - fields["ungrafts"]
        assert not any(answer[max(size, 16) :]), "INFO filled more than its room"
        assert not any(answer[104:]), "INFO filled what is reserved"
        return {"size": size, "flags": flags, **fields}

    def ioctl(self, handle: int, number: int) -> None:
        fcntl.ioctl(self._fd(handle), number, bytes(64))

    def mmap(
        self, handle: int, size: int, prot: int, flags: int, address: int, offset: int
    ) -> tuple[int, int]:
        """Where it is, and how much the process's page tables have grown."""
        before = abi.page_tables()
        found = abi.mmap(self._fd(handle), size, prot, flags, address, offset)
        return found, abi.page_tables() - before

    def munmap(self, address: int, size: int) -> None:
        abi.munmap(address, size)

    def cover(self, address: int, size: int) -> None:
        flags = abi.PRIVATE | abi.ANONYMOUS | abi.FIXED | NORESERVE
        abi.mmap(-1, size, abi.RW, flags, address)
        if abi.get(address, 8) != bytes(8):
            raise AssertionError("other memory over a window shows the region's")
        abi.munmap(address, size)

    def mremap(self, address: int, old: int, new: int, flags: int, target: int) -> None:
        abi.mremap(address, old, new, flags, target)

    def mprotect(self, address: int, size: int, prot: int) -> None:
        abi.mprotect(address, size, prot)

    def madvise(self, address: int, size: int, advice: str) -> None:
        abi.madvise(address, size, ADVICE_NUMBERS[advice])

    def mlock(self, address: int, size: int) -> None:
        abi.mlock(address, size)

    def load(self, address: int, size: int) -> bytes:
        """By a load: only where the model says it is no fault, or the worker dies."""
        return abi.get(address, size)

    def store(self, address: int, data: bytes) -> None:
        """By a store, as `load`."""
        abi.put(address, data)

    def load_by_call(self, address: int, size: int) -> bytes:
        """By a system call, which says EFAULT."""
        os.writev(self.writing, [abi.memory(address, size)])
        return os.read(self.reading, size)

    def store_by_call(self, address: int, data: bytes) -> None:
        """By a system call, which says EFAULT."""
        os.write(self.writing, data)
        try:
            os.readv(self.reading, [abi.memory(address, len(data))])
        except OSError:
            os.read(self.reading, len(data))
            raise

    def load_of(self, pid: int, address: int, size: int) -> bytes:
        """Another process's memory, by process_vm_readv."""
        return abi.get_safely(address, size, pid)

    def end_of(self, address: int, write: bool) -> int | None:
        """The signal that a child gets that touches the address."""
        return abi.dies_by(*((abi.put, address, b"!") if write else (abi.get, address, 1)))

    def file_read(self, source: str, offset: int, size: int) -> bytes:
        return os.pread(self.sources[source], size, offset)

    def file_write(self, source: str, offset: int, data: bytes) -> None:
        os.pwrite(self.sources[source], data, offset)

    def file_resize(self, source: str, size: int) -> None:
        os.ftruncate(self.sources[source], size)

    def faults(self, handle: int) -> int:
        """INFO: faults passed on so far."""
        return all_of_info(self._fd(handle)).faults


assert set(ADVICE_NUMBERS) == set(ADVICE)
assert (abi.PAGE, abi.SLOT) == (PAGE, SLOT)


class Pool:
    """Workers by number, and what belongs to the whole mount."""

    def __init__(self, folder: str, sources: dict[str, int], worker: type[Worker] = Worker) -> None:
        self.folder = folder
        self.sources = sources
        self.worker = worker
        self.pids: dict[int, int] = {}
        self.channels: dict[int, socket.socket] = {}

    def spawn(self, number: int, user: int = 0) -> None:
        """A new process, of this user."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = os.fork()
        if not pid:
            with suppress(BaseException):
                for channel in (ours, *self.channels.values()):
                    channel.close()
                os.umask(0)
                self.worker(theirs, self.folder, self.sources).serve()
            os._exit(1)
        self._enter(number, pid, ours, theirs)
        if user:
            self.call(number, "become", user)

    def _enter(self, number: int, pid: int, ours: socket.socket, theirs: socket.socket) -> None:
        theirs.close()
        ours.settimeout(PATIENCE)
        self.pids[number], self.channels[number] = pid, ours

    def fork(self, parent: int, child: int) -> None:
        """One process forks; the child is a worker of its own."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = self.call(parent, "fork", fd=theirs.fileno())
        self._enter(child, pid, ours, theirs)

    def kill(self, number: int) -> None:
        """kill -9. When it returns, nothing of the process is left."""
        pid = self.pids.pop(number)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        self.channels.pop(number).close()

    def send(self, sender: int, handle: int, receiver: int) -> None:
        """A descriptor goes from one process to another."""
        fds: list[int] = []
        self.call(sender, "give", handle, got=fds)
        self.call(receiver, "take", handle, fd=fds[0])
        os.close(fds[0])

    def call(
        self, number: int, call: str, *args: Any, fd: int = -1, got: list[int] | None = None
    ) -> Any:
        """Have a process make a call. :raises OSError: as the call. :raises Died: it is no more."""
        channel = self.channels[number]
        try:
            socket.send_fds(channel, [pickle.dumps((call, args))], [fd] if fd >= 0 else [])
            message, fds, _, _ = socket.recv_fds(channel, 1 << 16, 1)
        except TimeoutError:
            raise Died(f"{call} does not return") from None
        except OSError as error:
            raise Died(f"{call}: {error}") from None
        if not message:
            status = os.waitstatus_to_exitcode(os.waitpid(self.pids.pop(number), 0)[1])
            raise Died(f"{call} ended the process: {status}")
        if got is not None:
            got += fds
        kind, value = pickle.loads(message)
        if kind == "error":
            raise OSError(value, os.strerror(value))
        if kind == "refused":
            raise value
        assert kind == "value", value
        return value

    def statfs(self) -> int:
        """Bytes in use on the mount."""
        space = os.statvfs(self.folder)
        return (space.f_blocks - space.f_bfree) * space.f_frsize

    def listdir(self) -> list[str]:
        """The names, without ``mshare_info``."""
        return sorted(set(os.listdir(self.folder)) - {"mshare_info"})

    def finish(self) -> None:
        """End every process."""
        for number in list(self.pids):
            self.kill(number)
