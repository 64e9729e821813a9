"""The memory that all processes of the storm share (``struct control`` of storm.h)."""

from __future__ import annotations

import mmap
import os
import struct
import subprocess
from pathlib import Path

COUNTS = (
    "attaches",
    "forks",
    "checks",
    "stores",
    "refused",
    "layout_changes",
    "children_killed",
    "moves",
    "walks",
    "crowds",
    "poisoned",
    "registered",
)
SEATS = 128
_COUNTS_AT, _FINDING_AT, _SEAT_AT, _SEAT_SIZE = 32, 160, 672, 64


class Control:
    """Flags, counters, the first finding and the seats; the rest is the workers' own."""

    def __init__(self, path: Path, worker: Path, workers: int) -> None:
        size = int(subprocess.run([worker, "size"], check=True, capture_output=True).stdout)
        self.path = path
        with open(path, "w+b") as file:
            os.ftruncate(file.fileno(), size)
            self._memory = mmap.mmap(file.fileno(), size)
        self._put(16, workers)

    def _get(self, at: int) -> int:
        value: int = struct.unpack_from("=Q", self._memory, at)[0]
        return value

    def _put(self, at: int, value: int) -> None:
        struct.pack_into("=Q", self._memory, at, value)

    @property
    def stop(self) -> bool:
        """Whether everybody is to end."""
        return bool(self._get(0))

    @stop.setter
    def stop(self, value: bool) -> None:
        self._put(0, value)

    @property
    def finding(self) -> str:
        """What was found first, or nothing."""
        if not self._get(8):
            return ""
        return self._memory[_FINDING_AT:_SEAT_AT].split(b"\0")[0].decode() or "a finding"

    def find(self, text: str) -> None:
        """Enter a finding and end the storm."""
        if not self._get(8):
            self._memory[_FINDING_AT:_SEAT_AT] = text.encode()[:511].ljust(512, b"\0")
            self._put(8, 1)
        self.stop = True

    def counts(self) -> dict[str, int]:
        """All counters."""
        return {name: self._get(_COUNTS_AT + 8 * n) for n, name in enumerate(COUNTS)}

    def beats(self, seat: int) -> int:
        """How often the process in a seat has shown that it is alive."""
        return self._get(_SEAT_AT + seat * _SEAT_SIZE)

    def beat(self, seat: int, action: str, pid: int) -> None:
        """Show it."""
        at = _SEAT_AT + seat * _SEAT_SIZE
        self._put(at, self._get(at) + 1)
        self._put(at + 8, pid)
        self._memory[at + 32 : at + 64] = action.encode()[:31].ljust(32, b"\0")

    def clear(self, seat: int) -> None:
        """Nobody sits there now."""
        self._put(_SEAT_AT + seat * _SEAT_SIZE + 8, 0)

    def seat(self, seat: int) -> tuple[int, int, str]:
        """Process, step and action."""
        at = _SEAT_AT + seat * _SEAT_SIZE
        action = self._memory[at + 32 : at + 64].split(b"\0")[0].decode()
        return self._get(at + 8), self._get(at + 24), action
