"""What is read-only stays as it is, whatever route a write takes."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from mshare.engines.msharefs import info
from tests.conftest import NOBODY
from tests.kernel import abi
from tests.kernel.abi import PAGE, READ, RW, SHARED, SLOT

SIZE = 16 * PAGE
CONTENT = b"stays as it is. " * (SIZE // 16)
PTRACE, PTRACE_POKEDATA, PTRACE_ATTACH, PTRACE_DETACH = 101, 5, 16, 17
IO_SETUP, IO_DESTROY, IO_GETEVENTS, IO_SUBMIT = 206, 207, 208, 209
FUTEX, VMSPLICE, PROCESS_VM_WRITEV, GETRANDOM = 202, 278, 311, 318


def _bad(folder: str, flags: int = 0) -> int:
    """A descriptor of a file of what must not arrive."""
    file = f"{folder}/bad"
    with open(file, "wb") as out:
        out.write(b"BAD!" * (PAGE // 4))
    return os.open(file, os.O_RDONLY | flags)


def _iovec(address: int, length: int = PAGE) -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(struct.pack("=QQ", address, length), 16)


@contextmanager
def _heir() -> Iterator[int]:
    """Another process, which has inherited all windows."""
    child = abi.Child(abi.forever)
    try:
        yield child.pid
    finally:
        child.kill()


def by_read(address: int, disk: str) -> None:
    fd = _bad(disk)
    try:
        os.readv(fd, [abi.memory(address)])
    finally:
        os.close(fd)


def by_direct_read(address: int, disk: str) -> None:
    fd = _bad(disk, os.O_DIRECT)
    try:
        os.readv(fd, [abi.memory(address)])
    finally:
        os.close(fd)


def by_asynchronous_read(address: int, disk: str) -> None:
    fd = _bad(disk, os.O_DIRECT)
    context = ctypes.c_long(0)
    abi.syscall(IO_SETUP, 1, ctypes.addressof(context))
    try:
        block = struct.pack("=QIIHhIQQqQII", 0, 0, 0, 0, 0, fd, address, PAGE, 0, 0, 0, 0)
        request = ctypes.create_string_buffer(block, 64)
        pointer = ctypes.c_void_p(ctypes.addressof(request))
        abi.syscall(IO_SUBMIT, context.value, 1, ctypes.addressof(pointer))
        event = (ctypes.c_int64 * 4)()
        abi.syscall(IO_GETEVENTS, context.value, 1, 1, ctypes.addressof(event), 0)
        if event[2] < 0:
            raise OSError(-event[2], os.strerror(-event[2]))
    finally:
        abi.syscall(IO_DESTROY, context.value)
        os.close(fd)


def by_recv(address: int, disk: str) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.send(b"BAD!")
        theirs.recv_into(abi.memory(address))


def by_vmsplice(address: int, disk: str) -> None:
    reading, writing = os.pipe()
    os.write(writing, b"BAD!")
    vector = _iovec(address, 4)
    try:
        abi.syscall(VMSPLICE, reading, ctypes.addressof(vector), 1, 0)
    finally:
        os.close(reading)
        os.close(writing)


def by_getrandom(address: int, disk: str) -> None:
    abi.syscall(GETRANDOM, address, 64, 0)


def by_futex(address: int, disk: str) -> None:
    """FUTEX_WAKE_OP stores a number."""
    word = ctypes.c_int(0)
    operation = 0 << 28 | 0x444 << 12
    abi.syscall(FUTEX, ctypes.addressof(word), 5, 1, 1, address, operation)


def by_process_vm_writev(address: int, disk: str) -> None:
    source = ctypes.create_string_buffer(b"BAD!" * (PAGE // 4), PAGE)
    ours, theirs = _iovec(ctypes.addressof(source)), _iovec(address)
    with _heir() as pid:
        vectors = ctypes.addressof(ours), 1, ctypes.addressof(theirs), 1
        abi.syscall(PROCESS_VM_WRITEV, pid, *vectors, 0)


def by_proc_mem(address: int, disk: str) -> None:
    with _heir() as pid:
        fd = os.open(f"/proc/{pid}/mem", os.O_RDWR)
        try:
            os.pwrite(fd, b"BAD!", address)
        finally:
            os.close(fd)


def by_own_proc_mem(address: int, disk: str) -> None:
    fd = os.open("/proc/self/mem", os.O_RDWR)
    try:
        os.pwrite(fd, b"BAD!", address)
    finally:
        os.close(fd)


def by_ptrace(address: int, disk: str) -> None:
    with _heir() as pid:
        abi.syscall(PTRACE, PTRACE_ATTACH, pid, 0, 0)
        os.waitpid(pid, 0)
        try:
            abi.syscall(PTRACE, PTRACE_POKEDATA, pid, address, 0x2144414221444142)
        finally:
            abi.syscall(PTRACE, PTRACE_DETACH, pid, 0, 0)


Route = Callable[[int, str], None]
ROUTES: dict[Route, int] = {
    by_read: errno.EFAULT,
    by_direct_read: errno.EFAULT,
    by_asynchronous_read: errno.EFAULT,
    by_recv: errno.EFAULT,
    by_vmsplice: errno.EFAULT,
    by_getrandom: errno.EFAULT,
    by_futex: errno.EFAULT,
    by_process_vm_writev: errno.EFAULT,
    by_proc_mem: errno.EIO,
    by_own_proc_mem: errno.EIO,
    by_ptrace: errno.EIO,
}
KINDS = ["descriptor", "window", "protected", "file", "tmpfs"]


@pytest.fixture
def readonly(request: pytest.FixtureRequest, path: str, disk: str) -> Iterator[int]:
    """A window that must not be written, of each kind; at the end the content is as it was."""
    kind = request.param
    file = memory = -1
    fd = abi.make(path, fill=False)
    if kind in ("file", "tmpfs"):
        # The window is writable; what lies in the region was opened for reading.
        name = f"{disk}/content" if kind == "file" else f"/dev/shm/{os.path.basename(path)}"
        with open(name, "wb") as out:
            out.write(CONTENT)
        file = os.open(name, os.O_RDONLY)
        flags = SHARED | abi.FIXED
        abi.create_mapping(fd, size=SIZE, flags=flags, prot=READ, fd=file)
    else:
        abi.create_mapping(fd, size=SIZE)
        memory = abi.mmap(fd)
        abi.put(memory, CONTENT)
    match kind:
        case "descriptor":
            reading = os.open(path, os.O_RDONLY)
            address = abi.mmap(reading, prot=READ)
            os.close(reading)
        case "window":
            address = abi.mmap(fd, prot=READ)
        case "protected":
            abi.protect(fd, 0, SIZE, READ)
            address = abi.mmap(fd)
        case _:
            address = abi.mmap(fd)
    yield address
    assert abi.get(address, SIZE) == CONTENT
    abi.munmap(address)
    if memory >= 0:
        assert abi.get(memory, SIZE) == CONTENT
        abi.munmap(memory)
    if file >= 0:
        assert os.pread(file, SIZE, 0) == CONTENT
        os.close(file)
        os.unlink(name)
    os.close(fd)


@pytest.mark.parametrize("readonly", KINDS, indirect=True)
@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.__name__)
def test_no_write_arrives(readonly: int, disk: str, route: Route) -> None:
    """Refused by every route, for a page that was read before and for one that was not."""
    assert abi.get(readonly, 4) == CONTENT[:4]
    for address in (readonly, readonly + 8 * PAGE):
        with pytest.raises(OSError, match="Errno") as caught:
            route(address, disk)
        assert caught.value.errno == ROUTES[route]


@pytest.mark.parametrize("readonly", KINDS, indirect=True)
def test_no_store(readonly: int) -> None:
    """SIGSEGV, again and again, also after a read."""
    for address in (readonly, readonly + 8 * PAGE, readonly + SIZE - 4):
        assert abi.dies_by(abi.put, address, b"BAD!") == signal.SIGSEGV
        assert abi.get(address, 4) in CONTENT
        assert abi.dies_by(abi.put, address, b"BAD!") == signal.SIGSEGV


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.__name__)
def test_writes_arrive_where_allowed(region: int, disk: str, route: Route) -> None:
    """The same routes work on a writable window: it is the right that is missing elsewhere."""
    address = abi.mmap(region)
    route(address, disk)
    assert abi.get(address, 4) != bytes(4)
    abi.munmap(address)


@pytest.mark.parametrize("readonly", ["descriptor", "window"], indirect=True)
def test_no_mprotect(readonly: int) -> None:
    """A read-only window does not become writable, nor executable, whole or in part."""
    for size in (SLOT, PAGE):
        for prot in (RW, abi.WRITE, READ | abi.EXEC):
            with pytest.raises(OSError, match="Errno"):
                abi.mprotect(readonly, size, prot)
    assert abi.dies_by(abi.put, readonly, b"BAD!") == signal.SIGSEGV


@pytest.mark.parametrize("readonly", ["descriptor", "window"], indirect=True)
def test_moved_or_inherited_it_stays_read_only(readonly: int, disk: str) -> None:
    """After fork and after mremap."""

    def heir() -> None:
        target = abi.mremap(readonly, SLOT, SLOT, 3, 13 << 40)
        for route in (by_read, by_own_proc_mem):
            with suppress(OSError):
                route(target, disk)
        assert abi.get(target, 4) == CONTENT[:4]
        abi.put(target, b"BAD!")

    assert abi.dies_by(heir) == signal.SIGSEGV


@pytest.mark.parametrize("other", ["memory", "region"])
def test_no_write_slips_through_a_remap(region: int, path: str, other: str) -> None:
    """One thread swaps the window for writable memory, over and over, while one writes there."""
    memory = abi.mmap(region)
    abi.put(memory, CONTENT)
    own = abi.make(f"{path}-own")
    os.unlink(f"{path}-own")
    reading = os.open(path, os.O_RDONLY)
    address = abi.mmap(reading, prot=READ)
    zeros = os.open("/dev/zero", os.O_RDONLY)
    over = abi.FIXED | (abi.PRIVATE | abi.ANONYMOUS if other == "memory" else SHARED)
    stop = threading.Event()
    results = {True: 0, False: 0}

    def swap() -> None:
        while not stop.is_set():
            abi.mmap(-1 if other == "memory" else own, SLOT, RW, over, address)
            abi.mmap(reading, SLOT, READ, SHARED | abi.FIXED, address)

    def write() -> None:
        view = abi.memory(address, SIZE)
        while not stop.is_set():
            try:
                os.readv(zeros, [view])
                results[True] += 1
            except OSError as error:
                results[False] += 1
                assert error.errno == errno.EFAULT

    threads = [threading.Thread(target=work) for work in (swap, write)]
    for thread in threads:
        thread.start()
    time.sleep(1.5)
    stop.set()
    for thread in threads:
        thread.join()
    assert min(results.values()) > 0, results
    assert abi.get(memory, SIZE) == CONTENT
    assert abi.get(address, SIZE) == CONTENT
    abi.munmap(memory)
    abi.munmap(address)
    for fd in (own, reading, zeros):
        os.close(fd)


def test_descriptor_cannot_be_widened(region: int, path: str) -> None:
    """A user who may only read can't map for writing, reopen for writing, or change the layout."""
    address = abi.mmap(region)
    abi.put(address, CONTENT)
    os.fchmod(region, 0o644)

    def reader() -> list[str]:
        os.setgroups([])
        os.setuid(NOBODY)
        fd = os.open(path, os.O_RDONLY)
        attempts: list[Callable[[], object]] = [
            lambda: abi.mmap(fd),
            lambda: os.open(path, os.O_RDWR),
            lambda: os.open(f"/proc/self/fd/{fd}", os.O_RDWR),
            lambda: abi.create_mapping(fd),
            lambda: abi.unmap(fd, 0, PAGE),
            lambda: abi.protect(fd, 0, PAGE, READ),
            lambda: os.truncate(path, 0),
            lambda: os.unlink(path),
            lambda: os.chmod(path, 0o666),
        ]
        through = []
        for number, attempt in enumerate(attempts):
            try:
                attempt()
                through.append(str(number))
            except PermissionError:
                pass
        return through

    changes = info(region).layout_changes
    assert abi.Child(reader).result() == []
    assert info(region).layout_changes == changes
    assert abi.get(address, SIZE) == CONTENT
    abi.munmap(address)
