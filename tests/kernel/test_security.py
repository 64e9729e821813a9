"""What a user without rights cannot do: write, reach or run what is not theirs."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import signal
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from mshare.engines.msharefs import info
from tests.conftest import NOBODY, skip
from tests.kernel import abi, fuse
from tests.kernel.abi import PAGE, READ, RW, SHARED, SLOT
from tests.kernel.test_abi import refused

CONTENT = b"not yours to write. "[:16] * (PAGE // 16)
OTHER = NOBODY - 1
_libc = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNS, CLONE_NEWUSER, PR_SET_DUMPABLE = 0x20000, 0x10000000, 4
AT_FDCWD, PERSONALITY, RENAMEAT2, USERFAULTFD = -100, 135, 316, 323
UFFDIO_API, UFFDIO_REGISTER = 0xC018AA3F, 0xC020AA00
UFFD_USER_MODE_ONLY, UFFD_WP_ASYNC = 1, 1 << 15
F_ADD_SEALS, SEAL_WRITE, SEAL_FUTURE_WRITE = 1033, 8, 16
GET_FLAGS, SET_FLAGS, APPEND, IMMUTABLE = 0x80086601, 0x40086602, 0x20, 0x10


def become(user: int) -> None:
    """Give up root for good."""
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


def as_user(user: int, work: Callable[..., Any], *args: Any) -> Any:
    """What ``work`` returns in a process of that user."""

    def run() -> object:
        become(user)
        return work(*args)

    return abi.Child(run).result()


def mount(kind: str, folder: str, flags: int = 0, options: str = "", source: str = "") -> None:
    """mount(2)."""
    words = (source or kind, folder, kind)
    if _libc.mount(*(word.encode() for word in words), flags, options.encode()):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def enter_namespace() -> None:
    """A user and a mount namespace of one's own, in which one is root."""
    user, group = os.getuid(), os.getgid()
    # after a change of user /proc/self is root's
    _libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)
    if _libc.unshare(CLONE_NEWUSER | CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"0 {user} 1"),
        ("gid_map", f"0 {group} 1"),
    ):
        Path(f"/proc/self/{name}").write_text(text)


HAVE_NAMESPACES = os.path.exists("/proc/self/ns/user")


@pytest.fixture
def needs_namespaces() -> None:
    """The stock kernels have them; a small one with detectors may not."""
    if not HAVE_NAMESPACES:
        skip("this kernel has no user namespaces")


@pytest.fixture
def folder(disk: str) -> Iterator[str]:
    """A folder on a disk that every user can search."""
    os.chmod(disk, 0o755)
    yield disk


@contextmanager
def flagged(name: str, flag: int) -> Iterator[None]:
    """An inode flag, as of chattr."""
    with open(name, "rb") as file:
        (own,) = struct.unpack("l", fcntl.ioctl(file, GET_FLAGS, bytes(8)))
        fcntl.ioctl(file, SET_FLAGS, struct.pack("l", own | flag))
        yield
        fcntl.ioctl(file, SET_FLAGS, struct.pack("l", own))


def plain(name: str) -> Iterator[int]:
    """A file of root's that others may read."""
    yield os.open(name, os.O_RDONLY)


def reopened(name: str) -> Iterator[int]:
    """Its descriptor, opened again."""
    fd = os.open(name, os.O_RDONLY)
    refused(errno.EACCES, os.open, f"/proc/self/fd/{fd}", os.O_RDWR)
    yield os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)


def over_a_socket(name: str) -> Iterator[int]:
    """A descriptor that another process opened for reading, and sent."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        socket.send_fds(ours, [b"x"], [os.open(name, os.O_RDONLY)])
        yield socket.recv_fds(theirs, 1, 1)[1][0]


def memfd(seal: int) -> int:
    fd = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
    os.write(fd, CONTENT)
    fcntl.fcntl(fd, F_ADD_SEALS, seal)
    return fd


def sealed(name: str) -> Iterator[int]:
    """A memfd sealed against writing, of the attacker's own."""
    yield memfd(SEAL_WRITE)


def sealed_for_the_future(name: str) -> Iterator[int]:
    """A memfd sealed against new writers."""
    yield memfd(SEAL_FUTURE_WRITE)


def sealed_reopened(name: str) -> Iterator[int]:
    """A sealed memfd, opened again for reading."""
    yield os.open(f"/proc/self/fd/{memfd(SEAL_WRITE)}", os.O_RDONLY)


Way = Callable[[str], Iterator[int]]
#: what CREATE_MAPPING for writing says, and for reading where that is refused too
WAYS: dict[Way, int] = {
    plain: errno.EACCES,
    reopened: errno.EACCES,
    over_a_socket: errno.EACCES,
    sealed: errno.EPERM,
    sealed_for_the_future: errno.EPERM,
    sealed_reopened: errno.EACCES,
}


def attack(fd: int, code: int, own: str) -> None:
    """Put a descriptor into a region of one's own, and try to write through it."""
    region = abi.make(own, fill=False)
    words = {"size": PAGE, "flags": SHARED | abi.FIXED, "fd": fd}
    refused(code, abi.create_mapping, region, **words)
    try:
        abi.create_mapping(region, prot=READ, **words)
    except PermissionError:
        # before 6.7 a sealed memfd that is open for writing cannot be mapped at all
        assert code == errno.EPERM
        return
    for size in (PAGE, SLOT):
        refused(errno.EACCES, abi.protect, region, 0, size, RW)
    address = abi.mmap(region)
    assert abi.get(address, PAGE) == CONTENT
    assert abi.dies_by(abi.put, address, b"BAD!") == signal.SIGSEGV
    zeros = os.open("/dev/zero", os.O_RDONLY)
    refused(errno.EFAULT, os.readv, zeros, [abi.memory(address)])
    refused(errno.EINVAL, abi.mprotect, address, SLOT, RW)
    assert abi.get(address, PAGE) == CONTENT
    assert os.pread(fd, PAGE, 0) == CONTENT


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_what_is_read_only_stays_so_in_an_own_region(folder: str, path: str, way: Way) -> None:
    """The region is the attacker's, the file or its seal is not: no write, now or by PROTECT."""
    name = f"{folder}/content"
    Path(name).write_bytes(CONTENT)

    def attacker() -> None:
        for fd in way(name):
            attack(fd, WAYS[way], path)

    as_user(NOBODY, attacker)
    assert Path(name).read_bytes() == CONTENT


def test_file_on_a_read_only_mount(path: str, tmp_path: Path) -> None:
    """The user's own file, seen through a mount that is read-only."""
    os.chmod(tmp_path, 0o755)
    for parent in list(tmp_path.parents)[:-1]:
        os.chmod(parent, parent.stat().st_mode | 0o055)
    mount("tmpfs", str(tmp_path))
    name = tmp_path / "content"
    name.write_bytes(CONTENT)
    os.chown(name, NOBODY, NOBODY)
    subprocess.run(["mount", "-o", "remount,ro", tmp_path], check=True)

    def attacker() -> None:
        refused(errno.EROFS, os.open, name, os.O_RDWR)
        attack(os.open(name, os.O_RDONLY), errno.EACCES, path)

    try:
        as_user(NOBODY, attacker)
        assert name.read_bytes() == CONTENT
    finally:
        os.unlink(path)
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize("flag", [APPEND, IMMUTABLE])
def test_flagged_inode(folder: str, path: str, flag: int) -> None:
    """A file that may only grow, or not change at all: not even its owner writes through a region.

    As with mmap, an append-only file that is open for appending cannot be mapped shared at all.
    """
    name = f"{folder}/content"
    Path(name).write_bytes(CONTENT)
    os.chown(name, NOBODY, NOBODY)

    def attacker() -> None:
        refused(errno.EPERM, os.open, name, os.O_RDWR)
        attack(os.open(name, os.O_RDONLY), errno.EACCES, f"{path}-1")
        if flag == APPEND:
            fd, region = os.open(name, os.O_RDWR | os.O_APPEND), abi.make(f"{path}-2", fill=False)
            words = {"size": PAGE, "flags": SHARED | abi.FIXED, "fd": fd}
            for prot in (READ, RW):
                refused(errno.EACCES, abi.create_mapping, region, prot=prot, **words)

    try:
        with flagged(name, flag):
            as_user(NOBODY, attacker)
        assert Path(name).read_bytes() == CONTENT
    finally:
        for number in (1, 2):
            with suppress(FileNotFoundError):
                os.unlink(f"{path}-{number}")


def test_region_of_another_user(region: int, path: str) -> None:
    """Mode bits and the sticky root keep it, its name, and what is below others' folders."""
    Path("/proc/sys/fs/protected_hardlinks").write_text("1")
    address = abi.mmap(region)
    abi.put(address, CONTENT)
    os.fchown(region, OTHER, OTHER)
    os.mkdir(f"{path}-folder", 0o700)
    os.chown(f"{path}-folder", OTHER, OTHER)

    def attacker() -> None:
        mine = f"{path}-mine"
        fd = abi.make(mine)
        exchange = (AT_FDCWD, _text(mine), AT_FDCWD, _text(path), 2)
        for code, call, *args in (
            (errno.EACCES, os.open, path, os.O_RDONLY),
            (errno.EACCES, os.open, path, os.O_WRONLY),
            (errno.EPERM, os.unlink, path),
            (errno.EPERM, os.rename, path, f"{path}-away"),
            (errno.EPERM, os.rename, mine, path),
            (errno.EPERM, abi.syscall, RENAMEAT2, *exchange),
            (errno.EPERM, os.link, path, f"{path}-link"),
            (errno.EPERM, os.chmod, path, 0o666),
            (errno.EPERM, os.chown, path, NOBODY, NOBODY),
            (errno.EACCES, os.truncate, path, 2 * SLOT),
            (errno.EPERM, os.rmdir, f"{path}-folder"),
            (errno.EACCES, os.listdir, f"{path}-folder"),
            (errno.EACCES, os.mkdir, f"{path}-folder/x"),
            (errno.EACCES, os.link, mine, f"{path}-folder/x"),
            (errno.EPERM, os.unlink, f"{abi.MOUNT}/mshare_info"),
            (errno.EPERM, os.rename, mine, f"{abi.MOUNT}/mshare_info"),
        ):
            refused(code, call, *args)
        os.unlink(mine)
        os.close(fd)

    as_user(NOBODY, attacker)
    assert abi.get(address, PAGE) == CONTENT
    assert info(region).region_size == SLOT
    abi.munmap(address)
    os.rmdir(f"{path}-folder")


def _text(value: str) -> int:
    """Where the bytes of a path are; they stay."""
    _kept.append(ctypes.create_string_buffer(value.encode()))
    return ctypes.addressof(_kept[-1])


_kept: list[Any] = []


def test_nothing_runs(region: int, path: str) -> None:
    """Neither root runs a region, nor does set-user-id on it mean anything; exec drops windows."""
    os.fchmod(region, 0o6777)
    address = abi.mmap(region)
    abi.put(address, Path("/bin/true").read_bytes())
    refused(errno.EACCES, os.execv, path, [path])
    refused(errno.EPERM, abi.mmap, region, prot=READ | abi.EXEC)
    refused(errno.EACCES, abi.mprotect, address, SLOT, READ | abi.EXEC)
    assert abi.dies_by(ctypes.CFUNCTYPE(None)(address)) == signal.SIGSEGV
    # a program that asks for all it can read to be executable does not get a window that is
    run = abi.Child(lambda: (abi.syscall(PERSONALITY, 0x400000), abi.mmap(region, prot=READ))[1])
    assert run.result()
    shown = subprocess.run(["cat", "/proc/self/maps"], capture_output=True, text=True, check=True)
    assert path not in shown.stdout
    abi.munmap(address)


def test_userfaultfd_stays_out(region: int) -> None:
    """No kind of registration, which would let it make tables below a window."""
    address = abi.mmap(region)

    def attacker() -> int:
        tried = 0
        for features in (0, UFFD_WP_ASYNC):
            fd = abi.syscall(USERFAULTFD, UFFD_USER_MODE_ONLY)
            try:
                fcntl.ioctl(fd, UFFDIO_API, struct.pack("QQQ", 0xAA, features, 0))
            except OSError as error:
                # a kernel before 6.7 does not know it
                assert (error.errno, features) == (errno.EINVAL, UFFD_WP_ASYNC)
                continue
            for mode in (1, 2, 3):
                words = bytearray(struct.pack("QQQQ", address, SLOT, mode, 0))
                refused(errno.EINVAL, fcntl.ioctl, fd, UFFDIO_REGISTER, words)
                tried += 1
        return tried

    assert as_user(NOBODY, attacker) >= 3
    abi.munmap(address)


def test_mount_needs_the_administrator(tmp_path: Path) -> None:
    """EPERM for a user, also as root of a user namespace."""

    def attacker(namespace: bool) -> None:
        if namespace:
            enter_namespace()
        refused(errno.EPERM, mount, "msharefs", "/mnt")

    as_user(NOBODY, attacker, False)
    if HAVE_NAMESPACES:
        as_user(NOBODY, attacker, True)


def test_worker_has_the_rights_of_the_caller(path: str) -> None:
    """What maps into the host has the caller's credentials, for security modules to see."""
    events = Path("/sys/kernel/tracing")
    if not (events / "kprobe_events").exists():
        mount("tracefs", str(events))
    # struct cred: the user comes after the count, which has 8 bytes
    (events / "kprobe_events").write_text("p:mshare_test override_creds user=+8(%di):u32")
    switch = events / "events/kprobes/mshare_test/enable"
    (events / "trace").write_text("")
    try:
        switch.write_text("1")

        def user() -> None:
            fd = abi.make(path)
            words = {"size": PAGE, "prot": READ, "flags": SHARED | abi.FIXED}
            file = os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR)
            abi.create_mapping(fd, fd=file, **words)
            abi.protect(fd, PAGE, PAGE, READ)
            abi.unmap(fd, 0, PAGE)

        as_user(NOBODY, user)
        text = (events / "trace").read_text()
    finally:
        switch.write_text("0")
        (events / "kprobe_events").write_text("")
    lines = [line for line in text.splitlines() if "kworker" in line and "mshare_test" in line]
    # the size, memory, the trial of a file and its mapping, PROTECT and UNMAP
    assert len(lines) >= 6
    assert all(line.endswith(f"user={NOBODY}") for line in lines)


@pytest.mark.usefixtures("needs_fuse")
def test_fuse_is_no_content(region: int, tmp_path: Path) -> None:
    """A user could be its server, and by not answering hold the lock of a host mm for ever."""
    with fuse.mounted(str(tmp_path), lambda number: CONTENT) as name:
        file = os.open(name, os.O_RDONLY)
        assert os.pread(file, PAGE, 0) == CONTENT
        words = {"size": PAGE, "prot": READ, "flags": SHARED | abi.FIXED, "fd": file}
        refused(errno.EOPNOTSUPP, abi.create_mapping, region, **words)
        os.close(file)


@pytest.mark.usefixtures("needs_namespaces")
def test_overlay_of_a_user_is_no_content(path: str) -> None:
    """In a user namespace a FUSE file could be below it."""

    def attacker() -> None:
        region = abi.make(path)
        enter_namespace()
        mount("tmpfs", "/mnt")
        for name in ("lower", "upper", "work", "all"):
            os.mkdir(f"/mnt/{name}")
        Path("/mnt/lower/file").write_bytes(CONTENT)
        options = "lowerdir=/mnt/lower,upperdir=/mnt/upper,workdir=/mnt/work"
        mount("overlay", "/mnt/all", options=options)
        file = os.open("/mnt/all/file", os.O_RDONLY)
        words = {"size": PAGE, "prot": READ, "flags": SHARED | abi.FIXED}
        refused(errno.EOPNOTSUPP, abi.create_mapping, region, fd=file, **words)
        # the tmpfs below is shared memory as any
        abi.create_mapping(region, fd=os.open("/mnt/lower/file", os.O_RDONLY), **words)
        assert abi.get(abi.mmap(region), PAGE) == CONTENT

    as_user(NOBODY, attacker)


def test_memory_without_a_name_is_seen(region: int, path: str) -> None:
    """Unlinked but attached: df counts it, and /proc names who holds it."""
    address = abi.mmap(region)
    before = os.statvfs(abi.MOUNT).f_bfree
    abi.fill(address, 4 << 20)
    os.unlink(path)
    held = abi.Child(abi.forever)
    assert before - os.statvfs(abi.MOUNT).f_bfree == (4 << 20) // PAGE
    assert f"{path} (deleted)" in Path(f"/proc/{held.pid}/maps").read_text()
    assert os.readlink(f"/proc/{held.pid}/fd/{region}") == f"{path} (deleted)"
    held.kill()
    abi.munmap(address)
