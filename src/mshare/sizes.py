"""Sizes in bytes, read from and shown to people."""

from __future__ import annotations

import errno
import operator
from typing import SupportsIndex

from mshare.errors import invalid

PAGE_SIZE = 4096
HUGE_PAGE = 2 << 20
"""Bytes one PMD entry covers: a huge page, or one page of PTEs."""
SLOT_SIZE = 1 << 30
"""Bytes one PUD entry covers: the unit in which page tables are shared."""
MAX_SIZE = 1 << 46
"""Bytes in half a process's address space on x86-64 with four-level tables."""

_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40, "P": 50}


def parse_size(size: SupportsIndex | str) -> int:
    """Bytes from an integer or a string such as ``"4096"``, ``"4G"``, ``"1.5 GiB"``.

    Units are powers of 1024: K, M, G, T, P, each also as KiB or KB.

    :raises TypeError: neither an integer nor a string.
    :raises InvalidValue: EINVAL when it is not a size, or not positive.
    """
    if isinstance(size, str):
        number = _bytes(size)
    elif isinstance(size, bool):
        raise TypeError("a size is an integer or a string, not bool")
    else:
        try:
            number = operator.index(size)
        except TypeError:
            message = f"a size is an integer or a string, not {type(size).__name__}"
            raise TypeError(message) from None
    if number <= 0:
        raise invalid("a size is a positive number of bytes", size)
    return number


def parse_offset(offset: str) -> int:
    """Bytes from a string as for :func:`parse_size`, or 0.

    :raises InvalidValue: EINVAL when it is not a size, or negative.
    """
    number = _bytes(offset)
    if number < 0:
        raise invalid("an offset is 0 or more bytes", offset)
    return number


def _bytes(size: str) -> int:
    text = size.strip().upper()
    digits = text.rstrip("KMGTPIB ")
    unit = text[len(digits) :].strip()
    prefix = unit.removesuffix("B").removesuffix("I")
    try:
        value = int(digits) if digits.isascii() and digits.isdigit() else float(digits)
        number = value * (1 << _UNITS[prefix])
        if number != int(number):
            raise ValueError
    except (ValueError, KeyError, OverflowError):
        raise invalid("not a size; write bytes, or a number and K, M, G, T or P", size) from None
    return int(number)


def region_size(size: SupportsIndex | str) -> int:
    """Bytes of a region from ``size``, checked as every engine would.

    :raises InvalidValue: EINVAL when it is not whole pages; EFBIG when no process could map it.
    """
    number = parse_size(size)
    if number > MAX_SIZE:
        raise invalid(f"larger than a process can map ({human(MAX_SIZE)})", size, errno.EFBIG)
    if number % PAGE_SIZE:
        whole = round_up(number, PAGE_SIZE)
        raise invalid(f"a region is whole pages of {PAGE_SIZE} bytes; the next is {whole}", size)
    return number


def round_up(size: int, granule: int) -> int:
    """``size`` up to the next multiple of ``granule``, both in bytes."""
    return -(-size // granule) * granule


def human(size: float) -> str:
    """``size`` bytes for people: ``"1.5 GiB"``, exact below 1 KiB."""
    units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]
    while abs(size) >= 1024 and len(units) > 1:
        size /= 1024
        del units[0]
    return f"{size:.0f} {units[0]}" if size == int(size) else f"{size:.1f} {units[0]}"
