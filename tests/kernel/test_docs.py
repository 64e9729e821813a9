"""The shell blocks of the documentation that need root and the module."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import mshare
from tests import shown

HUGE_PAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")


@pytest.fixture
def huge_pages() -> Iterator[None]:
    """Afterwards there are as many huge pages as before."""
    pages = HUGE_PAGES.read_text()
    yield
    HUGE_PAGES.write_text(pages)


@pytest.mark.parametrize("page", shown.pages("lab"), ids=lambda page: page.name)
def test_shell_runs(page: Path, huge_pages: None, tmp_path: Path) -> None:
    """The commands of a page, in order, end well and print what is shown."""
    try:
        shown.run(page, "lab", tmp_path)
    finally:
        for name in shown.named(page):
            mshare.unlink(name)
