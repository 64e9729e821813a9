"""``mshare.mmap`` is ``mmap.mmap``: with CPython's own tests, and where it must stay plain.

The same tests run with and without the kernel module; see also ``tests/kernel/test_dropin.py``.
"""

from __future__ import annotations

import gc
import json
import mmap
import os
import re
import weakref
from pathlib import Path

import pytest

import mshare
from mshare import dropin
from tests.conftest import LAB, SubPython

SIZE = 8 << 20
PAGE = mmap.PAGESIZE

CPYTHON = """
import json, os, sys, types, unittest
from test import test_mmap
import mshare

os.chdir(sys.argv[1])
made = {True: 0, False: 0}

class Counted(mshare.mmap):
    __slots__ = ()
    def __new__(cls, *args, **kwargs):
        self = super().__new__(cls, *args, **kwargs)
        made[self.shared] += 1
        return self

names = types.ModuleType("mmap")
names.__dict__.update(vars(test_mmap.mmap), mmap=Counted)
for constant in ("ACCESS_READ", "ACCESS_WRITE", "ACCESS_COPY", "ACCESS_DEFAULT"):
    setattr(names, constant, getattr(mshare, constant))
test_mmap.mmap = names
# It looks for the name of the type, which is another.
del test_mmap.MmapTests.test_repr
suite = unittest.defaultTestLoader.loadTestsFromModule(test_mmap)
result = unittest.TextTestRunner(stream=sys.stderr, verbosity=2).run(suite)
print(json.dumps([result.testsRun, result.wasSuccessful(), made[True], made[False]]))
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of 8 MiB; each page starts with its number."""
    path = tmp_path / "file"
    path.write_bytes(b"".join(n.to_bytes(4) + bytes(PAGE - 4) for n in range(SIZE // PAGE)))
    return path


def test_cpython_cases(tmp_path: Path, python: SubPython) -> None:
    """CPython's test_mmap passes, all of it but the name in repr(); with the module, shared."""
    result = python(CPYTHON, tmp_path, MSHARE_MMAP_MIN="0")
    assert result.returncode == 0, result.stderr
    count, good, shared, plain = json.loads(result.stdout.splitlines()[-1])
    assert good, result.stderr
    assert count >= 40
    assert plain >= 10
    assert (shared >= 40) if LAB else (shared == 0), (shared, plain)


def test_it_is_an_mmap(file: Path) -> None:
    """It is one by type, says what it is, and shares where the module is."""
    with open(file, "r+b") as opened, mshare.mmap(opened.fileno(), 0) as memory:
        assert isinstance(memory, mmap.mmap)
        assert memory.shared is LAB
        pattern = "<mshare.mmap closed=False, access=ACCESS_DEFAULT, length=8388608, pos=0, off.*>"
        assert re.fullmatch(pattern, repr(memory))
        assert memory.size() == len(memory) == SIZE
        memory[:5] = b"begin"
        memory.flush()
        assert file.read_bytes()[:5] == b"begin"
        assert memory.find(b"begin") == 0
    assert repr(memory) == "<mshare.mmap closed=True>"
    assert not memory.shared
    with pytest.raises(ValueError, match="closed"):
        memory[0]


@pytest.mark.parametrize("offset", [0, PAGE, 5 * PAGE])
@pytest.mark.parametrize("access", [mshare.ACCESS_READ, mshare.ACCESS_WRITE, mshare.ACCESS_COPY])
def test_same_as_mmap(file: Path, access: int, offset: int) -> None:
    """At any offset it holds what mmap.mmap holds, and allows the same."""
    with open(file, "r+b") as opened:
        number = opened.fileno()
        ours = mshare.mmap(number, SIZE // 2, access=access, offset=offset)
        theirs = mmap.mmap(number, SIZE // 2, access=access, offset=offset)
    with ours, theirs:
        assert ours.shared is (LAB and access != mshare.ACCESS_COPY)
        assert ours[:] == theirs[:]
        results = []
        for memory in (ours, theirs):
            try:
                memory[3:6] = b"new"
                memory.move(100, 3, 3)
                results.append(bytes(memory[:200]))
            except TypeError as error:
                results.append(str(error).encode())
        assert results[0] == results[1]


def test_views_hold_it(file: Path) -> None:
    """It is not closed nor resized while there are views, and goes on as it was."""
    with open(file, "r+b") as opened:
        memory = mshare.mmap(opened.fileno(), SIZE)
    view = memoryview(memory)[PAGE:]
    for call in (memory.close, lambda: memory.resize(PAGE)):
        with pytest.raises(BufferError):
            call()
    assert memory.shared is LAB
    memory[PAGE] = 77
    assert view[0] == 77
    view.release()
    memory.close()


def test_resize(file: Path) -> None:
    """The file and the mapping grow and shrink together, and are shared still."""
    with open(file, "r+b") as opened:
        memory = mshare.mmap(opened.fileno(), SIZE)
    for size in (SIZE + 3 * PAGE, PAGE, 2 * SIZE):
        memory.resize(size)
        assert memory.size() == len(memory) == size == file.stat().st_size
        memory[size - 1] = 1
        assert memory.shared is LAB
    with open(file, "rb") as opened:
        opened.seek(2 * SIZE - 1)
        assert opened.read() == b"\1"
    memory.close()


def test_only_the_file_is_shared(file: Path, tmp_path: Path) -> None:
    """What is no large part of a regular file, mapped MAP_SHARED, is plain."""
    with open(file, "r+b") as opened:
        number = opened.fileno()
        for memory in (
            mshare.mmap(-1, SIZE),
            mshare.mmap(-1, SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS),
            mshare.mmap(number, SIZE, access=mshare.ACCESS_COPY),
            mshare.mmap(number, SIZE, flags=mmap.MAP_PRIVATE),
            mshare.mmap(number, SIZE, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE),
            mshare.mmap(number, SIZE, prot=mmap.PROT_READ | mmap.PROT_EXEC),
            mshare.mmap(number, dropin.min_size() - 1),
        ):
            assert not memory.shared
            memory.madvise(mmap.MADV_RANDOM)
            assert memory.read(1) == b"\0"
            memory.close()


def test_another_engine_asked_for(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MSHARE_ENGINE with another engine's name switches it off, and so does a wrong one."""
    for name in ("shm", "nonsense"):
        monkeypatch.setenv("MSHARE_ENGINE", name)
        with open(file, "rb") as opened:
            memory = mshare.mmap(opened.fileno(), 0, access=mshare.ACCESS_READ)
        assert not memory.shared
        assert memory[PAGE : PAGE + 4] == b"\0\0\0\1"
        memory.close()


def test_errors_are_those_of_mmap(tmp_path: Path, file: Path) -> None:
    """Wrong arguments raise what mmap.mmap raises."""
    (tmp_path / "empty").touch()
    with open(file, "rb") as opened, open(tmp_path / "empty", "r+b") as empty:
        number = opened.fileno()
        cases: list[tuple[tuple[int, ...], dict[str, int]]] = [
            ((number, SIZE), {}),
            ((number, SIZE + 1), {"access": mshare.ACCESS_READ}),
            ((number, SIZE), {"access": 9}),
            ((number, SIZE), {"access": mshare.ACCESS_READ, "prot": 1}),
            ((number, SIZE), {"access": mshare.ACCESS_READ, "offset": 1}),
            ((number, SIZE), {"access": mshare.ACCESS_READ, "offset": -PAGE}),
            ((number, -1), {"access": mshare.ACCESS_READ}),
            ((empty.fileno(), 0), {}),
            ((9999, SIZE), {}),
        ]
        for args, named in cases:
            with pytest.raises((OSError, ValueError, OverflowError)) as theirs:
                mmap.mmap(*args, **named)
            with pytest.raises(theirs.type, match=re.escape(str(theirs.value))):
                mshare.mmap(*args, **named)
        for method in ("resize", "write"):
            memory = mshare.mmap(number, SIZE, access=mshare.ACCESS_READ)
            with pytest.raises(TypeError):
                getattr(memory, method)(PAGE if method == "resize" else b"x")
            memory.close()


def test_no_memory_is_left(file: Path) -> None:
    """Closed, lost, or in a cycle of garbage with a view of it: nothing stays mapped or open."""

    def used() -> tuple[int, int]:
        with open("/proc/self/maps", "rb") as maps:
            lines = sum(b"/file" in line for line in maps)
        return lines, len(os.listdir("/proc/self/fd"))

    gc.collect()
    before = used()
    with open(file, "r+b") as opened:
        for how in range(30):
            memory = mshare.mmap(opened.fileno(), 0)
            assert memory.shared is LAB
            if how % 3 == 0:
                memory.close()
            elif how % 3 == 1:
                cycle: list[object] = [memory, memoryview(memory)]
                cycle.append(cycle)
                del cycle
        gone = weakref.ref(memory)
        del memory
    gc.collect()
    assert gone() is None
    assert used() == before


def test_ends_quietly(file: Path, python: SubPython) -> None:
    """A program that ends with mappings open says nothing about it."""
    code = """
import sys, mshare
file = open(sys.argv[1], "r+b")
memory = mshare.mmap(file.fileno(), 0)
view = memoryview(memory)
class Keeper:
    def __del__(self):
        memory.close() if memory.closed else memory[0]
keeper = Keeper()
file.close()
print(memory.shared)
"""
    result = python(code, file)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.strip() == str(LAB)


def test_bad_smallest_size(python: SubPython) -> None:
    """A size in ``MSHARE_MMAP_MIN`` that is none is named when mshare.mmap is used, not before."""
    code = "import mshare; print(len(mshare.list('shm')) >= 0); mshare.mmap(-1, 4096)"
    result = python(code, MSHARE_MMAP_MIN="1X")
    assert (result.returncode, result.stdout) == (1, "True\n")
    assert "not a size: 'MSHARE_MMAP_MIN=1X'" in result.stderr
