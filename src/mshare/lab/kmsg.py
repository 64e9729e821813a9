"""Find the reports of a broken kernel in its log.

A report is what the kernel prints when it caught itself at a fault: WARNING, BUG, Oops,
lockdep, a sanitizer, a hung task, a lockup. Not reports: a failed page allocation, an
out-of-memory kill, the crash of a user program.

KCSAN also finds races of the kernel with itself, many of them known and harmless. One counts
as a report when a function of a module takes part; the others are only told of.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

_STAMP = re.compile(r"^\[\s*\d+\.\d+\](?:\[\s*[TC]\d+\])? ?")

#: Each is searched in one message, without its time stamp.
REPORTS = tuple(
    re.compile(pattern)
    for pattern in (
        r"^-+\[ cut here \]-+",
        # also lockdep: possible circular locking, recursive locking, inconsistent lock state,
        # suspicious RCU usage, bad unlock balance
        r"^WARNING: ",
        r"\bpossible (circular|recursive) locking\b",
        r"\bsuspicious RCU usage\b",
        r"\binconsistent lock state\b",
        r"^INFO: trying to register non-static key",
        # also KASAN, KMSAN, KFENCE, Bad page, bad page map, rss-counter, pgtables_bytes
        r"^BUG(?!: KCSAN)[: ]",
        r"^BUG: KCSAN: .* \[\w+\]",
        r"\bkernel BUG at\b",
        r"\bOops\b.*\[#\d+\]",
        r"\bgeneral protection fault.*\[#\d+\]",
        r"^Kernel panic - not syncing",
        r"\bUBSAN: ",
        r"\bkmemleak: [1-9]\d* new suspected memory leaks",
        r"\btask .* blocked for more than \d+ seconds",
        r"\bsoft lockup\b",
        r"\bhard LOCKUP\b",
        r"\bdetected (expedited )?stalls\b",
        r"\bself-detected stall\b",
        r"^list_(add|del) corruption",
        r"^sysfs: cannot create duplicate filename",
    )
)

#: Lines that look like a report and are not.
ALLOWED: tuple[re.Pattern[str], ...] = ()

_KERNELS_RACE = re.compile(r"^BUG: KCSAN: (?!.* \[\w+\])(.*)")

_CONTEXT_BEFORE = 2
_LENGTH = 60
_END = re.compile(r"^---\[ end ")


@dataclass(frozen=True)
class Report:
    """The first line that gave it away, and the lines around."""

    title: str
    lines: tuple[str, ...]


def message(line: str) -> str:
    """A line of the log without its time stamp and thread."""
    return _STAMP.sub("", line.rstrip("\r\n"))


def is_report(line: str) -> bool:
    """Whether this line begins, or is part of, a report."""
    text = message(line)
    return any(pattern.search(text) for pattern in REPORTS) and not any(
        pattern.search(text) for pattern in ALLOWED
    )


def find_reports(log: str) -> list[Report]:
    """All reports of a kernel log, in order; each ends at its end mark or after 60 lines."""
    lines = [line.rstrip("\r") for line in log.split("\n")]
    reports: list[Report] = []
    index = 0
    while index < len(lines):
        if not is_report(lines[index]):
            index += 1
            continue
        end = index + 1
        while end < min(len(lines), index + _LENGTH) and not _END.match(message(lines[end])):
            end += 1
        block = lines[max(0, index - _CONTEXT_BEFORE) : end + 1]
        title = message(lines[index])
        if title.startswith("-") and index + 1 < len(lines):
            title = message(lines[index + 1])
        reports.append(Report(title, tuple(block)))
        index = end + 1
    return reports


def kernels_races(log: str) -> Counter[str]:
    """Data races of the kernel without a module, and how often each was seen."""
    found = (_KERNELS_RACE.match(message(line)) for line in log.split("\n"))
    return Counter(match[1] for match in found if match)
