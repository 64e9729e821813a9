"""``mshare.dask``: a dataset once on a node, for every worker of a cluster."""

from __future__ import annotations

import asyncio
import errno
import io
import os
import re
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dask
import numpy as np
import pytest
from distributed import Client, LocalCluster

import mshare
from mshare.dask import Dataset
from mshare.engines import Engine, by_name
from tests.conftest import LAB, SubPython

ENGINE = "msharefs" if LAB else "shm"
WANTED = np.arange(300_000, dtype="float64").reshape(300, 1000)


def load(log: Path) -> np.ndarray[Any, Any]:
    """The dataset, and a line in ``log`` for each time it is loaded."""
    with open(log, "a") as file:
        file.write(f"{os.getpid()}\n")
    return WANTED


def look(dataset: Dataset) -> tuple[int, bool, bool, int]:
    """What a task sees: the array's content, whether it can write, and the region's inode."""
    path = f"{by_name(dataset.engine).directory()}/{dataset.region}"
    array = dataset.array
    return os.getpid(), bool((array == WANTED).all()), array.flags.writeable, os.stat(path).st_ino


def names(dataset: Dataset) -> list[str]:
    """The regions of a dataset."""
    return [each.name for each in mshare.list() if each.name == dataset.region]


def until(condition: Callable[[], object]) -> None:
    """Wait for it."""
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@contextmanager
def cluster(workers: int) -> Iterator[Client]:
    """A cluster of so many processes; on an emulated processor they take their time."""
    patience = {
        "distributed.comm.timeouts.connect": "300s",
        "distributed.comm.timeouts.tcp": "300s",
        "distributed.deploy.lost-worker-timeout": "300s",
    }
    with (
        dask.config.set(patience),
        LocalCluster(
            n_workers=workers, threads_per_worker=1, dashboard_address=None, processes=True
        ) as found,
        Client(found) as client,
    ):
        yield client


def worker(dataset: Dataset, number: int = 1) -> Any:
    """Set the dataset up in this process, as a worker does."""
    asyncio.run(dataset.setup(SimpleNamespace(id=number)))  # type: ignore[arg-type]


def leave(dataset: Dataset, number: int = 1) -> None:
    """The worker goes."""
    asyncio.run(dataset.teardown(SimpleNamespace(id=number)))  # type: ignore[arg-type]


def test_cluster(tmp_path: Path) -> None:
    """All workers have one array; one that is killed takes nothing along, and gets it again."""
    log = tmp_path / "log"
    dataset = Dataset("features", partial(load, log), engine=ENGINE)
    with cluster(3) as client:
        client.register_plugin(dataset)
        before = client.run(look, dataset)
        pids, good, writable, inodes = map(set, zip(*before.values(), strict=True))
        assert len(pids) == 3
        assert (good, writable, len(inodes)) == ({True}, {False}, 1)
        tasks = [client.submit(lambda data, row: data.array[row].sum(), dataset, n) for n in (0, 7)]
        assert client.gather(tasks) == WANTED[[0, 7]].sum(axis=1).tolist()
        logs = str(client.get_worker_logs())
        assert f"on engine {ENGINE}" in logs
        assert LAB or "would share page tables, but" in logs

        os.kill(pids.pop(), signal.SIGKILL)
        left = client.run(look, dataset, on_error="ignore")
        assert {each[1:] for each in left.values()} == {(True, False, *inodes)}
        assert pids <= {each[0] for each in left.values()}
        until(lambda: len(client.run(os.getpid, on_error="ignore")) == 3)
        new = set(client.run(os.getpid)) - set(before)
        task = client.submit(look, dataset, workers=list(new), pure=False)
        pid, *rest = task.result()
        assert pid not in {each[0] for each in before.values()}
        assert rest == [True, False, *inodes]
        assert len(log.read_text().split()) == 1

        client.unregister_worker_plugin("features")
        assert not names(dataset)
        again = Dataset("features", partial(load, log), engine=ENGINE)
        assert again.region != dataset.region
        client.register_plugin(again)
        assert names(again)
        with pytest.raises(FileNotFoundError, match="missing"):
            client.register_plugin(Dataset("other", tmp_path / "missing.npy"))
        with pytest.raises(RuntimeError, match="not in this process"):
            client.submit(look, dataset).result()
    assert not names(again)


@pytest.mark.parametrize(
    "array",
    [
        WANTED,
        np.asfortranarray(WANTED),
        WANTED[::2, ::-3],
        np.array(5.5),
        np.zeros((0, 3)),
        np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]),
    ],
    ids=["C", "F", "view", "scalar", "empty", "records"],
)
@pytest.mark.parametrize("from_file", [True, False], ids=["file", "function"])
def test_content(
    engine: Engine, tmp_path: Path, array: np.ndarray[Any, Any], from_file: bool
) -> None:
    """Shape, type, order and content are those of the file, or of what the function returned."""
    np.save(tmp_path / "a.npy", array)
    source = tmp_path / "a.npy" if from_file else lambda: array
    dataset = Dataset("content", source, engine=engine.name)
    worker(dataset)
    try:
        assert dataset.engine == engine.name
        assert dataset.array.dtype == array.dtype
        assert dataset.array.flags.f_contiguous == np.load(tmp_path / "a.npy").flags.f_contiguous
        assert np.array_equal(dataset.array, array)
        assert mshare.stat(dataset.region).mode == 0o600
    finally:
        leave(dataset)
    assert not names(dataset)


def test_workers_of_one_process() -> None:
    """It stays until the last worker of a process goes, and an array outlives that too."""
    dataset = Dataset("threads", lambda: WANTED, engine=ENGINE)
    worker(dataset, 1)
    worker(dataset, 2)
    leave(dataset, 1)
    array = dataset.array
    leave(dataset, 2)
    leave(dataset, 2)
    assert not names(dataset)
    assert (array == WANTED).all()
    with pytest.raises(RuntimeError, match="not in this process"):
        assert dataset.array is None


def test_source_that_finds_a_file_there(tmp_path: Path) -> None:
    """Its own FileExistsError is an error, not somebody else's region."""

    def source() -> np.ndarray[Any, Any]:
        os.mkdir(tmp_path)
        return WANTED

    dataset = Dataset("exists", source, engine=ENGINE)
    with pytest.raises(FileExistsError):
        worker(dataset)
    assert not names(dataset)


def die_or_load(marker: Path) -> np.ndarray[Any, Any]:
    """The first process that loads is killed when it is about to be done."""
    if not marker.exists():
        marker.touch()
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    return WANTED


CHILD = """\
import asyncio, os, pickle, sys, types
from pathlib import Path
sys.path.insert(0, sys.argv[3])
dataset = pickle.loads(Path(sys.argv[1]).read_bytes())
asyncio.run(dataset.setup(types.SimpleNamespace(id=1)))
print(dataset.array.sum(), flush=True)
if sys.argv[2] == "stay":
    os.kill(os.getpid(), 9)
"""


def start(dataset: Dataset, folder: Path, python: SubPython, how: str) -> Any:
    """Set it up in a process of its own, which is then killed or goes without a farewell."""
    import pickle

    path = folder / f"dataset-{uuid.uuid4().hex}"
    path.write_bytes(pickle.dumps(dataset))
    return python(CHILD, path, how, Path(__file__).parent.parent)


def test_killed_while_loading(tmp_path: Path, python: SubPython) -> None:
    """A worker that dies while it loads leaves nothing, and who waited for it loads instead."""
    from concurrent.futures import ThreadPoolExecutor

    dataset = Dataset("dies", partial(die_or_load, tmp_path / "marker"), engine=ENGINE)
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(start, dataset, tmp_path, python, "end")
        until((tmp_path / "marker").exists)
        others = [pool.submit(start, dataset, tmp_path, python, "end") for _ in range(2)]
        assert first.result().returncode == -signal.SIGKILL
        results = [each.result() for each in others]
    assert [each.returncode for each in results] == [0, 0], results
    assert {float(each.stdout) for each in results} == {WANTED.sum()}
    mshare.unlink(dataset.region)


def test_left_over(tmp_path: Path, python: SubPython) -> None:
    """When all are killed the name stays; a worker that comes finds it, and so does a person."""
    log = tmp_path / "log"
    dataset = Dataset("left", partial(load, log), engine=ENGINE)
    assert start(dataset, tmp_path, python, "stay").returncode == -signal.SIGKILL
    assert names(dataset)
    worker(dataset)
    assert (dataset.array == WANTED).all()
    assert len(log.read_text().split()) == 1
    leave(dataset)
    assert not names(dataset)


def test_too_large(tmp_path: Path) -> None:
    """A dataset larger than memory is refused before it is read."""
    path = tmp_path / "large.npy"
    with open(path, "wb") as file:
        header = {"descr": "<f8", "fortran_order": False, "shape": (1 << 37,)}
        np.lib.format.write_array_header_2_0(file, header)
        file.truncate(file.tell() + (1 << 40))
    dataset = Dataset("large", path, engine=ENGINE)
    with pytest.raises(OSError, match=r"no room for the region: .* free, 1.0 TiB") as caught:
        worker(dataset)
    assert caught.value.errno == errno.ENOSPC
    assert not names(dataset)


def test_bad_files(tmp_path: Path) -> None:
    """A file that is cut short, not of NumPy, or holds objects gets an error that says so."""
    np.save(tmp_path / "short.npy", WANTED)
    os.truncate(tmp_path / "short.npy", 100_000)
    (tmp_path / "text.npy").write_text("a,b\n1,2\n")
    (tmp_path / "empty.npy").touch()
    np.save(tmp_path / "objects.npy", np.array([object()]), allow_pickle=True)
    for name, kind, text in (
        ("short", OSError, "cut short: it has 100000 bytes, its array ends at 2400128"),
        ("text", ValueError, "not a .npy file"),
        ("empty", ValueError, "not a .npy file"),
        ("objects", TypeError, "dtype 'object'"),
        ("missing", FileNotFoundError, "No such file"),
    ):
        dataset = Dataset(name, tmp_path / f"{name}.npy", engine=ENGINE)
        with pytest.raises(kind, match=re.escape(text)):
            worker(dataset)
        assert not names(dataset)
    with pytest.raises(TypeError, match="dtype 'object'"):
        worker(Dataset("objects", lambda: np.array([object()]), engine=ENGINE))
    for name in ("a/b", "", "x" * 250):
        with pytest.raises(ValueError, match="region's name"):
            Dataset(name, tmp_path)


class Shrinking(io.FileIO):
    """A file that is cut when it is first read."""

    def readinto(self, buffer: Any) -> int:
        os.truncate(self.name, 1000)
        return super().readinto(buffer) or 0


def test_file_shrinks(tmp_path: Path) -> None:
    """A file that becomes shorter while it is loaded is an error, not a SIGBUS later."""
    (tmp_path / "file").write_bytes(bytes(5000))
    with (
        Shrinking(tmp_path / "file") as file,
        pytest.raises(OSError, match="ends after 1000 of 5000 bytes") as caught,
    ):
        Dataset("shrinks", tmp_path / "file")._copy(file, memoryview(bytearray(5000)))
    assert caught.value.errno == errno.ENODATA


def test_no_permission(tmp_path: Path, root: None, python: SubPython) -> None:
    """Who may not read the file gets that error, with the file's name."""
    path = tmp_path / "secret.npy"
    np.save(path, WANTED)
    path.chmod(0o600)
    for folder in list(path.parents)[:-2]:
        folder.chmod(0o711)
    result = python(
        "import asyncio, os, sys, types, mshare.dask\n"
        "os.setgroups([])\nos.setuid(65534)\n"
        "dataset = mshare.dask.Dataset('secret', sys.argv[1], engine=sys.argv[2])\n"
        "try:\n    asyncio.run(dataset.setup(types.SimpleNamespace(id=1)))\n"
        "except PermissionError as error:\n    print(error.filename)\n",
        path,
        ENGINE,
    )
    assert (result.stdout, result.stderr) == (f"{path}\n", "")


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        (WANTED, {}, TypeError, "not ndarray; for an array write lambda: array"),
        ([1, 2], {}, TypeError, "not list; for an array write lambda: array"),
        (b"a.npy", {}, TypeError, "not bytes"),
        ("a.npy", {"mode": "0600"}, TypeError, "mode is an integer such as 0o640, not str"),
        ("a.npy", {"mode": 0o1777}, ValueError, "permission bits"),
        ("a.npy", {"engine": "zz"}, ValueError, "no such engine; there are .*: 'zz'"),
    ],
)
def test_refused_where_it_is_made(
    source: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    """What no worker could use is refused before it is sent to one."""
    with pytest.raises(error, match=message):
        Dataset("features", source, **options)
