"""Every Python block of the documentation runs, and every command it shows exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from mshare.cli import COMMANDS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.M | re.S)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_runs(page: Path, tmp_path: Path) -> None:
    """The blocks of a page, in order, are a program that ends well."""
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks(page, "python")))
    command = [sys.executable, "-W", "error", str(script)]
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=120, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    """A shown ``mshare`` command is one."""
    shown = "\n".join(blocks(page, "sh"))
    for command in re.findall(r"(?:^|\s|/|\| )mshare ([a-z][a-z-]*)", shown):
        assert command in COMMANDS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """A link to another page of the project finds it."""
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_review_names_tests_that_exist() -> None:
    """Each test that answers a row is there, in the file it is said to be in."""
    rows = [row for row in (ROOT / "docs/review.md").read_text().splitlines() if " | " in row]
    text, file = "", ""
    for row in rows:
        for word in re.findall(r"`([^`]+)`", row.split(" | ")[-1]):
            if word.endswith(".py"):
                file = word
                place = ROOT / (file if "/" in file else f"tests/kernel/{file}")
                text = place.read_text()
            else:
                assert f"def {word}(" in text, (file, word)
    assert len(rows) > 30


def test_no_open_ends() -> None:
    """No mark of something left to do, anywhere in the project (review, S16)."""
    marks = re.compile(
        r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "X" * 3, "HA" + "CK")) + r")\b"
    )
    files = [path for path in ROOT.iterdir() if path.suffix in (".md", ".toml")]
    for folder in ("src", "kmod", "tests", "docs", "examples", "benchmarks", "tools"):
        files += [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    assert len(files) > 100
    for path in files:
        if "__pycache__" not in path.parts:
            assert not marks.search(path.read_text(errors="replace")), path
