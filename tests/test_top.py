"""``mshare top``: the figures, the screen, and how it ends."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

import mshare
from mshare import pagetables, processes, watch
from mshare.cli import main
from mshare.cli.output import console
from mshare.cli.top import _frame
from mshare.watch import Program, Rates, Region, Snapshot
from tests.conftest import started

Capture = pytest.CaptureFixture[str]
TOP = [sys.executable, "-c", "import mshare.cli; mshare.cli.run()", "top", "--interval", "0.1"]
LEAVE_SCREEN = b"\x1b[?1049l"


def moment(taken: float, *regions: Region) -> Snapshot:
    """A made-up snapshot."""
    programs = [Program("postgres", 1500, 880 << 30, 601 << 20, 4242)]
    return Snapshot(taken, 881 << 30, 2 << 40, 1600, list(regions), programs)


def counted(faults: int, flushes: int, created: float = 1.0, name: str = "features") -> Region:
    """A made-up region of msharefs."""
    return Region(name, "msharefs", 300 << 30, 1 << 30, created, 1500, 601 << 20, faults, flushes)


def test_rates() -> None:
    """Events per second; a region that is new, or was made anew, has none yet."""
    key = "features", "msharefs"
    before, after = moment(10.0, counted(100, 7)), moment(12.0, counted(300, 8))
    assert watch.rates(before, after) == {key: Rates(100.0, 0.5)}
    again = moment(14.0, counted(5, 0, created=13.0))
    assert watch.rates(after, again) == {key: Rates()}
    assert watch.rates(moment(0.0), after) == {key: Rates()}
    assert watch.rates(after, after) == {key: Rates()}
    shm = Region("plain", "shm", 4096, 4096, 1.0)
    assert watch.rates(moment(1.0, shm), moment(2.0, shm)) == {("plain", "shm"): Rates()}


def test_snapshot_is_what_the_kernel_says(name: str) -> None:
    """The machine's page tables, a region, and this process among those of its name."""
    with mshare.create(name, "1M", engine="shm"):
        now = watch.snapshot()
    (region,) = (region for region in now.regions if region.name == name)
    assert (region.engine, region.size, region.resident) == ("shm", 1 << 20, 1 << 20)
    assert region.attachments is region.faults is None
    with open("/proc/self/comm") as file:
        comm = file.read().strip()
    (program,) = (program for program in now.programs if program.name == comm)
    assert program.page_tables >= program.largest >= 0.9 * pagetables.process()
    assert 1 <= program.processes < now.processes
    tables = [program.page_tables for program in now.programs]
    assert tables == sorted(tables, reverse=True)
    assert now.page_tables > 0


def test_readable_in_80_columns(capsys: Capture) -> None:
    """Large figures and the longest names fit, with nothing cut but names."""
    long = counted(10**9, 10**6, name="n" * 255)
    before, after = moment(0.0, counted(0, 0), long._replace(faults=0)), moment(1.0, long)
    console(80).print(_frame(before, after, None, 10))
    shown = capsys.readouterr().out
    lines = [line.rstrip() for line in shown.splitlines()]
    assert max(map(len, lines)) <= 80
    (row,) = (line for line in lines if line.startswith("nnnn"))
    assert row.split()[1:] == (
        ["msharefs", "300", "GiB", "1", "GiB", "1,500", "601", "MiB", "1,000,000,000", "0"]
    )
    (row,) = (line for line in lines if line.startswith("postgres"))
    assert row.split() == ["postgres", "1,500", "880", "GiB", "601", "MiB", "4242"]


@pytest.mark.parametrize("height", [5, 12, 24])
def test_fits_the_screen(height: int, capsys: Capture) -> None:
    """More regions than lines: the largest are shown, and how many are not."""
    many = [counted(0, 0, name=f"region-{number}") for number in range(100)]
    now = moment(1.0, *many)
    now = now._replace(programs=now.programs * 50)
    console(80).print(_frame(now, now, height, 10))
    shown = capsys.readouterr().out
    assert shown.count("\n") <= max(height, 9)
    assert re.search(r"^and \d+ smaller regions$", shown, re.M)
    assert "postgres" in shown


def test_processes_that_may_not_be_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """With hidepid=1 those of others are a PermissionError; the rest is shown."""
    real = processes.process

    def process(pid: int) -> object:
        if pid == 1:
            raise PermissionError(1, "no", f"/proc/{pid}/status")
        return real(pid)

    monkeypatch.setattr(processes, "process", process)
    assert os.getpid() in [each.pid for each in processes.processes()]


def test_once(name: str, capsys: Capture) -> None:
    """One interval, as a table and as JSON."""
    with mshare.create(name, "1M", engine="shm"):
        assert main(["top", "--once", "--interval", "0.1", "--programs", "2"]) == 0
        shown = capsys.readouterr().out
        assert main(["top", "--once", "--interval", "0.1", "--json", "--programs", "2"]) == 0
        found = json.loads(capsys.readouterr().out)
    assert name in shown
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= 80
    (region,) = (region for region in found["regions"] if region["name"] == name)
    assert region["engine"] == "shm"
    assert region["faults_per_second"] is None
    assert len(found["programs"]) == 2
    assert found["interval_seconds"] >= 0.1
    assert found["page_table_bytes"] > found["programs"][0]["page_table_bytes"] > 0


@pytest.mark.parametrize("json_too", [False, True])
def test_into_a_pipe(json_too: bool) -> None:
    """A frame or a line for each interval, without control characters; Ctrl-C ends it: 130."""
    command = [*TOP, "--json"] if json_too else TOP
    with started(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as top:
        assert top.stdout
        if json_too:
            for _ in range(3):
                assert json.loads(top.stdout.readline())["page_table_bytes"] > 0
        else:
            frames = 0
            while frames < 3:
                line = top.stdout.readline()
                frames += b"page tables" in line and b"processes" in line
                assert b"\x1b" not in line
        top.send_signal(signal.SIGINT)
        _, errors = top.communicate(timeout=20)
        assert (top.returncode, errors) == (130, b"")


def test_reader_that_goes_away() -> None:
    """With nobody to read, it ends without a word."""
    command = " ".join([*(f"'{word}'" for word in TOP), "--json | head -n 1"])
    result = subprocess.run(command, shell=True, capture_output=True, check=True, timeout=60)
    assert json.loads(result.stdout)
    assert not result.stderr


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """The two ends of a terminal of 80 by 24."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    yield ours, theirs
    os.close(ours)
    os.close(theirs)


@pytest.mark.parametrize(("end", "code"), [(b"q", 0), (b"\x03", 130), (signal.SIGTERM, 143)])
def test_on_a_terminal(terminal: tuple[int, int], end: bytes | signal.Signals, code: int) -> None:
    """q, Ctrl-C and kill leave the screen and the terminal as they were."""
    ours, theirs = terminal
    saved = termios.tcgetattr(theirs)
    environment = {**os.environ, "TERM": "xterm"}

    lead = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)"
    command = [TOP[0], "-c", f"{lead}; {TOP[2]}", *TOP[3:]]
    with started(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment,
        start_new_session=True,
    ) as top:
        seen = read_until(ours, lambda data: data.count(b"page tables,") + data.count(b"PID") >= 2)
        assert b"\x1b[?1049h" in seen
        assert termios.tcgetattr(theirs) != saved
        if isinstance(end, bytes):
            os.write(ours, end)
        else:
            top.send_signal(end)
        seen += read_until(ours, lambda data: LEAVE_SCREEN in data)
        assert top.wait(20) == code
    assert termios.tcgetattr(theirs) == saved
    assert b"Traceback" not in seen + rest(ours)


def read_until(fd: int, enough: object) -> bytes:
    """What comes out of a terminal, until that is enough."""
    data, deadline = b"", time.monotonic() + 60
    while not enough(data):  # type: ignore[operator]
        assert time.monotonic() < deadline, data
        data += rest(fd, 1.0)
    return data


def rest(fd: int, seconds: float = 0.2) -> bytes:
    """What there is to read within some seconds."""
    with suppress(OSError):
        if select.select([fd], [], [], seconds)[0]:
            return os.read(fd, 1 << 16)
    return b""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--interval", "0"],
        ["--interval", "-1"],
        ["--interval", "nan"],
        ["--interval", "inf"],
        ["--programs", "0"],
    ],
)
def test_bad_input(arguments: list[str], capsys: Capture) -> None:
    """What makes no sense is wrong usage, and its last line says why."""
    with pytest.raises(SystemExit) as caught:
        main(["top", "--once", *arguments])
    assert caught.value.code == 2
    output = capsys.readouterr()
    assert "give a number" in output.err.splitlines()[-1]
    assert not output.out
