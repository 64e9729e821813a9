"""The region of a file (OPEN_FILE), and ``mshare.mmap`` over it."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import gc
import mmap
import os
import random
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

import mshare
from mshare import dropin, engines
from mshare.engines.msharefs import Info, Msharefs, info
from tests.conftest import NOBODY
from tests.kernel import abi
from tests.kernel.abi import PAGE, READ, RW, SLOT
from tests.kernel.test_lifetime import nothing_left
from tests.kernel.test_security import APPEND, flagged

SIZE = 16 << 20
OPEN_FILE, OPEN_MAPPING = 0x40087804, 0x40107805
RDONLY, RDWR = os.O_RDONLY, os.O_RDWR
F_SEAL_FUTURE_WRITE = 0x10


@pytest.fixture(params=["disk", "tmpfs"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A file of 16 MiB, of random bytes, on each kind of file system."""
    folder = Path(request.getfixturevalue("disk")) if request.param == "disk" else tmp_path
    path = folder / "content"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return path


def open_mapping(address: int, access: int = RDWR, reserved: int = 0) -> int:
    """OPEN_MAPPING."""
    control = os.open(f"{abi.MOUNT}/mshare_info", RDONLY)
    try:
        request = bytearray(struct.pack("=QII", address, access, reserved))
        return int(fcntl.ioctl(control, OPEN_MAPPING, request))
    finally:
        os.close(control)


def open_file(fd: int, access: int = RDONLY) -> int:
    """OPEN_FILE, as a program without the library makes it."""
    control = os.open(f"{abi.MOUNT}/mshare_info", os.O_RDONLY)
    try:
        return int(fcntl.ioctl(control, OPEN_FILE, bytearray(struct.pack("=II", fd, access))))
    finally:
        os.close(control)


@contextmanager
def region_of(path: Path | str, access: int = RDONLY) -> Iterator[int]:
    """A descriptor of the region of the file at a path."""
    fd = os.open(path, access)
    region = open_file(fd, access)
    os.close(fd)
    yield region
    os.close(region)


def counters(path: Path | str, access: int = RDONLY) -> Info:
    """INFO of the region of a file."""
    with region_of(path, access) as region:
        return info(region)


def reading(path: Path | str) -> mshare.mmap:
    """All of the file, for reading."""
    with open(path, "rb") as opened:
        memory = mshare.mmap(opened.fileno(), 0, access=mshare.ACCESS_READ)
    assert memory.shared
    return memory


def writing(path: Path | str) -> mshare.mmap:
    """All of the file, for reading and writing."""
    with open(path, "r+b") as opened:
        memory = mshare.mmap(opened.fileno(), 0)
    assert memory.shared
    return memory


def refused(number: int, call: Callable[[], object]) -> None:
    """The call is refused with this errno."""
    with pytest.raises(OSError, match="Errno") as caught:
        call()
    assert caught.value.errno == number, errno.errorcode[caught.value.errno or 0]


def attached(path: Path, ready: int, go: int) -> tuple[int, int, int]:
    """Map the file, say so, wait; page tables, faults and a sum of all its bytes."""
    memory = reading(path)
    os.write(ready, b"r")
    os.read(go, 1)
    before = abi.minor_faults()
    for at in range(0, SIZE, PAGE):
        memory[at]
    faults = abi.minor_faults() - before
    return abi.page_tables(), faults, sum(memory[::PAGE])


def test_all_who_map_a_file_share_its_region(file: Path) -> None:
    """Processes that know nothing of each other share tables; the later take no faults."""
    first = reading(file)
    total = sum(first[::PAGE])
    before = counters(file)
    ready, say_ready = os.pipe()
    go, say_go = os.pipe()
    children = [abi.Child(attached, file, say_ready, go) for _ in range(4)]
    for _ in children:
        assert os.read(ready, 1)
    # each of them has what it inherited from here, and its own
    assert counters(file).attachments == 9
    os.write(say_go, b"go!!")
    for child in children:
        _, faults, seen = child.result()
        assert seen == total
        assert faults < 150
    first.close()
    after = counters(file)
    assert after.attachments == 0
    assert after.faults - before.faults < 10
    for fd in (ready, say_ready, go, say_go):
        os.close(fd)


def test_whoever_comes_first(file: Path) -> None:
    """Of many who ask at once, all get one region."""

    def hold(go: int, ready: int) -> None:
        fd = os.open(file, RDONLY)
        os.read(go, 1)
        abi.mmap(open_file(fd), prot=READ)
        os.write(ready, b"r")
        abi.forever()

    go, say_go = os.pipe()
    ready, say_ready = os.pipe()
    for _ in range(10):
        holders = [abi.Child(hold, go, say_ready) for _ in range(12)]
        os.write(say_go, bytes(12))
        for _ in holders:
            assert os.read(ready, 1)
        assert counters(file).attachments == 12
        for holder in holders:
            holder.kill()
        assert abi.settle(lambda: counters(file).attachments, 0) == 0
    for fd in (go, say_go, ready, say_ready):
        os.close(fd)


def test_nothing_is_left_after_kill_9(file: Path, disk: str) -> None:
    """With the last process the region is gone, and the file itself if it was deleted."""
    names = set(os.listdir(abi.MOUNT))
    doomed = f"{disk}/doomed"
    shutil.copy(file, doomed)

    def free() -> int:
        os.sync()
        space = os.statvfs(disk)
        return space.f_bfree * space.f_frsize

    def use(ready: int) -> None:
        memories = [reading(doomed), writing(doomed), reading(file), writing(file)]
        for memory in memories:
            memory[0 : len(memory) : PAGE]
        os.write(ready, b"r")
        abi.forever()

    ready, say_ready = os.pipe()
    reading(file).close()
    before = free()
    with nothing_left():
        users = [abi.Child(use, say_ready) for _ in range(6)]
        for _ in users:
            assert os.read(ready, 1)
        assert counters(doomed).attachments == counters(file, RDWR).attachments == 6
        os.unlink(doomed)
        assert free() < before + SIZE // 2
        for user in users:
            user.kill()
        assert set(os.listdir(abi.MOUNT)) == names
    assert abi.settle(lambda: before + SIZE // 2 - free(), 0) <= 0
    os.close(ready)
    os.close(say_ready)


def test_the_right_is_that_of_the_descriptor(file: Path) -> None:
    """No more can be had of a file than its descriptor was opened for."""
    for flags, access in ((os.O_WRONLY, RDONLY), (os.O_WRONLY, RDWR), (RDONLY, RDWR)):
        fd = os.open(file, flags)
        refused(errno.EACCES, partial(open_file, fd, access))
        os.close(fd)
    fd = os.open(file, os.O_PATH)
    refused(errno.EBADF, partial(open_file, fd))
    os.close(fd)
    with region_of(file) as region:
        refused(errno.EACCES, partial(abi.mmap, region, prot=RW))
        window = abi.mmap(region, prot=READ)
        refused(errno.EACCES, partial(abi.mprotect, window, SLOT, RW))
        assert abi.dies_by(abi.put, window, b"x") == signal.SIGSEGV
        abi.munmap(window)
        # root may open the region again, as any file, but what is in it is for reading
        again = os.open(f"/proc/self/fd/{region}", RDWR)
        window = abi.mmap(again)
        assert abi.dies_by(abi.put, window, b"x") == signal.SIGSEGV
        refused(errno.EPERM, partial(abi.protect, again, 0, PAGE, RW))
        abi.munmap(window)
        os.close(again)


def test_another_user_gets_nothing(file: Path) -> None:
    """Who may not open the file finds no way to its region, while others have it mapped."""
    for parent in reversed(file.parents):
        if os.stat(parent).st_uid == os.geteuid() and parent != Path("/"):
            os.chmod(parent, os.stat(parent).st_mode | 0o055)
    os.chmod(file, 0o600)

    def search(pid: int) -> list[int]:
        os.setgroups([])
        os.setuid(NOBODY)
        codes = []
        for path in (file, f"/proc/{pid}/map_files", f"/proc/{pid}/fd/{region}"):
            try:
                codes.append(-os.open(path, RDONLY))
            except OSError as error:
                codes.append(error.errno or 0)
        return codes

    def search_inherited() -> list[int]:
        """A descriptor it inherits is its; more than that is not."""
        os.setgroups([])
        os.setuid(NOBODY)
        codes = []
        for flags in (RDONLY, RDWR):
            try:
                codes.append(-os.open(f"/proc/self/fd/{region}", flags))
            except OSError as error:
                codes.append(error.errno or 0)
        return codes

    memory = reading(file)
    with region_of(file) as region:
        assert abi.Child(search, os.getpid()).result() == [errno.EACCES] * 3
        assert abi.Child(search_inherited).result() == [errno.EACCES] * 2
    memory.close()


def test_nobody_changes_what_is_in_it(file: Path) -> None:
    """Its layout is fixed, it never gets a name, and its size is set."""
    content = os.open(file, RDWR)
    fixed = abi.SHARED | abi.FIXED
    memory = writing(file)
    with region_of(file, RDWR) as region:
        for call in (
            partial(abi.create_mapping, region, size=PAGE),
            partial(abi.create_mapping, region, size=PAGE, flags=fixed, fd=content),
            partial(abi.unmap, region, 0, PAGE),
            partial(abi.protect, region, 0, PAGE, READ),
        ):
            refused(errno.EPERM, call)
        mount = os.open(abi.MOUNT, os.O_PATH)
        link = partial(os.link, f"/proc/self/fd/{region}", "named", dst_dir_fd=mount)
        refused(errno.ENOENT, partial(link, follow_symlinks=True))
        os.close(mount)
        refused(errno.EINVAL, partial(os.ftruncate, region, SLOT))
        again = abi.mmap(region)
        abi.put(again, b"x")
        assert memory[0] == ord("x")
        abi.munmap(again)
    os.close(content)
    memory.close()


def test_readers_and_writers_see_each_other(file: Path) -> None:
    """What is stored through one is loaded through the other, and read from the file."""
    reader, writer = reading(file), writing(file)
    plain = open(file, "r+b")  # noqa: SIM115
    for at in (0, 5 * PAGE + 1, SIZE - 3):
        writer[at : at + 3] = b"abc"
        assert reader[at : at + 3] == b"abc"
        assert os.pread(plain.fileno(), 3, at) == b"abc"
        os.pwrite(plain.fileno(), b"xyz", at)
        assert reader[at : at + 3] == writer[at : at + 3] == b"xyz"
    writer.flush()
    writer.flush(PAGE, PAGE)
    with pytest.raises(TypeError):
        reader[0] = 1
    plain.close()
    reader.close()
    writer.close()


def test_a_file_in_place_of_another(file: Path) -> None:
    """A new file of the old name is another region; who had the old one keeps it."""
    old = reading(file)
    kept = old[:PAGE]
    fresh = file.parent / "fresh"
    fresh.write_bytes(b"fresh" * (SIZE // 4))
    os.replace(fresh, file)
    new = reading(file)
    assert new[:10] == b"freshfresh"
    assert old[:PAGE] == kept
    assert len(new) == SIZE // 4 * 5
    os.unlink(file)
    file.write_bytes(b"third" * (SIZE // 4))
    assert reading(file)[:10] == b"thirdthird"
    assert new[:10] == b"freshfresh"
    old.close()
    new.close()


def test_a_file_that_grows_and_shrinks(file: Path) -> None:
    """A mapping covers its length; new ones see more; what the file lost is SIGBUS."""
    old = reading(file)
    with open(file, "ab") as opened:
        opened.write(b"more" * PAGE)
    assert len(old) == SIZE
    assert old.size() == SIZE + 4 * PAGE
    new = reading(file)
    assert new[SIZE : SIZE + 8] == b"moremore"
    os.truncate(file, SIZE)

    def touch(at: int) -> int:
        return new[at]

    assert abi.dies_by(touch, SIZE + PAGE) == signal.SIGBUS
    assert abi.dies_by(touch, SIZE - 1) is None
    os.truncate(file, 2 * SIZE)
    assert new[SIZE + PAGE] == 0
    old.close()
    new.close()


def test_beyond_a_slot(disk: str) -> None:
    """Windows start in any slot of the file and span as many as they need; it may grow to it."""
    path = f"{disk}/sparse"
    with open(path, "wb") as opened:
        opened.truncate(SIZE)
        early = reading(path)
        opened.truncate(5 * SLOT)
        for at in (SLOT - 2, 2 * SLOT + 5 * PAGE, 5 * SLOT - 4):
            opened.seek(at)
            opened.write(b"here")
    with open(path, "rb") as opened:
        for offset, length in (
            (0, 5 * SLOT),
            (SLOT - PAGE, 3 * SLOT),
            (2 * SLOT, SLOT),
            (4 * SLOT + PAGE, SLOT - PAGE),
        ):
            memory = mshare.mmap(opened.fileno(), length, access=mshare.ACCESS_READ, offset=offset)
            assert memory.shared
            for at in (SLOT - 2, 2 * SLOT + 5 * PAGE, 5 * SLOT - 4):
                if offset <= at < offset + length:
                    assert memory[at - offset : at - offset + 4] == b"here"
            memory.close()
    assert counters(path).attachments == 1
    early.close()


def test_what_hangs_on_the_open_file_ends_with_it(file: Path) -> None:
    """A lock of flock is free again when its descriptor is closed, whoever still maps the file."""
    first = open(file, "rb")  # noqa: SIM115
    fcntl.flock(first, fcntl.LOCK_EX)
    with region_of(file):
        memory = mshare.mmap(first.fileno(), 0, access=mshare.ACCESS_READ)
        other = abi.Child(time.sleep, 1)
        memory.close()
        first.close()
        other.result()
        with open(file, "rb") as again:
            fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_interrupted_in_the_middle(file: Path) -> None:
    """An exception after the kernel's part of a close or a resize puts no window back."""
    memory = writing(file)
    with pytest.raises(KeyboardInterrupt), dropin._plain(memory._window):
        mmap.mmap.close(memory)
        raise KeyboardInterrupt
    memory.close()
    assert memory.closed
    memory = writing(file)
    with pytest.raises(KeyboardInterrupt), dropin._plain(memory._window):
        mmap.mmap.resize(memory, 2 * SIZE)
        raise KeyboardInterrupt
    memory[2 * SIZE - 1] = 7
    assert len(memory) == 2 * SIZE
    memory.close()
    assert file.read_bytes()[-1] == 7


def test_garbage_looks_into_it_to_the_end(file: Path) -> None:
    """As with ``mmap.mmap``: a finalizer of the same garbage can still look."""

    class Holder:
        def __init__(self) -> None:
            self.memory = writing(file)
            self.view, self.look = memoryview(self.memory), self.store

        def store(self) -> None:
            self.view[0] = 5

        def __del__(self) -> None:
            self.store()
            self.view.release()

    def work() -> None:
        for _ in range(10):
            Holder()
            gc.collect()
        assert counters(file, RDWR).attachments == 0

    abi.Child(work).result()


@pytest.mark.parametrize("ask", ["file", "mapping"])
def test_watchers_are_not_told(file: Path, ask: str) -> None:
    """Who waits for a writer to be done with a file (inotify) does not take this for it."""
    libc = ctypes.CDLL(None)
    watch = libc.inotify_init1(os.O_NONBLOCK)
    fd = os.open(file, RDWR)
    address = abi.mmap(fd, SIZE, RW, abi.SHARED)
    assert libc.inotify_add_watch(watch, os.fsencode(file), 0xFFF) >= 0
    region = open_file(fd, RDWR) if ask == "file" else open_mapping(address)
    window = abi.mmap(region)
    abi.put(window, b"stored")
    abi.munmap(window)
    os.close(region)
    with pytest.raises(BlockingIOError):
        os.read(watch, 4096)
    os.close(fd)
    abi.munmap(address, SIZE)
    # the mapping was its last user
    assert os.read(watch, 4096)
    os.close(watch)


def test_an_overlay_that_copies_up(disk: str) -> None:
    """On overlayfs the region is that of the file below, so after a copy-up it is another."""
    for folder in ("lower", "upper", "work", "merged"):
        os.mkdir(f"{disk}/{folder}")
    Path(f"{disk}/lower/content").write_bytes(b"x" * SIZE)
    options = f"lowerdir={disk}/lower,upperdir={disk}/upper,workdir={disk}/work"
    mount = ["mount", "-t", "overlay", "-o", options, "overlay", f"{disk}/merged"]
    subprocess.run(mount, check=True)
    path = f"{disk}/merged/content"
    try:
        before = reading(path)
        assert before[0] == ord("x")
        writer = writing(path)
        writer[:5] = b"above"
        after = reading(path)
        assert after[:6] == b"abovex"
        assert before[:6] == b"xxxxxx"
        for memory in (before, writer, after):
            memory.close()
    finally:
        subprocess.run(["umount", f"{disk}/merged"], check=True)


@pytest.mark.parametrize("access", [7, os.O_WRONLY, RDWR | os.O_CREAT])
def test_what_is_asked_for_is_checked(file: Path, access: int) -> None:
    """Another access is EINVAL, a bad pointer EFAULT, a descriptor that is none EBADF."""
    fd = os.open(file, RDWR)
    refused(errno.EINVAL, partial(open_file, fd, access))
    refused(errno.EBADF, partial(open_file, 9999))
    control = os.open(f"{abi.MOUNT}/mshare_info", os.O_RDONLY)
    for number, code in ((errno.EFAULT, OPEN_FILE), (errno.ENOTTY, OPEN_FILE + 1)):
        refused(number, partial(abi.syscall, 16, control, code, 1))
    refused(errno.ENOTTY, partial(fcntl.ioctl, fd, OPEN_FILE, bytes(8)))
    with region_of(file) as region:
        refused(errno.ENOTTY, partial(fcntl.ioctl, region, OPEN_FILE, bytes(8)))
        refused(errno.EOPNOTSUPP, partial(open_file, region))
        assert fcntl.fcntl(region, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        assert os.fstat(region).st_nlink == 0
    os.close(control)
    os.close(fd)


def test_what_has_no_region(disk: str) -> None:
    """A device, a pipe, a folder, huge pages: EOPNOTSUPP."""
    reading_end, writing_end = os.pipe()
    for fd in (os.open("/dev/zero", RDWR), os.open(disk, RDONLY), reading_end, writing_end):
        number = errno.EACCES if fd == writing_end else errno.EOPNOTSUPP
        refused(number, partial(open_file, fd))
        os.close(fd)
    huge = os.memfd_create("huge", os.MFD_HUGETLB)
    os.ftruncate(huge, SIZE)
    refused(errno.EOPNOTSUPP, partial(open_file, huge, RDWR))
    os.close(huge)


def test_memfd(disk: str) -> None:
    """A file without a path has one too; its seals hold."""
    fd = os.memfd_create("content", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, SIZE)
    memory = mshare.mmap(fd, SIZE)
    assert memory.shared
    memory[7] = 7
    assert os.pread(fd, 1, 7) == b"\7"
    refused(errno.EBUSY, partial(fcntl.fcntl, fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE))
    memory.close()
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    refused(errno.EPERM, partial(open_file, fd, RDWR))
    again = os.open(f"/proc/self/fd/{fd}", RDONLY)
    memory = mshare.mmap(again, SIZE, access=mshare.ACCESS_READ)
    assert memory.shared
    assert memory[7] == 7
    memory.close()
    os.close(again)
    os.close(fd)


def test_no_more_than_an_own_mapping_gives(disk: str) -> None:
    """A seal, or a mark of the file, that came after the first writer holds for the next."""
    sealed = os.memfd_create("content", os.MFD_ALLOW_SEALING)
    marked = os.open(f"{disk}/content", RDWR | os.O_CREAT)
    for fd in sealed, marked:
        os.ftruncate(fd, SIZE)
    writers = [open_file(fd, RDWR) for fd in (sealed, marked)]
    fcntl.fcntl(sealed, fcntl.F_ADD_SEALS, F_SEAL_FUTURE_WRITE)
    with flagged(f"{disk}/content", APPEND):
        for fd, number in (sealed, errno.EPERM), (marked, errno.EACCES):
            refused(number, partial(abi.mmap, fd, SIZE))
            refused(number, partial(open_file, fd, RDWR))
            os.close(open_file(fd, RDONLY))
    again = open_file(marked, RDWR)
    for fd in (*writers, again, sealed, marked):
        os.close(fd)


def test_made_and_gone(file: Path, region: int) -> None:
    """300 regions of a file, each used by a reader and a writer, leave nothing."""

    def use(count: int) -> None:
        for _ in range(count):
            reader, writer = reading(file), writing(file)
            writer[0] = 1
            assert reader[0] == 1
            writer.resize(SIZE)
            reader.close()
            writer.close()

    # The window keeps this process known to the module: forgetting a process takes its time.
    keep = abi.mmap(region)
    use(10)
    with nothing_left(300):
        use(300)
    abi.munmap(keep)


def test_fork_inherits_and_maps_name_the_file(file: Path) -> None:
    """A child has the mapping too, on its own; tools see the file's name."""
    memory = reading(file)

    def child() -> bytes:
        data = memory[:100]
        memory.close()
        return data

    assert abi.Child(child).result() == memory[:100]
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if "content" in line]
    assert any(line.endswith("/content (deleted)") and "r--s" in line for line in lines), lines
    memory.close()


def test_advice(file: Path) -> None:
    """MADV_POPULATE_READ fills the shared tables; advice that drops pages keeps the content."""
    memory = reading(file)
    before = counters(file).pagetable_bytes
    memory.madvise(22)
    assert counters(file).pagetable_bytes >= before + SIZE // PAGE * 8
    content = memory[:PAGE]
    for advice in (mmap.MADV_RANDOM, mmap.MADV_WILLNEED, mmap.MADV_DONTNEED, mmap.MADV_NORMAL):
        memory.madvise(advice)
        memory.madvise(advice, 0, PAGE)
        assert memory.shared
        assert memory[:PAGE] == content
    memory.close()


def test_without_a_module_that_can(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mount that is not there, or a file in its place, makes it plain, and nothing else."""
    engine = engines.by_name("msharefs")
    assert isinstance(engine, Msharefs)
    monkeypatch.setattr(engine, "chosen", str(file.parent))
    with open(file, "rb") as opened:
        memory = mshare.mmap(opened.fileno(), 0, access=mshare.ACCESS_READ)
        assert not memory.shared
        memory.close()
        (file.parent / "mshare_info").write_bytes(b"1073741824\n")
        memory = mshare.mmap(opened.fileno(), 0, access=mshare.ACCESS_READ)
        assert not memory.shared
        memory.close()
