"""mshare: memory shared between processes, page tables too.

>>> import mshare
>>> with mshare.create("features", size="4G", mode=0o640) as region:      # doctest: +SKIP
...     table = region.asarray("float32", shape=(1_000_000, 256))
>>> table = mshare.attach("features", readonly=True).asarray("float32")   # doctest: +SKIP

``create``, ``attach``, ``list``, ``stat`` and ``unlink`` work on regions by name; a
:class:`Region` is an attachment. ``mshare`` and ``mshare_unlink`` are the two calls of the
kernel proposal it grew from. :mod:`mshare.pagetables` shows what page tables cost.
"""

from mshare.calls import mshare, mshare_unlink
from mshare.engines.base import Stat
from mshare.errors import InvalidValue
from mshare.region import Region, attach, create, list, stat, unlink

__version__ = "0.1.0"

__all__ = [
    "InvalidValue",
    "Region",
    "Stat",
    "attach",
    "create",
    "list",
    "mshare",
    "mshare_unlink",
    "stat",
    "unlink",
]
