"""Engine hugetlb: what the stock kernel shares, and what the administrator has to give."""

from __future__ import annotations

import errno
import os
import subprocess
import tempfile
from pathlib import Path

import pytest

import mshare
from mshare import bench, engines
from mshare.bench.content import ArrayContent
from mshare.engines import Engine
from mshare.engines import hugetlb as module
from mshare.sizes import HUGE_PAGE, SLOT_SIZE
from tests.conftest import SubPython

HUGETLB = engines.by_name("hugetlb")


def test_page_tables_are_shared(hugetlb: Engine) -> None:
    """With 2 GiB and 4 live workers those after the first pay next to nothing.

    The target holds for 8 workers too; the count is the same for each.
    """
    (row,) = bench.run(ArrayContent(2 * SLOT_SIZE), ["hugetlb"], processes=4)
    assert row.content_ok
    assert row.faults_first >= 1024
    assert row.faults_per_process is not None
    assert row.faults_per_process <= 8
    assert row.page_table_bytes_per_process is not None
    assert row.page_table_bytes_per_process <= 64 << 10


def test_addresses_are_aligned(hugetlb: Engine, name: str) -> None:
    """Every attachment starts at a multiple of 1 GiB, also when many are open at once."""
    mshare.create(name, "4M", engine="hugetlb").close()
    regions = [mshare.attach(name) for _ in range(6)]
    assert len({region.address for region in regions}) == 6
    assert all(region.address % SLOT_SIZE == 0 for region in regions)


def test_alignment_leaves_no_reservation(hugetlb: Engine, name: str) -> None:
    """What was reserved to find an aligned address is given back."""
    mshare.create(name, "4M", engine="hugetlb").close()

    def mapped() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * 4096

    before = mapped()
    regions = [mshare.attach(name) for _ in range(3)]
    assert mapped() - before < 64 << 20
    del regions


def test_not_enough_pages(hugetlb: Engine, name: str) -> None:
    """ENOSPC with the command that reserves what is missing; nothing changes behind the back."""
    setting = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages"
    with open(setting) as file:
        before = int(file.read())
    with pytest.raises(OSError, match=rf"echo \d+ > {setting}") as caught:
        mshare.create(name, (module._free_pages(HUGE_PAGE) + 64) * HUGE_PAGE, engine="hugetlb")
    assert caught.value.errno == errno.ENOSPC
    with open(setting) as file:
        assert int(file.read()) == before
    assert name not in {region.name for region in mshare.list()}


def test_more_than_the_machine_can_reserve(hugetlb: Engine, name: str) -> None:
    """No command makes huge pages of memory that is not there."""
    check = HUGETLB.check(32 << 40)
    assert (check.works, check.cure) == (False, None)
    assert "memory is" in check.why


def test_folder_that_is_not_on_hugetlbfs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another file system is refused with the command that mounts one, and so is no folder."""
    monkeypatch.setattr(HUGETLB, "chosen", str(tmp_path))
    check = HUGETLB.check()
    assert check.why == f"{tmp_path} is not on a hugetlbfs"
    assert check.cure == f"mount -t hugetlbfs -o mode=1777 hugetlbfs {tmp_path}"
    refused = pytest.raises(OSError, match="is not on a hugetlbfs; as root: mount -t hugetlbfs")
    with refused as caught:
        mshare.create(name, "2M", engine="hugetlb")
    assert caught.value.errno == errno.ENODEV
    monkeypatch.setattr(HUGETLB, "chosen", "/nowhere/at/all")
    assert HUGETLB.check().why == "/nowhere/at is not a folder; set MSHARE_HUGETLB_DIR to one"


def test_default_engine_goes_on_without(hugetlb: Engine, name: str) -> None:
    """When huge pages are short, the best engine is the next one."""
    with mshare.create(name, "4M") as region:
        assert region.engine == "hugetlb"
    size = (module._free_pages(HUGE_PAGE) + 1) * HUGE_PAGE
    with mshare.create(f"{name}-2", size) as region:
        assert region.engine == "shm"


def test_pages_taken_by_another(
    hugetlb: Engine, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages that go between check and creation: ENOSPC, and what was taken comes back."""
    free = module._free_pages(HUGE_PAGE)
    monkeypatch.setattr(module, "_free_pages", lambda page: 1 << 30)
    with pytest.raises(OSError, match="room") as caught:
        mshare.create(name, (free + 1) * HUGE_PAGE, engine="hugetlb")
    assert caught.value.errno in (errno.ENOSPC, errno.ENOMEM)
    monkeypatch.undo()
    assert module._free_pages(HUGE_PAGE) == free


def test_overcommit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages the kernel may make on demand are free pages."""
    pool = {
        "free_hugepages": 5,
        "resv_hugepages": 2,
        "nr_overcommit_hugepages": 10,
        "surplus_hugepages": 4,
    }
    monkeypatch.setattr(module, "_pool", lambda page, field: pool[field])
    assert module._free_pages(HUGE_PAGE) == 9


@pytest.mark.parametrize(
    ("missing", "why", "cure"),
    [
        ("kernel", "built without", None),
        ("mount", "mounted", "mount -t hugetlbfs"),
        ("permission", "permission", "install -d -m 1777"),
        ("pages", "free huge pages", "nr_hugepages"),
    ],
)
def test_check_says_what_is_missing(
    missing: str, why: str, cure: str | None, hugetlb: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each thing that can be missing has its reason and its command."""
    match missing:
        case "kernel":
            real = os.path.isdir
            monkeypatch.setattr(
                os.path, "isdir", lambda path: "sys/kernel" not in path and real(path)
            )
        case "mount":
            monkeypatch.setattr(HUGETLB, "chosen", None)
            monkeypatch.setattr(module, "_mounts", list)
            monkeypatch.setattr(HUGETLB, "_found", None)
        case "permission":
            monkeypatch.setattr(os, "access", lambda path, mode: False)
        case "pages":
            monkeypatch.setattr(module, "_free_pages", lambda page: 0)
    check = HUGETLB.check(4096)
    assert not check.works
    assert why in check.why
    assert cure in check.cure if cure and check.cure else check.cure is cure


def test_limited_mount(root: None, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mount with a size of its own has that much."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["mount", "-t", "hugetlbfs", "-o", "pagesize=2M,size=4M", "hugetlbfs", folder]
        subprocess.run(command, check=True)
        try:
            monkeypatch.setattr(HUGETLB, "chosen", f"{folder}/mshare")
            with pytest.raises(OSError, match="limited") as caught:
                mshare.create(name, "6M", engine="hugetlb")
            assert caught.value.errno == errno.ENOSPC
            mshare.create(name, "4M", engine="hugetlb").close()
            mshare.unlink(name)
        finally:
            subprocess.run(["umount", folder], check=True)


def test_mounts_are_found(root: None, name: str, python: SubPython) -> None:
    """A hugetlbfs mounted anywhere, also with a space in its path, is used."""
    with tempfile.TemporaryDirectory(suffix=" with space") as folder:
        command = ["mount", "-t", "hugetlbfs", "-o", "pagesize=2M", "hugetlbfs", folder]
        subprocess.run(command, check=True)
        try:
            assert folder in module._mounts()
            with open("/proc/self/mounts") as file:
                others = file.read().count(" hugetlbfs ") - 1
            code = "from mshare import engines; print(engines.by_name('hugetlb').directory())"
            found = python(code, MSHARE_HUGETLB_DIR="").stdout.strip()
            assert found == f"{folder}/mshare" or others
        finally:
            subprocess.run(["umount", folder], check=True)


def test_gone_mount_is_found_anew(root: None, name: str, python: SubPython) -> None:
    """A process that used a mount finds the next one when it is gone."""
    code = """
import subprocess, sys, tempfile, mshare
from mshare import engines
engine = engines.by_name("hugetlb")
def mount(folder):
    subprocess.run(["mount", "-t", "hugetlbfs", "-o", "pagesize=2M", "none", folder], check=True)
for _ in range(2):
    with tempfile.TemporaryDirectory() as folder:
        mount(folder)
        mshare.create(sys.argv[1], "2M", engine="hugetlb").close()
        mshare.attach(sys.argv[1]).close()
        mshare.unlink(sys.argv[1])
        subprocess.run(["umount", folder], check=True)
"""
    result = python(code, name, MSHARE_HUGETLB_DIR="")
    assert result.returncode == 0, result.stderr


def test_mount_without_our_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody made a region yet, one that is looked for is not found, and that is all."""
    monkeypatch.setattr(module, "_mounts", lambda: [str(tmp_path)])
    engine = module.Hugetlb()
    engine.chosen = None
    for _ in range(2):
        with pytest.raises(FileNotFoundError):
            engine.open("nothing", readonly=True)
