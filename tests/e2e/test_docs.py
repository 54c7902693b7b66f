"""The pages are true where a machine can tell: links lead somewhere, nothing is unfinished, commands and code run.

The commands of ``sh`` blocks and the code of ``python`` blocks of a page run in order, in an empty folder. A block that
begins with a file's name (``# my_model.py``) is saved as that file. Blocks without a language are not run: what needs a
network, another machine or an hour, and what a command prints.
"""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from fedftg.algorithms.registry import ALGORITHMS, REFINERS

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")]
BLOCK = re.compile(r"```(sh|python|toml)\n(.*?)```", re.DOTALL)
SHORT = ["--set", "rounds=1", "--set", "refiner.iterations=1"]
"""Appended to runs: what a page shows is that they work."""


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# Flower's pages show parts of apps; tests/flower runs the grid of one and whole apps.
RUN = [page for page in PAGES if BLOCK.search(page.read_text()) and not name(page).startswith("docs/flower")]


def test_links_and_nothing_left_to_fill_in() -> None:
    for page in PAGES:
        text = page.read_text()
        assert not re.search(r"PLACEHOLDER|TODO|FIXME|RESULT_", text), page
        for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)[^)]*\)", text):
            if not target.startswith(("http://", "https://", "mailto:")):
                other = page.parent / target if target else page
                assert other.exists(), (page, target)
                assert not anchor or anchor in anchors(other), (page, target, anchor)


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", RUN, ids=name)
def test_commands_and_code_run(
    page: Path, fedftg: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page_names: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    for table in (ALGORITHMS, REFINERS):  # what a page registers is gone after it
        monkeypatch.setattr(table, "data", dict(table.data))
    names = page_names(name(page))
    for language, block in BLOCK.findall(page.read_text()):
        saved = re.match(r"# (\S+\.(?:py|toml))\n", block)
        if saved:
            (tmp_path / saved[1]).write_text(block)
        elif language == "python":
            exec(compile(block.replace("rounds=5", "rounds=1"), name(page), "exec"), names)
        elif language == "sh":
            for line in block.replace("\\\n", " ").splitlines():
                run(shlex.split(line, comments=True), fedftg, tmp_path)


def run(words: list[str], fedftg: Any, folder: Path) -> None:
    if not words or words[0] == "ls":
        assert all((folder / word).exists() for word in words[1:]), words
        return
    assert words[0] == "fedftg", f"{words[0]} is not run here; give the block no language"
    trains = words[1] in ("run", "compare") and "--resume" not in words
    done = fedftg(*words[1:], *(SHORT if trains else []), path=folder)
    assert done.returncode == 0, done.stdout + done.stderr
