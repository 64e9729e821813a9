"""Huge pages are taken and given back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

import mshare
from mshare import hugepages
from tests.conftest import SubPython

SETTING = "/proc/sys/vm/nr_hugepages"


def pages() -> int:
    with open(SETTING) as file:
        return int(file.read())


def test_given_back(root: None) -> None:
    """The block has the pages; after it there are as many as before, also after an error."""
    before = pages()
    said: list[str] = []
    free = hugepages._read("free_hugepages") - hugepages._read("resv_hugepages")
    with pytest.raises(KeyboardInterrupt), hugepages.reserved((free + 4) << 21, said.append):
        assert pages() == before + 4
        raise KeyboardInterrupt
    assert pages() == before
    assert "reserving 4 huge pages" in said[0]
    assert f"there are {before}" in said[-1]


def test_more_than_there_can_be(root: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOMEM, and what the kernel did find is given back: here some pages, not all memory."""
    before = pages()
    write = hugepages._write
    monkeypatch.setattr(hugepages, "_write", lambda wanted: write(min(wanted, before + 4)))
    with pytest.raises(OSError, match="the kernel found"), hugepages.reserved(1 << 45, print):
        pass
    assert pages() == before


def test_not_root(as_nobody: SubPython) -> None:
    """Only root can, and bench goes on without."""
    code = """
from mshare import hugepages
try:
    with hugepages.reserved(1, print):
        pass
except PermissionError as error:
    print(error.strerror)
"""
    result = as_nobody(code)
    assert result.stdout == "only root can reserve huge pages\n", result.stderr


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_bench_gives_back(root: None, end: signal.Signals) -> None:
    """Ctrl-C or a kill in the middle of a bench leaves no page, mount, region or worker."""
    before = pages()
    with open("/proc/self/mounts") as file:
        mounts = file.read().count("hugetlbfs")
    environment = {**os.environ, "MSHARE_HUGETLB_DIR": ""}
    command = [sys.executable, "-c", "import mshare.cli; mshare.cli.run()"]
    size = ["--size", f"{(hugepages._read('free_hugepages') + 16) * 2}M"]
    process = subprocess.Popen(
        [*command, "bench", "--reserve", "--engine", "hugetlb", *size],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env=environment,
        text=True,
    )
    made = f"bench-{process.pid}-"
    deadline = time.monotonic() + 60
    while not any(region.name.startswith(made) for region in mshare.list()):
        assert time.monotonic() < deadline
        if process.poll() is not None:
            break
        if pages() > before:
            break
        time.sleep(0.01)
    time.sleep(0.5)
    process.send_signal(end)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + end, errors
    assert "gave the huge pages back" in errors
    assert "Traceback" not in errors
    assert pages() == before
    with open("/proc/self/mounts") as file:
        assert file.read().count("hugetlbfs") == mounts
    assert not any(region.name.startswith(made) for region in mshare.list())
