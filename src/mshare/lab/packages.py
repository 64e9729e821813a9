"""The Debian packages the lab needs, and the exact command that installs them.

Run as a script, this file prints them all, for ``tools/packages``.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable

#: Kernel series the lab is made for, newest first.
SERIES = ("6.12", "6.1")

#: Everything but the kernels; those carry an ABI number that moves, see :func:`kernel_packages`.
PACKAGES = (
    "qemu-system-x86",
    "busybox-static",
    "make",
    "kmod",
    "e2fsprogs",
    "util-linux",
)


def version_key(text: str) -> list[int]:
    """Order ``6.12.9`` before ``6.12.117``: the numbers of a version, in order."""
    return [int(number) for number in re.findall(r"\d+", text)]


def _available(pattern: str) -> list[str]:
    """Package names known to apt on this machine that match, from its local lists."""
    try:
        done = subprocess.run(
            ["apt-cache", "search", "--names-only", pattern],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.split(" ", 1)[0] for line in done.stdout.splitlines()]


def apt_knows(package: str) -> bool:
    """Whether apt has a package of that name."""
    return package in _available(f"^{re.escape(package)}$")


def kernel_packages(series: str) -> tuple[str, str]:
    """Image and headers package of the newest kernel of ``series`` that apt knows.

    Where apt knows none, the names hold a ``*`` for the ABI number.
    """
    pattern = rf"^linux-image-{re.escape(series)}\.[0-9][^ ]*[0-9]-amd64$"
    names = [name for name in _available(pattern) if "-rt-" not in name and "-cloud-" not in name]
    if not names:
        return f"linux-image-{series}.*-amd64", f"linux-headers-{series}.*-amd64"
    image = max(names, key=version_key)
    return image, image.replace("linux-image-", "linux-headers-", 1)


def apt_command(packages: Iterable[str]) -> str:
    """The one line to type."""
    return "apt-get install --no-install-recommends " + " ".join(
        f"'{name}'" if "*" in name else name for name in packages
    )


def all_packages() -> list[str]:
    """:data:`PACKAGES` and the kernels of every series."""
    return [*PACKAGES, *(name for series in SERIES for name in kernel_packages(series))]


if __name__ == "__main__":
    print(" ".join(all_packages()))
