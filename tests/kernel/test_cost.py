"""The arithmetic of costs against the module: ``mshare.cost``, small."""

from __future__ import annotations

import pytest

import mshare
from mshare import cost
from mshare.engines.msharefs import info
from mshare.sizes import PAGE_SIZE
from tests.measured import measured

SIZE = 128 << 20


@pytest.mark.parametrize("how", ["read", "write"])
def test_msharefs_costs_what_is_planned(name: str, how: str) -> None:
    """One set of tables per view, 12 KiB in each process, faults for the first process alone."""
    planned = cost.plan(SIZE, 3, writing=how == "write")[0]
    assert planned.engine == "msharefs"
    with mshare.create(name, SIZE) as region:
        region.asarray()[:] = 1
        filled = info(region.fileno())
        with measured(name, "msharefs", how, 3) as (first, *others):
            for process in (first, *others):
                assert process.vmpte == planned.vmpte == cost.WINDOW
            expected = planned.faults_first if how == "read" else 0
            assert 0 <= first.faults - expected <= 2
            assert [process.faults for process in others] == [planned.faults_further] * 2
            once = info(region.fileno()).pagetable_bytes
            assert abs(once - planned.once) <= 2 * PAGE_SIZE
        assert abs(filled.pagetable_bytes - cost.tables(SIZE)) <= 3 * PAGE_SIZE
