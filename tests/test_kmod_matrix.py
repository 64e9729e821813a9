"""tools/kmod_matrix.py finds what the compiler, sparse and checkpatch complain of."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from mshare.lab import kernels
from mshare.lab.images import cache_dir
from tests.conftest import skip

ROOT = Path(__file__).parent.parent
PLANTED = """
static int planted_for_the_compiler;
int planted_for_sparse;

static void __used planted_for_checkpatch(void) {
}
"""


def test_finds_what_is_planted(tmp_path: Path) -> None:
    """One fault for each of the three is found, each once, and the run fails."""
    image = kernels.newest_image("6.12")
    release = image.name.removeprefix("vmlinuz-") if image else "none"
    if not Path(f"/usr/src/linux-headers-{release}").exists() or not shutil.which("sparse"):
        skip("needs sparse and the headers of kernel 6.12")
    style = (cache_dir() / "checkpatch", Path("/usr/src/linux-source-6.12.tar.xz"))
    if not any(path.exists() for path in style):
        skip("needs the package linux-source-6.12")
    source = tmp_path / "kmod"
    shutil.copytree(ROOT / "kmod", source)
    with (source / "main.c").open("a") as file:
        file.write(PLANTED)
    command = [sys.executable, str(ROOT / "tools/kmod_matrix.py"), "--kernel", release]
    command += ["--source", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    found = [line for line in lines if "warning:" in line]
    assert len(found) == 2, done.stdout
    assert any("planted_for_the_compiler" in line for line in found)
    assert any("planted_for_sparse" in line for line in found)
    assert "checkpatch: 1 complaint" in lines, done.stdout
