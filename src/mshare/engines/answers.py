"""What an engine says: of a region, and of itself."""

from __future__ import annotations

from typing import NamedTuple


class Stat(NamedTuple):
    """A region as its engine shows it.

    ``size`` and ``resident`` (memory it holds now, None where the engine can't tell) are
    bytes; ``created`` is seconds since the epoch; ``backing`` is the file it maps, or None.
    ``broken`` says what is wrong with a region that can't be attached.
    """

    name: str
    engine: str
    size: int
    resident: int | None
    mode: int
    uid: int
    gid: int
    created: float
    backing: str | None = None
    broken: str | None = None


class Check(NamedTuple):
    """Whether an engine works here: ``why`` in a sentence, ``cure`` the command that changes it."""

    works: bool
    why: str
    cure: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def advice(self) -> str:
        """``why``, and the cure if there is one."""
        return f"{self.why}; as root: {self.cure}" if self.cure else self.why
