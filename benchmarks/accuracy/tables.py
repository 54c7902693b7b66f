"""Markdown tables from kept results; nothing in them is typed by hand."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

from cells import TABLES, Cell, fits

_CELLS = {cell.name: cell for rows in TABLES.values() for cell in rows.cells}
KINDS = ("selected", "all", "refined")


def write_tables(results: Path) -> Path:
    """Writes ``tables.md`` beside the results; tables without any result are left out."""
    parts = ["# Accuracy tables", "", "Made by `benchmarks/accuracy/accuracy.py` from the files beside it.", ""]
    for name, rows in TABLES.items():
        lines = [line for cell in rows.cells if (line := _line(results, cell)) is not None]
        if lines:
            parts += [f"## {name}. {rows.title}", "", *_HEAD, *lines, ""]
    path = results / "tables.md"
    results.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(parts), encoding="utf-8")
    return path


PAGE = Path(__file__).resolve().parents[2] / "docs" / "results.md"
_BLOCK = re.compile(r"(<!-- table (\w): [^>]*-->\n)(.*?)(<!-- end of table -->)", re.DOTALL)


def fill_page(text: str, results: Path) -> str:
    """The page's text with its tables, each between two comments, made anew from the results."""

    def filled(block: re.Match[str]) -> str:
        lines = [line for cell in TABLES[block[2]].cells if (line := _short_line(results, cell)) is not None]
        return block[1] + "\n".join([*_SHORT_HEAD, *lines]) + "\n" + block[4]

    return _BLOCK.sub(filled, text)


_COLUMNS = (
    "cell", "seeds", "rounds", "selected", "all", "refined", "final", "best", "gain over base", "over the preset",
    "right after fine-tuning", "s", "commit",
)  # fmt: skip
_HEAD = ("| " + " | ".join(_COLUMNS) + " |", "|---|" + "---|" * (len(_COLUMNS) - 1))


_SHORT_COLUMNS = (
    "cell",
    "seeds",
    "`selected`",
    "`all`",
    "`refined`",
    "over its base, by seed",
    "over the preset, by seed",
)
_SHORT_HEAD = ("| " + " | ".join(_SHORT_COLUMNS) + " |", "|---|" + "---|" * (len(_SHORT_COLUMNS) - 1))


def read(path: Path) -> dict[str, Any] | None:
    """A kept result; None where it is not there or not whole."""
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return result


def load(results: Path, cell: Cell) -> dict[int, dict[str, Any]]:
    """The kept results of a cell by seed; those of other settings under the same name are left out."""
    found = [read(path) for path in sorted((results / cell.name).glob("seed*.json"))]
    return {result["seed"]: result for result in found if result and fits(result["made_with"], cell)}


def spread(values: list[float], *, sign: bool = False) -> str:
    """Mean and standard deviation over seeds in percent."""
    mean = 100 * statistics.mean(values)
    text = f"{mean:+.2f}" if sign else f"{mean:.2f}"
    return f"{text} ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else text


EVALUATIONS = 10
"""Whose mean is a run's accuracy in the tables."""


def last(result: dict[str, Any], kind: str, until: int | None = None) -> float:
    """The mean of the last ten evaluations, or of those up to the round ``until``."""
    pairs = zip(result["rounds"], result["accuracy"][kind], strict=True)
    return statistics.mean([value for round, value in pairs if until is None or round <= until][-EVALUATIONS:])


def differences(results: Path, cell: Cell, other: str | None) -> dict[int, float]:
    """By seed: the deployed model's accuracy minus that of the other cell, over the rounds that both have."""
    if other is None:
        return {}
    theirs = load(results, _CELLS[other])
    found = {}
    for seed, run in load(results, cell).items():
        if seed in theirs:
            until = min(run["rounds"][-1], theirs[seed]["rounds"][-1])
            found[seed] = last(run, "refined", until) - last(theirs[seed], "refined", until)
    return found


def _paired(gains: list[float]) -> str:
    return f"{spread(gains, sign=True)} ({', '.join(f'{100 * gain:+.1f}' for gain in gains)})" if gains else ""


def _short_line(results: Path, cell: Cell) -> str | None:
    runs = load(results, cell)
    if not runs:
        return None
    return "| " + " | ".join((cell.name, str(len(runs)), *_means(runs), *_differences(results, cell))) + " |"


def _means(runs: dict[int, dict[str, Any]]) -> list[str]:
    return [spread([last(run, kind) for run in runs.values()]) for kind in KINDS]


def _differences(results: Path, cell: Cell) -> list[str]:
    return [_paired(list(differences(results, cell, other).values())) for other in (cell.base, cell.unchanged)]


def _line(results: Path, cell: Cell) -> str | None:
    runs = load(results, cell)
    if not runs:
        return None
    refined = [run["accuracy"]["refined"] for run in runs.values()]
    ends = [spread([values[-1] for values in refined]), spread([max(values) for values in refined])]
    rounds = str(next(iter(runs.values()))["rounds"][-1])
    after = [
        statistics.mean(
            right - before
            for before, right in zip(run["accuracy"]["selected"], run["accuracy"]["refined"], strict=True)
        )
        for run in runs.values()
    ]
    change = spread(after, sign=True) if cell.base else ""
    seconds = statistics.median(run["summary"]["seconds"]["total"] for run in runs.values())
    commits = ", ".join(sorted({run["commit"] for run in runs.values()}))
    columns = (
        cell.name,
        str(len(runs)),
        rounds,
        *_means(runs),
        *ends,
        *_differences(results, cell),
        change,
        f"{seconds:.0f}",
        commits,
    )
    return "| " + " | ".join(columns) + " |"
