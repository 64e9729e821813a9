"""Figures of this machine at one moment: what ``mshare top`` and ``mshare export`` show."""

from __future__ import annotations

import time
from collections import defaultdict
from contextlib import suppress
from typing import NamedTuple

import mshare
from mshare import engines, pagetables
from mshare.memory import meminfo
from mshare.processes import Process, processes


class Region(NamedTuple):
    """A region. Bytes; None is what its engine, or this user, can't tell."""

    name: str
    engine: str
    size: int
    resident: int | None
    created: float
    attachments: int | None = None
    page_tables: int | None = None
    """The one set that all attachments use."""
    faults: int | None = None
    """Passed on by the kernel module since the region was made."""
    flushes: int | None = None
    """Of TLBs, because the region's tables changed, since it was made."""


class Program(NamedTuple):
    """All processes of one name: page-table bytes in all, and of the largest, ``pid``."""

    name: str
    processes: int
    page_tables: int
    largest: int
    pid: int


class Snapshot(NamedTuple):
    """One moment: ``taken`` on the monotonic clock; page tables and memory of the machine."""

    taken: float
    page_tables: int
    memory: int
    processes: int
    regions: list[Region]
    programs: list[Program]
    """Largest page tables first."""


class Rates(NamedTuple):
    """Events of a region per second; None where there is nothing to compare."""

    faults: float | None = None
    flushes: float | None = None


def snapshot() -> Snapshot:
    """Read them all now."""
    taken = time.monotonic()
    found = list(processes())
    return Snapshot(
        taken=taken,
        page_tables=int(pagetables.system()),
        memory=meminfo()["MemTotal"],
        processes=len(found),
        regions=_regions(),
        programs=_programs(found),
    )


def rates(before: Snapshot, after: Snapshot) -> dict[tuple[str, str], Rates]:
    """Events per second of each region in ``after``, by name and engine.

    A region that was made anew has nothing to compare with.
    """
    seconds = after.taken - before.taken
    known = {(region.name, region.engine, region.created): region for region in before.regions}
    found = {}
    for region in after.regions:
        was = known.get((region.name, region.engine, region.created))
        if was is None or seconds <= 0:
            found[region.name, region.engine] = Rates()
        else:
            found[region.name, region.engine] = Rates(
                _rate(was.faults, region.faults, seconds),
                _rate(was.flushes, region.flushes, seconds),
            )
    return found


def _rate(before: int | None, after: int | None, seconds: float) -> float | None:
    if before is None or after is None:
        return None
    return (after - before) / seconds


def _regions() -> list[Region]:
    found = []
    for stat in mshare.list():
        counters: dict[str, int] = {}
        with suppress(OSError):
            counters = engines.by_name(stat.engine).counters(stat.name)
        found.append(
            Region(
                name=stat.name,
                engine=stat.engine,
                size=counters.get("mapped_end") or stat.size,
                resident=stat.resident,
                created=stat.created,
                attachments=counters.get("attachments"),
                page_tables=counters.get("pagetable_bytes"),
                faults=counters.get("faults"),
                flushes=counters.get("flushes"),
            )
        )
    return found


def _programs(found: list[Process]) -> list[Program]:
    groups = defaultdict(list)
    for process in found:
        groups[process.name].append(process)
    programs = []
    for name, members in groups.items():
        largest = max(members, key=lambda process: process.page_tables)
        tables = sum(process.page_tables for process in members)
        programs.append(Program(name, len(members), tables, largest.page_tables, largest.pid))
    return sorted(programs, key=lambda program: program.page_tables, reverse=True)
