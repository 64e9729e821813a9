"""The ABI as a program without the library uses it, and processes to use it in."""

from __future__ import annotations

import ctypes
import faulthandler
import fcntl
import gc
import mmap as python_mmap
import os
import pickle
import resource
import select
import signal
import struct
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

MOUNT = "/sys/fs/mshare"
SLOT = 1 << 30
PAGE = 4096
READ, WRITE, EXEC = 1, 2, 4
RW = READ | WRITE
SHARED, PRIVATE, FIXED, ANONYMOUS = 1, 2, 0x10, 0x20
PROCESS_VM_READV, PROCESS_VM_WRITEV = 310, 311
CREATE_MAPPING, UNMAP, PROTECT = 0x40287800, 0x40107801, 0x40187802

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
]
for _name in ("munmap", "mprotect", "madvise", "mlock"):
    getattr(_libc, _name).argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.mremap.restype = ctypes.c_void_p
_libc.mremap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_void_p,
]
_libc.syscall.restype = ctypes.c_long
_libc.memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
_Usage = ctypes.c_long * 18
_libc.getrusage.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_long)]
_MINFLT = 8
"""Where ru_minflt is in struct rusage, seen as longs."""
_KPF_THP = 22
"""The bit of /proc/kpageflags for a part of a huge page."""


def _check(result: int) -> int:
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def mmap(
    fd: int,
    size: int = SLOT,
    prot: int = RW,
    flags: int = SHARED,
    address: int = 0,
    offset: int = 0,
) -> int:
    """mmap(2)."""
    result: int | None = _libc.mmap(address, size, prot, flags, fd, offset)
    return _check(-1 if result == ctypes.c_void_p(-1).value else result or 0)


def munmap(address: int, size: int = SLOT) -> None:
    """munmap(2)."""
    _check(_libc.munmap(address, size, 0))


def mprotect(address: int, size: int, prot: int) -> None:
    """mprotect(2)."""
    _check(_libc.mprotect(address, size, prot))


def madvise(address: int, size: int, advice: int) -> None:
    """madvise(2)."""
    _check(_libc.madvise(address, size, advice))


def mlock(address: int, size: int) -> None:
    """mlock(2)."""
    _check(_libc.mlock(address, size, 0))


def mlockall(flags: int) -> None:
    """mlockall(2)."""
    _check(_libc.mlockall(flags))


def mremap(address: int, old: int, new: int, flags: int, target: int = 0) -> int:
    """mremap(2)."""
    result: int | None = _libc.mremap(address, old, new, flags, target)
    return _check(-1 if result == ctypes.c_void_p(-1).value else result or 0)


def syscall(number: int, *args: int) -> int:
    """Any system call, by its number on x86-64."""
    return _check(_libc.syscall(number, *map(ctypes.c_long, args)))


def create_mapping(
    region: int,
    at: int = 0,
    size: int = SLOT,
    prot: int = RW,
    flags: int = SHARED | FIXED | ANONYMOUS,
    fd: int = -1,
    offset: int = 0,
) -> None:
    """MSHAREFS_CREATE_MAPPING."""
    args = struct.pack("=QQQIIIxxxx", at, size, offset, prot, flags, fd & 0xFFFFFFFF)
    fcntl.ioctl(region, CREATE_MAPPING, args)


def punch(file: int, at: int, size: int) -> None:
    """Make a hole in a file: fallocate(2) with PUNCH_HOLE and KEEP_SIZE."""
    syscall(285, file, 3, at, size)


def unmap(region: int, at: int, size: int) -> None:
    """MSHAREFS_UNMAP."""
    fcntl.ioctl(region, UNMAP, struct.pack("=QQ", at, size))


def protect(region: int, at: int, size: int, prot: int) -> None:
    """PROTECT."""
    fcntl.ioctl(region, PROTECT, struct.pack("=QQII", at, size, prot, 0))


def make(path: str, size: int = SLOT, *, fill: bool = True) -> int:
    """A new region of ``size`` bytes, anonymous memory all over if ``fill``."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.ftruncate(fd, size)
    if fill:
        create_mapping(fd, size=size)
    return fd


def put(address: int, data: bytes) -> None:
    """Store ``data`` at ``address``."""
    ctypes.memmove(address, data, len(data))


def get(address: int, length: int) -> bytes:
    """Load ``length`` bytes from ``address``."""
    return ctypes.string_at(address, length)


def vector(address: int, length: int) -> tuple[int, Any]:
    """Where a struct iovec for these bytes is, and what keeps it there."""
    words = (ctypes.c_uint64 * 2)(address, length)
    return ctypes.addressof(words), words


def get_safely(address: int, length: int, pid: int = 0) -> bytes:
    """Load bytes of a process, by default this one; EFAULT where a load would be a signal."""
    data = ctypes.create_string_buffer(length)
    ours, theirs = vector(ctypes.addressof(data), length), vector(address, length)
    syscall(PROCESS_VM_READV, pid or os.getpid(), ours[0], 1, theirs[0], 1, 0)
    return data.raw


def put_safely(address: int, data: bytes) -> None:
    """Store bytes in this process; EFAULT where a store would be a signal."""
    source = ctypes.create_string_buffer(data, len(data))
    ours, theirs = vector(ctypes.addressof(source), len(data)), vector(address, len(data))
    syscall(PROCESS_VM_WRITEV, os.getpid(), ours[0], 1, theirs[0], 1, 0)


def memory(address: int, size: int = PAGE) -> memoryview:
    """The bytes there, as a buffer for calls that fill or send one."""
    return memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B")


def address_of(buffer: memoryview) -> int:
    """Where the bytes of a writable buffer are."""
    return ctypes.addressof(ctypes.c_ubyte.from_buffer(buffer))


def fill(address: int, size: int, value: int = 7) -> None:
    """Store ``value`` in every byte."""
    ctypes.memset(address, value, size)


def touch(address: int, size: int, step: int = 0, count: int = 1) -> int:
    """Read every byte at ``count`` addresses ``step`` apart; the minor faults it took.

    The same first with other memory: after a fork a process also copies pages of its own, and
    those faults are not the region's.
    """
    before, after = _Usage(), _Usage()
    own = ctypes.create_string_buffer(PAGE)
    for start, length, stride in ((ctypes.addressof(own), PAGE, 0), (address, size, step)):
        places = [start + number * stride for number in range(count)]
        _libc.getrusage(resource.RUSAGE_SELF, before)
        for place in places:
            _libc.memcmp(place, place, length)
        _libc.getrusage(resource.RUSAGE_SELF, after)
    return after[_MINFLT] - before[_MINFLT]


def entries(address: int, size: int) -> list[int | None]:
    """The page frames behind a range, from /proc/self/pagemap; None where no page is mapped."""
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(address // PAGE * 8)
        words = struct.unpack(f"{size // PAGE}Q", file.read(size // PAGE * 8))
    return [word & (1 << 55) - 1 if word >> 63 else None for word in words]


def frames(address: int, size: int) -> list[int]:
    """The page frames behind a range that was touched."""
    found = [frame for frame in entries(address, size) if frame is not None]
    assert len(found) == size // PAGE
    return found


def huge(address: int) -> bool:
    """Is a huge page behind an address? Touches it, for /proc/kpageflags to be asked."""
    touch(address, 1)
    (frame,) = entries(address, PAGE)
    if frame is None:  # khugepaged has taken it away since
        return False
    with open("/proc/kpageflags", "rb") as file:
        (flags,) = struct.unpack("Q", os.pread(file.fileno(), 8, frame * 8))
    return bool(flags >> _KPF_THP & 1)


def page_tables(pid: int | str = "self") -> int:
    """VmPTE in bytes."""
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmPTE"))


def meminfo(field: str) -> int:
    """A field of /proc/meminfo in bytes, with what each CPU has not yet added to it."""
    with open("/proc/sys/vm/stat_refresh") as refresh:
        refresh.read()
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{field}:"))


def minor_faults() -> int:
    """Minor faults of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


class Child:
    """A forked process that runs ``work`` and sends back what it returns."""

    def __init__(self, work: Callable[..., Any], *args: Any) -> None:
        reading, writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(reading)
            faulthandler.disable()
            gc.disable()
            try:
                answer = (True, work(*args))
            except BaseException:
                answer = (False, traceback.format_exc())
            try:
                with os.fdopen(writing, "wb") as pipe:
                    pickle.dump(answer, pipe)
            finally:
                os._exit(0)
        os.close(writing)
        self._reading = reading

    def result(self) -> Any:
        """What ``work`` returned. :raises AssertionError: it raised, or died by a signal."""
        with os.fdopen(self._reading, "rb") as pipe:
            data = pipe.read()
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        assert status == 0, f"the child ended with {status}"
        good, answer = pickle.loads(data)
        assert good, answer
        return answer

    def signal(self, seconds: float = 300) -> int | None:
        """The signal it died by, or None. :raises AssertionError: it does not end."""
        pidfd = os.pidfd_open(self.pid)
        ended = select.select([pidfd], [], [], seconds)[0]
        os.close(pidfd)
        if not ended:
            os.kill(self.pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self._reading)
        assert ended, f"the child still runs after {seconds} s"
        return -status if status < 0 else None

    def kill(self) -> None:
        """kill -9, and wait."""
        os.kill(self.pid, signal.SIGKILL)
        self.signal()


def code_of(call: Callable[..., object], *args: object) -> int:
    """0, or the errno of the call."""
    try:
        call(*args)
    except OSError as error:
        return error.errno or -1
    return 0


def within(folder: str, work: Callable[..., object], *args: object) -> Child:
    """A process in a cgroup."""

    def run() -> object:
        enter(folder)
        return work(*args)

    return Child(run)


def forever() -> None:
    """Stay until killed."""
    while True:
        signal.pause()


def dies_by(work: Callable[..., Any], *args: Any) -> int | None:
    """The signal a process dies by that runs ``work``."""
    return Child(work, *args).signal()


def settle(measure: Callable[[], int], wanted: int, seconds: float = 10) -> int:
    """Wait until ``measure`` is at most ``wanted``; what it was last."""
    deadline = time.monotonic() + seconds
    while (value := measure()) > wanted and time.monotonic() < deadline:
        time.sleep(0.1)
    return value


@contextmanager
def cgroup(name: str, **limits: str) -> Iterator[str]:
    """A memory cgroup (v2) with limits such as ``max="64M"``; gone after the block."""
    root = "/sys/fs/cgroup"
    with open(f"{root}/cgroup.subtree_control", "w") as file:
        file.write("+memory")
    folder = f"{root}/{name}-{os.getpid()}"
    os.mkdir(folder)
    for limit, value in limits.items():
        with open(f"{folder}/memory.{limit}", "w") as file:
            file.write(value)
    try:
        yield folder
    finally:
        for _ in range(50):
            try:
                os.rmdir(folder)
                break
            except OSError:
                time.sleep(0.1)


def enter(folder: str) -> None:
    """Move this process into a cgroup."""
    with open(f"{folder}/cgroup.procs", "w") as file:
        file.write(str(os.getpid()))


def current(folder: str) -> int:
    """Bytes charged to a cgroup."""
    with open(f"{folder}/memory.current") as file:
        return int(file.read())


def anonymous(size: int) -> int:
    """Private anonymous memory."""
    return mmap(-1, size, RW, PRIVATE | ANONYMOUS)


assert python_mmap.PAGESIZE == PAGE
