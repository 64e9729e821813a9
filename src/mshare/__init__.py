"""mshare: memory shared between processes, page tables too.

>>> import mshare
>>> with mshare.create("features", size="4G", mode=0o640) as region:      # doctest: +SKIP
...     table = region.asarray("float32", shape=(1_000_000, 256))
>>> table = mshare.attach("features", readonly=True).asarray("float32")   # doctest: +SKIP

``create``, ``attach``, ``list``, ``stat`` and ``unlink`` work on regions by name; a
:class:`Region` is an attachment. ``mshare`` and ``mshare_unlink`` are the two calls of the
kernel proposal it grew from. :mod:`mshare.pagetables` shows what page tables cost.
"""

import builtins
from typing import TYPE_CHECKING, Any

from mshare.calls import mshare as mshare
from mshare.calls import mshare_unlink
from mshare.dropin import ACCESS_COPY, ACCESS_DEFAULT, ACCESS_READ, ACCESS_WRITE, mmap
from mshare.engines.answers import Stat
from mshare.errors import InvalidValue
from mshare.region import Region
from mshare.regions import attach, create, stat, unlink
from mshare.regions import list as list

if TYPE_CHECKING:
    from mshare.arrays import SharedArray, share

__version__ = "0.1.0"

# not list and mshare: "from mshare import *" leaves the built-in and the module what they are
__all__ = [
    "ACCESS_COPY",
    "ACCESS_DEFAULT",
    "ACCESS_READ",
    "ACCESS_WRITE",
    "InvalidValue",
    "Region",
    "SharedArray",
    "Stat",
    "attach",
    "create",
    "mmap",
    "mshare_unlink",
    "share",
    "stat",
    "unlink",
]


def __getattr__(name: str) -> Any:
    """What needs NumPy comes with its first use."""
    if name in ("SharedArray", "share"):
        from mshare import arrays

        return getattr(arrays, name)
    raise AttributeError(f"module 'mshare' has no attribute '{name}'")


def __dir__() -> builtins.list[str]:
    """Also the names that come with their first use."""
    return sorted({*globals(), *__all__})
