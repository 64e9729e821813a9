"""The ABI: files, ioctls, mmap, and the errno of everything they refuse."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import signal
import socket
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mshare.engines.msharefs import info
from tests.conftest import NOBODY
from tests.kernel import abi
from tests.kernel.abi import PAGE, READ, RW, SLOT, WRITE

ROOT = Path(__file__).parent.parent.parent
TRACING = Path("/sys/kernel/tracing")
EVENTS = TRACING / "events/mshare"


def refused(code: int, call: Callable[..., Any], *args: Any, **words: Any) -> None:
    """``call`` fails with ``code``."""
    with pytest.raises(OSError, match="Errno") as caught:
        call(*args, **words)
    assert errno.errorcode[caught.value.errno or 0] == errno.errorcode[code]


def test_root() -> None:
    """The root is everybody's and sticky, and says the alignment."""
    info = os.stat(abi.MOUNT)
    assert stat.S_IMODE(info.st_mode) == 0o1777
    assert Path(abi.MOUNT, "mshare_info").read_text().strip() == str(SLOT)


def test_directories_modes_and_names(path: str) -> None:
    """Directories, modes, rename and unlink are those of any file system."""
    os.mkdir(path, 0o750)
    try:
        inner = f"{path}/region"
        fd = abi.make(inner)
        os.fchmod(fd, 0o640)
        assert stat.S_IMODE(os.stat(inner).st_mode) == 0o640
        os.rename(inner, f"{path}/other")
        refused(errno.ENOTEMPTY, os.rmdir, path)
        os.unlink(f"{path}/other")
        os.close(fd)
    finally:
        os.rmdir(path)


@pytest.mark.parametrize("size", [1, PAGE, SLOT - 1, SLOT + PAGE, 1 << 40 | 1])
def test_size_is_a_multiple_of_the_alignment(path: str, size: int) -> None:
    """Other sizes are EINVAL, and the file stays as it was."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    refused(errno.EINVAL, os.ftruncate, fd, size)
    assert os.fstat(fd).st_size == 0
    refused(errno.EINVAL, abi.mmap, fd)
    os.close(fd)


def test_size_is_set_once(path: str) -> None:
    """By ftruncate or fallocate; another size is EINVAL."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.posix_fallocate(fd, 0, 2 * SLOT)
    assert os.fstat(fd).st_size == 2 * SLOT
    for size in (SLOT, 3 * SLOT, 0):
        refused(errno.EINVAL, os.ftruncate, fd, size)
    assert os.fstat(fd).st_size == 2 * SLOT
    os.close(fd)


def test_largest_size(path: str) -> None:
    """More than a host mm can hold twice is EFBIG."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    refused(errno.EFBIG, os.ftruncate, fd, 1 << 62)
    os.close(fd)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.EINVAL, {"size": 0}),
        (errno.EINVAL, {"size": 100}),
        (errno.EINVAL, {"at": 100, "size": PAGE}),
        (errno.EINVAL, {"at": SLOT}),
        (errno.EINVAL, {"at": PAGE, "size": SLOT}),
        (errno.EINVAL, {"at": (1 << 64) - PAGE, "size": 2 * PAGE}),
        (errno.EINVAL, {"size": (1 << 64) - PAGE}),
        (errno.EINVAL, {"flags": abi.SHARED | abi.ANONYMOUS}),
        (errno.EINVAL, {"flags": abi.PRIVATE | abi.FIXED | abi.ANONYMOUS}),
        (errno.EINVAL, {"flags": abi.FIXED | abi.ANONYMOUS}),
        (errno.EINVAL, {"prot": 0x10}),
        (errno.EBADF, {"flags": abi.SHARED | abi.FIXED}),
    ],
)
def test_create_mapping_refuses(region: int, code: int, words: dict[str, int]) -> None:
    """A bad range, protection or flag changes nothing."""
    address = abi.mmap(region)
    abi.put(address, b"stays")
    changes = info(region).layout_changes
    refused(code, abi.create_mapping, region, **words)
    assert abi.get(address, 5) == b"stays"
    assert info(region).layout_changes == changes
    abi.munmap(address)


def test_executable_content_is_refused(region: int) -> None:
    """PROT_EXEC has no place in a region, nor on a window."""
    for call in (
        lambda: abi.create_mapping(region, prot=READ | abi.EXEC),
        lambda: abi.mmap(region, prot=READ | abi.EXEC),
    ):
        with pytest.raises(PermissionError):
            call()


@pytest.mark.parametrize("what", ["device", "pipe", "folder", "hugetlbfs", "msharefs"])
def test_content_that_cannot_be_shared(region: int, path: str, tmp_path: Path, what: str) -> None:
    """Only regular files in the page cache; the rest is EOPNOTSUPP."""
    match what:
        case "device":
            fd = os.open("/dev/zero", os.O_RDWR)
        case "pipe":
            fd = os.pipe()[0]
        case "folder":
            fd = os.open(tmp_path, os.O_RDONLY)
        case "hugetlbfs":
            fd = os.memfd_create("huge", os.MFD_HUGETLB)
        case "msharefs":
            fd = abi.make(f"{path}-2")
            os.unlink(f"{path}-2")
    flags = abi.SHARED | abi.FIXED
    refused(
        errno.EOPNOTSUPP, abi.create_mapping, region, size=2 << 20, flags=flags, fd=fd, prot=READ
    )
    os.close(fd)


def test_content_needs_its_access_mode(region: int, tmp_path: Path) -> None:
    """What a descriptor does not allow the region does not give."""
    file = tmp_path / "file"
    file.write_bytes(bytes(PAGE))
    flags = abi.SHARED | abi.FIXED
    reading = os.open(file, os.O_RDONLY)
    refused(errno.EACCES, abi.create_mapping, region, size=PAGE, flags=flags, fd=reading)
    abi.create_mapping(region, size=PAGE, flags=flags, fd=reading, prot=READ)
    refused(errno.EACCES, abi.protect, region, 0, PAGE, RW)
    writing = os.open(file, os.O_WRONLY)
    refused(errno.EACCES, abi.create_mapping, region, size=PAGE, flags=flags, fd=writing)
    os.close(reading)
    os.close(writing)


def test_layout_needs_a_writable_descriptor(region: int, path: str) -> None:
    """CREATE_MAPPING, UNMAP and PROTECT are EACCES on a descriptor for reading."""
    reading = os.open(path, os.O_RDONLY)
    refused(errno.EACCES, abi.create_mapping, reading)
    refused(errno.EACCES, abi.unmap, reading, 0, PAGE)
    refused(errno.EACCES, abi.protect, reading, 0, PAGE, READ)
    assert info(reading).region_size == SLOT
    refused(errno.EACCES, abi.mmap, reading)
    os.close(reading)


def test_unknown_ioctl(region: int) -> None:
    """ENOTTY."""
    import fcntl

    refused(errno.ENOTTY, fcntl.ioctl, region, 0x40107809, bytes(16))


def test_windows_are_whole_slots(region: int) -> None:
    """MAP_PRIVATE, PROT_NONE, odd sizes, offsets and addresses are EINVAL."""
    fixed = abi.SHARED | abi.FIXED
    for words in (
        {"flags": abi.PRIVATE},
        {"prot": 0},
        {"size": PAGE},
        {"size": 2 * SLOT},
        {"offset": PAGE, "size": SLOT - PAGE},
        {"offset": SLOT},
        {"flags": fixed, "address": (5 << 40) + PAGE},
    ):
        refused(errno.EINVAL, abi.mmap, region, **words)
    assert info(region).attachments == 0


def test_windows_that_the_kernel_refuses(region: int, path: str) -> None:
    """What mmap(2) gives before it asks the module, and an unprivileged user's limits."""
    assert abi.code_of(abi.mmap, os.open(path, os.O_PATH)) == errno.EBADF
    past = (1 << 63) - SLOT
    assert abi.code_of(abi.mmap, region, SLOT, RW, abi.SHARED, 0, past) == errno.EOVERFLOW
    locked, fixed = abi.SHARED | 0x2000, abi.SHARED | abi.FIXED

    def limited(limit: int) -> list[int]:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, limit))
        os.setuid(NOBODY)
        codes = [abi.code_of(abi.mmap, region, SLOT, RW, flags) for flags in (locked, fixed)]
        if limit:
            abi.mlockall(2)
            codes.append(abi.code_of(abi.mmap, region))
        return codes

    assert abi.Child(limited, 0).result() == [errno.EPERM, errno.EPERM]
    assert abi.Child(limited, 1 << 20).result() == [errno.EAGAIN, errno.EPERM, errno.EAGAIN]


def test_sealed_since_it_was_mapped(region: int) -> None:
    """A part is mapped anew, as whoever maps the file now; a whole is not."""
    file = os.memfd_create("content", os.MFD_ALLOW_SEALING)
    os.ftruncate(file, 16 * PAGE)
    abi.create_mapping(region, 0, 16 * PAGE, flags=abi.SHARED | abi.FIXED, fd=file)
    abi.protect(region, 0, 16 * PAGE, READ)
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, 0x10)  # F_SEAL_FUTURE_WRITE
    assert abi.code_of(abi.protect, region, 0, PAGE, RW) == errno.EPERM
    assert abi.code_of(abi.protect, region, 0, 16 * PAGE, RW) == errno.EACCES
    os.close(file)


def test_refused_window_takes_nothing(region: int) -> None:
    """What is at an address that is not aligned, or behind a length that is not, stays."""
    there = abi.mmap(-1, 3 * SLOT, RW, abi.PRIVATE | abi.ANONYMOUS | 0x4000)
    aligned = -(-there // SLOT) * SLOT
    abi.put(aligned, b"here")
    abi.put(aligned + PAGE, b"here")
    fixed = abi.SHARED | abi.FIXED
    with open("/proc/self/mem", "rb") as memory:  # an error, where a load would be SIGSEGV
        for address, size in ((aligned + PAGE, SLOT), (aligned, SLOT - PAGE), (aligned, 2 * PAGE)):
            refused(errno.EINVAL, abi.mmap, region, size, flags=fixed, address=address)
            for page in (aligned, aligned + PAGE):
                assert os.pread(memory.fileno(), 4, page) == b"here"
    window = abi.mmap(region)
    abi.put(window, b"region")
    with pytest.raises(OSError, match="Errno"):
        abi.mremap(window, SLOT, SLOT, 3, aligned + PAGE)
    assert abi.get(window, 6) == b"region"
    assert abi.get(aligned, 4) == b"here"
    abi.munmap(window)
    abi.munmap(there, 3 * SLOT)


def test_addresses(path: str) -> None:
    """Any aligned address, the whole region or a part; without one, an aligned one."""
    fd = abi.make(path, 3 * SLOT)
    whole = abi.mmap(fd, 3 * SLOT)
    assert whole % SLOT == 0
    abi.put(whole + 2 * SLOT + 5, b"third")
    part = abi.mmap(fd, SLOT, flags=abi.SHARED | abi.FIXED, address=7 << 40, offset=2 * SLOT)
    assert part == 7 << 40
    assert abi.get(part + 5, 5) == b"third"
    hint = abi.mmap(fd, SLOT, address=(9 << 40) + 12345)
    assert hint % SLOT == 0
    assert info(fd).attachments == 3
    for address, size in ((whole, 3 * SLOT), (part, SLOT), (hint, SLOT)):
        abi.munmap(address, size)
    assert info(fd).attachments == 0
    os.close(fd)


def test_no_part_of_a_window_goes(region: int) -> None:
    """Partial munmap, mmap over a part, mremap to another size, mprotect."""
    address = abi.mmap(region)
    abi.put(address, b"whole")
    refused(errno.EINVAL, abi.munmap, address, PAGE)
    refused(errno.EINVAL, abi.munmap, address + PAGE, SLOT - PAGE)
    over = abi.PRIVATE | abi.ANONYMOUS | abi.FIXED
    with pytest.raises(OSError, match="Errno"):
        abi.mmap(-1, PAGE, RW, over, address + PAGE)
    refused(errno.EINVAL, abi.mprotect, address, SLOT, READ)
    refused(errno.EINVAL, abi.mprotect, address, PAGE, READ)
    with pytest.raises(OSError, match="Errno"):
        abi.mremap(address, SLOT, 2 * SLOT, 1)
    with pytest.raises(OSError, match="Errno"):
        abi.mremap(address, SLOT, PAGE, 1)
    assert abi.get(address, 5) == b"whole"
    abi.munmap(address)


def test_mapped_over_as_a_whole(region: int) -> None:
    """Another mapping may take the window's place."""
    address = abi.mmap(region)
    abi.put(address, b"region")
    over = abi.PRIVATE | abi.ANONYMOUS | abi.FIXED | 0x4000
    abi.mmap(-1, SLOT, RW, over, address)
    assert abi.get(address, 6) == bytes(6)
    abi.put(address, b"mine")
    abi.munmap(address)
    again = abi.mmap(region)
    assert abi.get(again, 6) == b"region"
    abi.munmap(again)


def test_hole(path: str) -> None:
    """Nothing mapped in the region: SIGSEGV; GUP gives EFAULT; UNMAP makes a hole again."""
    fd = abi.make(path, fill=False)
    address = abi.mmap(fd)
    assert abi.dies_by(abi.get, address, 1) == signal.SIGSEGV
    reading, writing = os.pipe()
    refused(errno.EFAULT, os.writev, writing, [abi.memory(address)])
    abi.create_mapping(fd, size=2 * PAGE)
    abi.put(address, b"there")
    assert abi.dies_by(abi.get, address + 2 * PAGE, 1) == signal.SIGSEGV
    abi.unmap(fd, 0, PAGE)
    assert abi.dies_by(abi.get, address, 1) == signal.SIGSEGV
    assert abi.get(address + PAGE, 4) == bytes(4)
    assert info(fd).mapped_bytes == PAGE
    assert info(fd).mapped_end == 2 * PAGE
    for end in (reading, writing, fd):
        os.close(end)
    abi.munmap(address)


def test_replacing_gives_back_memory(path: str) -> None:
    """New anonymous memory is zero, and the old is free."""
    fd = abi.make(path)
    address = abi.mmap(fd)
    abi.fill(address, 64 << 20)
    full = abi.meminfo("Shmem")
    assert info(fd).resident_bytes == 64 << 20 == os.fstat(fd).st_blocks * 512
    abi.unmap(fd, 0, 32 << 20)
    assert abi.meminfo("Shmem") <= full - (30 << 20)
    abi.create_mapping(fd)
    assert abi.meminfo("Shmem") <= full - (60 << 20)
    assert abi.get(address + (40 << 20), 5) == bytes(5)
    abi.munmap(address)
    os.close(fd)


def test_descriptor_is_enough(region: int, path: str) -> None:
    """Sent over a socket and attached after the unlink."""
    address = abi.mmap(region)
    abi.put(address, b"by descriptor")
    ours, theirs = socket.socketpair()

    def receive() -> bytes:
        _, fds, _, _ = socket.recv_fds(theirs, 10, 1)
        return abi.get(abi.mmap(fds[0], prot=READ), 13)

    child = abi.Child(receive)
    os.unlink(path)
    socket.send_fds(ours, [b"fd"], [region])
    assert child.result() == b"by descriptor"
    abi.munmap(address)
    ours.close()
    theirs.close()


def test_maps_name_the_region(region: int, path: str) -> None:
    """/proc/PID/maps shows the file; smaps what is resident."""
    address = abi.mmap(region)
    abi.fill(address, 8 << 20)
    with open("/proc/self/smaps") as file:
        text = file.read()
    block = text[text.index(path) :].split("VmFlags")[0]
    assert "Size:            1048576 kB" in block
    assert f"Rss: {8192:>19} kB" in block
    abi.munmap(address)


def test_tracepoints_fire(path: str) -> None:
    """Graft, ungraft, fault, flush and layout change, with the operation's name."""
    if not EVENTS.exists():
        subprocess.run(["mount", "-t", "tracefs", "tracefs", TRACING], check=True)
    names = {f"mshare_{name}" for name in ("graft", "ungraft", "fault", "flush", "layout")}
    assert {entry.name for entry in EVENTS.iterdir() if entry.is_dir()} == names
    trace = TRACING / "trace"
    trace.write_text("")
    (EVENTS / "enable").write_text("1")
    try:
        fd = abi.make(path)
        address = abi.mmap(fd)
        abi.put(address, b"x")
        abi.protect(fd, 0, PAGE, READ)
        abi.unmap(fd, 0, PAGE)
        abi.munmap(address)
        os.close(fd)
        text = trace.read_text()
    finally:
        (EVENTS / "enable").write_text("0")
    assert {name for name in names if f" {name}: " in text} == names
    assert f"addr={address:x}" in text
    for operation in (f"map offset=0 size={SLOT:x}", "protect offset=0", "unmap offset=0"):
        assert operation in text


def test_c_program(tmp_path: Path) -> None:
    """A C program that knows only the ABI works."""
    program = tmp_path / "raw_abi"
    source = ROOT / "examples/raw_abi.c"
    command = ["cc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", str(program), str(source)]
    subprocess.run(command, check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "second process: 16384 pages read, 0 faults" in result.stdout


def test_write_only_window(region: int) -> None:
    """PROT_WRITE alone can be read too, as the hardware has it."""
    address = abi.mmap(region, prot=WRITE)
    abi.put(address, b"w")
    assert abi.get(address, 1) == b"w"
    abi.munmap(address)
