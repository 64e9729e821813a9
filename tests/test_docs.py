"""Every Python block of the documentation runs, and every shell block that can run here.

Those that need the kernel module run in the lab, by ``tests/kernel/test_docs.py``.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import mshare
from mshare import advice
from mshare.advice import Target
from mshare.cli import COMMANDS, main
from mshare.cli import advise as advise_command
from tests import shown
from tests.shown import PLACES

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.M | re.S)


@contextmanager
def nothing_left(page: Path) -> Iterator[None]:
    """No region of a name that the page mentions is left but those that were there before."""
    before = set(shown.named(page))
    try:
        yield
        assert set(shown.named(page)) <= before
    finally:
        for name in set(shown.named(page)) - before:
            mshare.unlink(name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_runs(page: Path, tmp_path: Path) -> None:
    """The blocks of a page, in order, are a program that ends well."""
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks(page, "python")))
    command = [sys.executable, "-W", "error", str(script)]
    with nothing_left(page):
        result = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=120, cwd=tmp_path
        )
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    """A shown ``mshare`` command is one."""
    text = "\n".join(block.text for block in shown.blocks(page))
    for command in re.findall(r"(?:^|\s|/|\| )mshare ([a-z][a-z-]*)", text):
        assert command in COMMANDS


@pytest.mark.parametrize("page", shown.pages(""), ids=lambda page: page.name)
def test_shell_runs(page: Path, tmp_path: Path) -> None:
    """The commands of a page, in order, end well, print what is shown, and leave no region."""
    with nothing_left(page):
        shown.run(page, "", tmp_path)


def test_every_block_says_whether_it_runs() -> None:
    """No block is left out by a word that nobody knows, and half of the shell's run."""
    known = {"", "ini", "python", "python not run"}
    known |= {f"{language} {where}".strip() for language in ("sh", "console") for where in PLACES}
    for page in PAGES:
        fences = re.findall(r"^```(.*)$", page.read_text(), re.M)
        assert set(fences[::2]) <= known, page
        assert set(fences[1::2]) <= {""}, page
    found = [block for page in shown.DOCS.glob("*.md") for block in shown.blocks(page)]
    assert {block.where for block in found} == set(PLACES)
    assert sum(block.where != "not run" for block in found) >= len(found) / 2


@pytest.mark.parametrize(
    ("output", "good"),
    [("a\n…\nb\n", True), ("a\nx y\nb\n", True), ("a\n… y\nb\n", True), ("a\nb\n", False)],
)
def test_shown_output_is_compared(output: str, good: bool) -> None:
    """An output that differs from what is shown is found."""
    assert bool(re.fullmatch(shown.pattern(output), "a\nx y\nb\n")) is good


def test_what_a_server_may_print(capsys: pytest.CaptureFixture[str]) -> None:
    """The examples of a server, which can't be had here, have the form of what is printed."""
    page = (shown.DOCS / "see-the-cost.md").read_text()
    fenced = re.findall(r"^```(.*)\n((?:.*\n)*?)```$", page, re.M)
    advised, top = [text for info, text in fenced if not info]
    gib = 1 << 30
    found = Target(
        kind="file",
        path="/data/features.npy",
        pids=[4242, *range(33)],
        programs={"gunicorn": 34},
        size=390 * gib,
        resident=212 * gib,
        page_tables=int(25.9 * gib),
        saves=int(25.2 * gib),
        change=advice._change(advice._Group("file", ""), 390 * gib, Counter({"gunicorn": 34})),
    )
    advise_command._show(1, found)
    assert capsys.readouterr().out.strip() == advised.strip()
    assert main(["top", "--once"]) == 0
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    headers = [line.split() for line in top.splitlines() if line and not re.search(r"\d", line)]
    assert len(headers) == 2
    assert all(header in printed for header in headers)


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_that_are_named_exist(page: Path) -> None:
    """So does every test that any page names."""
    everything = "".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    for name in re.findall(r"`(test_\w+)(?:\[[^`]*)?`", page.read_text()):
        assert f"def {name}(" in everything, name
    for file in re.findall(r"`((?:tests/[\w/]*)?test_\w+\.py)`", page.read_text()):
        assert (ROOT / file).exists() or list((ROOT / "tests").rglob(file)), file


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
