"""Sizes and names as people write them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from mshare.names import check_name
from mshare.sizes import human, parse_offset, parse_size, region_size, round_up


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("4096", 4096),
        ("4K", 4096),
        ("4k", 4096),
        ("4KiB", 4096),
        ("4 KB", 4096),
        ("1.5G", 3 << 29),
        (" 2 M ", 2 << 20),
        ("300G", 300 << 30),
        ("1T", 1 << 40),
        ("512B", 512),
    ],
)
def test_parse(text: str, size: int) -> None:
    """Units are powers of 1024."""
    assert parse_size(text) == size


def test_parse_offset() -> None:
    """An offset is a size, or nothing in any unit, and never negative."""
    assert [parse_offset(text) for text in ("0", "0K", " 0 GiB", "4K")] == [0, 0, 0, 4096]
    for text in ("-1K", "", "K"):
        with pytest.raises(ValueError, match=r"offset|not a size"):
            parse_offset(text)


def test_parse_integers() -> None:
    """Anything that is an integer is bytes."""
    assert parse_size(5) == parse_size(np.int64(5)) == 5


@given(some.text(max_size=12))
def test_parse_never_surprises(text: str) -> None:
    """Any string is a positive size or an error with errno."""
    try:
        assert parse_size(text) > 0
    except ValueError as error:
        assert isinstance(error, OSError)
        assert error.errno
        assert error.filename == text


@given(some.integers(1, 1 << 50), some.integers(1, 1 << 30))
def test_round_up(size: int, granule: int) -> None:
    """The next multiple, and no further."""
    rounded = round_up(size, granule)
    assert rounded % granule == 0
    assert 0 <= rounded - size < granule


@given(some.integers(1, 1 << 34))
def test_pages(pages: int) -> None:
    """Whole pages are a region's size, all else is not."""
    assert region_size(pages * 4096) == pages * 4096
    with pytest.raises(ValueError, match="next is"):
        region_size(pages * 4096 - 1)


def test_human() -> None:
    """What people read."""
    sizes = [0, 1, 1023, 1024, 1536, 4 << 20, 5 << 30, 3 << 50, 7 << 60]
    shown = ["0 B", "1 B", "1023 B", "1 KiB", "1.5 KiB", "4 MiB", "5 GiB", "3 PiB", "7168 PiB"]
    assert [human(size) for size in sizes] == shown


@given(some.text(max_size=300))
def test_names_never_surprise(text: str) -> None:
    """Any string is a file name that ls can show, or an error with errno."""
    try:
        name = check_name(text)
    except ValueError as error:
        assert isinstance(error, OSError)
    else:
        assert name.isascii()
        assert "/" not in name
        assert 0 < len(name) <= 255
