"""The shell blocks of the documentation: what runs where, and what it has to print.

The words behind the fence say where a block runs: ``sh`` here, ``sh lab`` as root with the module,
``sh not run`` nowhere, because it changes a machine for good, asks the network, or has no end.
``console`` blocks are commands after ``$`` and what they print; ``…`` stands for what differs.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import mshare

DOCS = Path(__file__).parent.parent / "docs"
PLACES = ("", "lab", "not run")


class Block(NamedTuple):
    """A fenced block: ``sh`` or ``console``, where it runs, and its text."""

    language: str
    where: str
    text: str


def blocks(page: Path) -> list[Block]:
    """The shell blocks of a page."""
    found = re.findall(r"^```(sh|console)\b *(.*)\n((?:.*\n)*?)```$", page.read_text(), re.M)
    return [Block(*each) for each in found]


def pages(where: str) -> list[Path]:
    """The pages with blocks to run there."""
    found = sorted(DOCS.glob("*.md"))
    return [page for page in found if any(block.where == where for block in blocks(page))]


def steps(block: Block) -> Iterator[tuple[str, str | None]]:
    """Each command of a block with what it has to print; None if that is not shown."""
    if block.language == "sh":
        yield block.text, None
        return
    for part in re.split(r"^\$ ", block.text, flags=re.M)[1:]:
        command, output = [], part.splitlines(keepends=True)
        while output:
            command.append(output.pop(0))
            if not command[-1].endswith("\\\n"):
                break
        yield "".join(command), "".join(output)


def pattern(output: str) -> str:
    """A regular expression for a shown output: a line that is ``…`` is any lines."""
    lines = []
    for line in output.splitlines():
        if line.strip() == "…":
            lines.append(r"(?:.*\n)*?")
        else:
            lines.append(re.escape(line.rstrip()).replace("…", ".*") + r"[ ]*\n")
    return "".join(lines)


def named(page: Path) -> list[str]:
    """The regions that there are with a name that the page mentions."""
    text = page.read_text()
    return [each.name for each in mshare.list() if re.search(rf"\b{re.escape(each.name)}\b", text)]


def run(page: Path, where: str, folder: Path) -> None:
    """Run the blocks of a page that are for this place, in their order. They have to end well."""
    (folder / ".venv").symlink_to(sys.prefix)
    environment = {
        **os.environ,
        "HOME": str(folder),
        "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
        "PYTHONPATH": os.path.dirname(os.path.dirname(mshare.__file__)),
        "COLUMNS": "80",
    }
    for block in blocks(page):
        if block.where != where:
            continue
        for command, output in steps(block):
            result = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", command],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
                timeout=600,
            )
            assert result.returncode == 0, (command, result.stdout, result.stderr)
            if output is not None:
                printed = "".join(f"{line.rstrip()}\n" for line in result.stdout.splitlines())
                assert re.fullmatch(pattern(output), printed), (command, output, printed)
