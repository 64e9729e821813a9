"""The arithmetic of costs, against what the kernel counts, and ``mshare plan``."""

from __future__ import annotations

import json
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import mshare
from mshare import cost, engines, hugepages, processes
from mshare.cli import main
from mshare.cost import PUD_COVERS, Cost
from mshare.engines import Engine, shm
from mshare.sizes import HUGE_PAGE, PAGE_SIZE, SLOT_SIZE
from tests.conftest import SubPython
from tests.measured import measured

MIB = 1 << 20


def of(engine: str, size: int, processes: int, how: str = "read", page: int = PAGE_SIZE) -> Cost:
    """The planned cost of one engine."""
    rows = cost.plan(size, processes, page_size=page, writing=how == "write")
    return next(row for row in rows if row.engine == engine)


@pytest.mark.parametrize("how", ["read", "write"])
@pytest.mark.parametrize("size", [PAGE_SIZE, 64 * MIB, 66 * MIB + 5 * PAGE_SIZE])
def test_shm_costs_what_is_planned(name: str, size: int, how: str) -> None:
    """Each process's VmPTE grows by exactly the planned bytes, in the planned number of faults."""
    with mshare.create(name, size, engine="shm") as region:
        region.asarray()[:] = 1
    planned = of("shm", size, 3, how)
    with measured(name, "shm", how, 3) as processes:
        for process in processes:
            assert process.vmpte == planned.vmpte == planned.per_process
            assert 0 <= process.faults - planned.faults_first <= 2
        assert planned.page_tables == sum(process.vmpte for process in processes)
    assert planned.faults_further == planned.faults_first


@pytest.mark.parametrize("how", ["read", "write"])
@pytest.mark.parametrize("more", [0, 3 * HUGE_PAGE])
def test_hugetlb_costs_what_is_planned(hugetlb: Engine, name: str, how: str, more: int) -> None:
    """The first process pays for the GiB, the others a fault; what is over each pays itself."""
    size = SLOT_SIZE + more
    with hugepages.reserved(size, lambda text: None):
        mshare.create(name, size, engine="hugetlb").close()
        planned = of("hugetlb", size, 3, how)
        with measured(name, "hugetlb", how, 3) as (first, *others):
            assert first.vmpte == planned.vmpte
            assert 0 <= first.faults - planned.faults_first <= 2
            for process in others:
                assert process.vmpte == planned.vmpte
                assert 0 <= process.faults - planned.faults_further <= 2
        mshare.unlink(name)


def test_huge_pages_need_no_pte_pages(
    root: None, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shared memory of transparent huge pages costs what is planned, and is counted so."""
    size = 64 * MIB
    subprocess.run(["mount", "-t", "tmpfs", "-o", "huge=advise", "tmpfs", tmp_path], check=True)
    try:
        monkeypatch.setenv("MSHARE_SHM_DIR", str(tmp_path))
        monkeypatch.setattr(engines.by_name("shm"), "chosen", str(tmp_path))
        shm._huge_setting.cache_clear()
        mshare.create(name, size, engine="shm").close()
        planned = of("shm", size, 3, page=HUGE_PAGE)
        with measured(name, "shm", "read", 3) as workers:
            for worker in workers:
                assert worker.vmpte == planned.vmpte == 2 * PAGE_SIZE
                assert 0 <= worker.faults - planned.faults_first <= 2
            users = [
                (process.pid, mapping)
                for process in processes.processes()
                for mapping in readable(process.pid)
                if name in mapping.path
            ]
            assert len(users) == 3
            for pid, mapping in users:
                (found,) = processes.occupied(pid, [mapping])
                assert (found.tables, found.resident) == (PAGE_SIZE, size)
        mshare.unlink(name)
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def readable(pid: int) -> list[processes.Shared]:
    """The shared mappings of a process; none of one that ended or that nobody may look at."""
    with suppress(OSError):
        return processes.shared_mappings(pid)
    return []


@pytest.mark.parametrize("advice", ["MADV_NOHUGEPAGE", "MADV_HUGEPAGE"])
def test_private_costs_what_is_planned(python: SubPython, advice: str) -> None:
    """A copy costs a table for each 2 MiB, also where it is made of huge pages."""
    size = 64 * MIB
    code = f"""
import mmap
from mshare import pagetables
memory = mmap.mmap(-1, {size}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.{advice})
before = pagetables.process()
with pagetables.Faults() as faults:
    for at in range(0, {size}, {PAGE_SIZE}):
        memory[at] = 1
print(pagetables.process() - before, int(faults.minor))
"""
    vmpte, faults = map(int, python(code).stdout.split())
    planned = of("private", size, 1)
    assert abs(vmpte - planned.vmpte) <= 3 * PAGE_SIZE
    if advice == "MADV_NOHUGEPAGE":
        assert 0 <= faults - planned.faults_first <= 64


def test_known_sums() -> None:
    """The sums of the documentation: 8 bytes a page, one page a GiB, one page 512 GiB."""
    gib = SLOT_SIZE
    assert cost.tables(gib) == 2 * MIB + 2 * PAGE_SIZE
    assert cost.tables(gib + 1) == 2 * MIB + 4 * PAGE_SIZE
    assert cost.tables(PUD_COVERS + gib, HUGE_PAGE) == (513 + 2) * PAGE_SIZE
    leaves = 1500 * 300 * gib // 512
    shm = of("shm", 300 * gib, 1500)
    assert leaves < shm.page_tables < 1.01 * leaves
    shared = of("msharefs", 300 * gib, 1500)
    assert shared.once == 2 * cost.tables(300 * gib) + cost.REGION
    assert shared.page_tables == shared.once + 1500 * 12 * 1024
    assert shared.page_tables < 0.02 * shm.page_tables
    assert (shared.faults_first, shared.faults_further) == (300 * gib // 65536, 0)
    assert of("msharefs", gib, 9, "write").once == cost.tables(gib) + cost.REGION
    assert of("private", gib, 7).content == 7 * gib
    assert of("shm", gib, 2, page=HUGE_PAGE).faults_further == 512


def test_plan(capsys: pytest.CaptureFixture[str]) -> None:
    """The table and the JSON hold the same sums, for every engine."""
    arguments = ["plan", "--size", "300G", "--processes", "1500"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "880.6 GiB" in shown
    assert "1,500 processes" in shown
    assert max(map(len, (line.rstrip() for line in shown.splitlines()))) <= 80
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["size_bytes"], found["processes"]) == (300 << 30, 1500)
    engines = {row["engine"]: row for row in found["engines"]}
    assert list(engines) == ["msharefs", "hugetlb", "shm", "private"]
    assert engines["msharefs"]["page_table_bytes_per_process"] == 12 << 10
    assert engines["shm"]["faults"] == 1500 * engines["shm"]["faults_first"]
    assert main([*arguments, "--json", "--page-size", "2M", "--access", "write"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert next(row for row in found["engines"] if row["engine"] == "shm")["faults_first"] == 153600


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "4Q", "--processes", "2"], "not a size"),
        (["--size", "0", "--processes", "2"], "positive"),
        (["--size", "65T", "--processes", "2"], "larger than a process can map"),
        (["--size", "1G", "--processes", "0"], "1 or more"),
        (["--size", "1G", "--processes", "-3"], "1 or more"),
        (["--size", "1G", "--processes", "2", "--page-size", "64K"], "4096, 2097152"),
        (["--size", "1G", "--processes", "2", "--page-size", "big"], "not a size"),
    ],
)
def test_bad_plans(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What makes no sense is wrong usage, and its last line says why."""
    with pytest.raises(SystemExit) as caught:
        main(["plan", *arguments])
    assert caught.value.code == 2
    output = capsys.readouterr()
    assert message in output.err.splitlines()[-1]
    assert not output.out


@pytest.mark.parametrize(
    ("size", "processes", "error", "message"),
    [
        (-5, 1, ValueError, "positive number of bytes: -5"),
        (0, 1, ValueError, "positive number of bytes: 0"),
        (1.5, 1, TypeError, "not float"),
        (PAGE_SIZE, 0, ValueError, "1 or more: 0"),
        (PAGE_SIZE, 1.5, TypeError, "whole number, not 1.5"),
        (PAGE_SIZE, "2", TypeError, "whole number, not '2'"),
    ],
)
def test_no_cost_of_nothing(
    size: Any, processes: Any, error: type[Exception], message: str
) -> None:
    """A size or a number of processes that can't be is refused; a size may be a string."""
    with pytest.raises(error, match=message):
        cost.plan(size, processes)
    assert cost.plan("1G", 2) == cost.plan(SLOT_SIZE, 2)
