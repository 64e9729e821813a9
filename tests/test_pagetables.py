"""Page tables, resident memory and faults, as the kernel counts them."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

import mshare
from mshare import pagetables
from mshare.bench.worker import touch
from mshare.sizes import PAGE_SIZE
from tests.conftest import SubPython

SIZE = 64 << 20


def test_touching_costs_page_tables_and_faults(name: str) -> None:
    """64 MiB of shared memory: 128 KiB of page tables, a fault for every 16 pages."""
    region = mshare.create(name, SIZE, engine="shm")
    array = region.asarray()
    touch(array[: 4 * PAGE_SIZE])
    before = pagetables.process()
    with pagetables.Faults() as faults:
        touch(array)
    grown = pagetables.process() - before
    assert SIZE // 512 - 8192 <= grown <= SIZE // 512 + 8192
    assert faults.minor >= SIZE // PAGE_SIZE // 16 - 8
    assert faults.major == 0
    mapping = pagetables.mapping_at(region.address)
    assert mapping.resident == mapping.size == SIZE
    assert mapping.shared
    assert name in mapping.path


def test_huge_pages_are_resident(hugetlb: object, name: str) -> None:
    """What hugetlbfs maps counts, though Rss leaves it out."""
    region = mshare.create(name, 4 << 20, engine="hugetlb")
    touch(region.asarray())
    assert pagetables.mapping_at(region.address).resident == 4 << 20


def test_figures_say_where_they_are_from() -> None:
    """Every figure has a unit and a kernel file."""
    here = os.getpid()
    with pagetables.Faults() as faults:
        pass
    figures = [
        pagetables.process(),
        pagetables.process(here),
        pagetables.system(),
        pagetables.own(),
        pagetables.own(here),
        faults.minor,
        faults.major,
        *(figure for each in pagetables.mappings() for figure in (each.size, each.resident)),
    ]
    for figure in figures:
        assert figure.unit in ("bytes", "faults")
        assert figure.source.startswith("/proc/")
    assert repr(pagetables.process(here)).endswith(f"bytes (/proc/{here}/status VmPTE)")
    assert pagetables.system() >= pagetables.process() > 0


def test_mappings_are_those_of_maps() -> None:
    """smaps is read whole: every mapping once, anonymous ones without a path."""
    found = [(mapping.start, mapping.end) for mapping in pagetables.mappings()]
    assert len(found) == len(set(found)) > 20
    assert any("libc" in mapping.path for mapping in pagetables.mappings())


def test_no_such_process() -> None:
    """A process that is gone is ProcessLookupError, with its number."""
    with pytest.raises(ProcessLookupError) as caught:
        pagetables.process(4_000_000)
    assert caught.value.filename == 4_000_000
    with pytest.raises(ProcessLookupError):
        pagetables.mappings(4_000_000)
    with pytest.raises(LookupError, match="nothing"):
        pagetables.mapping_at(0)


def test_process_that_ends_while_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read of it may be a part: it is gone."""
    monkeypatch.setattr(pagetables, "process", lambda pid: 0)
    for read in (pagetables.mappings, pagetables.own):
        with pytest.raises(ProcessLookupError):
            read(os.getpid())


def test_another_users_process(as_nobody: SubPython) -> None:
    """Sizes of another user's process are open to all, what it maps is not."""
    code = """
from mshare import pagetables
print(pagetables.process(int(sys.argv[1])) > 0)
try:
    pagetables.mappings(int(sys.argv[1]))
except PermissionError:
    print("refused")
"""
    result = as_nobody(code, os.getpid())
    assert result.stdout == "True\nrefused\n", result.stderr


def test_own_memory(name: str, python: SubPython) -> None:
    """A process's own is what it wrote itself: not shared memory, nor what it had of its parent."""
    code = """
import os, sys, mshare
from mshare import pagetables
size = 32 << 20
inherited = bytearray(size)
region = mshare.create(sys.argv[1], size, engine="shm")
if os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
start = pagetables.own()
memoryview(region)[:] = bytes(size)
bytes(inherited[:1])
shared = pagetables.own() - start
for place in range(0, size, 4096):
    inherited[place] = 1
copied = pagetables.own() - start
print(shared, copied, flush=True)
os._exit(0)
"""
    result = python(code, name)
    assert result.returncode == 0, result.stderr
    shared, copied = map(int, result.stdout.split())
    assert abs(shared) < 2 << 20
    assert 32 << 20 <= copied < 34 << 20


def test_paths_of_any_bytes(tmp_path: Path) -> None:
    """A mapped file whose name is not UTF-8, or has a carriage return, is a file."""
    path = os.path.join(os.fsencode(tmp_path), b"M\xfcller\rx")
    with open(path, "w+b") as file:
        file.truncate(4096)
        memory = mmap.mmap(file.fileno(), 4096)
    assert any(os.fsencode(each.path) == path for each in pagetables.mappings())
    memory.close()
