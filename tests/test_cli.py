"""The command: what it prints, its exit codes, and that no traceback reaches a user."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import mshare
from mshare import engines, module
from mshare.cli import COMMANDS, main
from tests.conftest import NOBODY

COMMAND = [sys.executable, "-c", "import mshare.cli; mshare.cli.run()"]
Capture = pytest.CaptureFixture[str]


def buffered() -> dict[str, str]:
    """The environment as it is now, with output that is written when there is enough."""
    return {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}


def test_help_has_an_example(capsys: Capture) -> None:
    """Every command's help has an example and the exit codes."""
    for command in COMMANDS:
        with pytest.raises(SystemExit) as caught:
            main([command, "--help"])
        assert caught.value.code == 0
        shown = capsys.readouterr().out
        assert "example:\n  " in shown
        assert "exit codes" in shown


@pytest.mark.parametrize("arguments", [[], ["fly"], ["create"], ["ls", "x"], ["bench", "--size"]])
def test_usage_errors(arguments: list[str], capsys: Capture) -> None:
    """Wrong usage ends with 2."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_as_a_module() -> None:
    """``python -m mshare`` is the command."""
    command = [sys.executable, "-m", "mshare", "--version"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert shown == f"mshare {mshare.__version__}\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion(shell: str, capsys: Capture) -> None:
    """A completion script knows the commands."""
    with pytest.raises(SystemExit) as caught:
        main(["--print-completion", shell])
    assert caught.value.code == 0
    assert "cp-in" in capsys.readouterr().out


def test_life_of_a_region(name: str, capsys: Capture) -> None:
    """create, ls, stat and rm tell the same story."""
    assert main(["create", name, "1M", "--mode", "0640", "--engine", "shm"]) == 0
    assert f"{name}: 1 MiB on engine shm" in capsys.readouterr().out
    assert main(["ls", "--json"]) == 0
    (listed,) = (row for row in json.loads(capsys.readouterr().out) if row["name"] == name)
    assert main(["stat", name, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == listed
    assert (listed["size"], listed["mode"], listed["engine"]) == (1 << 20, 0o640, "shm")
    assert main(["ls"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if name in line)
    assert line.split()[1:] == ["shm", "1", "MiB", "1", "MiB", "0640", "root", "memory"] or (
        os.geteuid()
    )
    assert main(["stat", name]) == 0
    assert "1 MiB (1048576 bytes)" in capsys.readouterr().out
    assert main(["rm", name]) == 0
    assert main(["rm", name, "also-not-there"]) == 1
    errors = capsys.readouterr().err
    assert errors.count("no such region") == 2


def test_backing_and_broken(name: str, tmp_path: Path, capsys: Capture) -> None:
    """A region over a file shows the file, and what is wrong when it is gone."""
    file = tmp_path / "file"
    file.write_bytes(b"x" * 5000)
    assert main(["create", name, "--backing", str(file)]) == 0
    file.unlink()
    assert main(["ls"]) == 0
    assert main(["stat", name]) == 0
    assert f"mshare rm {name}" in capsys.readouterr().out
    assert main(["rm", name]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["create", "NAME"], "--backing"),
        (["create", "NAME", "30T"], "room"),
        (["create", "a/b", "4K"], "slash"),
        (["create", "NAME", "--backing", "/nowhere"], "No such file"),
        (["stat", "NAME"], "no such region"),
        (["rm", "NAME"], "no such region"),
        (["cp-in", "NAME", "/nowhere"], "No such file"),
        (["cp-in", "NAME", "/"], "Is a directory"),
    ],
)
def test_errors(name: str, arguments: list[str], message: str, capsys: Capture) -> None:
    """What can't be done is one line on standard error and exit code 1."""
    assert main([name if word == "NAME" else word for word in arguments]) == 1
    output = capsys.readouterr()
    assert output.err.startswith(f"mshare {arguments[0]}: ")
    assert output.err.count("\n") == 1
    assert message in output.err
    assert not output.out
    assert name not in {region.name for region in mshare.list()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["create", "a", "4Q"], "not a size"),
        (["create", "a", "0"], "positive"),
        (["create", "a", "1"], "whole pages"),
        (["create", "a", "4K", "--mode", "rw"], "octal"),
        (["create", "a", "4K", "--mode", "7777"], "octal"),
        (["doctor", "--size", "x"], "not a size"),
        (["cp-in", "a", "/dev/null", "--size", "99X"], "not a size"),
        (["map", "a", "-", "--offset=-1K"], "'-1K': an offset"),
        (["unmap", "a", "0", "0K"], "positive"),
        (["protect", "a", "x", "4K", "--readonly"], "not a size"),
        (["lab", "--memory", "1X", "--dry-run"], "not a size"),
        (["lab", "--hugepages", "-1", "--dry-run"], "--hugepages: '-1': give a number, 0 or more"),
        (["lab", "--timeout", "nan", "--dry-run"], "give a number"),
    ],
)
def test_wrong_values(arguments: list[str], message: str, capsys: Capture) -> None:
    """A value that no machine would accept is wrong usage."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_copy_a_file(name: str, tmp_path: Path, capsys: Capture) -> None:
    """The region is made to fit, then used again; what is too large leaves it alone."""
    file = tmp_path / "file"
    data = os.urandom(100_000)
    file.write_bytes(data)
    assert main(["cp-in", name, str(file), "--engine", "shm"]) == 0
    assert "100000 bytes copied" in capsys.readouterr().out
    with mshare.attach(name) as region:
        assert region.size == 102_400
        assert bytes(region)[:100_000] == data
    file.write_bytes(b"short")
    assert main(["cp-in", name, str(file)]) == 0
    with mshare.attach(name) as region:
        assert bytes(region)[:6] == b"short" + data[5:6]
    assert main(["cp-in", name, str(file), "--size", "100K"]) == 0
    assert main(["cp-in", name, str(file), "--size", "104K"]) == 1
    assert "leave --size out" in capsys.readouterr().err
    file.write_bytes(bytes(200_000))
    assert main(["cp-in", name, str(file)]) == 1
    assert "does not fit" in capsys.readouterr().err
    with mshare.attach(name) as region:
        assert bytes(region)[:5] == b"short"


@pytest.mark.parametrize("size", [[], ["--size", "64K"]])
def test_copy_standard_input(name: str, size: list[str]) -> None:
    """A pipe of unknown length is kept until its length is known; --size saves that."""
    command = [*COMMAND, "cp-in", name, "-"]
    data = os.urandom(50_000)
    subprocess.run([*command, *size, "--engine", "shm"], input=data, check=True)
    with mshare.attach(name) as region:
        assert region.size == (65536 if size else 53248)
        assert bytes(region)[:50_000] == data


def test_failed_copy_leaves_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """More input than --size said: an error, and the region that was made is gone."""
    pipe = io.BufferedReader(io.FileIO(_pipe(bytes(9000)), "rb"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(pipe))
    assert main(["cp-in", name, "-", "--size", "4K", "--engine", "shm"]) == 1
    assert "does not fit" in capsys.readouterr().err
    assert name not in {region.name for region in mshare.list()}


def test_killed_copy_leaves_nothing(name: str) -> None:
    """A new region is not there before all of the input is in it, wherever the copy ends."""
    command = [*COMMAND, "cp-in", name, "-", "--size", "64M", "--engine", "shm"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as copy:
        assert copy.stdin is not None
        copy.stdin.write(bytes(32 << 20))
        copy.stdin.flush()
        assert name not in {region.name for region in mshare.list()}
        copy.kill()
    assert name not in {region.name for region in mshare.list()}


def _pipe(data: bytes) -> int:
    reading, writing = os.pipe()
    os.write(writing, data)
    os.close(writing)
    return reading


def test_doctor(capsys: Capture) -> None:
    """Every engine is explained, in words and as JSON."""
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "hugetlb: " in shown
    assert "shm: works" in shown
    assert main(["doctor", "--json", "--size", "40T"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["best"] is None
    assert found["size_bytes"] == 40 << 40
    for engine in found["engines"]:
        assert engine["works"] is False
        assert engine["why"]


def test_doctor_knows_the_engine_asked_for(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine of MSHARE_ENGINE is the one that is chosen; one that is none is an error."""
    monkeypatch.setenv("MSHARE_ENGINE", "shm")
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "MSHARE_ENGINE allows shm alone" in shown
    assert "shm: works, and is chosen" in shown
    assert shown.count("is chosen") == 1
    monkeypatch.setenv("MSHARE_ENGINE", "warp")
    assert main(["doctor"]) == 1
    assert "'warp': no such engine" in capsys.readouterr().err


def test_msharefs_without_the_module(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every message says what stands in the way here, not only that nothing is mounted."""
    problems = [("no modules here", "boot another kernel"), ("not loaded", "load it")]
    monkeypatch.setattr(module, "status", lambda: SimpleNamespace(problems=problems))
    engine = engines.by_name("msharefs")
    monkeypatch.setattr(engine, "chosen", str(tmp_path / "no" / "mount"))
    notes = ("not loaded; then: load it",)
    assert engine.check() == (False, "no modules here", "boot another kernel", notes)
    with pytest.raises(OSError, match="no modules here; as root: boot another kernel") as caught:
        mshare.create(name, 4096, engine="msharefs")
    assert (caught.value.errno, caught.value.filename) == (errno.ENODEV, name)


@pytest.mark.parametrize(
    "arguments",
    [
        "ls",
        "ls --json",
        "plan --size 1G --processes 2",
        "top --once --interval 0.1",
        "bench --help",
    ],
)
def test_output_to_a_closed_pipe(name: str, arguments: str) -> None:
    """A reader that goes away is no error to talk about: 141."""
    mshare.create(name, 4096).close()
    reading, writing = os.pipe()
    os.close(reading)
    result = subprocess.run(
        [*COMMAND, *arguments.split()],
        stdout=writing,
        stderr=subprocess.PIPE,
        check=False,
        env=buffered(),
    )
    os.close(writing)
    assert (result.returncode, result.stderr) == (141, b"")


def test_output_that_has_no_room(name: str) -> None:
    """The message says that it is the output which has no room, not the region."""
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [*COMMAND, "create", name, "4K"],
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
            env=buffered(),
        )
    message = "'standard output': all is done, but can't be told: No space left on device"
    assert (result.returncode, result.stderr.decode()) == (1, f"mshare create: {message}\n")
    mshare.unlink(name)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams(name: str, closed: str) -> None:
    """What is closed is as /dev/null, and messages go nowhere else."""
    script = f'"$0" "$@" {closed}'
    run = ["sh", "-c", script, *COMMAND]
    done = subprocess.run([*run, "create", name, "4K"], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert bool(done.stdout) == (">&-" not in closed.split())
    done = subprocess.run([*run, "create", name, "4K"], capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (1, b"")
    assert bool(done.stderr) == ("2>&-" not in closed)
    for arguments in ("ls", "top --once --interval 0.1", "plan --size 1G --processes 2"):
        done = subprocess.run([*run, *arguments.split()], capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_signal_before_the_command_is_read(number: signal.Signals, code: int) -> None:
    """While the commands are imported a signal ends it as it does later, without a traceback."""
    program = f"""
import os, sys
from mshare.cli import run
class Sends:
    def find_spec(self, name, path=None, target=None):
        if name == "mshare.cli.create":
            os.kill(os.getpid(), {number})
sys.meta_path.insert(0, Sends())
run(["ls"])
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (code, b"", b"")


def test_other_users_region(root: None, name: str) -> None:
    """What a user may not do is one line that says who may."""
    mshare.create(name, 4096, engine="shm").close()
    program = f"""
import os, sys
from mshare.cli import main
main(["stat", "warm-up-while-every-module-can-be-read"])
os.setgroups([]); os.setuid({NOBODY})
sys.exit(main(sys.argv[1:]))
"""
    for arguments, message in (
        (["rm", name], "only its owner or root"),
        (["cp-in", name, "/etc/passwd"], "no permission to read and write the region (mode 0600)"),
    ):
        result = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 1, result.stderr
        assert message in result.stderr
        assert "Traceback" not in result.stderr
