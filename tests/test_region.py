"""The Region object: views, arrays, lifetimes, processes and threads."""

from __future__ import annotations

import concurrent.futures
import gc
import io
import os
import pickle
import struct
import threading
import weakref
from typing import Any

import joblib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

import mshare
from mshare import pagetables
from tests.conftest import SubPython

SIZE = 1 << 20


@pytest.fixture
def region(name: str) -> mshare.Region:
    """A region of a MiB on engine shm."""
    return mshare.create(name, SIZE, engine="shm")


def mapped(address: int) -> bool:
    """Whether anything is mapped at ``address``."""
    try:
        pagetables.mapping_at(address)
    except LookupError:
        return False
    return True


def test_buffer_protocol(region: mshare.Region) -> None:
    """Everything that takes a buffer takes a region."""
    view = memoryview(region)
    assert (view.nbytes, view.format, view.readonly, view.contiguous) == (SIZE, "B", False, True)
    struct.pack_into("<I", region, 8, 0xDEADBEEF)
    assert struct.unpack_from("<I", region, 8) == (0xDEADBEEF,)
    assert io.BytesIO(b"read into").readinto(region) == 9
    assert bytes(view[:9]) == b"read into"
    assert np.frombuffer(view, "uint8").shape == (SIZE,)
    assert np.asarray(region).shape == (SIZE,)


def test_asarray_shapes(region: mshare.Region) -> None:
    """dtype, shape, offset and order are NumPy's."""
    assert region.asarray().shape == (SIZE,)
    assert region.asarray("float64").shape == (SIZE // 8,)
    assert region.asarray("float64", offset=SIZE - 20).shape == (2,)
    assert region.asarray("float32", 10).shape == (10,)
    assert region.asarray("float32", (4, 5), 400).shape == (4, 5)
    assert region.asarray("float32", [4, 5]).shape == (4, 5)
    assert region.asarray("float32", ()).shape == ()
    assert region.asarray("float32", -1).shape == (SIZE // 4,)
    assert region.asarray("float32", (-1, 16), 4).shape == (SIZE // 64 - 1, 16)
    assert region.asarray("float32", (2, -1, 8)).shape == (2, SIZE // 64, 8)
    fortran = region.asarray("int32", (2, 3), order="F")
    fortran[:] = [[1, 2, 3], [4, 5, 6]]
    assert region.asarray("int32", 6).tolist() == [1, 4, 2, 5, 3, 6]
    record = region.asarray([("id", "<i4"), ("value", "<f8")], 3)
    record["id"] = 7
    assert record[2]["id"] == 7


@pytest.mark.parametrize(
    ("dtype", "shape", "offset"),
    [
        ("uint8", SIZE + 1, 0),
        ("uint8", (SIZE, 2), 0),
        ("float32", SIZE // 4, 4),
        ("uint8", 1, SIZE),
        ("uint8", 1, -1),
        ("uint8", -2, 0),
        ("uint8", (-1, -1), 0),
        ("uint8", (-1, -2), 0),
        ("uint8", (-1, 0), 0),
        ("uint8", (-1, SIZE + 1), 0),
        (f"S{SIZE + 1}", None, 0),
        ("uint8", (1 << 40, 1 << 40), 0),
        ("uint8", None, SIZE),
    ],
)
def test_asarray_outside(region: mshare.Region, dtype: str, shape: Any, offset: int) -> None:
    """An array that is not inside the region is a ValueError."""
    with pytest.raises(ValueError, match=r"region|negative"):
        region.asarray(dtype, shape, offset)


@pytest.mark.parametrize("dtype", ["object", "floaty", [("a", "O")], "U0"])
def test_asarray_wrong_dtype(region: mshare.Region, dtype: Any) -> None:
    """What is no data type, or holds Python objects, is a TypeError."""
    with pytest.raises(TypeError):
        region.asarray(dtype)


@pytest.mark.parametrize("shape", ["ab", 1.5, (1, 2.5)])
def test_asarray_wrong_shape(region: mshare.Region, shape: Any) -> None:
    """A shape is integers."""
    with pytest.raises(TypeError):
        region.asarray("uint8", shape)


def test_close(region: mshare.Region) -> None:
    """A closed region says so, unmaps, and can be closed again."""
    address = region.address
    assert mapped(address)
    region.close()
    region.close()
    assert region.closed
    assert not mapped(address)
    assert "closed" in repr(region)
    for call in (lambda: memoryview(region), region.asarray, region.fileno, region.stat):
        with pytest.raises(ValueError, match=r"closed|released"):
            call()
    with pytest.raises(ValueError, match=f"the region '{region.name}' is closed"):
        region.asarray()
    with pytest.raises(ValueError, match="closed"), region:
        pass
    assert len(region) == SIZE
    pickle.loads(pickle.dumps(region)).close()
    region.unlink()


def test_with_closes_and_never_unlinks(name: str) -> None:
    """Leaving ``with`` ends the attachment, not the region."""
    with mshare.create(name, SIZE) as region:
        pass
    assert region.closed
    mshare.attach(name).close()


def test_views_outlive_the_region(region: mshare.Region) -> None:
    """Views keep the memory mapped; the last one lets it go."""
    address = region.address
    views: list[Any] = [region.asarray("float32"), memoryview(region)]
    views.append(views[0][5:10].reshape(5, 1).T)
    region.close()
    mshare.unlink(region.name)
    del region
    gc.collect()
    views[0][:] = 1.5
    assert views[2].tolist() == [[1.5] * 5]
    while views:
        assert mapped(address)
        views.pop(0)
        gc.collect()
    assert not mapped(address)


def test_region_dies_without_close(name: str) -> None:
    """A region nobody refers to gives back its mapping and its descriptor."""
    descriptors = len(os.listdir("/proc/self/fd"))
    region = mshare.create(name, SIZE)
    address, dead = region.address, weakref.ref(region)
    region.itself = region  # type: ignore[attr-defined]
    del region
    gc.collect()
    assert dead() is None
    assert not mapped(address)
    assert len(os.listdir("/proc/self/fd")) == descriptors


@given(order=some.permutations(range(6)), collect=some.booleans())
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_order_of_death(name: str, order: list[int], collect: bool) -> None:
    """Region, views, arrays and slices may die in any order; the last one unmaps."""
    region = mshare.create(name, SIZE, engine="shm")
    address = region.address
    mshare.unlink(name)
    view = memoryview(region)
    array = region.asarray("int32")
    alive: dict[int, Any] = {
        0: region,
        1: view,
        2: view[10:20],
        3: array,
        4: array[::7],
        5: np.asarray(array.data),
    }
    del region, view, array
    for dying in order:
        assert mapped(address)
        for survivor in alive.values():
            if isinstance(survivor, np.ndarray):
                survivor[...] = 3
        del alive[dying]
        survivor = None
        if collect:
            gc.collect()
    assert not mapped(address)


def test_pickle(region: mshare.Region) -> None:
    """A pickled region is its name and options; unpickling attaches again."""
    region.asarray()[3] = 9
    data = pickle.dumps(region)
    assert len(data) < 300
    again = pickle.loads(data)
    assert (again.name, again.engine, again.readonly) == (region.name, "shm", False)
    assert again.address != region.address
    assert again.asarray()[3] == 9
    reader = pickle.loads(pickle.dumps(mshare.attach(region.name, readonly=True)))
    assert reader.readonly
    region.unlink()
    with pytest.raises(FileNotFoundError, match=region.name):
        pickle.loads(data).asarray()


def test_exit_with_everything_alive(name: str, python: SubPython) -> None:
    """Interpreter exit with live regions, arrays and cycles: no crash, no warning."""
    code = """
import sys, threading, mshare, numpy
region = mshare.create(sys.argv[1], 1 << 20)
array = region.asarray("float32")
view = memoryview(region)
class Keeper: pass
keeper = Keeper(); keeper.me = keeper; keeper.array = array[3:]; keeper.region = region
class Late:
    def __del__(self):
        self.array[0] = 1
late = Late(); late.array = array
sys.modules["kept"] = late
other = mshare.attach(sys.argv[1])
other_array = other.asarray(); other.close(); del other
threading.Thread(target=lambda: array.sum()).start()
"""
    result = python(code, name, PYTHONDEVMODE="1")
    assert (result.returncode, result.stderr) == (0, "")


def test_exit_of_many_without_a_tracker(name: str, python: SubPython) -> None:
    """No helper process is started, and a reader's exit removes nothing."""
    mshare.create(name, SIZE, engine="shm").close()
    code = """
import os, sys, mshare
mshare.attach(sys.argv[1])
with open(f"/proc/self/task/{os.getpid()}/children") as file:
    print(repr(file.read()))
"""
    result = python(code, name)
    assert (result.stdout.strip(), result.stderr) == ("''", "")
    assert mshare.stat(name).size == SIZE


def test_threads(name: str) -> None:
    """Threads attach, write and close at once without a loss."""
    mshare.create(name, SIZE).close()

    def work(number: int) -> None:
        for _ in range(50):
            with mshare.attach(name) as region:
                region.asarray("int64")[number] += 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert mshare.attach(name).asarray("int64")[:8].tolist() == [50] * 8


def _square(region: mshare.Region, row: int) -> float:
    table = region.asarray("float64", (8, 16))
    table[row] **= 2
    return float(table[row].sum())


def test_futures_and_joblib(region: mshare.Region) -> None:
    """Process pools of concurrent.futures and joblib work on the one array."""
    region.asarray("float64", (8, 16))[:] = 2
    with concurrent.futures.ProcessPoolExecutor(2) as pool:
        assert list(pool.map(_square, [region] * 4, range(4))) == [64.0] * 4
    with joblib.parallel_config(n_jobs=2):
        sums = joblib.Parallel()(joblib.delayed(_square)(region, row) for row in range(4, 8))
    assert sums == [64.0] * 4
    assert (region.asarray("float64", (8, 16)) == 4).all()


def test_fork_inherits(region: mshare.Region) -> None:
    """A forked child has the attachment and its exit leaves the parent's alone."""
    array = region.asarray()
    pid = os.fork()
    if pid == 0:
        array[0] = 77
        region.close()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert array[0] == 77


def test_import_is_light(python: SubPython) -> None:
    """``import mshare`` brings in neither NumPy nor what only the command needs."""
    code = """
import sys, mshare, mshare.pagetables
heavy = {"numpy", "rich", "argparse", "subprocess", "multiprocessing", "matplotlib", "inspect"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    result = python(code)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("look", ["memoryview(self.region)[0]", "self.region.asarray()[0]"])
@pytest.mark.parametrize("close", [False, True])
def test_garbage_looks_into_it_to_the_end(
    region: mshare.Region, python: SubPython, look: str, close: bool
) -> None:
    """Finalizers of one piece of garbage run in any order: the memory goes after the last."""
    code = f"""
import gc, os, sys, mshare

class Worker:
    def __init__(self, region):
        self.region, self.run, self.view = region, self.look, memoryview(region)
    def look(self):
        {look} = 1
    def __del__(self):
        self.look()
        self.view.release()
        if {close}:
            self.region.close()

before = len(os.listdir("/proc/self/fd"))
for _ in range(20):
    Worker(mshare.attach(sys.argv[1]))
    gc.collect()
assert len(os.listdir("/proc/self/fd")) == before
with open("/proc/self/maps") as maps:
    assert sys.argv[1] not in maps.read()
"""
    done = python(code, region.name)
    assert (done.returncode, done.stderr) == (0, "")


def test_offsets_of_any_integer_type(region: mshare.Region) -> None:
    """A NumPy integer does not overflow."""
    assert region.asarray("uint8", offset=np.int8(100)).size == SIZE - 100
