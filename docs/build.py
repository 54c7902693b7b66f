"""Builds the site: ``make docs``, or ``python docs/build.py`` where the extra ``docs`` is installed.

The pages are written for GitHub; Zensical builds a copy of them. In the copy, links to files that the site has no page
for become the files' names, and LaTeX becomes MathML: browsers show it without a script or a network.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPY = ROOT / "build" / "docs"
LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)#\s]+)(#[^)\s]*)?\)")
MATHS = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def pages() -> dict[Path, Path]:
    """Returns which file of the repository is which file of the site's source."""
    docs = ROOT / "docs"
    found = {file: file.relative_to(docs) for file in docs.rglob("*") if file.is_file() and file.suffix != ".py"}
    measured = {file: Path("measured", file.name) for file in (ROOT / "benchmarks" / "results").glob("*.md")}
    return found | measured | {ROOT / name: Path(name.lower()) for name in ("CHANGELOG.md", "CONTRIBUTING.md")}


def relinked(text: str, source: Path, site: dict[Path, Path]) -> str:
    """Returns a page's text with the links of the site instead of those of the repository."""

    def link(found: re.Match[str]) -> str:
        words, target, anchor = found.groups()
        file = (source.parent / target).resolve()
        if file in site:
            return f"[{words}]({os.path.relpath(site[file], site[source].parent)}{anchor or ''})"
        if file.exists():
            return f"{words} (`{file.relative_to(ROOT)}`)"
        return found[0]

    return LINK.sub(link, text)


def mathml(found: re.Match[str]) -> str:
    """Returns LaTeX as MathML; what stands alone scrolls where it is wider than the page."""
    from latex2mathml.converter import convert  # tests import this file without the extra

    if found[1] == "span":
        return convert(unescape(found[2]))
    return f'<div class="maths">{convert(unescape(found[2]), display="block")}</div>'


def main() -> None:
    """Copies the pages, builds the site into ``site``, and exits with 1 on any warning."""
    shutil.rmtree(COPY, ignore_errors=True)
    site = pages()
    for source, place in site.items():
        (COPY / place).parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".md":
            (COPY / place).write_text(relinked(source.read_text(), source, site))
        else:
            shutil.copy(source, COPY / place)
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "NO_COLOR": "1"}, check=False)
    for page in (ROOT / "site").rglob("*.html"):
        page.write_text(MATHS.sub(mathml, page.read_text()))
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
