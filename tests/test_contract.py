"""What every engine promises: the same calls, the same errors."""

from __future__ import annotations

import errno
import gc
import multiprocessing
import os
import pickle
import signal
import stat as st
import subprocess
import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mshare
from mshare.engines import Engine
from mshare.sizes import round_up
from tests.conftest import SubPython

SIZE = 4 << 20


def full(engine: Engine) -> int:
    """Bytes the file of a region of SIZE has on this engine."""
    return round_up(SIZE, engine.granule)


BAD_NAMES = ["", "x" * 256, "a/b", "/a", "a\0b", "..", ".", ".hidden", "región", "new\nline"]
BAD_SIZES = [0, -1, -4096, 1, 4097, "0", "-4K", "4Q", "", "G", "nan", "inf", "1.0001K", "lots"]
HUGE_SIZES = ["32T", 1 << 62, "9999P"]


def test_create_attach_share(engine: Engine, name: str) -> None:
    """What is written through one attachment is read through another."""
    writer = mshare.create(name, SIZE, engine=engine.name)
    with writer, mshare.attach(name, readonly=True) as reader:
        assert reader.engine == engine.name
        assert reader.size == writer.size == len(reader) == SIZE
        memoryview(writer)[100:105] = b"hello"
        assert bytes(memoryview(reader)[100:105]) == b"hello"
        assert bytes(memoryview(reader)[:100]) == bytes(100)


def test_new_region_is_zero(engine: Engine, name: str) -> None:
    """A region starts as zeros, also after one that was not."""
    for _ in range(2):
        with mshare.create(name, SIZE, engine=engine.name) as region:
            array = region.asarray("uint64", SIZE // 8)
            assert not array.any()
            array[:] = 7
        mshare.unlink(name)


def test_file_is_a_multiple_of_the_granule(engine: Engine, name: str) -> None:
    """A region has the size asked for or the next its memory comes in; its file the granule's."""
    with mshare.create(name, 4096, engine=engine.name) as region:
        assert region.size == (engine.granule if engine.reserves else 4096)
    assert mshare.stat(name).size == engine.granule


def test_mode_and_owner(engine: Engine, name: str) -> None:
    """Mode bits are as given, whatever the umask; the owner is the creator."""
    old = os.umask(0o077)
    try:
        with mshare.create(name, SIZE, 0o646, engine=engine.name) as region:
            assert region.mode == 0o646
    finally:
        os.umask(old)
    stat = mshare.stat(name)
    assert (stat.mode, stat.uid, stat.gid) == (0o646, os.geteuid(), os.getegid())


def test_default_mode_is_private(engine: Engine, name: str) -> None:
    """Nobody else can attach unless told."""
    mshare.create(name, SIZE, engine=engine.name).close()
    assert mshare.stat(name).mode == 0o600


@pytest.mark.parametrize("mode", [-1, 0o1000, 0o10000])
def test_bad_mode(engine: Engine, name: str, mode: int) -> None:
    """More than permission bits is EINVAL."""
    with pytest.raises(ValueError, match="permission bits") as caught:
        mshare.create(name, SIZE, mode, engine=engine.name)
    assert isinstance(caught.value, OSError)
    assert name not in {region.name for region in mshare.list()}


def test_list_and_stat(engine: Engine, name: str) -> None:
    """A region is listed with what stat shows, until it is unlinked."""
    before = time.time()
    region = mshare.create(name, SIZE, engine=engine.name)
    (listed,) = (each for each in mshare.list() if each.name == name)
    assert listed == mshare.stat(name) == region.stat()
    assert listed.engine == engine.name
    assert listed.size == full(engine)
    assert listed.resident == (SIZE if engine.reserves else 0)
    assert before - 1 <= listed.created <= time.time() + 1
    assert listed.backing is None
    region.unlink()
    assert region.stat().size == full(engine)
    assert name not in {each.name for each in mshare.list(engine.name)}
    with pytest.raises(FileNotFoundError):
        mshare.stat(name)


def test_unlink_keeps_attachments(engine: Engine, name: str) -> None:
    """After an unlink the name is free, and who is attached goes on."""
    old = mshare.create(name, SIZE, engine=engine.name)
    memoryview(old)[0] = 1
    mshare.unlink(name)
    new = mshare.create(name, SIZE, engine=engine.name)
    assert memoryview(new)[0] == 0
    assert memoryview(old)[0] == 1


def test_unlink_twice(engine: Engine, name: str) -> None:
    """The second unlink is ENOENT."""
    mshare.create(name, SIZE, engine=engine.name).close()
    mshare.unlink(name)
    with pytest.raises(FileNotFoundError) as caught:
        mshare.unlink(name)
    assert caught.value.errno == errno.ENOENT
    assert caught.value.filename == name


def test_unlink_is_for_the_region_itself(engine: Engine, name: str) -> None:
    """Region.unlink leaves a region alone that has taken the name since, also when closed."""
    old = mshare.create(name, SIZE, engine=engine.name)
    mshare.unlink(name)
    with mshare.create(name, SIZE, engine=engine.name) as new:
        for _ in range(2):
            with pytest.raises(FileNotFoundError, match="no such region") as caught:
                old.unlink()
            assert caught.value.filename == name
            old.close()
        assert mshare.stat(name) == new.stat()
    new.unlink()
    with pytest.raises(FileNotFoundError, match="no such region"):
        new.unlink()


def test_attach_missing(engine: Engine, name: str) -> None:
    """No such region is ENOENT, with the name."""
    with pytest.raises(FileNotFoundError, match=name):
        mshare.attach(name, engine=engine.name)


def test_duplicate(engine: Engine, name: str) -> None:
    """A name that is taken is EEXIST and what has it stays as it is, on whichever engine."""
    with mshare.create(name, SIZE, engine=engine.name) as region:
        memoryview(region)[0] = 5
        for other in (engine.name, "shm", None):
            with pytest.raises(FileExistsError) as caught:
                mshare.create(name, SIZE, engine=other)
            assert caught.value.filename == name
        assert memoryview(region)[0] == 5


@pytest.mark.parametrize("bad", BAD_NAMES)
def test_bad_names(engine: Engine, bad: str) -> None:
    """A bad name is refused by every call, before anything changes."""
    for call in (
        lambda: mshare.create(bad, SIZE, engine=engine.name),
        lambda: mshare.attach(bad, engine=engine.name),
        lambda: mshare.unlink(bad, engine=engine.name),
        lambda: mshare.stat(bad, engine=engine.name),
        lambda: mshare.mshare(bad, 0, full(engine), os.O_RDWR | os.O_CREAT),
    ):
        with pytest.raises(OSError, match="name") as caught:
            call()
        assert isinstance(caught.value, ValueError)
        wanted = errno.ENAMETOOLONG if len(bad) > 255 else errno.EINVAL
        assert caught.value.errno == wanted


def test_longest_name(engine: Engine, name: str) -> None:
    """255 bytes are a name."""
    longest = name.ljust(255, "x")
    mshare.create(longest, SIZE, engine=engine.name).close()
    mshare.attach(longest).close()


@pytest.mark.parametrize("bad", [None, 5.0, b"bytes", ["x"]])
def test_name_of_another_type(engine: Engine, bad: object) -> None:
    """Only a string is a name."""
    with pytest.raises(TypeError):
        mshare.create(bad, SIZE, engine=engine.name)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", BAD_SIZES)
def test_bad_sizes(engine: Engine, name: str, bad: int | str) -> None:
    """What is not a positive number of whole pages is EINVAL."""
    with pytest.raises(ValueError, match=r"size|pages") as caught:
        mshare.create(name, bad, engine=engine.name)
    assert isinstance(caught.value, OSError)
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(FileNotFoundError):
        mshare.stat(name)


@pytest.mark.parametrize("bad", [None, 4096.0, [4096], True, b"4K"])
def test_size_of_another_type(engine: Engine, name: str, bad: object) -> None:
    """A size is an integer or a string."""
    with pytest.raises(TypeError):
        mshare.create(name, bad, engine=engine.name)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", HUGE_SIZES)
def test_more_than_the_machine_has(engine: Engine, name: str, size: int | str) -> None:
    """Too much fails at once, and leaves nothing."""
    free = os.sysconf("SC_AVPHYS_PAGES")
    with pytest.raises(OSError, match=r"room|larger") as caught:
        mshare.create(name, size, engine=engine.name)
    assert caught.value.errno in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG)
    with pytest.raises(FileNotFoundError):
        mshare.stat(name)
    assert os.sysconf("SC_AVPHYS_PAGES") > free // 2


def test_unknown_engine(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that is none is EINVAL and the message lists those there are."""
    with pytest.raises(ValueError, match="shm"):
        mshare.create(name, SIZE, engine="warp")
    monkeypatch.setenv("MSHARE_ENGINE", "warp")
    with pytest.raises(ValueError, match="warp"):
        mshare.create(name, SIZE)


def test_engine_from_the_environment(
    engine: Engine, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MSHARE_ENGINE chooses; the argument goes before it."""
    monkeypatch.setenv("MSHARE_ENGINE", engine.name)
    with mshare.create(name, SIZE) as region:
        assert region.engine == engine.name
    with mshare.create(f"{name}-2", SIZE, engine="shm") as region:
        assert region.engine == "shm"


def test_write_to_a_readonly_view(engine: Engine, name: str) -> None:
    """A read-only attachment has read-only views, and the memory itself refuses writes."""
    mshare.create(name, SIZE, engine=engine.name).close()
    with mshare.attach(name, readonly=True) as region:
        with pytest.raises(TypeError, match="read-only"):
            memoryview(region)[0] = 1
        with pytest.raises(ValueError, match="read-only"):
            region.asarray()[0] = 1
        with open("/dev/zero", "rb") as zero, pytest.raises(BufferError, match="not writable"):
            os.readv(zero.fileno(), [region])
        assert not memoryview(region)[0]


def test_no_store_gets_past_a_readonly_attachment(
    engine: Engine, name: str, python: SubPython
) -> None:
    """A store through a raw pointer is SIGSEGV, as the page tables say so."""
    mshare.create(name, SIZE, engine=engine.name).close()
    code = """
import ctypes, mshare, sys
region = mshare.attach(sys.argv[1], readonly=True)
ctypes.memset(region.address, 1, 1)
"""
    assert python(code, name).returncode == -signal.SIGSEGV
    assert not memoryview(mshare.attach(name))[0]


def test_permission_of_another_user(engine: Engine, name: str, as_nobody: SubPython) -> None:
    """Mode bits hold: none, read only, or all; only the owner may unlink."""
    code = """
import mshare, sys
def attempt(call):
    try:
        call().close()
        return "yes"
    except PermissionError as error:
        assert error.filename == sys.argv[1], error
        return "no"
class Done:
    def close(self): pass
def remove():
    mshare.unlink(sys.argv[1])
    return Done()
print(attempt(lambda: mshare.attach(sys.argv[1])),
      attempt(lambda: mshare.attach(sys.argv[1], readonly=True)), attempt(remove))
"""
    answers = {0o600: "no no no", 0o644: "no yes no", 0o666: "yes yes no"}
    for mode, answer in answers.items():
        mshare.create(name, SIZE, mode, engine=engine.name).close()
        result = as_nobody(code, name)
        assert result.stdout.strip() == answer, result.stderr
        mshare.unlink(name)


def test_another_user_creates(engine: Engine, name: str, as_nobody: SubPython) -> None:
    """Any user can have regions; root sees and removes them."""
    code = "mshare.create(sys.argv[1], 4096, engine=sys.argv[2])"
    result = as_nobody(code, name, engine.name)
    assert result.returncode == 0, result.stderr
    assert mshare.stat(name).uid == 65534


def test_creator_without_the_right_to_write(
    engine: Engine, name: str, as_nobody: SubPython
) -> None:
    """Who creates a region writes to it, whatever its mode bits say to those who come after."""
    code = """
name, engine = sys.argv[1:]
def fill(region):
    memoryview(region)[0] = 7
with mshare.create(name, 4096, 0o444, engine=engine, fill=fill) as region:
    memoryview(region)[1] = 8
with mshare.attach(name, readonly=True) as region:
    print(list(bytes(region)[:2]), oct(region.mode))
mshare.unlink(name)
os.environ["MSHARE_ENGINE"] = engine
length = mshare.engines.by_name(engine).granule
mshare.mshare(name, 0, length, os.O_RDWR | os.O_CREAT, 0o444)
"""
    result = as_nobody(code, name, engine.name)
    assert (result.stdout, result.stderr) == ("[7, 8] 0o444\n", "")
    assert mshare.stat(name).mode == 0o444


def test_creator_has_what_it_made(
    engine: Engine, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A region that takes the name right after is not the one that creation returns."""
    link = os.link

    def overtaken(*args: Any, **kwargs: Any) -> None:
        monkeypatch.undo()
        link(*args, **kwargs)
        mshare.unlink(name)
        mshare.create(name, SIZE, 0o640, engine=engine.name).close()

    monkeypatch.setattr(os, "link", overtaken)
    with mshare.create(name, SIZE, engine=engine.name) as region:
        assert region.mode == 0o600
    assert mshare.stat(name).mode == 0o640


def test_one_winner_of_a_hundred(engine: Engine, name: str) -> None:
    """Of 100 processes that create a name at once one has it, the others EEXIST."""
    ready, go = os.pipe()
    children = []
    for _ in range(100):
        pid = os.fork()
        if pid == 0:
            code = 99
            try:
                os.close(go)
                os.read(ready, 1)
                mshare.create(name, SIZE, engine=engine.name)
                code = 0
            except FileExistsError:
                code = 17
            finally:
                os._exit(code)
        children.append(pid)
    os.close(ready)
    os.close(go)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    assert sorted(codes) == [0] + [17] * 99
    assert mshare.stat(name).resident == (SIZE if engine.reserves else 0)


def test_filled_before_it_is_seen(engine: Engine, name: str) -> None:
    """With ``fill`` a region has its name when it is full; if filling fails there is none."""

    def fill(region: mshare.Region) -> None:
        assert region.name == name
        assert name not in [each.name for each in mshare.list()]
        region.asarray()[:SIZE] = 7

    with mshare.create(name, SIZE, 0o640, engine=engine.name, fill=fill) as region:
        assert (region.asarray()[:SIZE] == 7).all()
        assert region.mode == 0o640
    mshare.unlink(name)
    with pytest.raises(IndexError):
        mshare.create(
            name, SIZE, engine=engine.name, fill=lambda region: memoryview(region)[99 * SIZE]
        )
    with pytest.raises(FileNotFoundError):
        mshare.stat(name)
    with pytest.raises(TypeError, match="leave out fill"):
        mshare.create(name, backing=__file__, fill=fill)


def test_others_wait_while_it_is_filled(engine: Engine, name: str, python: SubPython) -> None:
    """Who creates the same name meanwhile waits, and then learns that it is there."""
    code = "import mshare, sys; mshare.create(sys.argv[1], 4096, engine=sys.argv[2])"
    with ThreadPoolExecutor() as pool:

        def fill(region: mshare.Region) -> None:
            second = pool.submit(python, code, name, engine.name)
            with pytest.raises(TimeoutError):
                second.result(timeout=1)
            waiting.append(second)

        waiting: list[Future[subprocess.CompletedProcess[str]]] = []
        mshare.create(name, SIZE, engine=engine.name, fill=fill).close()
        assert "FileExistsError" in waiting[0].result().stderr


def test_threads_wait_while_it_is_filled(engine: Engine, name: str, python: SubPython) -> None:
    """Threads wait as processes do, and one that creates another name lets nobody in."""
    code = "import mshare, sys; mshare.create(sys.argv[1], 4096, engine=sys.argv[2])"
    fills: list[int] = []
    waiting: list[Future[Any]] = []

    def create(number: int) -> str:
        def fill(region: mshare.Region) -> None:
            fills.append(number)
            if number:
                return
            mshare.create(f"{name}-here", 4096, engine=engine.name).close()
            pool.submit(mshare.create, f"{name}-there", 4096, engine=engine.name).result(60)
            waiting.append(pool.submit(create, 1))
            waiting.append(pool.submit(python, code, name, engine.name))
            for each in waiting:
                with pytest.raises(TimeoutError):
                    each.result(timeout=1)

        try:
            mshare.create(name, SIZE, engine=engine.name, fill=fill).close()
        except FileExistsError:
            return "exists"
        return "made"

    with ThreadPoolExecutor() as pool:
        assert create(0) == "made"
        assert waiting[0].result() == "exists"
        assert "FileExistsError" in waiting[1].result().stderr
    assert fills == [0]


def test_lock_is_released_before_children_end(engine: Engine, name: str) -> None:
    """A process forked while a region is filled keeps nobody from creating the name again."""
    ready, go = os.pipe()
    children = []

    def fill(region: mshare.Region) -> None:
        children.append(os.fork())
        if not children[0]:
            os.close(go)
            os.read(ready, 1)
            os._exit(0)

    mshare.create(name, SIZE, engine=engine.name, fill=fill).unlink()
    with ThreadPoolExecutor() as pool:
        again = pool.submit(mshare.create, name, SIZE, engine=engine.name)
        try:
            again.result(timeout=20).close()
        finally:
            os.close(go)
            os.close(ready)
            os.waitpid(children[0], 0)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("call", ["ftruncate", "posix_fallocate", "fchmod", "link"])
def test_creator_killed(
    engine: Engine, name: str, call: str, after: bool, python: SubPython
) -> None:
    """Wherever its creator is killed, a region is either whole or not there."""
    code = """
import os, signal, sys, mshare
real = getattr(os, sys.argv[3])
def dying(*args, **kwargs):
    if sys.argv[4] == "True":
        real(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGKILL)
setattr(os, sys.argv[3], dying)
mshare.create(sys.argv[1], 4 << 20, engine=sys.argv[2])
"""
    if call == "posix_fallocate" and not engine.reserves:
        call = "ftruncate"
    result = python(code, name, engine.name, call, after)
    assert result.returncode == -signal.SIGKILL, result.stderr
    found = [region for region in mshare.list() if region.name == name]
    assert bool(found) == (call == "link" and after)
    if found:
        assert found[0].resident == (SIZE if engine.reserves else 0)
        mshare.attach(name).close()
        mshare.unlink(name)
    mshare.create(name, SIZE, engine=engine.name).close()


def test_failed_creation_leaves_nothing(
    engine: Engine, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error on the way leaves no name, no memory and no descriptor."""
    gc.collect()
    reserving = ["posix_fallocate"] if engine.reserves else []
    for call in ("ftruncate", *reserving, "fchmod", "link", "fstat"):
        descriptors = len(os.listdir("/proc/self/fd"))
        with monkeypatch.context() as patch:

            def fail(*args: object, **kwargs: object) -> None:
                raise OSError(errno.EIO, "injected")

            patch.setattr(os, call, fail)
            with pytest.raises(OSError, match="injected"):
                mshare.create(name, SIZE, engine=engine.name)
        assert len(os.listdir("/proc/self/fd")) == descriptors
        assert name not in {region.name for region in mshare.list()}


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, None])
def test_reader_that_dies_harms_nothing(
    engine: Engine, name: str, end: signal.Signals | None, python: SubPython
) -> None:
    """A reader that exits or is killed leaves the region as it was."""
    with mshare.create(name, SIZE, engine=engine.name) as region:
        memoryview(region)[0] = 42
        code = """
import os, sys, mshare
region = mshare.attach(sys.argv[1])
view = memoryview(region)
assert view[0] == 42
if sys.argv[2] != "None":
    os.kill(os.getpid(), int(sys.argv[2]))
"""
        result = python(code, name, None if end is None else int(end))
        assert result.returncode == (0 if end is None else -end), result.stderr
        assert result.stderr == ""
        assert memoryview(region)[0] == 42
        assert mshare.stat(name).size == full(engine)


def test_at_an_address(engine: Engine, name: str) -> None:
    """``address=`` is where the region is; a taken or odd one is an error."""
    address = 0x6000_0000_0000
    mshare.create(name, SIZE, engine=engine.name).close()
    with mshare.attach(name, address=address) as region:
        assert region.address == address
        with pytest.raises(FileExistsError):
            mshare.attach(name, address=address)
        with pytest.raises(ValueError, match="multiple"):
            mshare.attach(name, address=address + full(engine) + 1)
        copy = pickle.dumps(region)
    with pickle.loads(copy) as region:
        assert region.address == address
    with mshare.attach(name, address=np.int64(address)) as region:
        assert region.address == address


def test_bad_addresses(engine: Engine, name: str) -> None:
    """The error has the region's name and the address; nothing is mapped elsewhere."""
    address = 0x6000_0000_0000
    with mshare.create(name, SIZE, engine=engine.name, address=address):
        with pytest.raises(FileExistsError, match=hex(address)) as taken:
            mshare.attach(name, address=address)
        assert taken.value.filename == name
    for bad in (0, -(1 << 30), 1 << 47, 1 << 65, (1 << 64) + address):
        with pytest.raises(ValueError, match=hex(bad)) as caught:
            mshare.attach(name, address=bad)
        assert isinstance(caught.value, OSError)
        assert caught.value.filename == name
    for odd in (1.5, "0x600000000000"):
        with pytest.raises(TypeError, match="an address is an integer"):
            mshare.attach(name, address=odd)  # type: ignore[arg-type]


def test_bad_address_is_found_before_it_is_filled(engine: Engine, name: str) -> None:
    """Filling can take hours; who fills sees the region where it will be."""
    address = 0x6000_0000_0000
    seen = []

    def fill(region: mshare.Region) -> None:
        seen.append(region.address)

    with pytest.raises(ValueError, match=hex(address + 1)):
        mshare.create(name, SIZE, engine=engine.name, address=address + 1, fill=fill)
    assert not seen
    with mshare.create(name, SIZE, engine=engine.name, address=address, fill=fill):
        pass
    assert seen == [address]


def test_attach_by_descriptor(engine: Engine, name: str) -> None:
    """An open descriptor is enough, also after the unlink; it gives no more than it has."""
    with mshare.create(name, SIZE, engine=engine.name) as region:
        memoryview(region)[7] = 7
        reading = os.open(f"/proc/self/fd/{region.fileno()}", os.O_RDONLY)
        region.unlink()
        with mshare.attach(region.fileno()) as second:
            assert memoryview(second)[7] == 7
            assert second.engine == engine.name
            assert second.name == name
        with mshare.attach(reading, readonly=True) as third:
            assert memoryview(third)[7] == 7
        with pytest.raises(PermissionError):
            mshare.attach(reading)
        os.close(reading)
        for closed in (reading, 9999, -1, 1 << 80):
            with pytest.raises(OSError, match="Bad file") as caught:
                mshare.attach(closed)
            assert caught.value.filename == closed
        with pytest.raises(TypeError):
            mshare.attach(True)


def test_layout_calls(engine: Engine, name: str, tmp_path: Path) -> None:
    """They work, or are EOPNOTSUPP and name the engine that can."""
    (tmp_path / "file").write_bytes(b"content")
    with mshare.create(name, SIZE, engine=engine.name) as region:
        for call in (
            partial(region.map, tmp_path / "file"),
            partial(region.protect, 0, 4096, readonly=True),
            partial(region.unmap, 0, 4096),
        ):
            if engine.name == "msharefs":
                call()
                continue
            with pytest.raises(OSError, match="msharefs") as caught:
                call()
            assert caught.value.errno == errno.EOPNOTSUPP


def test_locked(engine: Engine, name: str) -> None:
    """Memory that never moves, or a refusal that says which engine has it, and nothing is left."""
    if engine.locks:
        with mshare.create(name, size="4M", engine=engine.name, locked=True) as region:
            region.asarray()[:] = 3
        return
    with pytest.raises(OSError, match="msharefs can") as caught:
        mshare.create(name, size="4M", engine=engine.name, locked=True)
    assert caught.value.errno == errno.EOPNOTSUPP
    assert not [region for region in mshare.list() if region.name == name]


def test_no_locked_file(engine: Engine, name: str, tmp_path: Path) -> None:
    """A file can't be locked, whatever the engine; the error says what to do."""
    (tmp_path / "data").write_bytes(b"x")
    with pytest.raises(OSError, match="copy the content into it") as caught:
        mshare.create(name, backing=tmp_path / "data", engine=engine.name, locked=True)
    assert caught.value.errno == errno.EOPNOTSUPP
    assert not [region for region in mshare.list() if region.name == name]


def test_backing(engine: Engine, name: str, tmp_path: Path) -> None:
    """A region over a file is the file; an engine that can't says which can."""
    file = tmp_path / "data"
    np.arange(5000, dtype="int64").tofile(file)
    if not engine.maps_files:
        with pytest.raises(OSError, match="shm") as caught:
            mshare.create(name, backing=file, engine=engine.name)
        assert caught.value.errno == errno.EOPNOTSUPP
        assert name not in {region.name for region in mshare.list()}
        return
    with mshare.create(name, backing=file, engine=engine.name) as region:
        assert 40000 <= region.size <= 40960
        region.asarray("int64")[1] = -1
        with mshare.attach(name, readonly=True) as reader:
            assert reader.asarray("int64")[:3].tolist() == [0, -1, 2]
    assert np.fromfile(file, "int64")[1] == -1
    mshare.unlink(name)
    assert file.exists()


def test_files_of_regions_are_regular(engine: Engine, name: str) -> None:
    """What is no region's file is not attached, and nothing hangs on it."""
    mshare.create(name, SIZE, engine=engine.name).close()
    fifo = os.path.join(engine.directory(), f"{name}-fifo")
    try:
        os.mkfifo(fifo)
    except PermissionError:
        return
    try:
        with pytest.raises(OSError, match="not a region"):
            mshare.attach(f"{name}-fifo", engine=engine.name)
        assert f"{name}-fifo" not in {region.name for region in mshare.list()}
    finally:
        os.unlink(fifo)


def test_out_of_descriptors(engine: Engine, name: str, python: SubPython) -> None:
    """EMFILE is told as it is and leaves nothing."""
    code = """
import errno, resource, sys, os, mshare
resource.setrlimit(resource.RLIMIT_NOFILE, (12, 12))
held = []
try:
    while True:
        held.append(os.dup(0))
except OSError:
    pass
for extra in range(5):
    try:
        mshare.create(sys.argv[1], 4096, engine=sys.argv[2])
        break
    except OSError as error:
        assert error.errno in (errno.EMFILE, errno.ENODEV), error
        os.close(held.pop())
mshare.unlink(sys.argv[1])
"""
    result = python(code, name, engine.name)
    assert result.returncode == 0, result.stderr


def test_out_of_address_space(engine: Engine, name: str, python: SubPython) -> None:
    """RLIMIT_AS gives ENOMEM; a region that was being created is gone."""
    code = """
import errno, resource, sys, mshare
mshare.create("warm" + sys.argv[1], 4096, engine=sys.argv[2]).unlink()
resource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 29))
try:
    mshare.create(sys.argv[1], "512M", engine=sys.argv[2])
except OSError as error:
    assert error.errno == errno.ENOMEM, error
else:
    raise SystemExit("no error")
"""
    result = python(code, name, engine.name)
    assert result.returncode == 0, result.stderr
    assert not [region for region in mshare.list() if name in region.name]


def test_every_file_of_an_engine_is_a_plain_file(engine: Engine, name: str) -> None:
    """A region's file has the mode and the size ls shows, so other tools work on it."""
    mshare.create(name, SIZE, 0o640, engine=engine.name).close()
    info = os.stat(os.path.join(engine.directory(), name))
    assert st.S_ISREG(info.st_mode)
    assert (st.S_IMODE(info.st_mode), info.st_size) == (0o640, full(engine))


def _add_one(region: mshare.Region) -> int:
    array = region.asarray("int64")
    array[0] += 1
    return int(array[0])


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_start_methods(engine: Engine, name: str, method: str) -> None:
    """A region goes to processes of every start method, and comes back as it was changed."""
    with mshare.create(name, SIZE, engine=engine.name) as region:
        context = multiprocessing.get_context(method)
        with context.Pool(2) as pool:
            assert sorted(pool.map(_add_one, [region], 1)) == [1]
            assert pool.apply(_add_one, (region,)) == 2
        assert region.asarray("int64")[0] == 2
