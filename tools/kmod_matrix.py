"""Compile the module against every 6.1 and 6.12 header package of the archive, without a warning.

``python tools/kmod_matrix.py`` fetches the packages that are not installed into the cache (it
installs nothing and needs no root), builds with W=1 and sparse for each, runs checkpatch over the
source, and prints a table; ``--write`` puts that into docs/kernels.md. 1 when anything complains.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from mshare.lab import kernels
from mshare.lab.images import cache_dir
from mshare.lab.packages import SERIES, version_key

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/kernels.md"
CHECKPATCH = ("checkpatch.pl", "const_structs.checkpatch", "spelling.txt")
SOURCE_SERIES = SERIES[0]
EXCUSED = {
    "compat.h": "LINUX_VERSION_CODE",
    "trace.h": "OPEN_ENDED_LINE,PARENTHESIS_ALIGNMENT",
}
"""What checkpatch may not ask for: no test of the version, another shape of tracing macros."""
NOISE = re.compile(r"BTF|^make\[|^$")
"""What make prints that is about neither the module nor its source."""


class Build(NamedTuple):
    """What came of one kernel."""

    release: str
    facts: list[str]
    warnings: list[str]
    text: int
    lab: bool


def run(command: list[str], folder: Path = ROOT) -> str:
    """Output of a command that must not fail."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stdout}{done.stderr}")
    return done.stdout


def releases() -> list[str]:
    """Every release of the series with a header package, oldest first."""
    series = "|".join(re.escape(name) for name in SERIES)
    found = run(
        ["apt-cache", "search", "--names-only", rf"^linux-headers-({series})\.[0-9].*-amd64$"]
    )
    names = [line.split(" ", 1)[0].removeprefix("linux-headers-") for line in found.splitlines()]
    return sorted(names, key=lambda name: (version_key(name.split("-amd64")[0]), name))


def unpack(package: str, root: Path) -> None:
    """Have the content of a package below ``root``, fetched once."""
    stamp = root / f".{package}"
    if stamp.exists():
        return
    with tempfile.TemporaryDirectory(dir=root) as name:
        run(["apt-get", "--quiet", "--quiet", "download", package], Path(name))
        (file,) = Path(name).glob("*.deb")
        run(["dpkg-deb", "--extract", str(file), str(root)])
    stamp.touch()


def headers(release: str) -> Path:
    """Where modules for a kernel are built: its headers, installed or fetched."""
    installed = Path(f"/usr/src/linux-headers-{release}")
    if (installed / "Makefile").exists():
        return installed
    root = cache_dir() / "headers"
    root.mkdir(parents=True, exist_ok=True)
    package = f"linux-headers-{release}"
    depends = run(["apt-cache", "depends", package])
    for name in (
        package,
        *re.findall(r"Depends: (linux-(?:headers-.*-common.*|kbuild-.*))", depends),
    ):
        unpack(name, root)
    folder = root / "usr/src" / package
    makefile = folder / "Makefile"
    # it includes the common one by the path of an installed package
    makefile.write_text(
        re.sub(r"^include /usr/src", f"include {root}/usr/src", makefile.read_text())
    )
    return folder


def facts(config: str) -> list[str]:
    """What the module's code depends on, in this configuration."""

    def on(symbol: str) -> bool:
        return f"\nCONFIG_{symbol}=y\n" in config

    def number(symbol: str) -> int:
        match = re.search(rf"^CONFIG_{symbol}=(\d+)$", config, re.M)
        return int(match[1]) if match else 0

    split = on("SPLIT_PTE_PTLOCKS") and on("SPLIT_PMD_PTLOCKS")
    if not split and number("SPLIT_PTLOCK_CPUS"):
        enough = number("NR_CPUS") >= number("SPLIT_PTLOCK_CPUS")
        split = enough and on("ARCH_ENABLE_SPLIT_PMD_PTLOCK")
    models = {"PREEMPT_RT": "real time", "PREEMPT_DYNAMIC": "dynamic", "PREEMPT": "full"}
    return [
        "yes" if split else "no",
        "yes" if on("PER_VMA_LOCK") else "no",
        "yes" if on("TRANSPARENT_HUGEPAGE") else "no",
        next((name for symbol, name in models.items() if on(symbol)), "voluntary"),
        "yes" if on("X86_KERNEL_IBT") else "no",
        "yes" if on("KPROBES") else "no",
    ]


def build(release: str, source: Path) -> Build:
    """Build for one kernel, with the warnings of the compiler, sparse and modpost."""
    folder = headers(release)
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name) / "kmod"
        shutil.copytree(source, copy, ignore=shutil.ignore_patterns("*.o", "*.ko", "*.mod*", ".*"))
        done = subprocess.run(
            [
                "make",
                "-C",
                str(folder),
                f"M={copy}",
                "W=1",
                "C=2",
                f"-j{os.cpu_count() or 1}",
                "modules",
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        warnings = [
            line.replace(f"{copy}/", "kmod/")
            for line in done.stderr.splitlines()
            if not NOISE.search(line)
        ]
        text = 0
        if done.returncode:
            warnings = warnings or [f"make ended with {done.returncode}"]
        else:
            text = int(run(["size", str(copy / "mshare.ko")]).splitlines()[1].split()[0])
    config = (folder / ".config").read_text()
    return Build(release, facts(config), warnings, text, release in lab_releases())


def lab_releases() -> list[str]:
    """The releases that ``make kernel`` boots on this machine."""
    images = (kernels.newest_image(series) for series in SERIES)
    return [image.name.removeprefix("vmlinuz-") for image in images if image]


def checkpatch() -> Path:
    """The kernel's style checker, out of linux-source, installed or fetched."""
    folder = cache_dir() / "checkpatch"
    if not (folder / CHECKPATCH[-1]).exists():
        name = f"linux-source-{SOURCE_SERIES}"
        tarball = Path(f"/usr/src/{name}.tar.xz")
        with tempfile.TemporaryDirectory() as root:
            if not tarball.exists():
                unpack(name, Path(root))
                tarball = Path(root) / f"usr/src/{name}.tar.xz"
            folder.mkdir(parents=True, exist_ok=True)
            members = [f"{name}/scripts/{file}" for file in CHECKPATCH]
            run(["tar", "-xf", str(tarball), "-C", str(folder), "--strip-components=2", *members])
    return folder / CHECKPATCH[0]


def style(source: Path) -> list[str]:
    """What checkpatch says about the source, in its strict mode."""
    options = ["--strict", "--no-tree", "--terse", "--no-summary", "--show-types"]
    lines: list[str] = []
    for path in sorted(source.glob("*.[ch]")):
        excused = ["--ignore", EXCUSED[path.name]] if path.name in EXCUSED else []
        command = ["perl", str(checkpatch()), *options, *excused, "--file", path.name]
        done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
        said = [line for line in (done.stdout + done.stderr).splitlines() if line]
        if done.returncode and not said:
            said = [f"{path.name}: checkpatch ended with {done.returncode}"]
        lines += said
    return lines


def table(builds: Iterable[Build]) -> str:
    """The builds as a table in Markdown."""
    rows = [
        "kernel|split locks|VMA locks|huge pages|preemption|IBT|kprobes|built|warnings|code|lab",
        "---|---|---|---|---|---|---|---|---:|---:|---",
    ]
    for one in builds:
        built = "yes" if one.text else "no"
        size = f"{one.text / 1024:.1f} KiB"
        lab = "tested" if one.lab else ""
        rows.append("|".join([one.release, *one.facts, built, str(len(one.warnings)), size, lab]))
    return "\n".join(rows)


def count(number: int, what: str) -> str:
    """Number and noun."""
    return f"{number} {what}" + ("" if number == 1 else "s")


def excused() -> str:
    """The exceptions for checkpatch, in words."""
    told = [f"`{types.replace(',', '`, `')}` in `{file}`" for file, types in EXCUSED.items()]
    return f"Not asked for: {'; '.join(told)}"


def page(builds: list[Build], complaints: int) -> str:
    """docs/kernels.md."""
    compiler = run(["gcc-12", "-dumpfullversion"]).strip()
    sparse = run(["sparse", "--version"]).strip()
    return f"""# Kernels

Made by `make kmod-matrix` on {time.strftime("%Y-%m-%d", time.gmtime())}, with gcc {compiler} and \
sparse {sparse}. It compiles the module against
every 6.1 and 6.12 header package that the archive has, with `W=1` and sparse, and runs
`checkpatch.pl --strict` over the source: {count(complaints, "complaint")}. ({excused()}.)

{table(builds)}

- *split locks*: page-table locks that belong to the table. The module does not build without.
- *VMA locks*: a fault may hold the lock of the mapping instead of the mmap_lock.
- *huge pages*: the kernel has transparent ones.
- *IBT*: the kernel checks indirect branches.
- *kprobes*: how the module finds `mm_alloc`. It does not load without.
- *code*: text of `mshare.ko`.
- *lab*: `make kernel` boots this one and runs the tests of the module. The others are
  compiled only.
"""


def main() -> int:
    """Build for each kernel; 1 when something complains."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, default=ROOT / "kmod", help="the module")
    parser.add_argument("--kernel", action="append", help="this release alone; may be repeated")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    args = parser.parse_args()
    source = args.source.resolve()
    complaints = style(source)
    print(*complaints, f"checkpatch: {count(len(complaints), 'complaint')}", sep="\n", flush=True)
    builds = []
    for release in args.kernel or releases():
        start = time.monotonic()
        one = build(release, source)
        builds.append(one)
        print(*one.warnings, sep="\n", end="\n" if one.warnings else "")
        seconds = time.monotonic() - start
        print(
            f"{release}: {count(len(one.warnings), 'line')} of warnings, {seconds:.0f} s",
            flush=True,
        )
    if not builds:
        sys.exit("apt knows no header packages; try: apt-get update")
    print(table(builds))
    bad = bool(complaints) or any(one.warnings or not one.text for one in builds)
    if args.write and not bad:
        PAGE.write_text(page(builds, len(complaints)))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
