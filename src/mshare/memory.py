"""How much memory this process could still get, from the kernel's own figures."""

from __future__ import annotations

from contextlib import suppress
from typing import NamedTuple

from mshare.sizes import human


class Available(NamedTuple):
    """``bytes`` a process could get; ``source`` the kernel file that sets the limit."""

    bytes: int
    source: str

    def __str__(self) -> str:
        return f"{self.source}: {human(self.bytes)}"


def meminfo() -> dict[str, int]:
    """``/proc/meminfo``: field to bytes, or to pages for the HugePages_ counts."""
    fields = {}
    with open("/proc/meminfo") as file:
        for line in file:
            key, value, *unit = line.replace(":", " ").split()
            fields[key] = int(value) * (1024 if unit else 1)
    return fields


def available() -> Available:
    """The smaller of what the machine has left and what the memory cgroup has left.

    Asked for more than this, the kernel would not fail the call: it would kill a process.
    """
    fields = meminfo()
    machine = fields["MemAvailable"] + fields["SwapFree"]
    candidates = [Available(machine, "/proc/meminfo MemAvailable + SwapFree")]
    for folder in _cgroup_folders():
        for limit, usage in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            with suppress(OSError, ValueError):
                left = _number(f"{folder}/{limit}") - _number(f"{folder}/{usage}")
                left += _page_cache(folder)
                candidates.append(Available(max(left, 0), f"{folder}/{limit}"))
    return min(candidates, key=lambda candidate: candidate.bytes)


def _page_cache(folder: str) -> int:
    """Clean pages of files in a cgroup: they count as used, and go when memory is asked for."""
    try:
        with open(f"{folder}/memory.stat") as file:
            fields = {key: int(value) for key, value in map(str.split, file)}
    except OSError:
        return 0
    dirty = sum(_of(fields, key) for key in ("file_dirty", "dirty", "file_writeback", "writeback"))
    cache = _of(fields, "inactive_file") + _of(fields, "active_file")
    return max(cache - dirty, 0)


def _of(fields: dict[str, int], key: str) -> int:
    return fields.get(f"total_{key}", fields.get(key, 0))


def _number(path: str) -> int:
    with open(path) as file:
        return int(file.read())


def _cgroup_folders() -> list[str]:
    """Where this process's memory cgroup and those above it show their limits."""
    folders = []
    with suppress(OSError), open("/proc/self/cgroup") as file:
        for line in file:
            _, controllers, path = line.rstrip("\n").split(":", 2)
            if controllers == "":
                roots = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
            elif "memory" in controllers.split(","):
                roots = ["/sys/fs/cgroup/memory"]
            else:
                continue
            while True:
                folders += [root + path.rstrip("/") for root in roots]
                if path in ("/", ""):
                    break
                path = path.rpartition("/")[0]
    return folders
