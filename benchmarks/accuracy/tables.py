"""Markdown tables from kept results; nothing in them is typed by hand."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cells import SEEDS, TABLES, Cell, Rows, fits

CELLS = {cell.name: cell for rows in TABLES.values() for cell in rows.cells}
"""By name."""
KINDS = ("selected", "all", "refined")


def write_tables(results: Path) -> Path:
    """Writes ``tables.md`` beside the results; tables without any result are left out."""
    parts = ["# Accuracy tables", "", "Made by `benchmarks/accuracy/accuracy.py` from the files beside it.", ""]
    for name, rows in TABLES.items():
        lines = _table(results, rows, _COLUMNS)
        if len(lines) > 2:
            parts += [f"## {name}. {rows.title}", "", *lines, ""]
    path = results / "tables.md"
    results.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(parts), encoding="utf-8")
    return path


PAGE = Path(__file__).resolve().parents[2] / "docs" / "results.md"
_BLOCK = re.compile(r"(<!-- table (\w): [^>]*-->\n)(.*?)(<!-- end of table -->)", re.DOTALL)


def fill_page(text: str, results: Path) -> str:
    """The page's text with its tables, each between two comments, made anew from the results."""

    def filled(block: re.Match[str]) -> str:
        return block[1] + "\n".join(_table(results, TABLES[block[2]], _ON_PAGE)) + "\n" + block[4]

    return _BLOCK.sub(filled, text)


_COLUMNS = (
    "cell", "seeds", "round", "selected", "all", "refined", "final", "best", "gain over base", "over the preset",
    "right after fine-tuning", "a perfect guard adds", "s", "commit",
)  # fmt: skip
_ON_PAGE = {
    "cell": "cell",
    "seeds": "seeds",
    "selected": "`selected`",
    "all": "`all`",
    "refined": "`refined`",
    "gain over base": "over its base, by seed",
    "over the preset": "over the preset, by seed",
    "right after fine-tuning": "right after fine-tuning",
}
"""The columns of the page, and what they are called there."""


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


def last(result: dict[str, Any], *kinds: str, until: int | None = None, evaluations: int = EVALUATIONS) -> float:
    """The mean of the last evaluations, or of those up to the round ``until``; the best kind at each of them."""
    values = zip(*(result["accuracy"][kind] for kind in kinds), strict=True)
    taken = [max(of) for round, of in zip(result["rounds"], values, strict=True) if until is None or round <= until]
    return statistics.mean(taken[-evaluations:])


def differences(results: Path, cell: Cell, other: str | None, until: int | None = None) -> dict[int, float]:
    """By seed: the deployed model's accuracy minus that of the other cell, over the rounds that both have."""
    if other is None:
        return {}
    theirs = load(results, CELLS[other])
    found = {}
    for seed, run in load(results, cell).items():
        if seed in theirs:
            end = min(run["rounds"][-1], theirs[seed]["rounds"][-1], until or run["rounds"][-1])
            found[seed] = last(run, "refined", until=end) - last(theirs[seed], "refined", until=end)
    return found


def _table(results: Path, rows: Rows, columns: Iterable[str] | Mapping[str, str]) -> list[str]:
    """The lines of a table with these columns, whose values in a mapping are what they are called."""
    titles = columns if isinstance(columns, Mapping) else {name: name for name in columns}
    found = [_row(results, cell, rows.until) for cell in rows.cells if load(results, cell)]
    cells = [list(titles.values()), ["---"] * len(titles), *([row[name] for name in titles] for row in found)]
    return ["| " + " | ".join(row) + " |" for row in cells]


def _row(results: Path, cell: Cell, until: int | None) -> dict[str, str]:
    """By column: what is said of a cell that has results, up to the round ``until``."""
    by_seed = load(results, cell)
    runs = list(by_seed.values())
    end = min([run["rounds"][-1] for run in runs] + ([until] if until else []))
    to_end = [[v for r, v in zip(run["rounds"], run["accuracy"]["refined"], strict=True) if r <= end] for run in runs]
    after = [last(run, "refined", until=end) - last(run, "selected", until=end) for run in runs]
    guarded = [last(run, "selected", "refined", until=end) - last(run, "refined", until=end) for run in runs]
    return {
        "cell": cell.name,
        "seeds": str(len(runs)),
        "round": str(end),
        **{kind: spread([last(run, kind, until=end) for run in runs]) for kind in KINDS},
        "final": spread([values[-1] for values in to_end]),
        "best": spread([max(values) for values in to_end]),
        "gain over base": _paired(differences(results, cell, cell.base, end)),
        "over the preset": _paired(differences(results, cell, cell.unchanged, end)),
        "right after fine-tuning": spread(after, sign=True) if cell.base else "",
        "a perfect guard adds": spread(guarded, sign=True) if cell.base else "",
        "s": f"{statistics.median(run['summary']['seconds']['total'] for run in runs):.0f}",
        "commit": ", ".join(sorted({run["commit"] for run in runs})),
    }


def _paired(gains: dict[int, float]) -> str:
    """Mean, deviation, and each seed's in order; seeds are named where not all are there."""
    if not gains:
        return ""
    named = sorted(gains) != list(range(len(SEEDS)))
    each = (f"{f'seed {seed}: ' if named else ''}{100 * gain:+.1f}" for seed, gain in sorted(gains.items()))
    return f"{spread(list(gains.values()), sign=True)} ({', '.join(each)})"
