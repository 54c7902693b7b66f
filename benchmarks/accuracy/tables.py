"""Markdown tables from kept results; nothing in them is typed by hand."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cells import SEEDS, TABLES, Cell, Rows, fits

from fedftg.rundir import records

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
ACCURACY = RESULTS / "accuracy.jsonl"
"""One line a run."""
PAGES = (RESULTS / "accuracy.md", ROOT / "docs" / "results.md")
"""Pages with tables of these runs."""

CELLS = {cell.name: cell for rows in TABLES.values() for cell in rows.cells}
"""By name."""
KINDS = ("selected", "all", "refined")
EVALUATIONS = 10
"""Whose mean is a run's accuracy in the tables."""

Runs = dict[int, dict[str, Any]]
"""A cell's results by seed."""
Results = dict[str, Runs]
"""By the cell's name."""


def load(path: Path) -> Results:
    """Returns all kept results that were made with the present settings of their cell; of two, the later line."""
    kept: Results = {name: {} for name in CELLS}
    for result in sorted(records.read(path), key=lambda result: result["seed"]):
        cell = CELLS.get(result["cell"])
        if cell is not None and fits(result["made_with"], cell):
            kept[cell.name][result["seed"]] = result
    return kept


def write_tables(results: Results, path: Path) -> None:
    """Writes all tables with every column; tables without any result are left out."""
    parts = ["# Accuracy tables", "", "Made by `benchmarks/accuracy/accuracy.py` from the files beside it.", ""]
    for name, rows in TABLES.items():
        lines = _table(results, rows, _COLUMNS)
        if len(lines) > 2:
            parts += [f"## {name}. {rows.title}", "", *lines, ""]
    path.write_text("\n".join(parts), encoding="utf-8")


_BLOCK = re.compile(r"(<!-- table (\w+): [^>]*-->\n)(.*?)(<!-- end of table -->)", re.DOTALL)


def fill_page(text: str, results: Results) -> str:
    """Returns the page's text with its tables, each between two comments, made anew from the results."""

    def filled(block: re.Match[str]) -> str:
        name = block[2]
        lines = _summary(results) if name == "summary" else _table(results, TABLES[name], _ON_PAGE)
        return block[1] + "\n".join(lines) + "\n" + block[4]

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


_SUMMARY = {
    "FedAvg, alpha 0.1": "fedavg-fedftg-b0.1-gn",
    "FedProx, alpha 0.1": "fedprox-fedftg-b0.1-gn",
    "FedDyn, alpha 0.1": "feddyn-fedftg-b0.1-gn",
    "SCAFFOLD, alpha 0.1": "scaffold-fedftg-b0.1-gn",
    "MOON, alpha 0.1": "moon-fedftg-b0.1-gn",
    "FedAvg, alpha 0.1, BatchNorm": "fedavg-fedftg-b0.1-bn",
    "FedAvg, alpha 0.1, no normalisation": "fedavg-fedftg-b0.1-plain",
    "FedAvg, alpha 0.3": "fedavg-fedftg-b0.3-gn",
    "FedAvg, IID": "fedavg-fedftg-iid-gn",
    "FedAvg, alpha 0.1, preset `paper`": "fedavg-paper-b0.1-gn",
}
"""The rows of the short table: the setting and its cell."""


def _summary(results: Results) -> list[str]:
    """The short table: base, the average of its clients' last uploads, and what FedFTG deploys."""
    lines = [("setting", "base", "base's `all`", "deployed", "gain, by seed"), ("---",) * 5]
    for setting, name in _SUMMARY.items():
        row, base = _row(results, CELLS[name]), _row(results, CELLS[str(CELLS[name].base)])
        lines.append((setting, base["refined"], base["all"], row["refined"], row["gain over base"]))
    return ["| " + " | ".join(line) + " |" for line in lines]


def spread(values: list[float], *, sign: bool = False) -> str:
    """Returns mean and standard deviation over seeds in percent."""
    mean = 100 * statistics.mean(values)
    text = f"{mean:+.2f}" if sign else f"{mean:.2f}"
    return f"{text} ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else text


def last(result: dict[str, Any], *kinds: str, until: int | None = None, evaluations: int = EVALUATIONS) -> float:
    """Returns the mean of the last evaluations, or of those up to round ``until``; the best kind at each of them."""
    values = zip(*(result["accuracy"][kind] for kind in kinds), strict=True)
    taken = [max(of) for round, of in zip(result["rounds"], values, strict=True) if until is None or round <= until]
    return statistics.mean(taken[-evaluations:])


def differences(results: Results, cell: Cell, other: str | None, until: int | None = None) -> dict[int, float]:
    """Returns, by seed, the deployed model's accuracy minus the other cell's, over the rounds that both have."""
    theirs = results[other] if other is not None else {}
    found = {}
    for seed, run in results[cell.name].items():
        if seed in theirs:
            end = min(run["rounds"][-1], theirs[seed]["rounds"][-1], until or run["rounds"][-1])
            found[seed] = last(run, "refined", until=end) - last(theirs[seed], "refined", until=end)
    return found


def _table(results: Results, rows: Rows, columns: Iterable[str] | Mapping[str, str]) -> list[str]:
    """The lines of a table with these columns, whose values in a mapping are what they are called."""
    titles = columns if isinstance(columns, Mapping) else {name: name for name in columns}
    found = [_row(results, cell, rows.until) for cell in rows.cells if results[cell.name]]
    cells = [list(titles.values()), ["---"] * len(titles), *([row[name] for name in titles] for row in found)]
    return ["| " + " | ".join(row) + " |" for row in cells]


def _row(results: Results, cell: Cell, until: int | None = None) -> dict[str, str]:
    """By column: what is said of a cell that has results, up to the round ``until``."""
    runs = list(results[cell.name].values())
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
    """Mean, deviation, and each seed's in order; seeds are named where some are missing."""
    if not gains:
        return ""
    named = sorted(gains) != list(range(len(SEEDS)))
    each = (f"{f'seed {seed}: ' if named else ''}{100 * gain:+.1f}" for seed, gain in sorted(gains.items()))
    return f"{spread(list(gains.values()), sign=True)} ({', '.join(each)})"
