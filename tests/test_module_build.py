"""The module builds for both kernels without a warning of the compiler or of sparse."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from mshare.lab import kernels
from mshare.lab.build import find_sources
from mshare.lab.packages import SERIES
from tests.conftest import skip

TEXT_LIMIT = 64 << 10


@pytest.mark.parametrize("series", SERIES)
def test_no_warning(series: str, tmp_path: Path) -> None:
    """Built with W=1 and C=2 it says nothing, and what stays of it in memory is at most 64 KiB.

    Code, constants, unwind tables and symbol versions; not the types for debuggers (BTF), which
    are there only where the kernel's are at hand.
    """
    try:
        build = kernels.find_kernel(series).build
    except OSError as error:
        skip(f"kernel {series}: {error}")
    if build is None or not shutil.which("make") or not shutil.which("sparse"):
        skip(f"needs make, sparse and the headers of kernel {series}")
    folder = tmp_path / "kmod"
    shutil.copytree(find_sources(), folder)
    done = subprocess.run(
        ["make", "-C", str(build), f"M={folder}", "W=1", "C=2", "modules"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "BTF" not in line]
    assert not lines, done.stderr
    module = str(folder / "mshare.ko")
    text = sizes(module)[1].split()[0]
    types = sum(int(line.split()[1]) for line in sizes("-A", module) if line.startswith(".BTF"))
    assert int(text) - types <= TEXT_LIMIT


def sizes(*words: str) -> list[str]:
    """Lines of size(1)."""
    run = subprocess.run(["size", *words], capture_output=True, text=True, check=True)
    return run.stdout.splitlines()
