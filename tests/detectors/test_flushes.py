"""With a flush of the TLB taken out, the tests that are for it fail.

Without: they pass, which ``make kernel`` shows. The kernel is a stock one. What a freed page
holds is anybody's, so the machine may also crash in the middle.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from mshare.lab import EXIT_REPORT
from mshare.lab.packages import SERIES
from tests.detectors.plants import GIB, lab

TLB = "tests/kernel/test_tlb.py::"
PROTECT = "tests/kernel/test_protect.py::"
FLUSHES = {
    "NO_HOST_FLUSH": [
        f"{TLB}test_reclaim",
        f"{TLB}test_reclaim_of_a_file",
        f"{TLB}test_migration",
        f"{TLB}test_file_cut_short",
        f"{PROTECT}test_no_store_is_lost_to_writeback",
    ],
    "NO_FREEZE_FLUSH": [f"{PROTECT}test_nobody_writes_who_has_a_cpu_alone"],
    "NO_GUEST_FLUSH": [
        f"{TLB}test_thread_of_a_detached_window[unmapped]",
        f"{TLB}test_thread_of_a_detached_window[mapped over]",
    ],
}


@pytest.mark.parametrize("kernel", SERIES)
@pytest.mark.parametrize(
    ("bug", "test"), [(bug, test) for bug, tests in FLUSHES.items() for test in tests]
)
def test_missed(kernel: str, bug: str, test: str, tmp_path: Path) -> None:
    """The test fails, and its process may crash after that; or the machine does."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", test]
    result = lab(command, kernel, tmp_path, bug, 3 * GIB)
    output = result.stdout.decode(errors="replace")
    if result.status == EXIT_REPORT:
        assert result.reports
    else:
        assert result.status in (1, 128 + signal.SIGSEGV), result.reason + output
        assert "= FAILURES =" in output
