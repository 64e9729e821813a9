"""Engine shm: tmpfs and files."""

from __future__ import annotations

import errno
import os
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any
from unittest.mock import Mock

import pytest

import mshare
from mshare import engines, memory
from mshare.engines import base, shm
from mshare.engines.shm import Shm
from mshare.memory import Available
from tests.conftest import NOBODY, SubPython

SHM = engines.by_name("shm")


@pytest.fixture
def small_tmpfs(root: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A tmpfs of 1 MiB as the engine's folder."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", folder], check=True)
        monkeypatch.setattr(SHM, "chosen", folder)
        yield folder
        subprocess.run(["umount", folder], check=True)


def test_full_tmpfs(small_tmpfs: str, name: str) -> None:
    """Too much is ENOSPC with a cure, and the space is free again."""
    for _ in range(3):
        with pytest.raises(OSError, match=r"remount,size=2M") as caught:
            mshare.create(name, "2M", engine="shm")
        assert caught.value.errno == errno.ENOSPC
        assert not os.listdir(small_tmpfs)
    with mshare.create(name, 900 << 10, engine="shm") as region:
        region.asarray()[:] = 1
        with pytest.raises(OSError, match="room"):
            mshare.create(f"{name}-2", 900 << 10, engine="shm")
    assert not SHM.check(1 << 20).works


def test_filled_between_check_and_creation(
    small_tmpfs: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Space that goes after the check is still ENOSPC at creation, and nothing remains."""
    monkeypatch.setattr(Shm, "check", lambda self, size=0: engines.Check(True, ""))
    with pytest.raises(OSError, match="room") as caught:
        mshare.create(name, "2M", engine="shm")
    assert caught.value.errno == errno.ENOSPC
    assert not os.listdir(small_tmpfs)
    assert os.statvfs(small_tmpfs).f_bfree * 4096 == 1 << 20


def test_more_than_the_memory_left(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is not there is refused: the kernel would kill rather than fail."""
    monkeypatch.setattr(memory, "available", lambda: Available(1 << 20, "a limit"))
    with pytest.raises(OSError, match=r"a limit: 1 MiB free") as caught:
        mshare.create(name, "2M", engine="shm")
    assert caught.value.errno == errno.ENOSPC


def test_available_memory_knows_cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest of the machine's and the cgroups' limits counts."""
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    monkeypatch.setattr(memory, "_cgroup_folders", lambda: [str(tmp_path)])
    assert memory.available() == Available(4000000, f"{tmp_path}/memory.max")
    # clean pages of files go when memory is asked for
    (tmp_path / "memory.stat").write_text("inactive_file 500000\nactive_file 300\nfile_dirty 200\n")
    assert memory.available().bytes == 4500100
    (tmp_path / "memory.max").write_text("max\n")
    assert "MemAvailable" in memory.available().source


def test_names_that_are_none(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What somebody else puts into the folder is nobody's region, and breaks no list."""
    monkeypatch.setattr(SHM, "chosen", str(tmp_path))
    mshare.create(name, 4096, engine="shm").close()
    for odd in (b"caf\xe9", b"x\x1b[2J\x07y", b"two\nlines"):
        with open(os.path.join(os.fsencode(tmp_path), odd), "wb"):
            pass
    assert [region.name for region in mshare.list("shm")] == [name]


def test_link_of_another_user(root: None, name: str, tmp_path: Path) -> None:
    """A name that leads where its maker could not write is not written to; one's own is."""
    (tmp_path / "mine").write_bytes(bytes(4096))
    with mshare.create(name, backing=tmp_path / "mine", engine="shm"):
        pass
    with mshare.attach(name) as region:
        memoryview(region)[0] = 1
    link = f"{SHM.directory()}/{name}"
    os.lchown(link, NOBODY, NOBODY)
    with pytest.raises(PermissionError, match=f"user {NOBODY}, who may not open it so") as caught:
        mshare.attach(name)
    assert caught.value.filename == name
    assert (tmp_path / "mine").read_bytes()[0] == 1
    mshare.attach(name, readonly=True).close()
    (tmp_path / "mine").chmod(0o600)
    with pytest.raises(PermissionError, match=f"user {NOBODY}, who may not open it so"):
        mshare.attach(name, readonly=True)
    os.chown(tmp_path / "mine", NOBODY, NOBODY)
    mshare.attach(name).close()


def test_maker_of_the_folder_is_stopped(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Wherever it is stopped, the folder is for everybody or is not there."""
    folder = tmp_path / "mshare"
    monkeypatch.setattr(Shm, "directory", lambda self: str(folder))
    for where, call in ((os, "chmod"), (base, "_rename_new")):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(where, call, Mock(side_effect=KeyboardInterrupt))
            mshare.create(name, 4096, engine="shm")
        assert not list(tmp_path.iterdir())
    mshare.create(name, 4096, engine="shm").close()
    assert folder.stat().st_mode & 0o7777 == 0o1777
    mshare.unlink(name, engine="shm")


def test_many_makers_of_the_folder(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The first regions, made at once, are in one folder, and nothing is left beside it."""
    together = Barrier(4)

    def make(which: int) -> None:
        together.wait()
        mshare.create(f"{name}-{which}", 4096, engine="shm").close()

    for number in range(50):
        folder = tmp_path / f"{number}"
        monkeypatch.setattr(SHM, "chosen", str(folder))
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(make, range(4)))
        assert len(list(folder.iterdir())) == 4
        assert len(list(tmp_path.iterdir())) == number + 1


def test_made_anew_while_it_is_listed(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A name that led to a file a moment ago, and is memory now, is listed as that."""
    (tmp_path / "file").write_bytes(bytes(4096))
    mshare.create(name, backing=tmp_path / "file", engine="shm").close()
    real = os.readlink

    def readlink(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(os, "readlink", real)
        mshare.unlink(name)
        mshare.create(name, 8192, engine="shm").close()
        return real(*arguments, **options)

    monkeypatch.setattr(os, "readlink", readlink)
    (found,) = (each for each in mshare.list("shm") if each.name == name)
    assert (found.size, found.backing) == (8192, None)


def test_memory_is_taken_in_pieces(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal can only undo the last few MiB of what was allocated."""
    pieces: list[tuple[int, int]] = []
    real = os.posix_fallocate

    def fallocate(fd: int, start: int, size: int) -> None:
        pieces.append((start, size))
        real(fd, start, size)

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    mshare.create(name, "10M", engine="shm").close()
    assert pieces == [(0, 4 << 20), (4 << 20, 4 << 20), (8 << 20, 2 << 20)]
    assert mshare.stat(name).resident == 10 << 20


def test_no_folder(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its file system the engine says what to do."""
    monkeypatch.setattr(SHM, "chosen", "/nowhere/at/all")
    check = SHM.check()
    assert not check.works
    assert "set MSHARE_SHM_DIR" in check.why
    for how in ({"size": 4096}, {"backing": __file__}):
        with pytest.raises(OSError, match="/nowhere/at is not a folder") as caught:
            mshare.create(name, engine="shm", **how)
        assert (caught.value.errno, caught.value.filename) == (errno.ENODEV, name)


def test_folder_is_a_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in place of the folder is told, by the check and by creation."""
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setattr(SHM, "chosen", str(file))
    assert not SHM.check().works
    with pytest.raises(OSError, match=rf"{file} is not a folder; set MSHARE_SHM_DIR") as caught:
        mshare.create(name, 4096, engine="shm")
    assert (caught.value.errno, caught.value.filename) == (errno.ENODEV, name)


def test_folder_that_is_not_writable(name: str, tmp_path: Path, as_nobody: SubPython) -> None:
    """It is the folder that is blamed, with the region's name, also for a region over a file."""
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o700)
    (tmp_path / "content").write_bytes(b"x")
    (tmp_path / "content").chmod(0o644)
    for path in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        path.chmod(path.stat().st_mode | 0o011)
    code = """
name, folder, file = sys.argv[1:]
mshare.engines.by_name("shm").chosen = folder
for how in ({"size": 4096}, {"backing": file}):
    try:
        mshare.create(name, engine="shm", **how)
    except OSError as error:
        print(error.filename == name, error.strerror)
"""
    result = as_nobody(code, name, folder, tmp_path / "content")
    why = f"no permission to write {folder}; as root: install -d -m 1777 {folder}"
    assert result.stdout.splitlines() == [f"True {why}"] * 2, result.stderr


def test_relative_folder(name: str, tmp_path: Path, python: SubPython) -> None:
    """The folder is where it was when mshare was imported, wherever the process goes."""
    code = """
import os, sys
os.chdir(sys.argv[2])
import mshare
from mshare import engines
os.chdir("/")
print(engines.by_name("shm").check().works)
mshare.create(sys.argv[1], 4096, engine="shm")
"""
    result = python(code, name, tmp_path, MSHARE_SHM_DIR="folder")
    assert result.stdout == "True\n", result.stderr
    assert os.listdir(tmp_path / "folder") == [name]


def test_folder_on_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What can be mounted anew is a tmpfs; elsewhere that is no advice."""
    monkeypatch.setattr(SHM, "chosen", str(tmp_path))
    monkeypatch.setattr(shm, "_is_tmpfs", lambda device: False)
    assert [note for note in SHM.check().notes if "mount -o" in note] == []
    assert "not on a tmpfs" in SHM.check().notes[-1]
    monkeypatch.setattr(memory, "available", lambda: Available(1 << 60, "a limit"))
    check = SHM.check(1 << 59)
    assert (check.works, check.cure) == (False, None)


def test_folder_of_somebody_else(
    tmp_path: Path, root: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder whose owner could remove regions is noted."""
    os.chown(tmp_path, 1234, 1234)
    monkeypatch.setattr(SHM, "chosen", str(tmp_path))
    assert any("chown root:root" in note for note in SHM.check().notes)


def test_folder_is_everybodys(name: str) -> None:
    """Any user can make regions, and only owners remove them."""
    mshare.create(name, 4096, engine="shm").close()
    assert os.stat(SHM.directory()).st_mode & 0o7777 == 0o1777


@pytest.mark.parametrize("by", ["path", "pathlike", "descriptor"])
def test_backing(name: str, tmp_path: Path, by: str) -> None:
    """A file is named by path or open descriptor."""
    file = tmp_path / "content"
    file.write_bytes(b"content of the file")
    with file.open("r+b") as opened:
        how = {"path": str(file), "pathlike": file, "descriptor": opened.fileno()}[by]
        with mshare.create(name, backing=how) as region:  # type: ignore[arg-type]
            assert bytes(region) == b"content of the file"
            assert not region.readonly
    (listed,) = (each for each in mshare.list() if each.name == name)
    assert listed.backing == str(file)
    assert listed.size == 19
    assert listed.broken is None


def test_backing_is_chosen_past_hugetlb(name: str, tmp_path: Path) -> None:
    """The best engine that can do what is asked is chosen."""
    file = tmp_path / "content"
    file.write_bytes(b"x")
    with mshare.create(name, backing=file) as region:
        assert region.engine == "shm"


def test_backing_deleted_and_replaced(name: str, tmp_path: Path) -> None:
    """Attachments live on; a new one is ENOENT with the file's path; rm removes the region."""
    file = tmp_path / "content"
    file.write_bytes(b"first")
    with mshare.create(name, backing=file) as region:
        file.unlink()
        assert bytes(region) == b"first"
    with pytest.raises(FileNotFoundError, match=rf"{file} is gone.*mshare rm {name}"):
        mshare.attach(name)
    (listed,) = (each for each in mshare.list() if each.name == name)
    assert listed.broken
    assert str(file) in listed.broken
    with pytest.raises(FileExistsError):
        mshare.create(name, 4096)
    mshare.unlink(name)
    with pytest.raises(FileNotFoundError, match="no such region"):
        mshare.attach(name)


def test_unlink_over_a_file_that_is_gone(name: str, tmp_path: Path) -> None:
    """A region's own unlink removes it when the file is gone, and not one over another file."""
    for file in ("first", "second"):
        (tmp_path / file).write_bytes(b"x")
    old = mshare.create(name, backing=tmp_path / "first", engine="shm")
    mshare.unlink(name)
    new = mshare.create(name, backing=tmp_path / "second", engine="shm")
    with pytest.raises(FileNotFoundError, match="no such region"):
        old.unlink()
    (tmp_path / "second").unlink()
    new.unlink()


@pytest.mark.parametrize("what", ["missing", "folder", "empty", "pipe", "device", "deleted", "fd"])
def test_bad_backing(name: str, tmp_path: Path, what: str) -> None:
    """Only a regular file with content and a path can be a region."""
    path: str | int = str(tmp_path / "content")
    wanted, code = "file", errno.EINVAL
    match what:
        case "missing":
            code = errno.ENOENT
        case "folder":
            path, wanted = str(tmp_path), "regular"
        case "empty":
            Path(str(path)).touch()
            wanted = "empty"
        case "pipe":
            os.mkfifo(str(path))
            wanted = "regular"
        case "device":
            path, wanted = "/dev/zero", "regular"
        case "deleted":
            path, wanted = os.memfd_create("content"), "no path"
            os.write(path, b"x")
        case "fd":
            path, code = 9999, errno.EBADF
    with pytest.raises(OSError, match=wanted) as caught:
        mshare.create(name, backing=path)
    assert caught.value.errno == code
    assert name not in {region.name for region in mshare.list()}


def test_backing_has_its_own_size_and_mode(name: str, tmp_path: Path) -> None:
    """Size and mode are the file's, so giving them is EINVAL."""
    file = tmp_path / "content"
    file.write_bytes(b"x" * 4096)
    file.chmod(0o604)
    for size, mode in ((4096, None), (None, 0o600)):
        with pytest.raises(ValueError, match="leave them out"):
            mshare.create(name, size, mode, backing=file)
    with mshare.create(name, backing=file) as region:
        assert region.mode == 0o604


def test_pages_are_there_from_the_start(name: str) -> None:
    """All memory is reserved at creation, so no later SIGBUS."""
    with mshare.create(name, "16M", engine="shm") as region:
        assert region.stat().resident == 16 << 20


_HUGE = """
import mshare, sys
from mshare.engines.shm import Shm
with mshare.create("huge", "4M", engine="shm") as region:
    region.asarray()[:] = 7
    maps = open("/proc/self/smaps").read().split(f"{region.address:x}-")[1]
    print(next(line.split()[1] for line in maps.splitlines() if "ShmemPmdMapped" in line))
print(any("huge=advise" in note for note in Shm().check().notes))
"""


@pytest.mark.parametrize(
    ("option", "mapped", "noted"),
    [("advise", 4096, False), ("always", 4096, False), ("never", 0, True)],
)
def test_huge_pages(
    root: None, python: SubPython, tmp_path: Path, option: str, mapped: int, noted: bool
) -> None:
    """Where the tmpfs allows huge pages a region has them, and where not the doctor says how."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"huge={option}", "tmpfs", tmp_path], check=True)
    try:
        result = python(_HUGE, MSHARE_SHM_DIR=str(tmp_path))
        assert result.stdout.split() == [str(mapped), str(noted)], result.stderr
    finally:
        subprocess.run(["umount", tmp_path], check=True)
