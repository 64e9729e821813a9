"""``mshare advise``: what is found, what it is said to cost, and for whom."""

from __future__ import annotations

import json
import mmap
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import mshare
from mshare import advice, cost, hugepages, processes
from mshare.advice import Target
from mshare.cli import main
from mshare.engines import Engine
from mshare.processes import Occupied, Process, Shared
from mshare.sizes import HUGE_PAGE, PAGE_SIZE, SLOT_SIZE
from tests.conftest import NOBODY, SubPython, skip
from tests.measured import measured

Capture = pytest.CaptureFixture[str]
MIB = 1 << 20
SIZE = 32 * MIB
MAP_HUGETLB = 0x40000

_MAP = """
import ctypes, mmap, os, sys
from mshare import pagetables

def touch(memory, step=4096):
    for at in range(0, len(memory), step):
        memory[at]

def ready(what):
    print(what, flush=True)
    sys.stdin.read()
"""

_KINDS = f"""{_MAP}
size = {SIZE}
libc = ctypes.CDLL(None)
libc.shmat.restype = ctypes.c_void_p
segment = libc.shmget(0, size, 0o1600)
sysv = (ctypes.c_char * size).from_address(libc.shmat(segment, None, 0))
libc.shmctl(segment, 0, None)
memfd = os.memfd_create("advised")
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
shm = os.open(sys.argv[2], os.O_RDWR | os.O_CREAT)
for fd in memfd, file, shm:
    os.ftruncate(fd, size)
memory = [sysv, mmap.mmap(-1, size), *(mmap.mmap(fd, size) for fd in (memfd, file, shm))]
private = bytearray(b"x") * size
for each in memory:
    for at in range(0, size, 4096):
        each[at] = b"x" if each is sysv else 120
answer, told = os.pipe()
for number in range(2):
    if os.fork() == 0:
        open("/proc/self/comm", "w").write(sys.argv[3])
        for each in (*memory, private):
            touch(each)
        os.write(told, b".")
        sys.stdin.read()
        os._exit(0)
while number >= 0:
    number -= len(os.read(answer, 1))
open("/proc/self/comm", "w").write(sys.argv[3])
ready(os.getpid())
"""


@contextmanager
def holding(code: str, *arguments: object) -> Iterator[list[int]]:
    """Run a program until the end of the block; the numbers it prints when it is ready."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    with subprocess.Popen(
        command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        try:
            assert holder.stdout
            yield [int(number) for number in holder.stdout.readline().split()]
        finally:
            holder.stdin.close()  # type: ignore[union-attr]


def of(pid: int, minimum: int = 64 << 10) -> dict[str, Target]:
    """What is found of a process and others together, by kind."""
    return {each.kind: each for each in advice.scan(minimum).targets if pid in each.pids}


def largest(pid: int) -> Shared:
    """The largest shared mapping of a process; the C library may have one of its own."""
    return max(processes.shared_mappings(pid), key=lambda mapping: mapping.size)


@pytest.fixture
def shm(name: str) -> Iterator[str]:
    """A path in /dev/shm."""
    path = f"/dev/shm/{name}"
    yield path
    os.unlink(path)


@pytest.mark.parametrize("step", [PAGE_SIZE, 5 * MIB, 64 * MIB])
def test_estimates_are_what_vmpte_shows(tmp_path: Path, step: int) -> None:
    """Up to 1 GiB the estimate is exact, whether all of it was touched or a page here and there."""
    size = 256 * MIB
    code = f"""{_MAP}
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
os.ftruncate(file, {size})
before = pagetables.process()
memory = mmap.mmap(file, {size})
touch(memory, {step})
ready(f"{{os.getpid()}} {{int(pagetables.process() - before)}}")
"""
    with holding(code, tmp_path / "file") as (pid, grown):
        mapping = largest(pid)
        (found,) = processes.occupied(pid, [mapping])
        assert abs(found.tables - grown) <= 3 * PAGE_SIZE
        assert found.resident >= size // step * PAGE_SIZE
        if step == PAGE_SIZE:
            assert found.resident == size == mapping.size


def test_large_mappings_are_sampled(shm: str) -> None:
    """Half of the blocks of 8 GiB touched at random: the estimate is near VmPTE, and quick."""
    code = f"""{_MAP}
import random
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
os.ftruncate(file, 8 << 30)
before = pagetables.process()
memory = mmap.mmap(file, 8 << 30)
for block in random.Random(1).sample(range(4096), 2048):
    memory[block << 21]
ready(f"{{os.getpid()}} {{int(pagetables.process() - before)}}")
"""
    with holding(code, shm) as (pid, grown):
        (found,) = processes.occupied(pid, [largest(pid)])
        assert grown >= 2048 * PAGE_SIZE
        deviation = 0.06 * grown  # half of 256 blocks
        assert abs(found.tables - grown) <= 6 * deviation
        (found,) = processes.occupied(pid, [largest(pid)], samples=4096)
        assert abs(found.tables - grown) <= 3 * PAGE_SIZE


def test_every_kind_is_found(tmp_path: Path, shm: str) -> None:
    """Files and segments of every kind that three processes map, and no private memory."""
    with holding(_KINDS, tmp_path / "a file", shm, "adviser") as (pid,):
        found = of(pid)
    assert set(found) == {"file", "shm", "memfd", "sysv", "anonymous"}
    for target in found.values():
        assert len(target.pids) == 3
        assert target.programs == {"adviser": 3}
        assert target.size == target.resident == SIZE
        assert abs(target.page_tables - 3 * cost.tables(SIZE)) <= 3 * 3 * PAGE_SIZE
        least = 2 * cost.tables(SIZE) - 3 * cost.WINDOW - cost.REGION
        assert abs(target.saves - least) <= 3 * 3 * PAGE_SIZE
    assert found["file"].path == str(tmp_path / "a file")
    assert found["shm"].path == shm
    assert found["memfd"].path == "/memfd:advised"
    assert found["sysv"].path.startswith("/SYSV")
    assert "mshare" in found["file"].change
    assert str(SIZE) in found["anonymous"].change


def test_postgresql_is_told_of_huge_pages(tmp_path: Path, shm: str) -> None:
    """Its main segment wants huge_pages, with their number; what else it maps does not."""
    with holding(_KINDS, tmp_path / "file", shm, "postgres") as (pid,):
        found = of(pid)
    for kind in ("sysv", "anonymous"):
        assert "huge_pages = on" in found[kind].change
        more = f"hugepages-2048kB/nr_hugepages) + {SIZE // (2 * MIB)}))"
        assert more in found[kind].change
    for kind in ("file", "shm", "memfd"):
        assert "huge_pages" not in found[kind].change


def test_segments_of_other_namespaces(root: None) -> None:
    """The first segment of each IPC namespace has the same number, and is not the same."""
    code = f"""
import ctypes, os, sys
libc = ctypes.CDLL(None)
if libc.unshare(0x08000000):
    sys.exit()
libc.shmat.restype = ctypes.c_void_p
at = libc.shmat(libc.shmget(0, {SIZE}, 0o1600), None, 0)
ctypes.memset(at, 1, {SIZE})
print(os.getpid(), flush=True)
sys.stdin.read()
"""
    with holding(code) as first, holding(code) as second:
        if not first:
            skip("unshare(CLONE_NEWIPC) is not allowed here")
        (one,), (two,) = first, second
        assert largest(one).inode == largest(two).inode
        assert "sysv" not in of(one)
        assert "sysv" not in of(two)


def test_one_process_shares_with_nobody(tmp_path: Path) -> None:
    """What one process maps, also twice, is no case."""
    code = f"""{_MAP}
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
os.ftruncate(file, {SIZE})
memory = [mmap.mmap(file, {SIZE}) for _ in range(3)]
for each in memory:
    touch(each)
ready(os.getpid())
"""
    with holding(code, tmp_path / "file") as (pid,):
        assert not of(pid, PAGE_SIZE)


def test_readers_and_writers_need_two_sets() -> None:
    """With readers and a writer the sum is two sets of tables and 12 KiB for each process."""
    size = 100 * MIB
    each = Occupied(cost.tables(size), size, (1 << 50) - 1)

    def group(*writable: bool) -> advice._Group:
        made = advice._Group("file", "/file")
        for pid, write in enumerate(writable):
            made.users[pid].append(Shared(0, size, 0, (8, 1), 7, "/file", write))
            made.found[pid].append(each)
        return made

    now, then = advice._small(group(True, False, False), size)
    assert (now, then) == (3 * each.tables, 2 * each.tables + 3 * cost.WINDOW + cost.REGION)
    now, then = advice._small(group(False, False, False), size)
    assert (now, then) == (3 * each.tables, each.tables + 3 * cost.WINDOW + cost.REGION)


def test_one_set_holds_what_any_process_touched() -> None:
    """Processes that touched the same blocks need those once, others need all of them."""
    tables = 2 * PAGE_SIZE

    def then(*common: int) -> int:
        made = advice._Group("shm", "/dev/shm/sparse")
        for pid, bits in enumerate(common):
            made.users[pid].append(Shared(0, SLOT_SIZE, 0, (0, 1), 7, "", False))
            made.found[pid].append(Occupied(tables, PAGE_SIZE, bits))
        return advice._small(made, SLOT_SIZE)[1] - cost.REGION - len(common) * cost.WINDOW

    assert then(1, 1, 1) == tables + PAGE_SIZE
    assert then(1, 2, 4) == 3 * PAGE_SIZE + 2 * PAGE_SIZE
    assert then(0, 0, 0) == tables


def test_the_line_to_change_is_the_shortest_there_is() -> None:
    """For a file it is the drop-in for mmap, for segments the program as it is."""
    group = advice._Group("file", "/data/features.npy")
    names = Counter({"gunicorn: worker": 34})
    assert advice._change(group, SIZE, names).startswith("mshare.mmap(...) in place of mmap.mmap")
    group.kind = "memfd"
    assert advice._change(group, SIZE, names).startswith("the program as it is: mshare run -- ")
    group.path = "/dev/shm/mshare/features"
    assert "create the region features anew" in advice._change(group, SIZE, names)


def test_kernel_without_page_maps(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """Where the kernel shows no page maps that is said, and nothing made up."""
    monkeypatch.setattr(os.path, "exists", lambda path: path != "/proc/self/pagemap")
    assert main(["advise"]) == 1
    assert "shows no page maps" in capsys.readouterr().err


@pytest.mark.parametrize(("start", "saves"), [(SLOT_SIZE, 0), (3 * SLOT_SIZE // 2, 5)])
def test_hugetlb_is_judged_by_alignment(start: int, saves: int) -> None:
    """Two GiB in three processes: at whole GiB two PMD pages in all, elsewhere three in each."""
    group = advice._Group("hugetlb", "/huge")
    for pid in range(3):
        group.users[pid].append(Shared(start, start + 2 * SLOT_SIZE, 0, (0, 50), 7, "/huge", True))
        group.found[pid].append(Occupied(3 * PAGE_SIZE, SLOT_SIZE))
    now, then = advice._hugetlb(group, 2 * SLOT_SIZE)
    assert then == 2 * PAGE_SIZE
    assert now == (2 if start % SLOT_SIZE == 0 else 9) * PAGE_SIZE
    assert (now - then > 0) == (saves > 0)


def test_huge_pages_are_told_from_small_ones(hugetlb: Engine, name: str) -> None:
    """A region on hugetlbfs, a memfd, anonymous memory: of huge pages, all are kind hugetlb."""
    size = 6 * MIB
    region = mshare.create(name, size, engine="hugetlb")
    huge, small = os.memfd_create("huge", os.MFD_HUGETLB), os.memfd_create("small")
    for fd in (huge, small):
        os.ftruncate(fd, size)
    anonymous = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS
    held: list[mshare.Region | mmap.mmap] = [
        region,
        mmap.mmap(huge, size),
        mmap.mmap(-1, size, flags=anonymous | MAP_HUGETLB),
        mmap.mmap(small, size),
        mmap.mmap(-1, size, flags=anonymous),
    ]
    kinds = advice._Kinds()
    mappings = processes.shared_mappings(os.getpid())
    found = sorted(str(kinds.of(each, os.getpid())) for each in mappings if each.size == size)
    assert found == ["anonymous", "hugetlb", "hugetlb", "hugetlb", "memfd"]
    for each in held:
        each.close()
    os.close(huge)
    os.close(small)


def test_aligned_regions_on_hugetlb_are_no_case(hugetlb: Engine, name: str) -> None:
    """Three processes on a whole GiB of huge pages: shared by the kernel, when aligned."""
    with hugepages.reserved(SLOT_SIZE, lambda text: None):
        region = mshare.create(name, SLOT_SIZE, engine="hugetlb")
        path = f"{hugetlb.directory()}/{name}"
        region.close()
        with measured(name, "hugetlb", "read", 3):
            assert path not in [each.path for each in advice.scan(PAGE_SIZE).targets]
        code = f"""{_MAP}
file = os.open(sys.argv[1], os.O_RDWR)
first = mmap.mmap(file, {2 * MIB})
memory = mmap.mmap(file, {SLOT_SIZE})
touch(memory, {2 * MIB})
ready(os.getpid())
"""
        with holding(code, path) as (one,), holding(code, path) as (other,):
            (found,) = (each for each in advice.scan(PAGE_SIZE).targets if each.path == path)
            assert found.kind == "hugetlb"
            assert set(found.pids) == {one, other}
            assert found.resident == SLOT_SIZE
            assert "whole GiB" in found.change
        mshare.unlink(name)


def test_mapped_parts_count_once() -> None:
    """The size is of the file's bytes that are mapped: overlaps once, holes not at all."""

    def part(offset: int, size: int) -> Shared:
        return Shared(0, size, offset, (8, 1), 7, "/file", False)

    assert advice._mapped([part(0, 100), part(50, 100), part(50, 20), part(300, 10)]) == 160


def test_estimates_are_not_more_than_vmpte() -> None:
    """However the sample fell, a target's page tables are at most those of its processes."""
    group = advice._Group("file", "/file")
    programs = {}
    for pid in (7, 8):
        group.users[pid].append(Shared(0, SLOT_SIZE, 0, (8, 1), 7, "/file", False))
        group.found[pid].append(Occupied(2 * MIB, SLOT_SIZE, 1))
        programs[pid] = Process(pid, "x", MIB)
    target = advice._target(group, programs)
    assert target.page_tables == 2 * MIB


def test_processes_that_vanish(tmp_path: Path, shm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that ends between two looks is left out, and so is a number that is nobody's."""
    real = processes.pids
    monkeypatch.setattr(advice, "pids", lambda: [*real(), 4_000_000])
    with holding(_KINDS, tmp_path / "file", shm, "adviser") as (pid,):
        (victim, *_) = set(of(pid)["memfd"].pids) - {pid}
        killed: list[int] = []

        def progress(text: str, done: int, total: int) -> None:
            if text == "reading page maps" and not killed:
                os.kill(victim, signal.SIGKILL)
                while processes.process(victim):  # it dies after kill has returned
                    time.sleep(0.01)
                killed.append(victim)

        found = {each.kind: each for each in advice.scan(PAGE_SIZE, progress).targets}
        assert killed
        assert victim not in found["memfd"].pids
        assert pid in found["memfd"].pids


def test_one_that_ends_while_it_is_looked_at() -> None:
    """Its page map, open already, has no entries: it does not count as one with no pages."""
    code = f"{_MAP}memory = mmap.mmap(-1, {SIZE})\nready(os.getpid())"
    with holding(code) as (pid,), open(f"/proc/{pid}/pagemap", "rb") as pagemap:
        mapping = largest(pid)
        assert len(processes._pages(pagemap.fileno(), mapping, [mapping.start // HUGE_PAGE])) == 1
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(ProcessLookupError):
            processes._pages(pagemap.fileno(), mapping, [mapping.start // HUGE_PAGE])


def test_progress(tmp_path: Path, shm: str) -> None:
    """Both passes say how far they are, from the first step to the last."""
    steps: dict[str, list[tuple[int, int]]] = {}

    def progress(text: str, done: int, total: int) -> None:
        steps.setdefault(text, []).append((done, total))

    with holding(_KINDS, tmp_path / "file", shm, "adviser"):
        advice.scan(64 << 10, progress)
    assert list(steps) == ["reading maps", "reading page maps"]
    for each in steps.values():
        total = each[0][1]
        assert each == [(done, total) for done in range(total)]
        assert total >= 3


def test_a_user_sees_their_own(root: None, python: SubPython, tmp_path: Path) -> None:
    """As a user: the own processes are found, the others counted, and root would see them."""
    tmp_path.chmod(0o777)
    code = f"""
import ctypes, heapq, importlib.util, json, mmap, numpy, os, rich.progress, signal, sys
from mshare.cli import main
numpy.random.default_rng(1)
main(["advise", "--min", "1P"])
os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
memory = mmap.mmap(-1, {SIZE})
for at in range(0, {SIZE}, 4096):
    memory[at] = 1
answer, told = os.pipe()
children = []
for _ in range(2):
    children.append(os.fork())
    if not children[-1]:
        for at in range(0, {SIZE}, 4096):
            memory[at]
        os.write(told, b".")
        signal.pause()
    os.read(answer, 1)
try:
    print("-----", flush=True)
    main(["advise", "--min", "32K", "--json"])
    print("-----", flush=True)
    main(["advise", "--min", "32K"])
finally:
    for child in children:
        os.kill(child, 9)
"""
    result = python(code)
    assert result.returncode == 0, result.stderr
    _, first, shown = result.stdout.split("-----\n")
    found = json.loads(first)
    assert found["processes_unreadable"] > 0
    assert [target["kind"] for target in found["targets"]] == ["anonymous"]
    assert found["targets"][0]["processes"] == 3
    assert "run it as root" in shown
    assert "anonymous shared memory" in shown


def test_command(tmp_path: Path, shm: str, capsys: Capture) -> None:
    """Ranked by what is saved, cut at --limit, the same as JSON; strange names do no harm."""
    file = tmp_path / "odd \x1b[31m\u00e9 name"
    with holding(_KINDS, file, shm, "adviser") as (pid,):
        assert main(["advise", "--min", "64K", "--limit", "3"]) == 0
        shown = capsys.readouterr().out
        assert main(["advise", "--min", "64K", "--limit", "1000", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert main(["advise", "--min", "64K", "--limit", "1000"]) == 0
        whole = capsys.readouterr().out
    assert shown.startswith("1. ")
    assert "\n3. " in shown
    assert "\n4. " not in shown
    assert "more: mshare advise --limit" in shown
    assert "\x1b" not in whole
    assert "odd \\x1b[31m\u00e9 name" in whole
    saves = [target["saves_bytes"] for target in found["targets"]]
    assert saves == sorted(saves, reverse=True)
    assert found["found"] == len(saves) >= 5
    assert found["page_table_bytes_machine"] > sum(
        target["page_table_bytes"] for target in found["targets"] if pid in target["pids"]
    )
    assert main(["advise", "--min", "1P"]) == 0
    assert "nothing found" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--min", "4Q"], "not a size"),
        (["--min", "0"], "positive"),
        (["--limit", "0"], "1 or more"),
    ],
)
def test_bad_input(arguments: list[str], message: str, capsys: Capture) -> None:
    """What makes no sense is wrong usage, and its last line says why."""
    with pytest.raises(SystemExit) as caught:
        main(["advise", *arguments])
    assert caught.value.code == 2
    output = capsys.readouterr()
    assert message in output.err.splitlines()[-1]
    assert not output.out
