"""The two calls of the proposal (review rows S7, S8 and S11 to S14)."""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

import mshare
from mshare import calls, mapping
from mshare.engines import Engine
from mshare.sizes import SLOT_SIZE
from tests.conftest import SubPython

RW_CREATE = os.O_RDWR | os.O_CREAT
_addresses = itertools.count(0x5000_0000_0000, 4 * SLOT_SIZE)


@pytest.fixture
def addr() -> Iterator[int]:
    """A 1 GiB-aligned address where nothing is mapped before and after."""
    chosen = next(_addresses)
    yield chosen
    mapping.munmap(chosen, 2 * SLOT_SIZE)


@pytest.fixture(autouse=True)
def _on_engine(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSHARE_ENGINE", engine.name)


@pytest.fixture
def size(engine: Engine) -> int:
    """A length the engine takes."""
    return max(engine.granule, 1 << 21)


def put(address: int, data: bytes) -> None:
    ctypes.memmove(address, data, len(data))


def get(address: int, length: int) -> bytes:
    return ctypes.string_at(address, length)


def anonymous(address: int, size: int, prot: int = 3) -> None:
    flags = mapping.MAP_PRIVATE | mapping.MAP_ANONYMOUS | mapping.MAP_FIXED
    mapping.mmap(address, size, prot, flags, -1)


def test_creates_where_nothing_is(name: str, addr: int, size: int) -> None:
    """S12: a range without mappings becomes a new, zero region."""
    assert mshare.mshare(name, addr, size, RW_CREATE, 0o640) == addr
    assert get(addr, 100) == bytes(100)
    put(addr + size - 4, b"last")
    with mshare.attach(name, readonly=True) as region:
        assert region.size == size
        assert region.mode == 0o640
        assert bytes(memoryview(region)[-4:]) == b"last"


def test_keeps_what_is_there(name: str, addr: int, size: int) -> None:
    """S11: the content of mappings in the range is kept and shared; holes become zeros."""
    anonymous(addr, 8192)
    anonymous(addr + 16384, 4096, prot=1)
    put(addr + 4095, b"across pages")
    mshare.mshare(name, addr, size, RW_CREATE)
    assert get(addr + 4095, 12) == b"across pages"
    assert get(addr + 8192, 8) == bytes(8)
    put(addr + 16384, b"now writable")
    with mshare.attach(name) as region:
        memoryview(region)[0:5] = b"other"
        assert bytes(memoryview(region)[4095:4107]) == b"across pages"
    assert get(addr, 5) == b"other"


def test_content_that_cannot_be_read(name: str, addr: int, size: int) -> None:
    """S11: where the content can't be kept nothing changes."""
    anonymous(addr, 4096)
    put(addr, b"stays")
    anonymous(addr + 4096, 4096, prot=0)
    with pytest.raises(PermissionError):
        mshare.mshare(name, addr, size, RW_CREATE)
    assert get(addr, 5) == b"stays"
    with pytest.raises(FileNotFoundError):
        mshare.stat(name)


def test_existing_region_replaces_the_range(name: str, addr: int, size: int) -> None:
    """S8: O_CREAT without O_EXCL opens the region that exists; its content is what is seen."""
    with mshare.create(name, size) as region:
        memoryview(region)[0:3] = b"old"
        anonymous(addr, 4096)
        put(addr, b"mine")
        assert mshare.mshare(name, addr, size, RW_CREATE) == addr
        assert get(addr, 4) == b"old\0"


def test_exclusive(name: str, addr: int, size: int) -> None:
    """O_CREAT|O_EXCL on a name that is taken is EEXIST, and nothing is mapped."""
    flags = RW_CREATE | os.O_EXCL
    mshare.mshare(name, addr, size, flags)
    with pytest.raises(FileExistsError) as caught:
        mshare.mshare(name, addr + 2 * SLOT_SIZE, size, flags)
    assert caught.value.errno == errno.EEXIST


def test_another_user_makes_it_meanwhile(
    name: str, addr: int, size: int, monkeypatch: pytest.MonkeyPatch, engine: Engine
) -> None:
    """O_CREAT without O_EXCL takes what is there by the time the own content is copied."""
    anonymous(addr, 4096)

    def copy_in(*arguments: Any) -> None:
        os.close(engine.create(name, size, 0o600))

    monkeypatch.setattr(calls, "_copy_in", copy_in)
    with pytest.raises(FileExistsError):
        mshare.mshare(name, addr, size, RW_CREATE | os.O_EXCL)
    mshare.unlink(name)
    assert mshare.mshare(name, addr, size, RW_CREATE) == addr
    put(addr, b"theirs")
    with mshare.attach(name) as region:
        assert bytes(memoryview(region)[:6]) == b"theirs"


def test_no_creat(name: str, addr: int, size: int) -> None:
    """Without O_CREAT a name nobody has is ENOENT."""
    with pytest.raises(FileNotFoundError) as caught:
        mshare.mshare(name, addr, size, os.O_RDWR)
    assert caught.value.errno == errno.ENOENT


STORE = """
import ctypes, mshare, os, sys
address = mshare.mshare(sys.argv[1], 0, int(sys.argv[2]), int(sys.argv[3]))
assert ctypes.string_at(address, 1) == b"x"
print("read", flush=True)
ctypes.memset(address, 65, 1)
print("written", flush=True)
"""


@pytest.mark.parametrize(
    ("mode", "said", "code"),
    [
        (os.O_RDONLY, "read\n", -signal.SIGSEGV),
        (os.O_WRONLY, "read\nwritten\n", 0),
        (os.O_RDWR, "read\nwritten\n", 0),
    ],
)
def test_access_modes(
    name: str, size: int, python: SubPython, mode: int, said: str, code: int
) -> None:
    """S7: O_RDONLY, which is 0, maps read-only; O_WRONLY can be read too."""
    with mshare.create(name, size) as region:
        memoryview(region)[0:1] = b"x"
        result = python(STORE, name, size, mode)
        assert (result.stdout, result.returncode) == (said, code), result.stderr
        assert bytes(memoryview(region)[0:1]) == (b"x" if code else b"A")


def test_read_only_creation(name: str, addr: int, size: int) -> None:
    """O_CREAT with O_RDONLY keeps the content and takes the right to write it away."""
    anonymous(addr, 4096)
    put(addr, b"final")
    mshare.mshare(name, addr, size, os.O_CREAT | os.O_RDONLY)
    assert get(addr, 5) == b"final"
    with open("/proc/self/maps") as file:
        line = next(line for line in file if line.startswith(f"{addr:x}-"))
    assert line.split()[1] == "r--s"


@pytest.mark.parametrize(
    ("addr_off", "length", "flags"),
    [
        (4096, 1 << 21, RW_CREATE),
        (1, 1 << 21, RW_CREATE),
        (-(1 << 62), 1 << 21, RW_CREATE),
        (0, 0, RW_CREATE),
        (0, -4096, RW_CREATE),
        (0, 1 << 60, RW_CREATE),
        (0, 5000, RW_CREATE),
        (0, 1 << 21, 3 | os.O_CREAT),
        (0, 1 << 21, os.O_RDWR | os.O_CREAT | os.O_APPEND),
    ],
)
def test_bad_arguments(name: str, addr: int, addr_off: int, length: int, flags: int) -> None:
    """S13, S14: a bad address, length or flag is EINVAL and makes nothing."""
    with pytest.raises(ValueError, match=r"address|length|flags") as caught:
        mshare.mshare(name, addr + addr_off, length, flags)
    assert isinstance(caught.value, OSError)
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(FileNotFoundError):
        mshare.stat(name)


@pytest.mark.parametrize("mode", [-1, 0o7777])
def test_bad_mode(name: str, size: int, mode: int) -> None:
    """More than permission bits is EINVAL, as with create."""
    with pytest.raises(ValueError, match="permission bits"):
        mshare.mshare(name, 0, size, RW_CREATE, mode)
    with pytest.raises(FileNotFoundError):
        mshare.stat(name)


def test_length_must_be_the_regions(name: str, addr: int, size: int, engine: Engine) -> None:
    """EINVAL for another length than the region has."""
    mshare.create(name, size).close()
    with pytest.raises(ValueError, match="length"):
        mshare.mshare(name, addr, size + engine.granule, os.O_RDWR)


def test_permission(name: str, size: int, as_nobody: SubPython) -> None:
    """EACCES when the mode bits forbid the access, for attaching and for unlinking."""
    mshare.create(name, size, 0o644).close()
    code = """
name, size = sys.argv[1], int(sys.argv[2])
mshare.mshare(name, 0, size, os.O_RDONLY)
for flags in (os.O_RDWR, os.O_WRONLY, os.O_RDWR | os.O_CREAT):
    try:
        mshare.mshare(name, 0, size, flags)
    except PermissionError as error:
        assert error.filename == name
    else:
        raise SystemExit(f"flags {flags} worked")
try:
    mshare.mshare_unlink(name)
except PermissionError:
    print("refused")
"""
    result = as_nobody(code, name, size)
    assert result.stdout == "refused\n", result.stderr


def test_unlink(name: str, addr: int, size: int) -> None:
    """The name goes, the sharing stays; twice is ENOENT."""
    mshare.mshare(name, addr, size, RW_CREATE)
    with mshare.attach(name) as other:
        mshare.mshare_unlink(name)
        put(addr, b"shared on")
        assert bytes(memoryview(other)[:9]) == b"shared on"
    with pytest.raises(FileNotFoundError) as caught:
        mshare.mshare_unlink(name)
    assert caught.value.errno == errno.ENOENT


def test_chosen_address(name: str, size: int) -> None:
    """Address 0 leaves it to the engine: a multiple of 1 GiB."""
    address = mshare.mshare(name, 0, size, RW_CREATE)
    assert address
    assert address % SLOT_SIZE == 0
    mapping.munmap(address, size)


def test_another_address_in_each_process(
    name: str, addr: int, size: int, python: SubPython
) -> None:
    """S14: processes share at different addresses."""
    mshare.mshare(name, addr, size, RW_CREATE)
    code = """
import ctypes, mshare, os, sys
address = int(sys.argv[2]) + (7 << 30)
mshare.mshare(sys.argv[1], address, int(sys.argv[3]), os.O_RDWR)
ctypes.memmove(address + 5, b"from there", 10)
"""
    assert python(code, name, addr, size).returncode == 0
    assert get(addr + 5, 10) == b"from there"


def test_appears_with_its_content(
    name: str, addr: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody sees it before what was in the range is in it."""
    anonymous(addr, 4096)
    copy_in = calls._copy_in

    def look(*arguments: Any) -> None:
        with pytest.raises(FileNotFoundError):
            mshare.attach(name)
        copy_in(*arguments)

    monkeypatch.setattr(calls, "_copy_in", look)
    assert mshare.mshare(name, addr, size, RW_CREATE, 0o640) == addr
    mshare.attach(name).close()
