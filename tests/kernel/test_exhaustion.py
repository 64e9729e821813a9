"""What runs out on a stock kernel: the errno the ABI says, and nothing half made."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import mshare
from mshare import engines, mapping
from mshare.engines.msharefs import LOCKED, info
from tests.conftest import NOBODY, skip
from tests.kernel import abi
from tests.kernel.abi import PAGE, READ, SLOT
from tests.kernel.test_lifetime import module_users

MIB = 1 << 20
FIXED = abi.SHARED | abi.FIXED
_libc = ctypes.CDLL(None, use_errno=True)


def standing(fd: int) -> tuple[object, ...]:
    """Names, references, and the region's layout."""
    now = info(fd)
    layout = (now.region_size, now.attachments, now.mapped_bytes, now.mapped_end)
    return sorted(os.listdir(abi.MOUNT)), module_users(), layout


@contextmanager
def setting(path: str, value: int) -> Iterator[None]:
    """A setting of the kernel, as it was after the block."""
    file = Path("/proc/sys") / path
    before = file.read_text()
    file.write_text(str(value))
    try:
        yield
    finally:
        file.write_text(before)


@pytest.mark.parametrize("call", [os.ftruncate, lambda fd, size: os.posix_fallocate(fd, 0, size)])
def test_file_size(path: str, call: Callable[[int, int], None]) -> None:
    """RLIMIT_FSIZE: EFBIG, and the region has no size until it may have one."""

    def limited() -> tuple[int, int]:
        fd = os.open(path, os.O_RDWR | os.O_CREAT)
        resource.setrlimit(resource.RLIMIT_FSIZE, (SLOT - 1, resource.RLIM_INFINITY))
        refused = abi.code_of(call, fd, SLOT)
        resource.setrlimit(resource.RLIMIT_FSIZE, (SLOT, resource.RLIM_INFINITY))
        assert info(fd).region_size == os.fstat(fd).st_size == 0
        return refused, abi.code_of(call, fd, SLOT)

    assert abi.Child(limited).result() == (errno.EFBIG, 0)


def test_files_of_the_machine(path: str) -> None:
    """fs.file-max: ENFILE for all but root, from open, ftruncate and CREATE_MAPPING."""

    def limited(unsized: int, sized: int) -> tuple[int, ...]:
        os.setuid(NOBODY)
        return (
            abi.code_of(os.open, f"{path}-new", os.O_RDWR | os.O_CREAT),
            abi.code_of(os.ftruncate, unsized, SLOT),
            abi.code_of(abi.create_mapping, sized),
        )

    names = [path, f"{path}-sized"]
    fds = [os.open(names[0], os.O_RDWR | os.O_CREAT), abi.make(names[1], fill=False)]
    before = [standing(fd) for fd in fds]
    # the kernel counts them for each processor, and looks at the sum when that is a lot
    many = [os.open(os.devnull, os.O_RDONLY) for _ in range(700)]
    with setting("fs/file-max", 1):
        assert abi.Child(limited, *fds).result() == (errno.ENFILE,) * 3
    for fd in many:
        os.close(fd)
    assert [standing(fd) for fd in fds] == before
    os.ftruncate(fds[0], SLOT)
    for fd, name in zip(fds, names, strict=True):
        abi.create_mapping(fd)
        os.close(fd)
        os.unlink(name)


@pytest.mark.parametrize("most", range(100, 104))
def test_mappings_of_a_region(region: int, most: int) -> None:
    """vm.max_map_count: what needs more is ENOMEM, and the range as it was, or without content."""
    rw, ro = abi.mmap(region), abi.mmap(region, prot=READ)
    pages = [2 * number * PAGE for number in range(1, 200)]
    for at in pages:
        abi.put(rw + at, b"before")
    old, zeros, hole = [b"before"] * 2, [bytes(6)] * 2, [errno.EFAULT] * 2
    half: list[object] = [errno.EFAULT, b"before"]
    changes: list[tuple[Callable[[int], None], object, tuple[object, ...]]] = [
        (
            lambda at: abi.create_mapping(region, at, PAGE),
            zeros,
            (old, hole, half),
        ),
        (lambda at: abi.protect(region, at, PAGE, READ), old, (old,)),
        (lambda at: abi.unmap(region, at, PAGE), hole, (old, half)),
    ]
    refused = dict.fromkeys(range(len(changes)), 0)
    with setting("vm/max_map_count", most):
        for number, at in enumerate(pages):
            # the first ones use up what there is
            which = 0 if number < most // 4 else number % 3
            change, done, left = changes[which]
            code = abi.code_of(change, at)
            shown = [content(window + at) for window in (rw, ro)]
            assert (code, shown) == (0, done) or (code == errno.ENOMEM and shown in left)
            refused[which] += code == errno.ENOMEM
    assert min(refused.values()) > 10
    for at in pages:
        for change, done, _ in changes[::2]:
            change(at)
            assert [content(window + at) for window in (rw, ro)] == done
    for window in (rw, ro):
        abi.munmap(window)


@pytest.mark.parametrize(("most", "half"), [(100, True), (101, False)])
def test_mappings_of_a_locked_region(path: str, most: int, half: bool) -> None:
    """At vm.max_map_count what cannot go from both views stays locked."""
    region = abi.make(path, fill=False)
    abi.create_mapping(region, size=200 * PAGE, flags=FIXED | abi.ANONYMOUS | mapping.MAP_LOCKED)
    with setting("vm/max_map_count", most):
        for at in range(PAGE, 199 * PAGE, 2 * PAGE):
            code = abi.code_of(abi.unmap, region, at, PAGE)
            now = info(region)
            if code:
                break
            assert now.locked_bytes == now.mapped_bytes
    assert code == errno.ENOMEM
    assert now.flags & LOCKED
    # 6.1 and 6.12 count alike: one view was taken apart, and the other could not be
    assert now.locked_bytes == now.mapped_bytes + PAGE * half
    window = abi.mmap(region, prot=READ)
    assert abi.code_of(abi.unmap, region, at, PAGE) == errno.EBUSY
    abi.munmap(window)
    abi.unmap(region, 0, SLOT)
    assert info(region).mapped_bytes == info(region).locked_bytes == 0
    os.close(region)


def content(address: int) -> object:
    """What is there, or the errno of a call that looks."""
    try:
        return abi.get_safely(address, 6)
    except OSError as error:
        return error.errno


def test_layout_change_without_memory(region: int) -> None:
    """A group without memory, whose process may not be killed: done, or ENOMEM and unharmed.

    What a change has to allocate is the caller's to pay.
    """
    rw, ro = abi.mmap(region), abi.mmap(region, prot=READ)
    pages = [2 * number * PAGE for number in range(1, 60)]
    for at in pages:
        abi.put(rw + at, b"before")

    def limited(folder: str) -> list[tuple[int, object, object]]:
        Path("/proc/self/oom_score_adj").write_text("-1000")
        limit = os.open(f"{folder}/memory.max", os.O_WRONLY)
        told = []
        for number, at in enumerate(pages):
            code = 0
            # the first ones touch the memory that the next need
            os.pwrite(limit, b"0" if number > 5 else b"max", 0)
            try:
                abi.create_mapping(region, at, PAGE)
            except OSError as error:
                code = error.errno or -1
            os.pwrite(limit, b"max", 0)
            told.append((code, content(rw + at), content(ro + at)))
        return told

    with abi.cgroup("limit", **{"swap.max": "0"}) as folder:
        child = abi.within(folder, limited, folder)
        while os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
            # should it need memory of its own while there is none; longer than a slow change takes
            time.sleep(1.5)
            Path(f"{folder}/memory.max").write_text("max")
        told = child.result()
    refused = [each for each in told if each[0]]
    assert refused
    for code, by_rw, by_ro in told:
        assert by_rw == by_ro
        if code:
            assert code == errno.ENOMEM
            assert by_rw in (b"before", errno.EFAULT)
        else:
            assert by_rw == bytes(6)
    for at in pages:
        abi.create_mapping(region, at, PAGE)
        assert abi.get(rw + at, 6) == abi.get(ro + at, 6) == bytes(6)
    for window in (rw, ro):
        abi.munmap(window)


def test_creation_in_a_full_group(path: str) -> None:
    """An engine that reserves refuses what the memory cgroup has no room for; nothing is left."""

    def create() -> tuple[int, object, bool]:
        try:
            mshare.create("full-group", 64 * MIB, engine="shm")
        except OSError as error:
            return error.errno or -1, error.filename, "memory.max" in str(error)
        return 0, None, False

    with abi.cgroup("full", max=str(32 * MIB)) as folder:
        assert abi.within(folder, create).result() == (errno.ENOSPC, "full-group", True)
    assert "full-group" not in {each.name for each in mshare.list()}


@pytest.fixture
def quota(disk: str) -> Iterator[str]:
    """A folder on ext4 where user nobody may have 4 MiB."""
    if not os.path.exists("/proc/sys/fs/quota"):
        skip("this kernel is built without quotas")
    image, folder = f"{disk}/image", tempfile.mkdtemp()
    for module in ("loop", "quota_v2"):
        subprocess.run(["modprobe", "-q", module], check=False)  # it may be built in
    with open(image, "wb") as file:
        file.truncate(64 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-O", "quota", image], check=True)
    found = subprocess.run(
        ["losetup", "--find", "--show", image], check=True, capture_output=True, text=True
    )
    device = found.stdout.strip()
    subprocess.run(["mount", "-t", "ext4", "-o", "usrquota", device, folder], check=True)
    set_quota, user, blocks = 0x800008, 0, 1
    limits = struct.pack("8QI4x", 4 * MIB >> 10, 0, 0, 0, 0, 0, 0, 0, blocks)
    command = set_quota << 8 | user
    assert _libc.quotactl(command, device.encode(), NOBODY, limits) == 0, ctypes.get_errno()
    os.chmod(folder, 0o1777)
    yield folder
    subprocess.run(["umount", folder], check=True)
    os.rmdir(folder)
    subprocess.run(["losetup", "--detach", device], check=True)


def test_quota_under_a_file(quota: str, path: str) -> None:
    """A store in a hole that the quota has no block for is SIGBUS; other content is safe."""
    size = 16 * MIB
    fd, file = abi.make(path, fill=False), os.open(f"{quota}/file", os.O_RDWR | os.O_CREAT)
    os.pwrite(file, b"first", 0)
    os.ftruncate(file, size)
    os.fchown(file, NOBODY, NOBODY)
    abi.create_mapping(fd, 0, size, flags=FIXED, fd=file)
    window = abi.mmap(fd)

    def store() -> None:
        os.setuid(NOBODY)
        abi.fill(window + MIB, size - MIB)

    assert abi.dies_by(store) == signal.SIGBUS
    assert abi.get(window, 5) == b"first"
    assert abi.get(window + MIB, 4) == b"\7" * 4
    assert MIB < os.fstat(file).st_blocks * 512 <= 4 * MIB
    abi.munmap(window)
    os.close(fd)
    os.unlink(path)
    os.close(file)


def test_quota_of_an_engine(quota: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A region that the quota of its folder has no room for: EDQUOT with the name, nothing left."""
    monkeypatch.setattr(engines.by_name("shm"), "chosen", quota)

    def create() -> tuple[int, object]:
        os.setuid(NOBODY)
        mshare.create("small", MIB, engine="shm").unlink()
        try:
            mshare.create("large", 8 * MIB, engine="shm")
        except OSError as error:
            return error.errno or -1, error.filename
        return 0, None

    assert abi.Child(create).result() == (errno.EDQUOT, "large")
    assert {"small", "large"}.isdisjoint(os.listdir(quota))
