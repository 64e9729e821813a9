"""The library and the command on the engine msharefs, where it can more than the others."""

from __future__ import annotations

import errno
import json
import os
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import mshare
from mshare.cli import main
from mshare.engines.msharefs import info
from tests.kernel import abi
from tests.kernel.abi import PAGE, SLOT

SIZE = 8 << 20


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of four pages, each full of its own number."""
    path = tmp_path / "file"
    np.repeat(np.arange(4, dtype="uint8"), PAGE).tofile(path)
    return path


def attach_and_store(name: str, at: int) -> None:
    """Write a byte of a region from another process."""
    with mshare.attach(name) as region:
        memoryview(region)[at] = 1


def test_file_in_a_region(name: str, file: Path) -> None:
    """A file mapped into a region is seen by every process, and written through it."""
    with mshare.create(name, SIZE) as region, mshare.attach(name, readonly=True) as reader:
        region.map(file, PAGE)
        assert reader.asarray("uint8", 6 * PAGE)[::PAGE].tolist() == [0, 0, 1, 2, 3, 0]
        region.asarray("uint8")[2 * PAGE] = 99
        assert file.read_bytes()[PAGE] == 99
        region.map(file, 0, PAGE, file_offset=3 * PAGE)
        assert reader.asarray("uint8")[0] == 3
        region.map(None, 0, 2 * PAGE)
        assert not reader.asarray("uint8", 2 * PAGE).any()


def test_hole_and_readonly_part(name: str) -> None:
    """What was unmapped or write-protected ends the process that touches it, and only that."""
    with mshare.create(name, SIZE) as region:
        region.unmap(PAGE, PAGE)
        region.protect(2 * PAGE, PAGE, readonly=True)
        for at in (PAGE, 2 * PAGE):
            assert abi.dies_by(attach_and_store, name, at) == signal.SIGSEGV
        assert abi.dies_by(attach_and_store, name, 0) is None
        region.protect(2 * PAGE, PAGE, readonly=False)
        assert abi.dies_by(attach_and_store, name, 2 * PAGE) is None
        assert region.asarray("uint8")[[0, 2 * PAGE]].tolist() == [1, 1]


def test_readonly_backing(name: str, file: Path) -> None:
    """A region over a file that may only be read can't be written by any attachment."""
    fd = os.open(file, os.O_RDONLY)
    mshare.create(name, backing=fd).close()
    os.close(fd)
    assert abi.dies_by(attach_and_store, name, 0) == signal.SIGSEGV
    with mshare.attach(name, readonly=True) as region:
        assert region.asarray("uint8")[::PAGE].tolist() == [0, 1, 2, 3]
    assert file.read_bytes()[0] == 0


@pytest.mark.parametrize("offset", [-PAGE, 1, SLOT, SLOT + PAGE])
def test_ranges_are_checked(name: str, file: Path, offset: int) -> None:
    """A range outside the region, or not of whole pages, is EINVAL before anything changes."""
    with mshare.create(name, SIZE) as region:
        changes = info(region.fileno()).layout_changes
        for call in (
            partial(region.map, file, offset),
            partial(region.unmap, offset, PAGE),
            partial(region.protect, offset, PAGE, readonly=True),
            partial(region.map, file, 0, file_offset=1),
        ):
            with pytest.raises(OSError, match="whole pages") as caught:
                call()
            assert caught.value.errno == errno.EINVAL
        assert info(region.fileno()).layout_changes == changes


def test_a_reader_can_change_no_layout(name: str, file: Path) -> None:
    """A read-only attachment's layout calls are EACCES."""
    with mshare.create(name, SIZE), mshare.attach(name, readonly=True) as reader:
        for call in (
            partial(reader.map, file),
            partial(reader.unmap, 0, PAGE),
            partial(reader.protect, 0, PAGE, readonly=True),
        ):
            with pytest.raises(PermissionError):
                call()


def test_what_cannot_be_mapped(name: str, tmp_path: Path) -> None:
    """A device, a folder, an empty or a missing file get an error that names them."""
    (tmp_path / "empty").touch()
    with mshare.create(name, SIZE) as region:
        for path, kind in (
            ("/dev/zero", OSError),
            (tmp_path, IsADirectoryError),
            (tmp_path / "empty", ValueError),
            (tmp_path / "missing", FileNotFoundError),
        ):
            with pytest.raises(kind):
                region.map(path, 0, None)
        assert not region.asarray("uint8", PAGE).any()


def test_commands(name: str, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``map``, ``unmap``, ``protect`` and ``stat`` do and show the same."""
    assert main(["create", name, "1G"]) == 0
    assert main(["map", name, str(file), "--offset", "4K", "--readonly"]) == 0
    assert main(["map", name, "-", "--offset", "1M", "--length", "1M"]) == 0
    assert main(["protect", name, "0", "4K", "--readonly"]) == 0
    assert main(["unmap", name, "512M", "512M"]) == 0
    with mshare.attach(name, readonly=True) as region:
        assert region.size == SLOT // 2
        assert region.asarray("uint8")[PAGE : 5 * PAGE : PAGE].tolist() == [0, 1, 2, 3]
    for at in (0, PAGE):
        assert abi.dies_by(attach_and_store, name, at) == signal.SIGSEGV
    capsys.readouterr()
    assert main(["stat", name, "--json"]) == 0
    counters = json.loads(capsys.readouterr().out)["counters"]
    assert counters["layout_changes"] == 5
    assert counters["mapped_bytes"] == counters["mapped_end"] == SLOT // 2
    assert main(["stat", name]) == 0
    assert "layout changes: 5\n" in capsys.readouterr().out
    assert main(["unmap", name, "2G", "4K"]) == 1
    assert "whole pages" in capsys.readouterr().err
    assert main(["ls"]) == 0
    assert "mshare_info" not in capsys.readouterr().out


def test_same_address_everywhere(name: str) -> None:
    """``address=`` puts every attachment at one address, in any process."""
    address = 1 << 45
    with mshare.create(name, SIZE, address=address) as region:
        region.asarray("uint64")[0] = address

        def other() -> int:
            region.close()
            with mshare.attach(name, address=address) as again:
                return int(again.asarray("uint64")[0]) - (again.address or 0)

        assert abi.Child(other).result() == 0
