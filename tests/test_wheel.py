"""What is installed without a checkout has what is compiled on the user's machine."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parents[1]
BUILD = """
import mshare.preload, mshare.lab.build
print(mshare.__file__)
print(mshare.lab.build.find_sources())
print(mshare.preload.build())
"""


def test_sources_are_installed(tmp_path: Path) -> None:
    """The module's, all of them, and those of ``mshare run``, which builds from them."""
    wheel = next(WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"]))
    zipfile.ZipFile(wheel).extractall(tmp_path)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "c")}
    run = subprocess.run(
        [sys.executable, "-c", BUILD], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    package, sources, library = map(Path, run.stdout.splitlines())
    assert package == tmp_path / "mshare" / "__init__.py"
    assert sources == tmp_path / "mshare" / "kmod"
    tracked = subprocess.check_output(["git", "ls-files", "kmod"], cwd=ROOT, text=True)
    assert {path.name for path in sources.iterdir()} >= {
        Path(line).name for line in tracked.splitlines()
    }
    assert library.is_relative_to(tmp_path / "c")
