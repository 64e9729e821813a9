"""Arguments of the commands. A value that no machine would accept is wrong usage."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from mshare.cli import explain
from mshare.sizes import parse_offset, parse_size

Value = TypeVar("Value")
Number = TypeVar("Number", int, float)


def argument(parse: Callable[[str], Value]) -> Callable[[str], Value]:
    """``parse`` as an argument's ``type``, whose errors argparse then tells."""

    def parsed(text: str) -> Value:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(explain(error)) from None

    return parsed


size = argument(parse_size)
offset = argument(parse_offset)


def between(
    kind: Callable[[str], Number], least: Number, most: Number | None = None
) -> Callable[[str], Number]:
    """The ``type`` of a number from ``least`` to ``most``."""

    def parsed(text: str) -> Number:
        with suppress(ValueError):
            value = kind(text)
            if math.isfinite(value) and least <= value and (most is None or value <= most):
                return value
        limits = f"{least:,} or more" if most is None else f"{least:,} to {most:,}"
        raise argparse.ArgumentTypeError(f"{text!r}: give a number, {limits}")

    return parsed
