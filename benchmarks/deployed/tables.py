"""Tables of the kept results, filled into the blocks of ``benchmarks/results/deployed.md``."""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cells import CELLS, OWN, PAPER

from fedftg.rundir import records

FOLDER = Path(__file__).parent.parent / "results"
RESULTS = FOLDER / "deployed.jsonl"
PAGES = (FOLDER / "deployed.md", *(FOLDER.parent.parent / "docs" / f"{name}.md" for name in ("results", "oneshot")))
DEFAULT = "fedftg"
FREE = ("aggregate", "ema", "wima", "all")
"""The averages, without correction, that the default has to beat in each cell."""

Line = dict[str, Any]
_BLOCK = re.compile(r"(<!-- deployed ([^:]+):[^>]*-->\n)(.*?)(<!-- end of table -->)", re.DOTALL)


def load() -> list[Line]:
    """Returns the kept results; of two of one run, the later one."""
    return list({(line["cell"], line["seed"]): line for line in records.read(RESULTS)}.values())


def paired() -> list[Line]:
    """Returns the lines of base trajectories for which the default was run too, with its accuracies among theirs."""
    order = [*CELLS, *PAPER]
    kept = sorted(load(), key=lambda line: (order.index(line["cell"]), line["seed"]))
    lines = {(line["cell"], line["seed"]): line for line in kept}
    both = ((line, lines.get((f"default-{cell}", seed))) for (cell, seed), line in lines.items())
    return [{**base, "accuracy": base["accuracy"] | default["accuracy"]} for base, default in both if default]


def write_page() -> None:
    """Fills every block ``<!-- deployed PREFIX SEEDS: ... -->`` with the cells of that prefix and those seeds."""
    lines = paired()

    def fill(found: re.Match[str]) -> str:
        prefix, seeds, *what = found[2].split()
        if what == ["rivals"]:
            return found[1] + rivals(prefix, [int(seed) for seed in seeds.split(",")]) + found[4]
        chosen = {int(seed) for seed in seeds.split(",")}
        use = [line for line in lines if re.match(prefix, line["cell"]) and line["seed"] in chosen]
        return found[1] + (table(use, *what) if use else "Not measured yet.\n") + found[4]

    for page in PAGES:
        page.write_text(_BLOCK.sub(fill, page.read_text(encoding="utf-8")), encoding="utf-8")


def mean(line: Line, name: str, until: int | None = None) -> float:
    """Returns the mean of the last ten evaluations (up to a round), in %."""
    values = [
        value
        for number, value in zip(line["rounds"], line["accuracy"][name], strict=True)
        if value is not None and (until is None or number <= until)
    ]
    return 100 * statistics.mean(values[-10:]) if values else math.nan


def table(lines: list[Line], what: str = "") -> str:
    """Returns a row per cell: each variant's mean ± standard deviation over seeds, and the default's lead.

    Args:
        what: ``imbalanced`` for the accuracies on the imbalanced test set, ``rounds`` for rows at rounds 50, 100, 200,
            ``short`` without the columns that are never best.
    """
    names = [name for name in lines[0]["accuracy"] if not name.endswith(", imbalanced")]
    hidden = {"short": ("wima", "ensemble", "sent"), "rounds": ("ensemble", "ensemble + prior")}.get(what, ())
    shown = [name for name in names if name not in hidden]
    cells: dict[str, list[Line]] = defaultdict(list)
    for line in lines:
        cells[line["cell"]].append(line)
    rows = [["cell", "seeds", *shown, f"{DEFAULT} - best average", f"{DEFAULT} - (all + prior)", "seeds won"]]
    ends = [50, 100, 200] if what == "rounds" else [None]
    for (cell, found), end in ((item, end) for item in cells.items() for end in ends):
        suffix = ", imbalanced" if what == "imbalanced" else ""
        by_name = {name: [mean(line, name + suffix, end) for line in found] for name in names}
        best = max(FREE, key=lambda name: statistics.mean(by_name[name]))
        leads = [ours - theirs for ours, theirs in zip(by_name[DEFAULT], by_name[best], strict=True)]
        over = [ours - theirs for ours, theirs in zip(by_name[DEFAULT], by_name["all + prior"], strict=True)]
        won = sum(by_name[DEFAULT][i] > max(by_name[name][i] for name in FREE) for i in range(len(found)))
        label = cell if end is None else f"{cell}, round {end}"
        rows.append(
            [label, str(len(found)), *(spread(by_name[name]) for name in shown), f"{spread(leads, '+')} ({best})",
             spread(over, "+"), f"{won} of {len(found)}"]
        )  # fmt: skip
    return "\n".join(["| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]]) + "\n"


def rivals(cell: str, seeds: Sequence[int]) -> str:
    """Returns a row per variant of a cell, and per run of its own, with the accuracy after each round."""
    kept = {(line["cell"], line["seed"]): line for line in load()}
    lines = [kept[cell, seed] for seed in seeds if (cell, seed) in kept]
    if not lines:
        return "Not measured yet.\n"
    rounds = lines[0]["rounds"]
    rows = [["deployed", "seeds", *(f"round {number}" for number in rounds)], ["---"] * (2 + len(rounds))]
    variants = [(name, name, lines) for name in [*lines[0]["variants"], "ensemble", "ensemble + prior"]]
    for own, label in OWN.items():
        found = [kept[f"{own}-{cell}", seed] for seed in seeds if (f"{own}-{cell}", seed) in kept]
        variants += [(label, DEFAULT, found)] if found else []
    for label, name, of in variants:
        values = [[line["accuracy"][name][line["rounds"].index(number)] for line in of] for number in rounds]
        shown = ("" if None in each else spread([100 * value for value in each]) for each in values)
        rows.append([label, str(len(of)), *shown])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def spread(values: list[float], sign: str = "") -> str:
    """Returns ``mean ± standard deviation``."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.2f}{deviation}"
