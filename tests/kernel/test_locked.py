"""Locked regions: all of the content is in memory, and no page of it ever moves."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import struct
import subprocess
from collections.abc import Callable

import pytest

import mshare
from mshare.engines import msharefs
from tests.kernel import abi
from tests.kernel.test_races import IO_URING_REGISTER, IO_URING_SETUP

SIZE = 8 << 20
PAGE, SLOT = abi.PAGE, abi.SLOT
DONTNEED = 4
LOCKED = 0x2000
FLAGS = abi.SHARED | abi.FIXED | abi.ANONYMOUS | LOCKED
KVM_CREATE_VM, KVM_CREATE_VCPU, KVM_RUN = 0xAE01, 0xAE41, 0xAE80
KVM_SET_MEMORY, KVM_GET_SREGS, KVM_SET_SREGS, KVM_SET_REGS = (
    0x4020AE46,
    0x8138AE83,
    0x4138AE84,
    0x4090AE82,
)
KVM_EXIT_HLT = 5
NOBODY = 65534


def lock(path: str, size: int = SIZE) -> int:
    """A region with ``size`` bytes of locked memory at its start, and a hole behind."""
    fd = abi.make(path, fill=False)
    abi.create_mapping(fd, size=size, flags=FLAGS)
    return fd


def error_of(work: Callable[..., object], *args: object, **options: object) -> int | None:
    """The errno a call fails with, or None."""
    try:
        work(*args, **options)
    except OSError as error:
        return error.errno
    return None


def test_all_there_from_the_start(path: str) -> None:
    """Every page is in memory before anybody attaches, and INFO says that it is locked."""
    fd = lock(path)
    found = msharefs.info(fd)
    assert found.flags == msharefs.LOCKED
    assert found.locked_bytes == found.resident_bytes == found.mapped_bytes == SIZE
    os.close(fd)


def test_pages_stay_where_they_are(path: str) -> None:
    """Neither reclaim nor compaction moves a page; of others they do."""
    fd, other = lock(path), abi.make(f"{path}-other", fill=False)
    abi.create_mapping(other, size=SIZE)
    windows = [abi.mmap(fd), abi.mmap(other)]
    for window in windows:
        abi.fill(window, SIZE)
    before = [abi.frames(window, SIZE) for window in windows]
    # the root group gives up what it can: the other region goes to swap and comes back elsewhere
    error_of(_write, "/sys/fs/cgroup/memory.reclaim", 1 << 30)
    for _ in range(3):
        _write("/proc/sys/vm/compact_memory", 1)
    for window in windows:
        abi.touch(window, 1, step=PAGE, count=SIZE // PAGE)
    after = [abi.frames(window, SIZE) for window in windows]
    assert after[0] == before[0]
    assert after[1] != before[1], "nothing was reclaimed: the test would not see a page that moves"
    for window in windows:
        abi.munmap(window)
    for each in (fd, other):
        os.close(each)
    os.unlink(f"{path}-other")


def _write(path: str, value: int) -> None:
    with open(path, "w") as file:
        file.write(str(value))


def test_content_stays_while_attached(path: str) -> None:
    """With a window nothing is taken or replaced, and holes can be filled; without, all goes."""
    fd = lock(path)
    window = abi.mmap(fd)
    abi.put(window, b"here")
    assert error_of(abi.unmap, fd, 0, PAGE) == errno.EBUSY
    assert error_of(abi.protect, fd, 0, PAGE, abi.READ) == errno.EBUSY
    assert error_of(abi.create_mapping, fd, size=2 * SIZE, flags=FLAGS) == errno.EBUSY
    assert abi.get(window, 4) == b"here"
    abi.create_mapping(fd, at=SIZE, size=PAGE, flags=FLAGS)
    abi.put(window + SIZE, b"more")
    abi.unmap(fd, 2 * SIZE, PAGE)  # a hole: nothing is taken
    abi.munmap(window)
    abi.protect(fd, 0, PAGE, abi.READ)
    abi.unmap(fd, PAGE, SIZE)
    found = msharefs.info(fd)
    assert found.locked_bytes == found.mapped_bytes == PAGE
    os.close(fd)


def test_one_kind_for_good(path: str) -> None:
    """A region is locked or movable from its first mapping on."""
    fd, other = lock(path), abi.make(f"{path}-other")
    assert error_of(abi.create_mapping, fd, at=SIZE, size=PAGE) == errno.EINVAL
    assert error_of(abi.create_mapping, other, size=PAGE, flags=FLAGS) == errno.EINVAL
    abi.unmap(fd, 0, SIZE)
    assert error_of(abi.create_mapping, fd, size=PAGE) == errno.EINVAL
    for each in (fd, other):
        os.close(each)
    os.unlink(f"{path}-other")


def test_nothing_stays_locked(path: str) -> None:
    """Memory goes with the region, whoever held it last."""
    before = abi.meminfo("Shmem")
    fd = lock(path)
    assert abi.meminfo("Shmem") >= before + SIZE
    child = abi.Child(lambda: abi.fill(abi.mmap(fd), SIZE))
    child.result()
    os.close(fd)
    os.unlink(path)
    assert abi.settle(lambda: abi.meminfo("Shmem"), before + (1 << 20)) <= before + (1 << 20)


def test_no_file(path: str, disk: str) -> None:
    """A file is not locked: whoever may write to it could take its pages away."""
    fd = abi.make(path, fill=False)
    for content in os.memfd_create("content"), os.open(f"{disk}/content", os.O_RDWR | os.O_CREAT):
        os.ftruncate(content, SIZE)
        flags = abi.SHARED | abi.FIXED | LOCKED
        refused = error_of(abi.create_mapping, fd, size=SIZE, flags=flags, fd=content)
        assert refused == errno.EOPNOTSUPP
        os.close(content)
    assert msharefs.info(fd).mapped_bytes == 0
    abi.create_mapping(fd, size=SIZE)  # nor was it decided what kind of region it is
    os.close(fd)


def dropped() -> int:
    """How often caches were dropped since the boot."""
    with open("/proc/vmstat") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("drop_pagecache "))


def test_dropped_caches(path: str) -> None:
    """Memory on its way to be locked is not what the kernel may drop."""

    def drop() -> None:
        while True:
            _write("/proc/sys/vm/drop_caches", 3)

    before = dropped()
    child = abi.Child(drop)
    fd = abi.make(path, fill=False)
    for _ in range(20):
        abi.create_mapping(fd, size=SIZE, flags=FLAGS)
        assert msharefs.info(fd).locked_bytes == SIZE
    child.kill()
    assert dropped() > before
    os.close(fd)


def test_refused_change_takes_nothing(path: str) -> None:
    """Pages can be registered for the time after a PROTECT that was refused, as before it."""
    fd = lock(path)
    window = abi.mmap(fd)
    before = register(window)
    # 6.1 takes no file mapping but those of tmpfs and hugetlbfs
    assert before == (errno.EOPNOTSUPP if os.uname().release.startswith("6.1.") else None)
    assert error_of(abi.protect, fd, 0, PAGE, abi.READ) == errno.EBUSY
    assert register(window) == before
    abi.munmap(window)
    os.close(fd)


def register(window: int) -> int | None:
    """The errno of a registration of pages with io_uring, for writing and for long."""
    abi.madvise(window, SLOT, DONTNEED)  # what is in the tables is not asked about
    params = abi.memory(abi.anonymous(PAGE))
    ring = abi.syscall(IO_URING_SETUP, 4, abi.address_of(params))
    vector = abi.vector(window, SIZE)
    error = error_of(abi.syscall, IO_URING_REGISTER, ring, 0, vector[0], 1)
    os.close(ring)
    return error


def _as_nobody(limit: int, path: str, repeat: int) -> list[int | None]:
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, limit))
    os.setuid(NOBODY)
    errors = []
    for _ in range(repeat):
        fd = abi.make(path, fill=False)
        errors.append(error_of(abi.create_mapping, fd, size=SIZE, flags=FLAGS))
        os.close(fd)
        os.unlink(path)
    return errors


@pytest.mark.parametrize(
    ("limit", "expected"), [(0, errno.EPERM), (SIZE - PAGE, errno.ENOMEM), (SIZE, None)]
)
def test_limit_of_the_user(path: str, limit: int, expected: int | None) -> None:
    """RLIMIT_MEMLOCK holds for a user, and what went is no longer counted."""
    assert abi.Child(_as_nobody, limit, path, 3).result() == [expected] * 3


def test_limit_outlives_the_process(path: str) -> None:
    """What a user locked counts as long as it is locked, not as long as the process lives."""

    def first() -> None:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (SIZE, SIZE))
        os.setuid(NOBODY)
        lock(path)

    abi.Child(first).result()
    assert abi.Child(_as_nobody, SIZE, f"{path}-2", 1).result() == [errno.ENOMEM]
    os.unlink(path)
    assert abi.Child(_as_nobody, SIZE, f"{path}-2", 1).result() == [None]


def test_the_caller_pays(path: str) -> None:
    """Locked memory is charged to the group of the process that asks for it."""
    with abi.cgroup("locker") as folder:

        def work() -> int:
            abi.enter(folder)
            before = abi.current(folder)
            fd = lock(path)
            used = abi.current(folder) - before
            os.close(fd)
            return used

        assert abi.Child(work).result() >= SIZE
        os.unlink(path)


def test_over_the_limit_of_a_group(path: str) -> None:
    """A process that locks more than its group may have is refused, and nobody dies of it."""
    with abi.cgroup("locker", **{"max": "48M", "swap.max": "0"}) as folder:
        fd = abi.make(path, fill=False)
        others = [abi.within(folder, abi.forever) for _ in range(3)]

        def work() -> int | None:
            return error_of(abi.create_mapping, fd, size=128 << 20, flags=FLAGS)

        assert abi.within(folder, work).result() == errno.ENOMEM
        for other in others:
            assert os.waitpid(other.pid, os.WNOHANG) == (0, 0)
            other.kill()
        found = msharefs.info(fd)
        assert found.mapped_bytes == found.locked_bytes == 0
        os.close(fd)


def machine() -> int:
    """A virtual machine of this process: its descriptor."""
    for module in ("kvm_amd", "kvm_intel"):
        subprocess.run(["modprobe", module], check=False, capture_output=True)
    kvm = os.open("/dev/kvm", os.O_RDWR)
    return fcntl.ioctl(kvm, KVM_CREATE_VM, 0)


def test_virtual_machines_need_it(path: str) -> None:
    """A process with a virtual machine attaches a locked region, and no other."""
    fd, other = lock(path), abi.make(f"{path}-other")

    def work() -> list[int | None]:
        machine()
        return [error_of(abi.mmap, fd), error_of(abi.mmap, other)]

    assert abi.Child(work).result() == [None, errno.EOPNOTSUPP]
    assert error_of(abi.mmap, other) is None
    for each in (fd, other):
        os.close(each)
    os.unlink(f"{path}-other")


def processor(window: int) -> Callable[[], int]:
    """A virtual processor in real mode, with the window as its memory, that starts at 0 there.

    What comes back runs it until it halts, or does anything else, and says what it was.
    """
    vm = machine()
    memory = struct.pack("=IIQQQ", 0, 0, 0, SIZE, window)
    fcntl.ioctl(vm, KVM_SET_MEMORY, memory)
    cpu = fcntl.ioctl(vm, KVM_CREATE_VCPU, 0)
    shown = abi.memory(abi.mmap(cpu, PAGE, abi.RW, abi.SHARED)).cast("I")
    segments = bytearray(312)
    fcntl.ioctl(cpu, KVM_GET_SREGS, segments)
    struct.pack_into("=QIH", segments, 0, 0, 0xFFFF, 0)  # the first is CS
    fcntl.ioctl(cpu, KVM_SET_SREGS, segments)
    registers = struct.pack("=18Q", *[0] * 17, 2)

    def run() -> int:
        fcntl.ioctl(cpu, KVM_SET_REGS, registers)
        fcntl.ioctl(cpu, KVM_RUN, 0)
        return shown[2]

    return run


def test_processor_during_layout_changes(path: str) -> None:
    """A virtual processor's faults, which keep all locks (RETRY_NOWAIT), meet layout changes."""
    fd = lock(path)

    def stay() -> int:
        window = abi.mmap(fd)
        run = processor(window)
        for turn in range(100):
            number = turn % 256
            # mov byte [0x1000], number; hlt
            abi.put(window, bytes([0xC6, 0x06, 0x00, 0x10, number, 0xF4]))
            abi.madvise(window, SLOT, DONTNEED)
            assert run() == KVM_EXIT_HLT
            assert abi.get(window + 0x1000, 1) == bytes([number])
        return msharefs.info(fd).faults

    child = abi.Child(stay)
    changes = 0
    while not os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        changes += 1
        abi.create_mapping(fd, size=PAGE, at=SIZE + changes * PAGE, flags=FLAGS)
    assert child.result() > 0
    assert changes > 3
    os.close(fd)


def test_library(path: str) -> None:
    """``create(locked=True)`` and its errors say what to do."""
    name = os.path.basename(path)
    with mshare.create(name, size=SIZE, locked=True) as region:
        assert region.size == SIZE
        with pytest.raises(OSError, match="as this one, has it attached") as caught:
            region.protect(0, PAGE, readonly=True)
        assert caught.value.errno == errno.EBUSY
        counters = msharefs.Msharefs().counters(name)
        assert counters["locked_bytes"] == SIZE

        def work() -> str:
            machine()
            movable = mshare.create(f"{name}-2", size=SIZE, engine="msharefs")
            return repr(movable)

        with pytest.raises(AssertionError, match="create it with locked=True"):
            abi.Child(work).result()
        assert not [each for each in mshare.list() if each.name == f"{name}-2"]
