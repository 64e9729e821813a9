"""Huge pages for the length of a run, taken and given back openly.

Only ``mshare bench --reserve`` calls this: an engine never changes what the administrator set.
"""

from __future__ import annotations

import errno
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from mshare import engines
from mshare.sizes import HUGE_PAGE, human, round_up

_POOL = "/sys/kernel/mm/hugepages/hugepages-2048kB"


@contextmanager
def reserved(size: int, say: Callable[[str], None]) -> Iterator[None]:
    """Have free huge pages for ``size`` bytes and a hugetlbfs to use them, for this block.

    Both are as before when it ends, also by an interrupt. ``say`` gets a line for each change.

    :raises PermissionError: not root.
    :raises OSError: ENOMEM when the kernel can't find enough free memory in one piece;
        EOPNOTSUPP without huge pages in the kernel.
    """
    if not os.path.isdir(_POOL):
        raise OSError(errno.EOPNOTSUPP, "this kernel has no huge pages of 2 MiB", "hugetlb")
    if os.geteuid():
        raise PermissionError(errno.EPERM, "only root can reserve huge pages", "hugetlb")
    needed = round_up(size, HUGE_PAGE) // HUGE_PAGE
    missing = max(0, needed - (_read("free_hugepages") - _read("resv_hugepages")))
    before = _read("nr_hugepages")
    try:
        if missing:
            amount = human(missing * HUGE_PAGE)
            say(f"reserving {missing} huge pages ({amount}); there were {before}")
            _write(before + missing)
        added = _read("nr_hugepages") - before
        if added < missing:
            message = f"the kernel found {added} of {missing} huge pages; free memory is in pieces"
            raise OSError(errno.ENOMEM, message, "hugetlb")
        with _mounted(say):
            yield
    finally:
        if missing:
            _write(max(before, _read("nr_hugepages") - missing))
            say(f"gave the huge pages back; there are {_read('nr_hugepages')}")


@contextmanager
def _mounted(say: Callable[[str], None]) -> Iterator[None]:
    """A hugetlbfs the engine finds, of this block's own where there is none."""
    engine = engines.by_name("hugetlb")
    with open("/proc/self/mounts", errors="surrogateescape") as file:
        if engine.chosen or " hugetlbfs " in file.read():
            yield
            return
    folder = tempfile.mkdtemp(prefix="mshare-hugetlb-")
    try:
        command = ["mount", "-t", "hugetlbfs", "-o", "pagesize=2M,mode=1777", "hugetlbfs", folder]
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        os.rmdir(folder)
        reason = getattr(error, "stderr", None) or str(error)
        message = f"can't mount hugetlbfs: {reason.strip()}"
        raise OSError(errno.EPERM, message, folder) from None
    say(f"mounted hugetlbfs on {folder} for this run")
    os.environ[engine.variable] = engine.chosen = folder
    try:
        yield
    finally:
        engine.chosen = None
        del os.environ[engine.variable]
        subprocess.run(["umount", folder], check=False, capture_output=True)
        with suppress(OSError):
            os.rmdir(folder)


def _read(field: str) -> int:
    with open(f"{_POOL}/{field}") as file:
        return int(file.read())


def _write(pages: int) -> None:
    with open(f"{_POOL}/nr_hugepages", "w") as file:
        file.write(str(pages))
