"""The shell blocks of the documentation that need root and the module."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import mshare
from tests import shown

HUGE_PAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")


def mounts() -> int:
    """How often something is mounted on the folder for huge pages."""
    return Path("/proc/self/mountinfo").read_text().count(" /dev/hugepages ")


@pytest.fixture
def huge_pages() -> Iterator[None]:
    """Afterwards there are as many huge pages, and mounts of them, as before."""
    pages, mounted = HUGE_PAGES.read_text(), mounts()
    yield
    HUGE_PAGES.write_text(pages)
    for _ in range(mounts() - mounted):
        subprocess.run(["umount", "/dev/hugepages"], check=True)


@pytest.mark.parametrize("page", shown.pages("lab"), ids=lambda page: page.name)
def test_shell_runs(page: Path, huge_pages: None, tmp_path: Path) -> None:
    """The commands of a page, in order, end well and print what is shown."""
    try:
        shown.run(page, "lab", tmp_path)
    finally:
        for name in shown.named(page):
            mshare.unlink(name)
