"""The models of the protocol hold, and lose what holds when a step is taken out."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.conftest import skip

ROOT = Path(__file__).parent.parent


def test_models() -> None:
    """Every quick scenario of spec/check.py is as it says, with each invariant broken once."""
    if not shutil.which("spin"):
        skip("SPIN is not installed: apt-get install spin")
    command = [sys.executable, str(ROOT / "spec/check.py"), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=3600)
    assert done.returncode == 0, done.stdout + done.stderr
    table = (ROOT / "docs/how-it-works.md").read_text().split("### What must always hold")[1]
    invariants = set(re.findall(r"^\| (\d) \|", table.split("###")[0], re.M))
    assert len(invariants) == 9
    assert set(re.findall(r"  (\d) found: ", done.stdout)) == invariants
    limits = set(re.findall(r"(BREAK_\w+) .*  found: ", done.stdout))
    assert {"BREAK_PATIENCE", "BREAK_PIN", "BREAK_KEEPS", "BREAK_ASKED", "BREAK_KIND"} <= limits
    races = set(re.findall(r"^seed.pml +(S\d) .* found: ", done.stdout, re.M))
    assert races == {"S1", "S2", "S3", "S4"}
    assert len(re.findall(r"  holds$", done.stdout, re.M)) >= 6
    assert len(re.findall(r"  ends$", done.stdout, re.M)) >= 3


def test_every_step_is_tried() -> None:
    """Each step that a model can leave out, and each process it can add, is in a scenario."""
    check = (ROOT / "spec/check.py").read_text()
    for model in (ROOT / "spec").glob("*.pml"):
        for symbol in re.findall(r"^#ifn?def (BREAK_\w+|WITH_\w+|S\d)$", model.read_text(), re.M):
            assert re.search(rf"\b{symbol}\b", check), (model.name, symbol)
