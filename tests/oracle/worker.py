"""Real processes for the machine: the same calls as `model.Process`, made to the kernel.

`Pool` is to the kernel what `model.Mount` is to the model. Each worker is a process that the
pool drives over a socket. A worker that dies where it should not, or does not answer, is a
difference like any other.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import itertools
import os
import pickle
import resource
import signal
import socket
import struct
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

from mshare.engines.msharefs import INFO, OPEN_FILE, OPEN_MAPPING
from mshare.engines.msharefs import info as all_of_info
from tests.kernel import abi
from tests.oracle.memory import (
    ADVICE,
    FILE_SIZE,
    NORESERVE,
    PAGE,
    SLOT,
    TMPFILE,
    WRITE,
    Closed,
    Fault,
    Readonly,
    refuse,
)

CLONE, CLONE_PARENT, PRCTL, DUMPABLE = 56, 0x8000, 157, 4
ADVICE_NUMBERS = {
    "NORMAL": 0, "SEQUENTIAL": 2, "DONTNEED": 4, "FREE": 8, "REMOVE": 9, "DONTFORK": 10,
    "DOFORK": 11, "MERGEABLE": 12,
    "HUGEPAGE": 14, "NOHUGEPAGE": 15, "DONTDUMP": 16, "DODUMP": 17, "WIPEONFORK": 18,
    "COLD": 20, "PAGEOUT": 21, "POPULATE_READ": 22, "POPULATE_WRITE": 23, "COLLAPSE": 25,
    "WILLNEED": 3,
}  # fmt: skip
SHMGET, SHMAT, SHMCTL, SHM_RDONLY, IPC_RMID = 29, 30, 31, 0o10000, 0
TABLES_PER_WINDOW = 16 << 10
"""Page-table bytes a process may pay for a window, of whatever size: what lies above a slot."""
ROOM = 1 << 17
"""Bytes of a message."""
PATIENCE = 120
"""Seconds until a call counts as one that never returns."""
_with_gil = ctypes.PyDLL(None, use_errno=True)
_with_gil.syscall.restype = ctypes.c_long


NONE = 1 << 19
"""A descriptor that no process has open."""
NOMINAL = 1 << 50
"""From here on an address is a name for one that the kernel has chosen."""
Outcome = tuple[str, Any]
Call = tuple[int | None, str, tuple[Any, ...]]
"""A call by a process, or by none for what belongs to the whole mount."""


class Died(Exception):
    """A worker was killed by a signal, or hangs."""


def outcome(call: Callable[..., Any], *args: Any) -> Outcome:
    """What a call came to: a value, an errno by name, a signal by name, or a refusal of Python."""
    try:
        return "value", call(*args)
    except OSError as error:
        return "error", errno.errorcode[error.errno or 0]
    except Fault as fault:
        return "signal", fault.signal.name
    except (Closed, Readonly) as refusal:
        return "refused", type(refusal).__name__


class Worker:
    """The calls, made in the process that has this object."""

    def __init__(self, channel: socket.socket, folder: str, sources: dict[str, int]) -> None:
        self.channel = channel
        self.folder = folder
        self.sources = sources
        self.fds: dict[int, int] = {}
        self.outgoing: list[int] = []
        self.reading, self.writing = os.pipe()
        self.chosen: list[tuple[int, int]] = []

    def serve(self) -> NoReturn:
        """Answer until killed."""
        try:
            while True:
                message, fds, _, _ = socket.recv_fds(self.channel, ROOM, 1)
                if not message:
                    break
                calls: list[tuple[str, tuple[Any, ...]]] = pickle.loads(message)
                answers: list[Outcome] = []
                for call, args in calls:
                    try:
                        answers.append(outcome(self.attempt, call, (*args, *fds)))
                    except Exception:
                        answers.append(("broken", traceback.format_exc()))
                outgoing, self.outgoing = self.outgoing, []
                socket.send_fds(self.channel, [pickle.dumps(answers)], outgoing)
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
        if handle in self.fds:
            os.close(self.fds[handle])
        self.fds[handle] = fd

    def _fd(self, handle: int) -> int:
        return self.fds.get(handle, NONE)

    def _at(self, address: int) -> int:
        """The address meant, if it is one the kernel has chosen."""
        if address < NOMINAL:
            return address
        nominal, real = next(each for each in reversed(self.chosen) if each[0] <= address)
        return address - nominal + real

    def _path(self, name: str) -> str:
        return self.folder if name == TMPFILE else f"{self.folder}/{name}"

    # The calls of model.Process.

    def open(self, handle: int, name: str, flags: int, mode: int) -> None:
        flags |= os.O_TMPFILE if name == TMPFILE else 0
        self.fds[handle] = os.open(self._path(name), flags, mode)

    def open_again(self, handle: int, other: int, flags: int) -> None:
        self.fds[handle] = os.open(f"/proc/self/fd/{self._fd(other)}", flags)

    def close(self, handle: int) -> None:
        os.close(self._fd(handle))
        del self.fds[handle]

    def ftruncate(self, handle: int, size: int) -> None:
        os.ftruncate(self._fd(handle), size)

    def fallocate(self, handle: int, mode: int, offset: int, size: int) -> None:
        abi.syscall(285, self._fd(handle), mode, offset, size)

    def read(self, handle: int) -> None:
        os.read(self._fd(handle), 0)

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
        fd = self.sources.get(source, NONE)
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
                 "mapped_bytes", "mapped_end", "locked_bytes")  # fmt: skip
        fields = dict(zip(names, struct.unpack_from("=13Q", answer, 8), strict=True))
        fields["in_place"] = fields["grafts"] - fields["ungrafts"]
        assert not any(answer[max(size, 16) :]), "INFO filled more than its room"
        assert not any(answer[112:]), "INFO filled what is reserved"
        return {"size": size, "flags": flags, **fields}

    def open_file(self, handle: int, control: int, source: str, access: int) -> None:
        fd = self.sources.get(source, NONE)
        self._open_region(handle, control, OPEN_FILE, struct.pack("=II", fd, access))

    def open_mapping(
        self, handle: int, control: int, address: int, access: int, reserved: int = 0
    ) -> None:
        args = struct.pack("=QII", self._at(address), access, reserved)
        self._open_region(handle, control, OPEN_MAPPING, args)

    def _open_region(self, handle: int, control: int, number: int, args: bytes) -> None:
        self.fds[handle] = fcntl.ioctl(self._fd(control), number, bytearray(args))
        assert not os.get_inheritable(self.fds[handle]), "exec does not close it"

    def limit_locked(self, size: int) -> None:
        most = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (size, most))

    def ioctl(self, handle: int, number: int) -> None:
        fcntl.ioctl(self._fd(handle), number, bytes(64))

    def mmap(
        self,
        handle: int,
        size: int,
        prot: int,
        flags: int,
        address: int,
        offset: int,
        nominal: int = 0,
    ) -> tuple[int, bool]:
        """How far the address is from a right one; and whether page tables grew as they may."""
        before = abi.page_tables()
        found = abi.mmap(self._fd(handle), size, prot, flags, address, offset)
        few = abi.page_tables() - before <= TABLES_PER_WINDOW
        if not nominal:
            return found - address, few
        self.chosen.append((nominal, found))
        return found % SLOT, few

    def munmap(self, address: int, size: int) -> None:
        abi.munmap(self._at(address), size)

    def cover(self, address: int, size: int) -> None:
        flags = abi.PRIVATE | abi.ANONYMOUS | abi.FIXED | NORESERVE
        abi.mmap(-1, size, abi.RW, flags, address)
        if abi.get(address, 8) != bytes(8):
            raise AssertionError("other memory over a window shows the region's")
        abi.munmap(address, size)

    def mremap(self, address: int, old: int, new: int, flags: int, target: int) -> None:
        abi.mremap(self._at(address), old, new, flags, target)

    def mprotect(self, address: int, size: int, prot: int) -> None:
        abi.mprotect(self._at(address), size, prot)

    def madvise(self, address: int, size: int, advice: str) -> None:
        abi.madvise(self._at(address), size, ADVICE_NUMBERS[advice])

    def mlock(self, address: int, size: int) -> None:
        abi.mlock(self._at(address), size)

    def mmap_other(
        self, address: int, source: str, size: int, prot: int, flags: int, offset: int
    ) -> None:
        self.munmap_other(address)
        if source == "segment":
            number = abi.syscall(SHMGET, 0, size, 0o600)
            try:
                abi.syscall(SHMAT, number, address, 0 if prot & WRITE else SHM_RDONLY)
            finally:
                abi.syscall(SHMCTL, number, IPC_RMID, 0)
            return
        flags |= abi.FIXED | (abi.ANONYMOUS if source == "anonymous" else 0)
        abi.mmap(self.sources.get(source, NONE), size, prot, flags, address, offset)

    def munmap_other(self, address: int) -> None:
        abi.munmap(address, SLOT)

    def access(self, direct: bool, watch: int, address: int, what: int | bytes) -> tuple[Any, int]:
        """Load so many bytes or store these; what was loaded, and the faults INFO has counted.

        Directly is by an instruction, which only may be where it is no signal. Otherwise it is by
        a system call, which says EFAULT.
        """
        address, before = self._at(address), self._faults(watch)
        found = None
        match what, direct:
            case int(), True:
                found = abi.get(address, what)
            case int(), False:
                found = self._send(address, what)
            case bytes(), True:
                abi.put(address, what)
            case bytes(), False:
                self._receive(address, what)
        return found, self._faults(watch) - before

    def _faults(self, watch: int) -> int:
        return all_of_info(self.fds[watch]).faults if watch in self.fds else 0

    def _send(self, address: int, size: int) -> bytes:
        os.writev(self.writing, [abi.memory(address, size)])
        return os.read(self.reading, size)

    def _receive(self, address: int, data: bytes) -> None:
        os.write(self.writing, data)
        try:
            os.readv(self.reading, [abi.memory(address, len(data))])
        except OSError:
            os.read(self.reading, len(data))
            raise

    def where(self, address: int) -> int:
        """The real address."""
        return self._at(address)

    def load_of(self, pid: int, address: int, size: int) -> bytes:
        """Another process's memory, by process_vm_readv."""
        return abi.get_safely(address, size, pid)

    def end_of(self, address: int, write: bool) -> str | None:
        """The signal that a child gets that touches the address."""
        address = self._at(address)
        number = abi.dies_by(*((abi.put, address, b"!") if write else (abi.get, address, 1)))
        return None if number is None else signal.Signals(number).name

    def file_read(self, source: str, offset: int, size: int) -> bytes:
        return os.pread(self.sources[source], size, offset)

    def file_write(self, source: str, offset: int, data: bytes) -> None:
        fd = self.sources[source]
        os.pwrite(fd, data, offset)
        os.ftruncate(fd, -(-os.fstat(fd).st_size // PAGE) * PAGE)

    def file_resize(self, source: str, size: int) -> None:
        os.ftruncate(self.sources[source], size)


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

    def run(self, calls: list[Call]) -> list[Outcome]:
        """Make calls one after the other. It ends early with a process that dies."""
        found: list[Outcome] = []
        try:
            for number, group in itertools.groupby(calls, lambda each: each[0]):
                if number is None:
                    for _, call, args in group:
                        found.append(outcome(getattr(self, call), *args))
                else:
                    found += self._ask(number, [(call, args) for _, call, args in group])
        except Died as end:
            found.append(("died", str(end)))
        return found

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
            self._call(number, "become", user)

    def _enter(self, number: int, pid: int, ours: socket.socket, theirs: socket.socket) -> None:
        theirs.close()
        ours.settimeout(PATIENCE)
        self.pids[number], self.channels[number] = pid, ours

    def fork(self, parent: int, child: int) -> None:
        """One process forks; the child is a worker of its own."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = self._call(parent, "fork", fd=theirs.fileno())
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
        self._call(sender, "give", handle, got=fds)
        self._call(receiver, "take", handle, fd=fds[0])
        os.close(fds[0])

    def load_of(self, reader: int, owner: int, address: int, size: int) -> bytes:
        """One process reads the memory of another."""
        real = self._call(owner, "where", address)
        found: bytes = self._call(reader, "load_of", self.pids[owner], real, size)
        return found

    def _call(
        self, number: int, call: str, *args: Any, fd: int = -1, got: list[int] | None = None
    ) -> Any:
        """One call, with a descriptor, or for one. :raises OSError: as the call."""
        fds = [fd] if fd >= 0 else []
        (kind, value), *_ = self._ask(number, [(call, args)], fds, got)
        if kind == "error":
            refuse(getattr(errno, value))
        assert kind == "value", value
        return value

    def _ask(
        self,
        number: int,
        calls: list[tuple[str, tuple[Any, ...]]],
        fds: list[int] | None = None,
        got: list[int] | None = None,
    ) -> list[Outcome]:
        """Have a process make calls. :raises Died: it is no more."""
        channel = self.channels[number]
        what = ", ".join(call for call, _ in calls)
        try:
            socket.send_fds(channel, [pickle.dumps(calls)], fds or [])
            message, came, _, _ = socket.recv_fds(channel, ROOM, 1)
        except TimeoutError:
            raise Died(f"one does not return of: {what}") from None
        except OSError as error:
            raise Died(f"{error} in one of: {what}") from None
        if not message:
            status = os.waitstatus_to_exitcode(os.waitpid(self.pids.pop(number), 0)[1])
            self.channels.pop(number).close()
            raise Died(f"one ended the process by {status}: {what}")
        if got is not None:
            got += came
        answers: list[Outcome] = pickle.loads(message)
        return answers

    def statfs(self) -> int:
        """Bytes in use on the mount."""
        space = os.statvfs(self.folder)
        return (space.f_blocks - space.f_bfree) * space.f_frsize

    def listdir(self) -> list[str]:
        """The names, without ``mshare_info``."""
        return sorted(set(os.listdir(self.folder)) - {"mshare_info"})

    def begin(self) -> None:
        """No process, and files as they are at first."""
        self.finish()
        for name in ("memfd", "tmpfs", "disk"):
            os.ftruncate(self.sources[name], 0)
            os.ftruncate(self.sources[name], FILE_SIZE)

    def finish(self) -> None:
        """End every process, and remove every name."""
        for number in list(self.pids):
            self.kill(number)
        for name in self.listdir():
            os.unlink(f"{self.folder}/{name}")
