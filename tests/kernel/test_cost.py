"""What is reckoned, advised and shown about regions of msharefs, against the module."""

from __future__ import annotations

import json

import pytest

import mshare
from mshare import advice, cost, watch
from mshare.cli import main
from mshare.engines.msharefs import info
from mshare.sizes import PAGE_SIZE
from tests.measured import measured

SIZE = 128 << 20
RETRIED = SIZE // PAGE_SIZE // 100
"""Faults that may have to be tried again, which counts again, on a busy machine."""


@pytest.mark.parametrize("how", ["read", "write"])
def test_msharefs_costs_what_is_planned(name: str, how: str) -> None:
    """One set of tables per view, 12 KiB in each process, faults for the first reader alone."""
    planned = cost.plan(SIZE, 3, writing=how == "write")[0]
    assert planned.engine == "msharefs"
    with mshare.create(name, SIZE) as region:
        region.asarray()[:] = 1
        filled = info(region.fileno())
        assert filled.pagetable_bytes == cost.tables(SIZE) + cost.REGION
        assert 0 <= filled.faults - SIZE // PAGE_SIZE <= RETRIED
        with measured(name, "msharefs", how, 3) as (first, *others):
            for process in (first, *others):
                assert process.vmpte == planned.vmpte == planned.per_process == cost.WINDOW
            expected = planned.faults_first if how == "read" else 0
            assert 0 <= first.faults - expected <= 2
            assert [process.faults for process in others] == [planned.faults_further] * 2
            assert info(region.fileno()).pagetable_bytes == planned.once


def test_top_shows_the_counters(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Attachments, page tables and faults of a region are the kernel's, and go as it goes."""
    with mshare.create(name, SIZE) as region:
        before = watch.snapshot()
        region.asarray()[:] = 1
        after = watch.snapshot()
        (found,) = (each for each in after.regions if each.name == name)
        counters = info(region.fileno())
        assert (found.size, found.attachments) == (SIZE, counters.attachments)
        assert found.page_tables == counters.pagetable_bytes
        assert found.faults == counters.faults >= SIZE // PAGE_SIZE
        rate = watch.rates(before, after)[name, "msharefs"].faults
        assert rate
        faults = round(rate * (after.taken - before.taken))
        assert 0 <= faults - SIZE // PAGE_SIZE <= RETRIED
        assert main(["top", "--once", "--interval", "0.1", "--json"]) == 0
        shown = json.loads(capsys.readouterr().out)["regions"]
        (row,) = (row for row in shown if row["name"] == name)
        assert row["page_table_bytes"] == counters.pagetable_bytes
        assert row["faults_per_second"] == 0
        assert main(["export"]) == 0
        line = f'mshare_region_faults_total{{engine="msharefs",region="{name}"}} {found.faults}.0'
        assert line in capsys.readouterr().out
    mshare.unlink(name)
    assert name not in [each.name for each in watch.snapshot().regions]


def test_regions_need_no_advice(name: str) -> None:
    """What is a region already is not advised to become one, unlike the same on shm."""
    mshare.create(name, SIZE).close()
    with measured(name, "msharefs", "read", 3):
        assert name not in str(advice.scan(PAGE_SIZE))
    mshare.unlink(name)
    with mshare.create(name, SIZE, engine="shm") as region:
        region.asarray()[:] = 1
        with measured(name, "shm", "read", 3):
            (found,) = (each for each in advice.scan(PAGE_SIZE).targets if name in each.path)
            assert found.saves > cost.tables(SIZE)
            assert "mshare module load" in found.change
