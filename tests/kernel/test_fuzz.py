"""Random calls of a user without rights; ``tests/security`` has the program, and the long run."""

from __future__ import annotations

import os
import time

from tests.security.run_fuzz import fuzz

CALLS = int(os.environ.get("MSHARE_FUZZ_CALLS", "8000"))


def test_random_calls() -> None:
    """Nothing is left of them; that nothing is in the kernel log is for the lab to see."""
    seed = int(time.time())
    print(f"seed {seed}")
    print(fuzz(CALLS, seed))
