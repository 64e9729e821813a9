"""The examples run, check their own figures, and say that they did what they are for."""

from __future__ import annotations

import gc
import importlib.util
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
    "array_arrow": "no byte was copied of what is not compressed",
    "array_npy": "found in all ways",
    "array_torch": "every epoch read the same",
}
"""The last line of each."""
NEEDS = {"array_torch": "torch"}
"""What is too large to come along with the tests: those examples run where it is installed."""
RUN = [name for name in WANTED if name not in NEEDS or importlib.util.find_spec(NEEDS[name])]


def names() -> list[str]:
    """The regions that examples make."""
    return [each.name for each in mshare.list() if each.name.startswith(("share-", "prices"))]


@pytest.mark.parametrize("example", RUN)
def test_example(example: str) -> None:
    """It ends well, warns of nothing, and leaves no region."""
    gc.collect()
    before = names()
    source = os.path.dirname(os.path.dirname(mshare.__file__))
    result = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / f"{example}.py")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([source, *sys.path[1:]])},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    *figures, last = result.stdout.splitlines()
    assert last == WANTED[example]
    assert any("not saved" in line or "np.load " in line for line in figures)
    assert names() == before


def test_every_example_is_known() -> None:
    """Each example in Python is run here, if what it needs is installed."""
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(WANTED)
