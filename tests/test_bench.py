"""mshare bench: the rows, the content, the failures."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

import mshare
from mshare import bench
from mshare.bench import worker
from mshare.bench.content import BLOCK, ArrayContent, FileContent, checksums
from mshare.cli import main
from mshare.engines import Engine

ROW = {
    "engine": str,
    "kernel": str,
    "size_bytes": int,
    "processes": int,
    "page_table_bytes_per_process": int,
    "faults_first": int,
    "faults_per_process": int,
    "touch_seconds_first": float,
    "touch_seconds_per_process": float,
    "attach_seconds": float,
    "content_ok": bool,
}


def test_row(engine: Engine) -> None:
    """Two workers, both alive: the row has every field, and what was counted is right."""
    size = 8 << 20
    (row,) = bench.as_json(bench.run(ArrayContent(size), [engine.name], processes=2))
    assert {key: type(row[key]) for key in ROW} == ROW
    assert (row["engine"], row["size_bytes"], row["processes"]) == (engine.name, size, 2)
    assert row["kernel"] == os.uname().release
    assert row["content_ok"]
    if engine.name == "shm":
        assert 128 <= row["faults_per_process"] <= 136
        assert size // 512 <= row["page_table_bytes_per_process"] <= size // 512 + 12288


def test_alternating_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines take turns, and the turn after goes the other way round."""
    costs: list[str] = []
    cost = worker.Cost(0, 0, 1.0, 1.0, True)
    monkeypatch.setattr(bench, "_answer", lambda pipe: cost)
    monkeypatch.setattr(bench, "get_context", lambda method: pytest.fail("no workers here"))

    class NoWorkers:
        def __enter__(self) -> list[object]:
            return [NoPipe()]

        def __exit__(self, *_: object) -> None:
            pass

    class NoPipe:
        def send(self, request: tuple[str, str, object]) -> None:
            costs.append(request[1])

    class NoRegion:
        def __init__(self, content: object, name: str) -> None:
            self.name = name

        def __enter__(self) -> str:
            return self.name

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(bench, "_workers", lambda count: NoWorkers())
    monkeypatch.setattr(bench, "_region", NoRegion)
    bench.run(ArrayContent(1 << 20), ["hugetlb", "shm"], processes=1, repeat=3)
    assert costs == ["hugetlb", "shm", "shm", "hugetlb", "hugetlb", "shm"]


def test_one_process(name: str) -> None:
    """With one worker there is no further one to speak of."""
    (row,) = bench.run(ArrayContent(1 << 20), ["shm"], processes=1)
    assert row.faults_per_process is None
    assert row.touch_seconds_per_process is None
    assert row.page_table_bytes_per_process is None


def test_known_content() -> None:
    """The checksums are the array's own, and find any word that changed or moved."""
    content = ArrayContent(3 * BLOCK + 4096)
    whole = np.arange(content.size // 4) % 65521
    expected = whole.astype(np.float32).view(np.uint64)
    assert content.sums[0] == expected[: BLOCK // 8].sum()
    assert content.sums[-1] == expected[3 * BLOCK // 8 :].sum()
    memory = bytearray(content.size)
    content.fill(memoryview(memory))
    assert np.array_equal(checksums(memoryview(memory)), content.sums)
    memory[BLOCK + 5] ^= 1
    assert np.flatnonzero(checksums(memoryview(memory)) != content.sums).tolist() == [1]


def test_any_file(tmp_path: Path) -> None:
    """A file of any length is shared as it is, with zeros after it."""
    file = tmp_path / "data"
    data = os.urandom(BLOCK + 12345)
    file.write_bytes(data)
    content = FileContent(str(file))
    assert content.size == BLOCK + 16384
    memory = bytearray(content.size)
    content.fill(memoryview(memory))
    assert memory == data.ljust(content.size, b"\0")
    (row,) = bench.run(content, ["shm"], processes=2)
    assert row.content_ok


def test_wrong_content_is_found(name: str) -> None:
    """A worker that sees other bytes says so, and the command ends with 3."""
    content = ArrayContent(2 * BLOCK)
    with mshare.create(name, content.size, engine="shm") as region:
        content.fill(memoryview(region))
        assert worker.measure(name, "shm", content.sums)[1].content_ok
        memoryview(region)[BLOCK + 77] ^= 4
        assert not worker.measure(name, "shm", content.sums)[1].content_ok


def test_command_ends_with_3(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wrong content is an exit code of its own."""
    real = ArrayContent.fill

    def spoiled(self: ArrayContent, memory: memoryview) -> None:
        real(self, memory)
        memory[5000] ^= 1

    monkeypatch.setattr(ArrayContent, "fill", spoiled)
    assert main(["bench", "--engine", "shm", "--size", "1M", "--processes", "2"]) == 3
    assert "WRONG" in capsys.readouterr().out


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--json is a list of rows, and the plot is written."""
    plot = tmp_path / "plot.svg"
    arguments = ["bench", "--engine", "shm", "--size", "1M", "--processes", "3", "--repeat", "2"]
    assert main([*arguments, "--json", "--plot", str(plot)]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert set(ROW) <= set(row)
    assert len(row["page_table_bytes"]) == 3
    assert "shm" in plot.read_text()
    assert main(arguments) == 0
    assert "medians of 2 runs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "30T", "--engine", "shm"], "can't be measured"),
        (["--file", "/nowhere"], "No such file"),
        (["--file", "/"], "regular"),
        (["--file", "/proc/version"], "empty"),
        (["--plot", "plot.gif"], ".svg or .png"),
        (["--plot", "/nowhere/plot.svg"], "can't write"),
    ],
)
def test_bad_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bad input ends at once with a line that says what is wrong."""
    assert main(["bench", *arguments]) == 1
    output = capsys.readouterr()
    assert message in output.err.splitlines()[-1]
    assert not output.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "4Q"], "4Q"),
        (["--size", "100T"], "larger"),
        (["--processes", "0"], "1 or more"),
        (["--repeat", "-1"], "1 or more"),
        (["--file", "x", "--size", "1M"], "not allowed with"),
    ],
)
def test_wrong_usage(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Values that no machine would take are wrong usage."""
    with pytest.raises(SystemExit) as caught:
        main(["bench", *arguments])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_worker_that_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that is killed ends the run with an error and without its region."""
    real = bench._answer

    def killing(pipe: object) -> object:
        answer = real(pipe)  # type: ignore[arg-type]
        if answer is None:
            import multiprocessing

            for child in multiprocessing.active_children():
                os.kill(child.pid or 0, signal.SIGKILL)
        return answer

    monkeypatch.setattr(bench, "_answer", killing)
    with pytest.raises(OSError, match="died by signal 9"):
        bench.run(ArrayContent(1 << 20), ["shm"], processes=2)
    assert not any(region.name.startswith(f"bench-{os.getpid()}-") for region in mshare.list())
