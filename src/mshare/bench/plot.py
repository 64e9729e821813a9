"""The picture: page-table memory over processes, one line an engine."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from itertools import accumulate

from mshare.bench import Row
from mshare.errors import invalid
from mshare.sizes import human

_COLOURS = {"shm": "#c44e52", "hugetlb": "#4c72b0", "msharefs": "#2a9d5c"}


def check(path: str) -> None:
    """See that :func:`draw` will be able to write ``path``, before any long work.

    :raises InvalidValue: EINVAL when it is neither ``.svg`` nor ``.png``.
    :raises OSError: there is no such folder, or no permission, or no matplotlib.
    """
    if not path.endswith((".svg", ".png")):
        raise invalid("a plot is written as .svg or .png", path)
    folder = os.path.dirname(path) or "."
    if not os.access(folder, os.W_OK):
        code = errno.EACCES if os.path.isdir(folder) else errno.ENOENT
        raise OSError(code, "can't write the plot there", path)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        message = "plots need matplotlib; in a checkout of mshare: pip install '.[plot]'"
        raise OSError(errno.ENOPKG, message, path) from None


def draw(rows: Sequence[Row], path: str) -> None:
    """Write the picture of ``rows``, all of one size, to ``path``."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "mshare"
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for row in rows:
        total = [number / (1 << 20) for number in accumulate(row.page_table_bytes)]
        count = range(1, len(total) + 1)
        axes.plot(count, total, "o-", color=_COLOURS.get(row.engine), markersize=4, clip_on=False)
        axes.annotate(
            f"{row.engine}: {human(sum(row.page_table_bytes))}",
            (len(total), total[-1]),
            xytext=(8, 4),
            textcoords="offset points",
            color=_COLOURS.get(row.engine),
            verticalalignment="center",
            annotation_clip=False,
        )
    axes.set_title(
        f"Page tables of processes that share {human(rows[0].size_bytes)}, "
        f"Linux {rows[0].kernel.split('-')[0]}",
        fontsize=11,
    )
    axes.set_xlabel("processes attached")
    axes.set_ylabel("page tables, MiB")
    axes.set_ylim(bottom=0)
    axes.set_xlim(0, max(2, rows[0].processes) * 1.3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None} if path.endswith(".svg") else None, dpi=150)
    pyplot.close(figure)
