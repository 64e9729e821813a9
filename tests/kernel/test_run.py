"""Programs that know nothing of mshare, under ``mshare run``."""

from __future__ import annotations

import ctypes
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import shared_memory
from pathlib import Path

import pytest

from tests.conftest import NOBODY
from tests.kernel import abi
from tests.kernel.test_lifetime import nothing_left

SIZE = 16 << 20
SHMGET, SHMAT, SHMCTL, SHMDT = 29, 30, 31, 67
SHM_RDONLY, IPC_RMID, IPC_STAT = 0o10000, 0, 2
SOURCE = Path(__file__).with_name("run.c")


@contextmanager
def segment(size: int = SIZE, flags: int = 0o600) -> Iterator[int]:
    """A System V segment; removed after the block."""
    number = abi.syscall(SHMGET, 0, size, flags)
    try:
        yield number
    finally:
        abi.syscall(SHMCTL, number, IPC_RMID, 0)


def attaches(number: int) -> int:
    """How often the segment is attached, as the kernel counts it."""
    answer = ctypes.create_string_buffer(256)
    abi.syscall(SHMCTL, number, IPC_STAT, ctypes.addressof(answer))
    return int(struct.unpack_from("=Q", answer.raw, 88)[0])


def run(
    *command: str, options: tuple[str, ...] = ("--min-size", "1M"), **environment: str
) -> subprocess.CompletedProcess[str]:
    """A command under ``mshare run --verbose``."""
    start = [sys.executable, "-c", "from mshare.cli import run; run()", "run", "--verbose"]
    return subprocess.run(
        [*start, *options, "--", *command],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, **environment},
    )


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python program under ``mshare run --verbose``; ``abi`` and ``os`` are there."""
    start = "import ctypes, mmap, os, sys, time; from tests.kernel import abi\n"
    return run(sys.executable, "-c", start + code, *arguments)


def good(result: subprocess.CompletedProcess[str]) -> str:
    """It ended well; what it said on standard error."""
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stderr


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> str:
    """``run.c``, compiled."""
    binary = tmp_path_factory.mktemp("program") / "run"
    command = ["cc", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread", "-o", str(binary)]
    subprocess.run([*command, str(SOURCE)], check=True)
    return str(binary)


def test_every_call_does_what_it_does_without(program: str) -> None:
    """What a program sees of 140 calls on its mappings is the same with windows and without."""
    plain = subprocess.run([program, "calls"], capture_output=True, text=True, check=True)
    with nothing_left():
        result = run(program, "calls")
        said = good(result)
    assert result.stdout == plain.stdout
    assert said.count(": shared: 2 MiB of anonymous memory\n") > 60
    assert said.count(": shared: 2 MiB of a System V segment\n") > 60
    for call in ("madvise", "mlock", "mlock2", "mlockall", "mbind", "mprotect", "pkey_mprotect"):
        assert f"no longer shared: 2 MiB of memory: {call}\n" in said
    for call in ("mremap", "munmap of a part", "mmap over it", "remap_file_pages"):
        assert f"no longer shared: 2 MiB of memory: {call}\n" in said


def test_threads_notice_nothing_of_the_change_back(program: str) -> None:
    """While the plain mapping takes a window's place, other threads load and store all the time."""
    with nothing_left():
        said = good(run(program, "threads", "5"))
    assert said.count("no longer shared") == 5 * 10
    assert said.count("no longer shared: 2 MiB of memory: madvise of a part\n") == 5


def test_threads_signals_and_forks(program: str) -> None:
    """Threads, a signal handler and forked children map and unmap at once; none hangs or dies."""
    with nothing_left():
        result = run(program, "storm", "8")
        assert ": shared: " in good(result)
    assert re.fullmatch(r"\d+ mappings, \d+ signals, \d+ children\n", result.stdout)


def test_forked_workers_share_page_tables() -> None:
    """Of 8 forked workers each reads 256 MiB with hardly a fault and no tables of its own."""
    said = good(
        python("""
size = 256 << 20
memory = mmap.mmap(-1, size)
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
abi.fill(start, size)
before = abi.meminfo("PageTables")
def work():
    tables = abi.page_tables()
    faults = abi.touch(start, size)
    abi.put(start + os.getpid() % 1000 * abi.PAGE, b"x")
    os.write(ready[1], b"r")
    os.read(go[0], 1)
    return faults, abi.page_tables() - tables
ready, go = os.pipe(), os.pipe()
children = [abi.Child(work) for _ in range(8)]
for _ in children:
    os.read(ready[0], 1)
more = abi.meminfo("PageTables") - before
os.write(go[1], b"g" * 8)
results = [child.result() for child in children]
assert max(faults for faults, _ in results) < 20, results
assert max(tables for _, tables in results) <= 8192, results
assert more < 8 * (100 << 10), more
assert abi.page_tables() < 400 << 10
""")
    )
    assert ": shared: 256 MiB of anonymous memory\n" in said


def test_shared_memory_of_multiprocessing(tmp_path: Path) -> None:
    """A process in the library and one outside see each other's stores, whoever comes first."""
    memory = shared_memory.SharedMemory(create=True, size=SIZE)
    try:
        buffer = memory.buf
        assert buffer is not None
        buffer[:5] = b"early"
        result = python(
            """
from multiprocessing import resource_tracker, shared_memory
resource_tracker.register = lambda *_: None
memory = shared_memory.SharedMemory(sys.argv[1])
assert bytes(memory.buf[:5]) == b"early"
memory.buf[-4:] = b"late"
assert sys.stdin.readline() == ""
memory.close()
""",
            memory.name,
        )
        assert ": shared: 16 MiB of a file\n" in good(result)
        assert bytes(buffer[-4:]) == b"late"
    finally:
        del buffer
        memory.close()
        memory.unlink()


def test_segments_count_as_ever() -> None:
    """A segment is attached once by each process, also by a forked one, and content agrees."""
    with segment() as number:
        address = abi.syscall(SHMAT, number, 0, 0)
        abi.put(address, b"early")
        result = python(
            """
libc = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype = ctypes.c_void_p
libc.shmat.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
libc.shmdt.argtypes = [ctypes.c_void_p]
from tests.kernel.test_run import attaches
number = int(sys.argv[1])
first, second = libc.shmat(number, None, 0), libc.shmat(number, None, 0o10000)
assert attaches(number) == 3
assert abi.get(first, 5) == abi.get(second, 5) == b"early"
assert abi.dies_by(abi.put, second, b"x") == 11
abi.put(first + 100, b"late")
def child():
    assert attaches(number) == 5
    assert libc.shmdt(first) == 0
    assert attaches(number) == 4
    return abi.get(second + 100, 4)
assert abi.Child(child).result() == b"late"
assert attaches(number) == 3
assert libc.shmdt(second) == 0
assert libc.shmdt(second) == -1
assert attaches(number) == 2
""",
            str(number),
        )
        assert good(result).count(": shared: 16 MiB of a System V segment\n") == 2
        assert abi.get(address + 100, 4) == b"late"
        assert attaches(number) == 1
        abi.syscall(SHMDT, address)


def test_a_memfd_goes_to_another_process() -> None:
    """A child that execs a program with the descriptor finds the content, and what it wrote."""
    said = good(
        python("""
import subprocess
fd = os.memfd_create("content", 0)
os.ftruncate(fd, 16 << 20)
memory = mmap.mmap(fd, 16 << 20)
memory[:5] = b"early"
code = '''
import mmap, sys
memory = mmap.mmap(int(sys.argv[1]), 0)
assert memory[:5] == b"early"
memory[-4:] = b"late"
'''
subprocess.run([sys.executable, "-c", code, str(fd)], pass_fds=[fd], check=True)
assert memory[-4:] == b"late"
""")
    )
    assert said.count(": shared: 16 MiB of a file\n") == 2


def test_what_is_populated_is_there() -> None:
    """MAP_POPULATE fills the shared tables, so the first access of a page takes no fault."""
    said = good(
        python("""
address = abi.mmap(-1, 16 << 20, 3, 0x8021)
assert abi.touch(address, 16 << 20) < 10
""")
    )
    assert ": shared: 16 MiB" in said


def test_what_is_killed_leaves_nothing() -> None:
    """kill -9 of a whole tree: regions, references, page tables and memory are gone."""
    code = """
memory = mmap.mmap(-1, 32 << 20)
memory[::4096] = b"x" * (8 << 10)
for _ in range(3):
    if not os.fork():
        memory[4096] = 1
        abi.forever()
print("ready", flush=True)
abi.forever()
"""
    start = "import mmap, os; from tests.kernel import abi\n"
    command = [sys.executable, "-c", "from mshare.cli import run; run()", "run", "--min-size", "1M"]
    with (
        nothing_left(),
        subprocess.Popen(
            [*command, "--", sys.executable, "-c", start + code],
            stdout=subprocess.PIPE,
            start_new_session=True,
        ) as process,
    ):
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        os.killpg(process.pid, 9)


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("os.environ['x'] = ''", None),
        (
            "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))",
            "out of descriptors",
        ),
        ("import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 30,) * 2)", "memory"),
        ("os.chroot(sys.argv[1])", "not there"),
        ("ctypes.CDLL(None).mlockall(2)", "mlockall"),
        (f"os.setgroups([]); os.setuid({NOBODY})", None),
    ],
)
def test_it_falls_back(code: str, why: str | None, tmp_path: Path) -> None:
    """Without a descriptor, address space, or the module in sight a mapping is plain, and works."""
    after = f"""
{code}
memory = mmap.mmap(-1, 16 << 20)
memory[5] = 5
child = os.fork()
if not child:
    memory[7] = memory[5]
    os._exit(0)
os.waitpid(child, 0)
assert memory[7] == 5
memory.close()
"""
    said = good(python(after, str(tmp_path)))
    assert why is None or "not shared: 16 MiB of anonymous memory: " in said
    assert (why or ": shared: ") in said


WATCHERS = {
    "userfaultfd": """
fd = abi.syscall(323, 0)
fcntl.ioctl(fd, 0xC018AA3F, struct.pack("=QQQ", 0xAA, 0, 0))
watch = 0xC020AA00, "=QQQQ", [(at, 1 << 24, 1, 0) for at in (early, late())]
""",
    "KVM": """
from tests.kernel.test_locked import machine
fd = machine()
watch = 0x4020AE46, "=IIQQQ", [(i, 0, i << 24, 1 << 24, at) for i, at in enumerate((early, late()))]
""",
}
"""Make a watcher, and have it watch a mapping from before and one from after."""


@pytest.mark.parametrize("watcher", WATCHERS)
def test_who_watches_page_tables_gets_plain_mappings(watcher: str) -> None:
    """With a userfaultfd or a virtual machine no mapping of the program is a window any more."""
    said = good(
        python(f"""
import fcntl, struct
early = abi.mmap(-1, 1 << 24, 3, 0x21)
abi.put(early, b"early")
late = lambda: abi.mmap(-1, 1 << 24, 3, 0x21)
{WATCHERS[watcher]}
number, form, ranges = watch
for each in ranges:
    fcntl.ioctl(fd, number, struct.pack(form, *each))
os.close(fd)
assert abi.get(early, 5) == b"early"
""")
    )
    assert "no longer shared: 16 MiB of memory: KVM, userfaultfd or a device\n" in said
    not_shared = (
        "not shared: 16 MiB of anonymous memory: the program uses KVM, userfaultfd or a device"
    )
    assert f"{not_shared}\n" in said


@pytest.mark.parametrize("call", [0xC0186451, 0xC0404B20, 0xC00846D2, 0xC0181B01])
def test_devices_with_page_tables_of_their_own(call: int) -> None:
    """Such a call takes all windows away, whatever device it is made on; one of a terminal not."""
    said = good(
        python(
            """
import fcntl
memory = mmap.mmap(-1, 1 << 24)
for number in (0x4B33, 0x5413, int(sys.argv[1])):
    assert memory.write(b"x") == 1
    print("before", hex(number), file=sys.stderr, flush=True)
    try:
        fcntl.ioctl(os.open("/dev/null", os.O_RDWR), number, bytearray(256))
    except OSError:
        pass
""",
            str(call),
        )
    )
    before, after = said.split(f"before {call:#x}\n")
    assert "no longer shared" not in before
    assert "no longer shared: 16 MiB of memory: KVM, userfaultfd or a device\n" in after


def test_mapping_behind_a_window() -> None:
    """A program that takes away all it finds in its maps takes nothing from the window."""
    good(
        python("""
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
size = 16 << 20
at = libc.mmap(None, ctypes.c_size_t(size), 3, 0x21, -1, 0)
ctypes.memset(at, 7, size)
with open("/proc/self/maps") as maps:
    lines = [line.split() for line in maps]
found = [[int(number, 16) for number in line[0].split("-")] for line in lines if line[1][3] == "s"]
behind = [start for start, end in found if end - start == 1 << 30 and start != at]
assert len(behind) == 1
assert libc.munmap(ctypes.c_void_p(behind[0]), ctypes.c_size_t(1 << 30)) == 0
assert ctypes.string_at(at + size - 1, 1) == b"\\7"
new = libc.mmap(ctypes.c_void_p(behind[0]), ctypes.c_size_t(1 << 30), 3, 0x4032, -1, 0)
assert new == behind[0]
assert libc.munmap(ctypes.c_void_p(at), ctypes.c_size_t(size)) == 0
assert ctypes.string_at(new, 1) == b"\\0"
""")
    )


FORKS = """
#include <pthread.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>
static void map(void)
{
	char *memory = mmap(NULL, 16 << 20, 3, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	memset(memory, 1, 4096);
	munmap(memory, 16 << 20);
}
__attribute__((constructor)) static void early(void) { pthread_atfork(map, map, map); }
int library(void) { return 0; }
"""


def test_fork_handlers_of_others_map(tmp_path: Path) -> None:
    """Those of a library that is there before: in the middle of a fork, and none waits for ever."""
    (tmp_path / "library.c").write_text(FORKS)
    main = "int library(void), fork(void), wait(int *);\n"
    main += "int main(void) { int s = 1; library(); if (!fork()) return 0; wait(&s); return s; }\n"
    (tmp_path / "main.c").write_text(main)
    library, binary = str(tmp_path / "library.so"), str(tmp_path / "main")
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-o", library, str(tmp_path / "library.c")], check=True
    )
    subprocess.run(["cc", "-w", "-o", binary, str(tmp_path / "main.c"), library], check=True)
    with nothing_left():
        assert ": shared: 16 MiB of anonymous memory\n" in good(run(binary))


def test_reader_of_its_messages_is_gone(program: str) -> None:
    """The program never wrote to standard error; it does not die of what the library has to say."""
    reading, writing = os.pipe()
    os.close(reading)
    start = [sys.executable, "-c", "from mshare.cli import run; run()", "run", "--verbose"]
    command = [*start, "--min-size", "1M", "--", program, "threads", "1"]
    done = subprocess.run(command, stderr=writing, check=False, timeout=300, stdout=subprocess.PIPE)
    os.close(writing)
    assert (done.returncode, done.stdout) == (0, b"1 rounds\n")


def test_far_longer_than_the_file(tmp_path: Path) -> None:
    """A window would have page tables for all of the length at once."""
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    said = good(
        python(
            """
file = open(sys.argv[1], "r+b")
at = abi.mmap(file.fileno(), 1 << 40, 3, 1)
abi.put(at, b"here")
assert file.read(4) == b"here"
""",
            str(tmp_path / "file"),
        )
    )
    assert "not shared: 1048576 MiB of a file: much longer than the file\n" in said


def test_sync_by_a_window_for_reading(disk: str) -> None:
    """What others wrote reaches the disk by msync() of a mapping that only reads."""
    path = f"{disk}/content"
    Path(path).write_bytes(bytes(SIZE))
    os.sync()
    said = good(
        python(
            """
file = os.open(sys.argv[1], os.O_RDWR)
at = abi.mmap(file, 16 << 20, 1, 1)
assert abi.get(at, 1) == b"\\0"
dirty = lambda: abi.meminfo("Dirty") + abi.meminfo("Writeback")
os.pwrite(file, b"x" * (8 << 20), 0)
before = dirty()
assert before >= 8 << 20
assert ctypes.CDLL(None).msync(ctypes.c_void_p(at), ctypes.c_size_t(16 << 20), 4) == 0
assert dirty() <= before - (7 << 20)
""",
            path,
        )
    )
    assert ": shared: 16 MiB of a file\n" in said


def test_more_mappings_than_it_keeps() -> None:
    """The 257th is plain, and all of them work."""
    said = good(
        python("""
all = [mmap.mmap(-1, 1 << 20) for _ in range(270)]
for number, memory in enumerate(all):
    memory[:2] = number.to_bytes(2, "little")
for number, memory in enumerate(all):
    assert memory[:2] == number.to_bytes(2, "little")
    memory.close()
again = mmap.mmap(-1, 1 << 20)
""")
    )
    assert said.count(": shared: ") == 257
    assert said.count("too many mappings") == 14


def test_what_is_left_alone() -> None:
    """Small, private, executable mappings, those at an address or an offset: untouched."""
    said = good(
        python("""
abi.mmap(-1, 1 << 19, 3, 0x21)
abi.mmap(-1, 1 << 24, 3, 0x22)
abi.mmap(-1, 1 << 24, 7, 0x21)
abi.mmap(-1, 1 << 24, 0, 0x21)
abi.mmap(-1, 1 << 24, 3, 0x21, 1 << 40)
abi.mmap(-1, 1 << 24, 3, 0x2021)
fd = os.memfd_create("content")
os.ftruncate(fd, 1 << 24)
abi.mmap(fd, 1 << 23, 3, 1, 0, 1 << 20)
""")
    )
    assert ": shared: " not in said
    reasons = ("neither for reading", "at an address", "flags", "from an offset on")
    assert [said.count(reason) for reason in reasons] == [2, 1, 1, 1]


def test_environment_for_who_starts_it_otherwise() -> None:
    """What --print says, set for a program, does the same."""
    start = [sys.executable, "-c", "from mshare.cli import run; run()", "run", "--verbose"]
    words = [*start, "--min-size", "1M", "--print"]
    printed = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    code = "import mmap; mmap.mmap(-1, 1 << 24)"
    script = f'{printed}export LD_PRELOAD MSHARE_RUN_MIN MSHARE_RUN_VERBOSE; exec "$@"'
    words = ["sh", "-c", script, "sh", sys.executable, "-c", code]
    result = subprocess.run(words, capture_output=True, text=True, check=True)
    assert ": shared: 16 MiB of anonymous memory\n" in result.stderr


def test_the_mount_that_is_asked(tmp_path: Path) -> None:
    """Where there is no module the command says so, and runs nothing unless told to go on."""
    result = run("echo", "ran", MSHARE_MSHAREFS_DIR=str(tmp_path))
    assert (result.returncode, result.stdout) == (1, "")
    assert "mshare run: " in result.stderr
    assert "as root: " in result.stderr
    assert result.stderr.count("\n") == 1
    result = run("echo", "ran", options=("--fallback",), MSHARE_MSHAREFS_DIR=str(tmp_path))
    assert (result.returncode, result.stdout) == (0, "ran\n")
    (tmp_path / "mshare_info").write_text("1073741824\n")
    result = run("echo", "ran", MSHARE_MSHAREFS_DIR=str(tmp_path))
    assert result.returncode == 1
    assert "older" in result.stderr
