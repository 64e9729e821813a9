"""Each detector finds the bug that is planted for it, and nothing where there is none."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mshare.lab import EXIT_REPORT
from tests.detectors.plants import trigger

#: The races that are looked for are few among all accesses: look at more of them.
KCSAN = "kcsan.skip_watch=100"

PLANTED = [
    ("FREED_TABLE", "BUG: KASAN: use-after-free in "),
    ("LOCK_ORDER", "WARNING: possible circular locking dependency detected"),
    ("SLEEP", "BUG: sleeping function called from invalid context at "),
]


@pytest.mark.parametrize("kernel", ["debug-6.12", "debug-6.1"])
@pytest.mark.parametrize(("bug", "title"), PLANTED)
def test_found(kernel: str, bug: str, title: str, tmp_path: Path) -> None:
    """A layout change with the bug in it is reported as what it is."""
    result = trigger(kernel, "layout_change", tmp_path, bug)
    assert result.status == EXIT_REPORT, result.reason + result.tail()
    assert title in result.reports[0].title
    print(result.reports[0].title)


@pytest.mark.parametrize("kernel", ["debug-6.12", "debug-6.1"])
def test_nothing_found_without_a_bug(kernel: str, tmp_path: Path) -> None:
    """The same without one is clean."""
    result = trigger(kernel, "layout_change", tmp_path, "NOTHING")
    assert result.status == 0, result.reason + result.tail()
    assert result.stdout == b"done\n"


def test_race_found(tmp_path: Path) -> None:
    """What all guests write, written under the lock of each, is a data race."""
    result = trigger("kcsan-6.12", "attaches", tmp_path, "UNLOCKED", KCSAN)
    assert result.status == EXIT_REPORT, result.reason + result.tail()
    side = r"mshare_graft(_all)?(\+\S+)? \[mshare\]"
    title = result.reports[0].title
    # without the other side where KCSAN has only seen the value change
    assert re.fullmatch(f"BUG: KCSAN: data-race in {side}( / {side})?", title), title


def test_no_race_found_without_a_bug(tmp_path: Path) -> None:
    """The same with atomic operations is clean."""
    result = trigger("kcsan-6.12", "attaches", tmp_path, "NOTHING", KCSAN)
    assert result.status == 0, result.reason + result.tail()
    assert result.stdout == b"done\n"
