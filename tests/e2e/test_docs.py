"""The pages are true where a machine can tell: links lead somewhere, nothing is left to fill in, examples run."""

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_nothing_left_to_fill_in(page: Path) -> None:
    text = page.read_text()
    assert not re.search(r"PLACEHOLDER|TODO|FIXME|RESULT_", text)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / target).exists(), target


def test_own_algorithm_of_the_extending_page(fedftg: Any, tiny: list[str], tmp_path: Path) -> None:
    page = (ROOT / "docs" / "extending.md").read_text()
    code = next(block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "register_algorithm" in block)
    (tmp_path / "my_algorithms.py").write_text(code)
    settings = ["--set", 'plugins=["my_algorithms"]', "--set", "algorithm.name=fedavgm", "--set", "rounds=1"]
    done = fedftg("run", *tiny, *settings, "--out", "r", path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "fedavgm + fedftg" in done.stdout


def test_snippet_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "README.md").read_text()
    code = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]
    exec(code.replace("rounds=5", "rounds=1"), {})
    assert (tmp_path / "runs" / "mine" / "summary.json").exists()
