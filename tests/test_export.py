"""``mshare export``: what Prometheus reads, and what can't be done."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families as parse

import mshare
from mshare import watch
from mshare.cli import main
from mshare.watch import Program, Region, Snapshot
from tests.conftest import NOBODY, SubPython, started

Capture = pytest.CaptureFixture[str]
EXPORT = [sys.executable, "-c", "import mshare.cli; mshare.cli.run()", "export"]


def metrics(text: str) -> dict[str, Metric]:
    """The text as Prometheus understands it."""
    return {metric.name: metric for metric in parse(text)}


def test_figures_are_those_of_top(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """Every figure of a snapshot, by name and unit; what is not known is left out."""
    regions = [
        Region("features", "msharefs", 1 << 30, 1 << 29, 1.0, 34, 1 << 21, 1000, 7),
        Region("plain", "shm", 4096, None, 1.0),
    ]
    programs = [Program('odd "name"\\', 3, 900, 400, 7), Program("small", 1, 10, 10, 8)]
    now = Snapshot(0.0, 12345, 1 << 40, 4, regions, programs)
    monkeypatch.setattr("mshare.cli.export.snapshot", lambda: now)
    assert main(["export", "--programs", "1"]) == 0
    found = metrics(capsys.readouterr().out)
    values = {
        name: {tuple(sorted(each.labels.values())): each.value for each in metric.samples}
        for name, metric in found.items()
    }
    assert values == {
        "mshare_pagetable_bytes": {(): 12345},
        "mshare_region_size_bytes": {("features", "msharefs"): 1 << 30, ("plain", "shm"): 4096},
        "mshare_region_resident_bytes": {("features", "msharefs"): 1 << 29},
        "mshare_region_attachments": {("features", "msharefs"): 34},
        "mshare_region_pagetable_bytes": {("features", "msharefs"): 1 << 21},
        "mshare_region_faults": {("features", "msharefs"): 1000},
        "mshare_region_flushes": {("features", "msharefs"): 7},
        "mshare_program_processes": {('odd "name"\\',): 3},
        "mshare_program_pagetable_bytes": {('odd "name"\\',): 900},
        "mshare_program_largest_pagetable_bytes": {('odd "name"\\',): 400},
    }


def test_names_follow_the_conventions(capsys: Capture) -> None:
    """Base units, counters that end in _total, a help text for each, and no unit but bytes."""
    assert main(["export"]) == 0
    text = capsys.readouterr().out
    for name, metric in metrics(text).items():
        assert re.fullmatch(r"mshare_[a-z_]+", name)
        assert metric.documentation.endswith(".")
        assert metric.type == ("counter" if name.endswith(("faults", "flushes")) else "gauge")
    assert "mshare_region_faults_total counter" in text


def test_textfile(tmp_path: Path, name: str) -> None:
    """The file is there whole, and nothing beside it; a reader of the old one keeps it."""
    path = tmp_path / "mshare.prom"
    path.write_text("old")
    with path.open() as old, mshare.create(name, "1M", engine="shm"):
        assert main(["export", "--textfile", str(path)]) == 0
        assert old.read() == "old"
    assert os.listdir(tmp_path) == ["mshare.prom"]
    samples = metrics(path.read_text())["mshare_region_size_bytes"].samples
    assert {"region": name, "engine": "shm"} in [sample.labels for sample in samples]


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_serve(end: signal.Signals) -> None:
    """Each request reads anew, on this machine alone; a signal ends it and frees the port."""
    with started([*EXPORT, "--port", "0"], stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr
        line = server.stderr.readline()
        found = re.fullmatch(r"serving (http://127\.0\.0\.1:(\d+)/metrics)\n", line)
        assert found, line
        for _ in range(2):
            with urlopen(found[1], timeout=20) as answer:
                assert answer.headers["Content-Type"].startswith("text/plain")
                assert "mshare_pagetable_bytes" in metrics(answer.read().decode())
        assert listening(int(found[2])) == {"0100007F"}
        server.send_signal(end)
        assert server.wait(20) == 128 + end
        assert not server.stderr.read()
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        free.bind(("127.0.0.1", int(found[2])))


def listening(port: int) -> set[str]:
    """The addresses, as the kernel writes them, on which someone listens on a port."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    rows = [line.split() for line in lines]
    listeners = [row[1].split(":") for row in rows if row[3] == "0A"]
    return {address for address, number in listeners if int(number, 16) == port}


def test_port_in_use(capsys: Capture) -> None:
    """A port that someone has is an error that names it."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["export", "--port", str(port)]) == 1
    error = capsys.readouterr().err
    assert f"127.0.0.1:{port}" in error
    assert "in use" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "0", "--address", "192.0.2.1"], "192.0.2.1"),
        (["--port", "0", "--address", "no such place"], "no such place"),
        (["--textfile", "FOLDER/mshare.txt"], ".prom"),
        (["--textfile", "FOLDER/missing/mshare.prom"], "No such file"),
        (["--textfile", "FOLDER/folder.prom"], "Is a directory"),
    ],
)
def test_bad_input(arguments: list[str], message: str, tmp_path: Path, capsys: Capture) -> None:
    """What can't be done is one line that says why, and leaves nothing."""
    (tmp_path / "folder.prom").mkdir()
    assert main(["export", *(word.replace("FOLDER", str(tmp_path)) for word in arguments)]) == 1
    output = capsys.readouterr()
    assert message in output.err
    assert output.err.count("\n") == 1
    assert not output.out
    assert os.listdir(tmp_path) == ["folder.prom"]


@pytest.mark.parametrize("arguments", [["--port", "65536"], ["--port", "-1"], ["--programs", "0"]])
def test_numbers_out_of_range(arguments: list[str], capsys: Capture) -> None:
    """What is no port or no number of programs is wrong usage."""
    with pytest.raises(SystemExit) as caught:
        main(["export", *arguments])
    assert caught.value.code == 2
    assert "give a number" in capsys.readouterr().err


def test_unwritable_folder(root: None, python: SubPython, tmp_path: Path) -> None:
    """A folder that is someone else's: permission denied, with the path that was asked for."""
    code = f"""
import os, sys
from mshare.cli import main
main(["export"])
os.setgroups([]); os.setuid({NOBODY})
sys.exit(main(["export", "--textfile", sys.argv[1]]))
"""
    tmp_path.chmod(0o755)
    result = python(code, tmp_path / "mshare.prom")
    assert result.returncode == 1
    assert "mshare.prom': can't write it: Permission denied" in result.stderr
    assert not os.listdir(tmp_path)


def test_library_is_not_there(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """Without the client library the message has the command that installs it."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["export"]) == 1
    assert "pip install '.[export]'" in capsys.readouterr().err


def test_regions_come_and_go(name: str) -> None:
    """A region that is removed while it is looked at is no error."""
    mshare.create(name, 4096, engine="shm").close()
    listed = mshare.list()
    mshare.unlink(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mshare, "list", lambda: listed)
        assert name in [region.name for region in watch.snapshot().regions]
