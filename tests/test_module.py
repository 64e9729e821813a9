"""``mshare module``: what it says about this machine, and the errors it raises."""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path

import pytest

from mshare import module
from mshare.cli import module as command

Capture = pytest.CaptureFixture[str]


def call(*arguments: str) -> int:
    """``mshare module`` in this process."""
    parser = argparse.ArgumentParser()
    command.set_argparser(parser)
    return command.main(parser.parse_args(arguments))


def test_status_is_the_same_in_json(capsys: Capture) -> None:
    """Both forms name the kernel; a machine without the module has a cure for it."""
    code = call("status", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["kernel"] == platform.release()
    assert code == (0 if found["loaded"] and found["mounted"] else 1)
    assert found["loaded"] or found["problems"]
    assert all(problem["cure"] for problem in found["problems"])
    assert call("status") == code
    shown = capsys.readouterr()
    assert platform.release() in shown.out
    assert all(problem["what"] in shown.err for problem in found["problems"])


@pytest.fixture
def no_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel without loadable modules."""
    why = [("this kernel takes no modules", "boot another")]
    monkeypatch.setattr(module, "_kernel_problems", lambda release: (False, why))


@pytest.mark.parametrize("action", ["build", "install", "load"])
def test_kernel_without_modules(no_modules: None, action: str) -> None:
    """Each action says why it can't, and what can."""
    with pytest.raises(OSError, match="takes no modules; boot another"):
        call(action)


@pytest.fixture
def good_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that takes the module, without headers."""
    monkeypatch.setattr(module, "_kernel_problems", lambda release: (True, []))
    monkeypatch.setattr(module, "_headers", lambda release: None)
    monkeypatch.setattr("platform.release", lambda: "6.1.0-1-amd64")


def test_missing_headers(good_kernel: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command that installs them, if apt has them."""
    monkeypatch.setattr(module, "apt_knows", lambda package: True)
    with pytest.raises(FileNotFoundError, match=r"apt-get install .*headers-6\.1\.0-1-amd64"):
        module.build()
    monkeypatch.setattr(module, "apt_knows", lambda package: False)
    with pytest.raises(FileNotFoundError, match="where this kernel came from"):
        module.build()


def test_only_root_changes_the_kernel(good_kernel: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are told to use sudo."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    for action in (module.install, module.load, module.unload):
        with pytest.raises(PermissionError, match="sudo"):
            action()


def test_refusals() -> None:
    """A signature that is missing is a matter of permission; anything else has its reason."""
    error = module._refused("insmod: ERROR: could not insert module: Key was rejected by service")
    assert isinstance(error, PermissionError) and "mokutil" in str(error)
    assert "No such device" in str(module._refused("insmod: ERROR: No such device"))


def test_dkms_conf_decides_the_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which kernels are supported is written once, in ``dkms.conf``."""
    monkeypatch.setattr(module, "find_sources", lambda: tmp_path)
    assert module._supported_pattern().startswith("^(6")
    (tmp_path / "dkms.conf").write_text('BUILD_EXCLUSIVE_KERNEL="^6\\.9\\."\n')
    assert module._supported_pattern() == r"^6\.9\."


def test_users_of_a_file_system(tmp_path: Path) -> None:
    """A process with an open file there is a user."""
    with (tmp_path / "file").open("w"):
        assert os.getpid() in [pid for pid, _ in module.users(tmp_path)]
