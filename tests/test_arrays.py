"""``mshare.share``: arrays that are sent by name."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mshare
from mshare.engines import Engine
from tests.conftest import SubPython


def names() -> list[str]:
    """The regions that share() has named."""
    return [region.name for region in mshare.list() if region.name.startswith("share-")]


@pytest.mark.parametrize(
    "array",
    [
        np.arange(24.0).reshape(2, 3, 4),
        np.asfortranarray(np.arange(12, dtype="int16").reshape(3, 4)),
        np.arange(100)[::-7],
        np.array(5.5),
        np.zeros((0, 3)),
        np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]),
        np.array(["text", "longer text"]),
        np.array(["2020-01-01"], dtype="datetime64[D]"),
    ],
    ids=lambda array: str(array.dtype),
)
def test_same_array(engine: Engine, array: np.ndarray[Any, Any]) -> None:
    """It holds what was copied, and so does what comes out of the pickle: the same memory."""
    shared = mshare.share(array, engine=engine.name)
    assert shared.dtype == array.dtype
    assert shared.shape == array.shape
    assert (shared == array).all()
    assert shared.flags.f_contiguous == array.flags.f_contiguous or not array.flags.contiguous
    data = pickle.dumps(shared)
    assert len(data) < 1000
    again = pickle.loads(data)
    assert isinstance(again, mshare.SharedArray)
    assert (again == array).all()
    assert again.strides == shared.strides
    if array.size:
        shared.fill(np.zeros((), array.dtype)[()])
        assert (again == shared).all()


def test_slices_are_the_same_memory(engine: Engine) -> None:
    """Slices and transposed views are pickled as a place in the region; results as any array."""
    shared = mshare.share(np.arange(1000).reshape(10, 100), engine=engine.name)
    for view in (shared[3:5, 10:20], shared[::-2, ::-3], shared.T, shared[4], shared.view("u1")):
        again = pickle.loads(pickle.dumps(view))
        assert (again == view).all()
        again[...] = 7
        assert (view == 7).all()
    for result in (shared + 1, shared[shared > 5], np.sort(shared)):
        assert getattr(result, "name", None) is getattr(result, "engine", None) is None
        again = pickle.loads(pickle.dumps(result))
        assert not isinstance(again, mshare.SharedArray)
        assert (again == result).all()


def test_results_leave_the_region(engine: Engine) -> None:
    """What is computed is a plain number or array, which does not keep the region."""
    gc.collect()
    before = names()
    shared = mshare.share(np.arange(1000.0).reshape(10, 100), engine=engine.name)
    number = shared.sum()
    assert type(number) is np.float64
    assert json.dumps([number, round(shared.mean(), 1)]) == "[499500.0, 499.5]"
    assert hash(shared.max()) == hash(999.0)
    assert type(shared[0, 0]) is type(shared[0] @ shared[0]) is np.float64
    results = [shared.mean(0), shared + 1, shared[shared > 5], shared[[1, 2]], np.cumsum(shared)]
    assert {type(result) for result in results} == {np.ndarray}
    masked = np.ma.masked_array(shared, shared < 5)
    assert isinstance(masked.data, mshare.SharedArray)
    assert masked.data.name == shared.name
    results += [masked.mean(0), masked + 1, shared.copy(), shared.argmax(0), np.sort(shared)]
    total = shared
    total += 1
    assert total is shared
    assert np.add(shared, 1, out=shared) is shared
    del shared, total, masked
    gc.collect()
    assert names() == before
    assert results[0][0] == 450


def test_every_view_keeps_the_region(engine: Engine) -> None:
    """Any view alone, also one that starts at the end, keeps the region and its name."""
    record = np.array([(1, 2.0), (3, 4.0)], dtype=[("a", "i4"), ("b", "f8")])
    for array, look in (
        (np.arange(1024.0).reshape(4, 256), lambda a: a[::-2, ::-3].T),
        (np.arange(1024.0).reshape(4, 256), np.ma.masked_array),
        (record, lambda a: a["b"]),
        (record, lambda a: a[1]),
        (np.array(5.5), lambda a: a[...]),
    ):
        gc.collect()
        before = names()
        shared = mshare.share(array, engine=engine.name)
        view = look(shared)
        del shared
        gc.collect()
        assert len(names()) == len(before) + 1
        assert pickle.loads(pickle.dumps(view)).tolist() == look(array).tolist()
        del view
        gc.collect()
        assert names() == before


def test_sent_for_reading(engine: Engine) -> None:
    """What may not be written here may not be written there."""
    shared = mshare.share(np.arange(10), engine=engine.name)
    shared.flags.writeable = False
    again = pickle.loads(pickle.dumps(shared))
    with pytest.raises(ValueError, match="read-only"):
        again[0] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        again.flags.writeable = True


def test_name_goes_with_the_last_array(engine: Engine) -> None:
    """A region without a name of the caller's is gone with the arrays over it here."""
    gc.collect()
    before = names()
    shared = mshare.share(np.arange(10), engine=engine.name)
    part, data = shared[3:], pickle.dumps(shared)
    assert shared.name in names()
    assert shared.engine == engine.name
    again = pickle.loads(data)
    del shared
    gc.collect()
    assert getattr(part, "name", None) in names()
    del part
    gc.collect()
    assert names() == before
    assert again.tolist() == list(range(10))
    with pytest.raises(FileNotFoundError):
        len(pickle.loads(data))


def test_a_name_of_the_callers_stays(engine: Engine, name: str) -> None:
    """With a name given it is a region like any other."""
    mshare.share(np.arange(10), name, mode=0o640, engine=engine.name)
    gc.collect()
    with mshare.attach(name) as region:
        assert region.mode == 0o640
        assert region.asarray("int64", 10).tolist() == list(range(10))
    with pytest.raises(FileExistsError):
        mshare.share(np.arange(10), name)


def test_refused() -> None:
    """Objects can't be shared, nor a mask be lost; nothing is left of the attempt."""
    before = names()
    with pytest.raises(TypeError, match="its data and its mask"):
        mshare.share(np.ma.masked_array([1, 2], [False, True]))
    with pytest.raises(TypeError, match="object"):
        mshare.share(np.array([object()]))
    assert names() == before


def double(array: mshare.SharedArray) -> int:
    """Work of another process: change the array, and say who did."""
    array *= 2
    return os.getpid()


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_workers(engine: Engine, method: str) -> None:
    """Workers get the array itself, and their end does not end the region."""
    shared = mshare.share(np.arange(8), engine=engine.name)
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.apply(double, [shared[:4]]) != os.getpid()
        pool.apply(double, [shared[:2]])
    assert shared.tolist() == [0, 4, 4, 6, 4, 5, 6, 7]
    assert shared.name in names()


kept: list[mshare.SharedArray] = []


def keep(engine: str, sender: Connection, inherited: str | None) -> None:
    """Work of another process: share, and end with the array in a global variable."""
    kept.append(mshare.share(np.arange(8), engine=engine))
    there = names()
    sender.send((kept[0].name in there, inherited in there))


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_end_of_a_worker(engine: Engine, method: str) -> None:
    """A worker that ends takes its own regions with it, and none of its parent."""
    shared = mshare.share(np.arange(8), engine=engine.name)
    before = names()
    context: Any = multiprocessing.get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    worker = context.Process(target=keep, args=(engine.name, sender, shared.name))
    worker.start()
    assert receiver.recv() == (True, True)
    worker.join()
    assert worker.exitcode == 0
    assert names() == before


def test_program_ends_before_its_worker(python: SubPython, tmp_path: Path) -> None:
    """A worker that is started at the end of a program still finds what it is given."""
    (tmp_path / "work.py").write_text("def work(array):\n    print(array.tolist())\n")
    code = """
import multiprocessing, sys
import mshare
if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    from work import work
    array = mshare.share([1, 2])
    multiprocessing.get_context("spawn").Process(target=work, args=(array,)).start()
"""
    result = python(code, tmp_path)
    assert (result.stdout, result.stderr, result.returncode) == ("[1, 2]\n", "", 0)


def test_end_of_a_program(python: SubPython) -> None:
    """A program that ends takes its regions with it; one that is killed leaves a name to remove."""
    before = names()
    code = "import mshare, os, sys; a = mshare.share([1, 2]); print(a.name, flush=True); "
    result = python(code)
    assert (result.returncode, result.stderr) == (0, "")
    assert names() == before
    child = "pid = os.fork()\nif not pid:\n    del a\n    os._exit(0)\nos.waitpid(pid, 0)\n"
    result = python(f"{code}\n{child}os.kill(os.getpid(), 9)")
    assert result.returncode == -signal.SIGKILL
    assert set(names()) - set(before) == {result.stdout.strip()}
    mshare.unlink(result.stdout.strip())


def test_names_of_the_package(python: SubPython) -> None:
    """dir() has the names that come later; ``import *`` hides neither a built-in nor the module."""
    code = """
import sys
import mshare
assert {"share", "SharedArray", "list", "mshare"} <= set(dir(mshare))
assert "numpy" not in sys.modules
module, builtin = mshare, list
from mshare import *
assert (mshare, list) == (module, builtin)
assert share is mshare.share
"""
    result = python(code)
    assert (result.returncode, result.stderr) == (0, "")


def _first(array: Any) -> float:
    return float(np.asarray(array)[0])


class Sent:
    """Is pickled as what was pickled before."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __reduce__(self) -> tuple[Callable[[bytes], object], tuple[bytes]]:
        return pickle.loads, (self.data,)


def test_pool_is_told_what_is_gone() -> None:
    """A share that nobody holds is gone when the worker looks: an error, and no silence."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        gone = Sent(pickle.dumps(mshare.share(np.arange(5.0))))
        answer: Any = pool.apply_async(_first, (gone,))
        with pytest.raises(FileNotFoundError):
            answer.get(60)
        kept = mshare.share(np.arange(5.0))
        assert pool.apply_async(_first, (kept,)).get(60) == 0.0


@pytest.mark.parametrize("what", ["array", "region"])
def test_what_is_gone_says_so_when_it_is_used(name: str, what: str) -> None:
    """Whatever is done with it, and also when it is sent on."""
    region = mshare.create(name, 4096)
    data = pickle.dumps(mshare.share(np.arange(5.0)) if what == "array" else region)
    region.unlink()
    region.close()
    gone = pickle.loads(pickle.dumps(pickle.loads(data)))
    uses: list[Callable[[], object]] = [
        lambda: gone[0],
        lambda: gone + 1,
        lambda: np.asarray(gone),
        lambda: gone.address,
        gone.__len__,
        gone.__enter__,
    ]
    for use in uses:
        with pytest.raises(FileNotFoundError):
            use()
