"""Which kernel to boot: its image, its headers and its modules.

A kernel is named by its series (``6.1``, ``6.12``: the newest installed ABI is taken), by the name
of one with detectors that ``make lab-kernels`` built (``debug-6.12``), or by a path: a bzImage, or
the top of a kernel build tree.
"""

from __future__ import annotations

import errno
import lzma
import subprocess
from dataclasses import dataclass
from pathlib import Path

from mshare.lab.images import cache_dir, image_release
from mshare.lab.packages import SERIES, apt_command, kernel_packages, version_key

BOOT = Path("/boot")
MODULES = Path("/lib/modules")

#: What the guest needs to see the host, as ``(module, configuration symbol)``.
NEEDED = (
    ("virtio_pci", "VIRTIO_PCI"),
    ("virtio_console", "VIRTIO_CONSOLE"),
    ("9pnet_virtio", "NET_9P_VIRTIO"),
    ("9p", "9P_FS"),
    ("overlay", "OVERLAY_FS"),
)
NEEDED_FOR_DISKS = (
    ("virtio_blk", "VIRTIO_BLK"),
    ("crc32c-intel", "CRYPTO_CRC32C_INTEL"),
    ("ext4", "EXT4_FS"),
)


@dataclass(frozen=True)
class Kernel:
    """A bootable kernel; ``build`` is where modules for it are built, if that is known."""

    release: str
    image: Path
    build: Path | None
    modules: Path | None

    @property
    def series(self) -> str:
        """``6.1`` of ``6.1.0-56-amd64``."""
        return ".".join(self.release.split(".")[:2])


def find_kernel(name: str | None = None) -> Kernel:
    """The kernel called ``name``; ``None`` is the newest installed series of :data:`SERIES`.

    :raises FileNotFoundError: none installed; the message has the command that installs it.
    :raises PermissionError: the image is not readable.
    :raises ValueError: the file is not a kernel.
    """
    if name is None:
        installed = (newest_image(series) for series in SERIES)
        image = next((image for image in installed if image), None)
        kernel = from_image(image) if image else None
        name = SERIES[0]
    elif "/" in name or Path(name).exists():
        path = Path(name).resolve()
        if not path.exists():
            raise FileNotFoundError(errno.ENOENT, "no kernel image or build tree there", name)
        kernel = from_tree(path) if path.is_dir() else from_image(path)
    elif (tree := cache_dir() / "kernels" / name / ".done").exists():
        kernel = from_tree(tree.parent)
    else:
        image = newest_image(name)
        kernel = from_image(image) if image else None
    if kernel is None and name[:1].isalpha():
        raise FileNotFoundError(errno.ENOENT, f"no such kernel; try: tools/lab-kernel {name}", name)
    if kernel is None:
        raise FileNotFoundError(
            errno.ENOENT,
            f"no such kernel is installed; try: {apt_command(kernel_packages(name))}",
            f"{BOOT}/vmlinuz-{name}.*-amd64",
        )
    return kernel


def newest_image(series: str) -> Path | None:
    """The newest ``vmlinuz`` in ``/boot`` of a series, or of exactly that release."""
    exact = BOOT / f"vmlinuz-{series}"
    if exact.exists():
        return exact
    images = [
        path
        for path in BOOT.glob(f"vmlinuz-{series}.*-amd64")
        if "-rt-" not in path.name and "-cloud-" not in path.name
    ]
    return max(images, key=lambda path: version_key(path.name), default=None)


def from_image(image: Path) -> Kernel:
    """The kernel in a bzImage, with the modules and headers installed for its release."""
    release = image_release(image)
    modules = MODULES / release
    build = modules / "build"
    return Kernel(
        release=release,
        image=image,
        build=build.resolve() if (build / "Makefile").exists() else None,
        modules=modules if (modules / "modules.dep").exists() else None,
    )


def from_tree(tree: Path) -> Kernel:
    """The kernel built in ``tree``; what the guest needs must be built in, not modules."""
    image = tree / "arch/x86/boot/bzImage"
    release = tree / "include/config/kernel.release"
    for path in (image, release):
        if not path.exists():
            raise FileNotFoundError(errno.ENOENT, "not a built kernel tree: missing", str(path))
    config = (tree / ".config").read_text().splitlines()
    missing = [symbol for _, symbol in NEEDED if f"CONFIG_{symbol}=y" not in config]
    if missing:
        raise ValueError(f"{tree}: the lab needs these built in (=y): {' '.join(missing)}")
    return Kernel(release.read_text().strip(), image, tree, None)


def needed_modules(kernel: Kernel, disks: bool) -> list[tuple[str, bytes]]:
    """Name and content of the modules the guest loads first, in the order to load them.

    :raises FileNotFoundError: the kernel has such a module neither built in nor as a file.
    """
    if kernel.modules is None:
        return []
    wanted = NEEDED + (NEEDED_FOR_DISKS if disks else ())
    builtin = {_stem(line) for line in _lines(kernel.modules / "modules.builtin")}
    depends: dict[str, list[str]] = {}
    for line in _lines(kernel.modules / "modules.dep"):
        path, _, needs = line.partition(":")
        depends[_stem(path)] = [path, *needs.split()]
    order: list[str] = []
    for name in (module.replace("-", "_") for module, _ in wanted):
        if name in builtin:
            continue
        if name not in depends:
            raise FileNotFoundError(errno.ENOENT, "the kernel lacks a module", name)
        order += [path for path in reversed(depends[name]) if path not in order]
    return [(_stem(path), read_module(kernel.modules / path)) for path in order]


def read_module(path: Path) -> bytes:
    """A module's ELF image, decompressed."""
    data = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(data)
    if path.suffix == ".zst":
        return subprocess.run(["zstd", "-dc"], input=data, capture_output=True, check=True).stdout
    return data


def _stem(path: str) -> str:
    return Path(path).name.split(".", 1)[0].replace("-", "_")


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines()
