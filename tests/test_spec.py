"""The models of the protocol hold, and lose what holds when a step is taken out."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from tests.conftest import skip

ROOT = Path(__file__).parent.parent


def test_models() -> None:
    """Every quick scenario of spec/check.py is as it says."""
    if not shutil.which("spin"):
        skip("SPIN is not installed: apt-get install spin")
    command = [sys.executable, str(ROOT / "spec/check.py"), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("holds") >= 3
    assert done.stdout.count("found") >= 11
