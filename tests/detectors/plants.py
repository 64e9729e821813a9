"""Boot the lab with a bug planted in the module."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from mshare.lab import Options, Result, kernels, run
from mshare.lab.build import find_sources
from tests.conftest import skip

GIB = 1 << 30


def need(kernel: str) -> None:
    """Skip where the kernel is not built or installed."""
    try:
        kernels.find_kernel(kernel)
    except OSError as error:
        skip(f"kernel {kernel}: {error}")


def sources(folder: Path, bug: str) -> Path:
    """A copy of the module's sources that builds with ``PLANT_bug``."""
    copy = folder / "kmod"
    shutil.copytree(find_sources(), copy)
    with (copy / "Kbuild").open("a") as kbuild:
        kbuild.write(f"ccflags-y += -DMSHARE_PLANT=PLANT_{bug}\n")
    return copy


def trigger(kernel: str, name: str, folder: Path, bug: str, kernel_args: str = "") -> Result:
    """Run one of :mod:`tests.detectors.triggers` over the module with a bug."""
    command = [sys.executable, "-m", "tests.detectors.triggers", name]
    return lab(command, kernel, folder, bug, 2 * GIB, kernel_args)


def lab(
    command: Sequence[str],
    kernel: str,
    folder: Path,
    bug: str,
    memory: int,
    kernel_args: str = "",
) -> Result:
    """Run a command over the module with a bug; ``NOTHING`` is none."""
    need(kernel)
    options = Options(
        kernel=kernel,
        memory=memory,
        timeout=900,
        module=sources(folder, bug),
        disk=GIB,
        swap=GIB // 2,
        kernel_args=kernel_args,
        # no bug that is found there needs two at a time, and debug-6.1 may hang while it boots
        one_thread=kernel.startswith("debug-"),
    )
    return run(command, options)
