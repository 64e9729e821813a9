"""Kernel images: the release in a bzImage, and the ELF file packed in it.

An emulated processor takes seconds to unpack an xz image; this machine does it once.
Offsets are those of Documentation/arch/x86/boot.rst.
"""

from __future__ import annotations

import errno
import hashlib
import lzma
import os
import struct
from pathlib import Path

#: The ELF note that lets QEMU start the unpacked kernel (PVH): name size 4, any size, type 18.
_PVH_NOTES = tuple(struct.pack("<III", 4, size, 18) + b"Xen\0" for size in (4, 8))


def cache_dir() -> Path:
    """``$XDG_CACHE_HOME/mshare`` or ``~/.cache/mshare``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mshare"


def image_release(image: Path) -> str:
    """The release written in the header of a bzImage (Documentation/arch/x86/boot.rst)."""
    try:
        with image.open("rb") as file:
            head = file.read(0x10000)
    except PermissionError:
        raise PermissionError(
            errno.EACCES,
            "the lab reads the kernel image as you; allow it with: sudo chmod a+r",
            str(image),
        ) from None
    if len(head) < 0x210 or head[0x202:0x206] != b"HdrS":
        raise ValueError(f"{image}: not a Linux bzImage")
    (offset,) = struct.unpack_from("<H", head, 0x20E)
    text = head[offset + 0x200 :].split(b"\0", 1)[0]
    return text.split(b" ", 1)[0].decode()


def boot_image(image: Path) -> Path:
    """The image, or its unpacked form in the cache where that boots faster."""
    with image.open("rb") as file:
        head = file.read(0x10000)
        setup_sectors = head[0x1F1] or 4
        offset, length = struct.unpack_from("<II", head, 0x248)
        file.seek((setup_sectors + 1) * 512 + offset)
        packed = file.read(length)
    if not packed.startswith(b"\xfd7zXZ\0"):
        return image
    name = f"{image_release(image)}-{hashlib.sha256(packed).hexdigest()[:16]}"
    target = cache_dir() / "images" / name
    if target.exists():
        return target
    try:
        data = lzma.LZMADecompressor().decompress(packed)
    except lzma.LZMAError:
        return image
    if not data.startswith(b"\x7fELF") or not any(note in data for note in _PVH_NOTES):
        return image
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{name}.{os.getpid()}")
    scratch.write_bytes(data)
    scratch.replace(target)
    return target
