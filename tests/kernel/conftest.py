"""Tests of the kernel module. They run in the lab: ``mshare lab -- pytest tests/kernel``."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator

import pytest

from tests.conftest import skip
from tests.kernel import abi, fuse

if not os.path.exists(f"{abi.MOUNT}/mshare_info"):
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def path() -> Iterator[str]:
    """A path in msharefs that nobody uses; gone after the test."""
    chosen = f"{abi.MOUNT}/kernel-{uuid.uuid4().hex[:12]}"
    yield chosen
    if os.path.exists(chosen):
        os.unlink(chosen)


@pytest.fixture
def region(path: str) -> Iterator[int]:
    """A descriptor of a region of one slot, all of it anonymous memory."""
    fd = abi.make(path)
    yield fd
    os.close(fd)


@pytest.fixture
def disk(tmp_path: os.PathLike[str]) -> str:
    """A folder on a disk file system."""
    if not os.path.ismount("/mnt/disk"):
        pytest.fail("give the lab a disk: mshare lab --disk 1G")
    folder = f"/mnt/disk/{uuid.uuid4().hex}"
    os.mkdir(folder)
    return folder


@pytest.fixture
def needs_fuse() -> None:
    """The stock kernels have it; a small one with detectors may not."""
    if not fuse.available():
        skip("this kernel has no FUSE")
