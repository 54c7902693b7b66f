"""The site of ``make docs``: every page is in its navigation, links lead somewhere, the build has no warning."""

import ast
import importlib.util
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import fedftg

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build", ROOT / "docs" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def in_navigation(entries: list[Any]) -> Iterator[str]:
    for entry in entries:
        for value in entry.values() if isinstance(entry, dict) else [entry]:
            yield from in_navigation(value) if isinstance(value, list) else [value]


def test_navigation_has_every_page_once(build: ModuleType) -> None:
    nav = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"]
    assert sorted(in_navigation(nav)) == sorted(
        page.as_posix() for page in build.pages().values() if page.suffix == ".md"
    )


def test_links_of_the_repository_become_those_of_the_site(build: ModuleType) -> None:
    def relinked(text: str) -> str:
        return str(build.relinked(text, ROOT / "docs" / "algorithms" / "fedavg.md", build.pages()))

    assert relinked("[all](../results.md#ten-rows)") == "[all](../results.md#ten-rows)"
    assert relinked("[all](../../benchmarks/results/deployed.md)") == "[all](../measured/deployed.md)"
    assert relinked("[log](../../CHANGELOG.md#added)") == "[log](../changelog.md#added)"
    assert relinked("[a recipe](../../recipes/default.toml)") == "a recipe (`recipes/default.toml`)"
    assert relinked("![plot](../figures/oneshot.png)") == "![plot](../figures/oneshot.png)"
    assert relinked("[Flower](https://flower.ai) and f[0](x)") == "[Flower](https://flower.ai) and f[0](x)"


def test_reference_has_every_public_name() -> None:
    shown = set(re.findall(r"^::: (\S+)", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE))
    listed = re.search(r"__all__ = (\[.*?\])", (ROOT / "src/fedftg/flower/__init__.py").read_text(), re.DOTALL)
    assert listed is not None
    public = [*fedftg.__all__, *(f"flower.{name}" for name in ast.literal_eval(listed[1]))]
    assert {f"fedftg.{name}" for name in public} - {"fedftg.__version__"} <= shown


@pytest.mark.skipif(importlib.util.find_spec("zensical") is None, reason="needs the extra docs")
def test_build_without_warnings() -> None:
    done = subprocess.run([sys.executable, "docs/build.py"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    method, api = ((ROOT / "site" / name).read_text() for name in ("method.html", "api.html"))
    assert "<math " in method
    assert "arithmatex" not in method
    assert "Returns one model, distilled from" in api
