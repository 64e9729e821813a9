"""The examples run, and say that they did what they are for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import mshare

EXAMPLES = Path(__file__).parent.parent / "examples"
WANTED = {
    "array_pool": "the sum is right",
    "array_joblib": "the image is smooth",
    "array_arrow": "no byte was copied",
    "array_npy": "found all four",
}


def names() -> list[str]:
    """The regions that examples make."""
    return [each.name for each in mshare.list() if each.name.startswith(("share-", "prices"))]


@pytest.mark.parametrize("example", WANTED)
def test_example(example: str) -> None:
    """It ends well, warns of nothing, and leaves no region."""
    before = names()
    source = os.path.dirname(os.path.dirname(mshare.__file__))
    result = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / f"{example}.py")],
        env={**os.environ, "PYTHONPATH": source},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert result.stdout.strip() == WANTED[example]
    assert names() == before


def test_every_example_is_run() -> None:
    """Each example in Python is run here."""
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(WANTED)
