"""What runs out: each call fails with the kernel's errno and the region's name, and leaves nothing.

Most tests walk: they give the call a little more each time, from nothing on, until it succeeds.
"""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import mshare
from mshare.cli import main
from mshare.engines import Engine
from tests.conftest import SubPython, skip

SIZE = 4 << 20
PREPARED = """
import contextlib, errno, gc, os, resource, sys, mshare
import numpy
from mshare import engines, mapping
name, chosen, call = sys.argv[1:4]
os.environ["MSHARE_ENGINE"] = chosen
engine = engines.by_name(chosen)
size = max(engine.granule, 1 << 21)
other = name + "-other"
there = mshare.create(name, size)
regions = mshare.list()

def made(region):
    region.unlink()
    region.close()

def shared(address):
    mshare.mshare_unlink(other)
    mapping.munmap(address, size)

def again(nothing):
    mshare.create(name, size).close()

CALLS = {
    "create": (lambda: mshare.create(other, size), made, other),
    "attach": (lambda: mshare.attach(name), lambda region: region.close(), name),
    "attach a descriptor": (lambda: mshare.attach(there.fileno()), lambda r: r.close(), name),
    "stat": (lambda: mshare.stat(name), lambda nothing: None, name),
    "list": (lambda: mshare.list(), lambda found: same(found, regions), None),
    "unlink": (lambda: mshare.unlink(name), again, name),
    "mshare": (lambda: mshare.mshare(other, 0, size, os.O_RDWR | os.O_CREAT), shared, other),
    "asarray": (lambda: there.asarray("float32"), lambda array: None, None),
}
call, undo, about = CALLS[call]

def same(one, two):
    key = lambda region: (region.name, region.engine, region.size)
    one, two = ([key(each) for each in some if each.name.startswith(name)] for some in (one, two))
    assert one == two

def state():
    gc.collect()
    held = sorted(os.listdir("/proc/self/fd"))
    with open("/proc/self/maps") as file:
        mapped = sum(f"/{name}" in line or "/mshare/#" in line for line in file)
    return held, mapped, len([each for each in mshare.list() if each.name.startswith(name)])
"""

CALLS = ["create", "attach", "attach a descriptor", "stat", "list", "unlink", "mshare"]


def walked(result: subprocess.CompletedProcess[str]) -> int:
    """How often the call failed before it worked."""
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return int(result.stdout)


@pytest.mark.parametrize("call", CALLS)
def test_descriptors(engine: Engine, name: str, call: str, python: SubPython) -> None:
    """EMFILE, with the region's name, at each descriptor a call opens; nothing is pretended."""
    code = """
before = state()
limit = 64
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
for free in range(20):
    taken = [os.open(os.devnull, os.O_RDONLY)]
    with contextlib.suppress(OSError):
        while True:
            taken.append(os.dup(taken[0]))
    for _ in range(free):
        os.close(taken.pop())
    try:
        result = call()
    except OSError as error:
        caught = error
    else:
        caught = None
    for fd in taken:
        os.close(fd)
    if caught is None:
        undo(result)
        print(free)
        break
    assert caught.errno == errno.EMFILE, repr(caught)
    assert about is None or caught.filename == about, repr(caught)
    del caught
    assert state() == before, (before, state())
"""
    failed = walked(python(PREPARED + code, name, engine.name, call))
    assert failed < 19
    assert failed > 0 or call in ("stat", "unlink")


@pytest.mark.parametrize("call", ["create", "attach", "mshare"])
def test_address_space(engine: Engine, name: str, call: str, python: SubPython) -> None:
    """RLIMIT_AS: ENOMEM with the region's name, or MemoryError where Python itself has none."""
    code = """
before = state()
undo(call())
extra, failed = 4096, 0
while True:
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * 4096
    resource.setrlimit(resource.RLIMIT_AS, (used + extra, resource.RLIM_INFINITY))
    try:
        result = call()
    except MemoryError:
        caught = None
    except OSError as error:
        caught = error
    else:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
        undo(result)
        print(failed)
        break
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
    failed += 1
    if caught is not None:
        assert caught.errno == errno.ENOMEM, repr(caught)
        assert caught.filename == about, repr(caught)
    del caught
    assert state() == before, (before, state())
    extra = extra * 3 // 2 & -4096 if extra > 8192 else extra + 4096
"""
    assert walked(python(PREPARED + code, name, engine.name, call)) > 5


def test_memory_for_an_array(engine: Engine, name: str, python: SubPython) -> None:
    """MemoryError at each allocation of the interpreter in asarray(): nothing stays mapped."""
    code = """
import _testcapi
before = state()
undo(call())
failed, worked = 0, 0
for nth in range(1, 1000):
    caught = False
    _testcapi.set_nomemory(nth, nth + 1)
    try:
        result = call()
    except MemoryError:
        caught = True
    finally:
        _testcapi.remove_mem_hooks()
    if caught:
        failed += 1
        worked = 0
        assert state() == before, (nth, before, state())
    else:
        del result
        worked += 1
        if worked == 40:
            break
there.unlink()
del there, call, undo, CALLS
assert state()[1:] == (0, 0), state()
print(failed)
"""
    if subprocess.run([sys.executable, "-c", "import _testcapi"], check=False).returncode:
        skip("this Python has no _testcapi, which makes its allocations fail")
    assert walked(python(PREPARED + code, name, engine.name, "asarray")) > 0


@pytest.mark.parametrize("where", ["os.open", "os.fstat", "mapping.mmap", "mapping._memory_type"])
def test_memory_to_attach(
    engine: Engine, name: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MemoryError on the way to an attachment is passed on; nothing stays open or mapped."""

    def held() -> tuple[int, int]:
        maps = Path("/proc/self/maps").read_text()
        return len(os.listdir("/proc/self/fd")), maps.count(name)

    def fail(*args: object, **kwargs: object) -> None:
        raise MemoryError

    mshare.create(name, SIZE, engine=engine.name).close()
    mshare.attach(name).close()
    gc.collect()
    before = held()
    with monkeypatch.context() as patch:
        patch.setattr(f"mshare.{where}" if where[0] in "mR" else where, fail)
        with pytest.raises(MemoryError):
            mshare.attach(name)
        del patch
    assert held() == before
    with mshare.attach(name) as region:
        assert not memoryview(region)[0]


def test_file_size(engine: Engine, name: str, python: SubPython) -> None:
    """RLIMIT_FSIZE: EFBIG with the name, not the signal SIGXFSZ, and the next creation works."""
    code = """
before = state()
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
for attempt in (call, lambda: mshare.mshare(other, 0, size, os.O_RDWR | os.O_CREAT)):
    try:
        attempt()
    except OSError as error:
        assert error.errno == errno.EFBIG, repr(error)
        assert error.filename == other, repr(error)
    else:
        raise SystemExit("no error")
    assert state() == before
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
undo(call())
print(2)
"""
    assert walked(python(PREPARED + code, name, engine.name, "create")) == 2


def test_copy_of_a_file_that_cannot_be_read(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """cp-in tells the error of the read, and the region it made is gone."""
    assert main(["cp-in", name, "/proc/self/mem", "--engine", "shm"]) == 1
    assert "Input/output error" in capsys.readouterr().err
    assert name not in {region.name for region in mshare.list()}


@pytest.mark.parametrize("there", [False, True])
def test_copy_of_a_file_that_shrinks(
    name: str,
    there: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A file that ends before its length is no success; a region made for it is gone."""
    file = tmp_path / "file"
    file.write_bytes(bytes(100_000))
    if there:
        mshare.create(name, 1 << 20, engine="shm").close()
    monkeypatch.setattr("mshare.cli.cp_in._CHUNK", 40_000)
    real = mshare.attach if there else mshare.create

    def shrink(*args: object, **kwargs: object) -> mshare.Region:
        os.truncate(file, 50_000)
        return real(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(mshare, real.__name__, shrink)
    assert main(["cp-in", name, str(file), "--engine", "shm"]) == 1
    assert f"'{file}': the input ended after 50000 of 100000 bytes" in capsys.readouterr().err
    assert (name in {region.name for region in mshare.list()}) == there


def test_copy_without_room_for_the_input(root: None, name: str) -> None:
    """A pipe that does not fit where it is kept: ENOSPC, and no region."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64K", "tmpfs", folder], check=True)
        try:
            program = "import mshare.cli; mshare.cli.run()"
            result = subprocess.run(
                [sys.executable, "-c", program, "cp-in", name, "-", "--engine", "shm"],
                input=bytes(1 << 20),
                env={**os.environ, "TMPDIR": folder},
                capture_output=True,
                check=False,
            )
        finally:
            subprocess.run(["umount", folder], check=True)
    assert result.returncode == 1
    assert os.strerror(errno.ENOSPC) in result.stderr.decode()
    assert b"Traceback" not in result.stderr
    assert name not in {region.name for region in mshare.list()}
