"""``mshare run`` without the module: what it refuses and why, and that its library falls back."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mshare import preload
from mshare.cli import main
from tests.conftest import NOBODY, skip

Capture = pytest.CaptureFixture[str]
COMMAND = [sys.executable, "-c", "from mshare.cli import run; run()", "run"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for the library."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_needs_no_new_c_library(cache: Path) -> None:
    """A program may come with an older one than this machine's, where a newer version is fatal."""
    if not shutil.which("objdump"):
        skip("needs objdump (binutils)")
    said = subprocess.run(
        ["objdump", "-T", preload.build()], check=True, capture_output=True, text=True
    ).stdout
    needed = {tuple(map(int, found.split("."))) for found in re.findall(r"GLIBC_([\d.]+)", said)}
    assert (2, 2, 5) in needed
    assert max(needed) < (2, 17)


def elf(machine: int = 62, bits: int = 2, loader: str = "/lib64/ld-linux-x86-64.so.2") -> bytes:
    """The head of a program, as far as anyone looks at it here."""
    count = 1 if loader else 0
    head = b"\x7fELF" + bytes([bits, 1, 1]) + bytes(9) + struct.pack("<HHI", 3, machine, 1)
    head += struct.pack("<QQQIHHHHHH", 0, 64, 0, 0, 64, 56, count, 0, 0, 0)
    entry = struct.pack("<IIQQQQQQ", 3, 4, 120, 0, 0, len(loader) + 1, len(loader) + 1, 1)
    return head + (entry * count) + loader.encode() + b"\0" * 64


def program(folder: Path, content: bytes, mode: int = 0o755) -> str:
    """A file that may be run."""
    path = folder / "program"
    path.write_bytes(content)
    path.chmod(mode)
    return str(path)


def test_program_that_will_do(tmp_path: Path) -> None:
    """A dynamic x86-64 program, this Python, and scripts of theirs pass."""
    preload.check_program(program(tmp_path, elf()))
    preload.check_program(sys.executable)
    preload.check_program(program(tmp_path, f"#! {sys.executable} -W error\npass\n".encode()))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (elf(loader=""), "linked statically"),
        (elf(loader="/lib/ld-musl-x86_64.so.1"), "not glibc"),
        (elf(machine=183), "not for x86-64"),
        (elf(machine=3, bits=1), "not for x86-64"),
        (elf()[:40], "not for x86-64"),
        (b"", "neither a program"),
        (b"echo hello\n", "neither a program"),
        (b"#!\n", "names no interpreter"),
        (b"#!/nowhere/sh -e\n", "/nowhere/sh is not there"),
        (b"#!STATIC\n", "linked statically"),
    ],
)
def test_program_that_will_not_do(
    content: bytes, message: str, tmp_path: Path, capfd: Capture
) -> None:
    """What the library can't get into is 126 and one line, before anything starts."""
    if content == b"#!STATIC\n":
        static = tmp_path / "static"
        static.write_bytes(elf(loader=""))
        content = f"#!{static}\n".encode()
    path = program(tmp_path, content)
    assert main(["run", "--", path]) == 126
    said = capfd.readouterr().err
    assert said.startswith("mshare run: ")
    assert message in said
    assert said.count("\n") == 1


def test_program_that_gains_rights(root: None, tmp_path: Path, capfd: Capture) -> None:
    """Setuid or setgid to another than who runs it is refused; to the same it is not."""
    path = program(tmp_path, elf(), 0o4755)
    preload.check_program(path)
    for user, group, mode in ((NOBODY, 0, 0o4755), (0, NOBODY, 0o2755)):
        os.chown(path, user, group)
        os.chmod(path, mode)
        assert main(["run", "--", path]) == 126
        assert "the loader ignores LD_PRELOAD" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("make", "code", "message"),
    [
        (lambda folder: "no-such-program-anywhere", 127, "no such program"),
        (lambda folder: str(folder / "nothing"), 127, "no such program"),
        (str, 126, "may not be run"),
        (lambda folder: program(folder, elf(), 0o644), 126, "may not be run"),
    ],
)
def test_program_that_is_not_there(
    make: Callable[[Path], str], code: int, message: str, tmp_path: Path, capfd: Capture
) -> None:
    """127 and 126, as a shell has it."""
    assert main(["run", "--", make(tmp_path)]) == code
    said = capfd.readouterr().err
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--"],
        ["--print", "--", "true"],
        ["--min-size", "x", "--", "true"],
        ["--min-size", "0", "--", "true"],
    ],
)
def test_usage(arguments: list[str], capfd: Capture) -> None:
    """No program, or a size that is none, is 2."""
    with pytest.raises(SystemExit) as caught:
        main(["run", *arguments])
    assert caught.value.code == 2
    assert "usage" in capfd.readouterr().err


def test_without_the_module(cache: Path, tmp_path: Path) -> None:
    """Nothing runs, and the message has the cure; with --fallback it runs as it is."""
    words = ["--", "sh", "-c", 'echo "$@"; exit 7', "--", "a", "--", "-b"]
    environment = {**os.environ, "MSHARE_MSHAREFS_DIR": str(tmp_path)}
    for options, code, shown in (([], 1, ""), (["--fallback"], 7, "a -- -b\n")):
        result = subprocess.run(
            [*COMMAND, *options, *words],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
        assert (result.returncode, result.stdout) == (code, shown)
        assert result.stderr.startswith("mshare run: ")
        assert "as root: " in result.stderr
        assert result.stderr.count("\n") == 1


def test_library(cache: Path) -> None:
    """It is built once, without a warning, and lies where all can read it if root built it."""
    first = preload.build()
    assert first.parent.parent == cache / "mshare" / "preload"
    before = first.stat()
    assert preload.build().stat().st_mtime_ns == before.st_mtime_ns
    assert before.st_mode & 0o777 == 0o755
    code = [str(path) for path in sorted(preload.sources().glob("*.c"))]
    strict = ["-Wall", "-Wextra", "-Werror", "-std=gnu11", "-fsyntax-only", "-I", "kmod"]
    root = Path(preload.__file__).parents[2]
    subprocess.run(["cc", *strict, *code], check=True, cwd=root)


def test_no_compiler(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what to install."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"apt-get install .*gcc"):
        preload.build()
    assert not list(cache.rglob("*.so*"))


def test_library_that_does_not_build(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error has what the compiler said, and nothing half-made is left."""
    monkeypatch.setattr(preload, "_FLAGS", ("-no-such-flag-at-all",))
    with pytest.raises(OSError, match=r"does not build: .*no-such-flag.*"):
        preload.build()
    assert not list(cache.rglob("*.so"))


def test_every_mapping_is_plain(cache: Path) -> None:
    """With the library and no module, shared memory works, and only --verbose says a word."""
    code = """
import mmap, os
memory = mmap.mmap(-1, 1 << 27)
memory[5] = 5
if not os.fork():
    memory[7] = memory[5]
    os._exit(0)
os.wait()
memory.madvise(mmap.MADV_DONTNEED)
assert memory[7] == 5
memory.close()
"""
    for verbose in ("0", "1"):
        environment = {
            **os.environ,
            "LD_PRELOAD": str(preload.build()),
            "MSHARE_RUN_MIN": "65536",
            "MSHARE_MSHAREFS_DIR": "/nowhere",
            "MSHARE_RUN_VERBOSE": verbose,
        }
        result = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert result.stderr.count("not shared: 128 MiB of anonymous memory") == int(verbose)
        assert bool(result.stderr) == bool(int(verbose))
