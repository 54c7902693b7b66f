"""The tables and the figure that are made of the kept results."""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from figure import COLOURS
from matplotlib.figure import Figure
from methods import BESIDE, METHODS, OF_DATA
from tables import spread

from fedftg.rundir import records

FOLDER = Path(__file__).parent.parent / "results"
RESULTS = FOLDER / "oneshot.jsonl"
DRY = Path("runs") / "oneshot" / "dry.jsonl"
DOCS = FOLDER.parent.parent / "docs"
PAGE = DOCS / "oneshot.md"

Line = dict[str, Any]
Values = dict[str, dict[float, dict[int, Line]]]
_BLOCK = re.compile(r"(<!-- oneshot (\w+):[^>]*-->\n)(.*?)(<!-- end of table -->)", re.DOTALL)


def load(file: Path = RESULTS) -> list[Line]:
    """Returns the kept results; of two of one row and federation, the later one."""
    lines = records.read(file) if file.exists() else []
    return list({(line["data"], line["alpha"], line["seed"], line["method"]): line for line in lines}.values())


def write_page() -> None:
    """Fills every block ``<!-- oneshot DATA: ... -->``."""
    lines, text = load(), PAGE.read_text(encoding="utf-8")
    PAGE.write_text(_BLOCK.sub(lambda found: found[1] + tables(lines, found[2]) + found[4], text), encoding="utf-8")


def by_method(lines: list[Line], data: str) -> Values:
    """Returns the lines of a data set by method, alpha and seed, in the order of the rows."""
    values: Values = defaultdict(lambda: defaultdict(dict))
    best, *ensembles = BESIDE
    order = [best, *METHODS, *ensembles]
    for line in sorted(lines, key=lambda line: order.index(line["method"])):
        if line["data"] == data:
            values[line["method"]][line["alpha"]][line["seed"]] = line
    return values


def tables(lines: list[Line], data: str) -> str:
    """Returns a row per method: accuracy by alpha, share of the way from the average to the ensemble, seconds."""
    values = by_method(lines, data)
    if not values:
        return "Not measured yet.\n"
    alphas = sorted({alpha for of in values.values() for alpha in of})
    rows = [["method", *(f"alpha {alpha:g}" for alpha in alphas), "share", "seconds", "runs"]]
    rows.append(["---"] * len(rows[0]))
    for name, of in values.items():
        found = [line for seeds in of.values() for line in seeds.values()]
        seconds = [line["seconds"] for line in found if line["seconds"] is not None]
        cells = [
            spread([100 * line["accuracy"] for line in of[alpha].values()]) if of[alpha] else "" for alpha in alphas
        ]
        share = _share(values, name)
        rows.append([name, *cells, "" if share is None else f"{share:.2f}",
                     f"{statistics.mean(seconds):.0f}" if seconds else "", str(len(found))])  # fmt: skip
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def _share(values: Values, name: str) -> float | None:
    """Returns the gain over the average, as a share of that of the prior-corrected ensemble in the same federations."""
    low, high = values.get("average", {}), values.get("ensemble + prior", {})
    gains = [
        [of["accuracy"] - low[alpha][seed]["accuracy"] for of in (line, high[alpha][seed])]
        for alpha, seeds in values[name].items()
        for seed, line in seeds.items()
        if seed in low.get(alpha, {}) and seed in high.get(alpha, {})
    ]
    total = sum(whole for _, whole in gains)
    return sum(part for part, _ in gains) / total if total else None


def write_figure() -> None:
    """Draws a panel per data set, a row per method: a dot per alpha (mean of seeds), the ensemble as lines."""
    lines = load()
    found = {data: values for data in OF_DATA if (values := by_method(lines, data))}
    if not found:
        return
    names = [name for name in METHODS if any(name in values for values in found.values())]
    figure = Figure(figsize=(9, 1.6 + 0.32 * len(names)), dpi=100, layout="constrained")
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    alphas = sorted({line["alpha"] for line in lines})
    for axes, (data, values) in zip(panels, found.items(), strict=True):
        for number, (alpha, colour) in enumerate(zip(alphas, COLOURS.values(), strict=False)):
            means = {name: 100 * statistics.mean(line["accuracy"] for line in of[alpha].values())
                     for name, of in values.items() if of.get(alpha)}  # fmt: skip
            places = [(means[name], row + 0.2 * (number - 1)) for row, name in enumerate(names) if name in means]
            axes.plot(*zip(*places, strict=True), "o", color=colour, markersize=6, label=f"alpha {alpha:g}")
            if "ensemble + prior" in means:
                axes.axvline(means["ensemble + prior"], color=colour, linestyle="--", linewidth=1.2)
        axes.set_title(data, fontsize=11)
        axes.set_xlabel("test accuracy in %")
        axes.grid(alpha=0.3)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    panels[0].plot([], [], color="black", linestyle="--", linewidth=1.2, label="clients' ensemble, prior-corrected")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(DOCS / "figures" / "oneshot.png")
