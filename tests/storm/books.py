"""What the machine has of each kind of thing, before and after: nothing may be left over."""

from __future__ import annotations

import os
import subprocess
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

MOUNT = "/sys/fs/mshare"
KIB = 1 << 10
#: How much more of each there may be at the end: what other things of the machine do.
SLACK = {"PageTables": 512 * KIB, "Shmem": 256 * KIB, "SUnreclaim": 8192 * KIB}
_CACHES = ("mm_struct", "vm_area_struct", "shmem_inode_cache")
_CACHE_SLACK = 256


def count() -> dict[str, int]:
    """Bytes of memory by use, and objects of caches."""
    Path("/proc/sys/vm/drop_caches").write_text("3")
    for name in _CACHES:
        with suppress(OSError):
            Path(f"/sys/kernel/slab/{name}/shrink").write_text("1")
    with suppress(OSError):
        Path("/proc/sys/vm/stat_refresh").read_bytes()
    result = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, value = line.split(":")
        if name in SLACK:
            result[name] = int(value.split()[0]) * KIB
    for line in Path("/proc/slabinfo").read_text().splitlines():
        words = line.split()
        if words[0] in _CACHES:
            result[words[0]] = int(words[1])
    return result


@cache
def quarantine() -> int:
    """Bytes of freed objects that KASAN keeps at most: a 32nd of memory (mm/kasan/quarantine.c)."""
    if " kasan_report\n" not in Path("/proc/kallsyms").read_text():
        return 0
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE") // 32


def over(before: dict[str, int], after: dict[str, int]) -> list[str]:
    """What there is more of, beyond what is usual."""
    slack = SLACK | {"SUnreclaim": SLACK["SUnreclaim"] + quarantine()}
    return [
        f"{name}: {before[name]} before, {after[name]} after"
        for name in before
        if after[name] > before[name] + slack.get(name, _CACHE_SLACK)
    ]


def settle(before: dict[str, int], seconds: float) -> tuple[dict[str, int], list[str]]:
    """Count until it is as before; some things go late."""
    deadline = time.monotonic() + seconds
    while True:
        after = count()
        left = over(before, after)
        if not left or time.monotonic() > deadline:
            return after, left
        time.sleep(1)


def module_users() -> int:
    """References to the module while msharefs is not mounted."""
    subprocess.run(["umount", MOUNT], check=True)
    users = int(Path("/sys/module/mshare/refcnt").read_text())
    subprocess.run(["mount", "-t", "msharefs", "msharefs", MOUNT], check=True)
    return users


def attachments() -> dict[str, int]:
    """Windows on the regions of the storm."""
    from mshare.engines.msharefs import info

    result = {}
    for path in sorted(Path(MOUNT).glob("storm-*")):
        fd = os.open(path, os.O_RDONLY)
        result[path.name] = info(fd).attachments
        os.close(fd)
    return result
