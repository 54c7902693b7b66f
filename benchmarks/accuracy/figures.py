"""Figures from kept results, for docs/results.md and benchmarks/results/accuracy.md."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cells import PRESETS, TABLES, Cell
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tables import CELLS, ROOT, Results, Runs, differences

FOLDER = ROOT / "docs" / "figures"
# Okabe and Ito's colours: distinct with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
OF_PRESET = dict(zip(PRESETS, COLOURS, strict=False))


def write_figures(results: Results, folder: Path = FOLDER) -> None:
    """Draws all figures; cells without results are left out."""
    _gains(results, folder / "accuracy_gains.png")
    _curves(results, folder / "accuracy_rounds.png")
    _trends(results, folder / "accuracy_trends.png")
    _parts(results, folder / "accuracy_parts.png")
    _after(results, folder)


def _gains(results: Results, path: Path) -> None:
    """Gain of the deployed model over the base for each cell of table A: a dot a seed, a bar for their mean."""
    rows: dict[str, list[tuple[str, list[float]]]] = {}
    for cell in TABLES["A"].cells:
        gains = [100 * gain for gain in differences(results, cell, cell.base).values()]
        if gains and cell.base is not None:
            preset = next(name for name in PRESETS if f"-{name}-" in cell.name)
            rows.setdefault(_label(cell.base), []).append((preset, gains))
    figure = Figure(figsize=(9, 1.6 + 0.52 * len(rows)), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.axvline(0, color="black", linewidth=0.8)
    for place, presets in enumerate(rows.values()):
        for preset, gains in presets:
            height = place + 0.25 * (PRESETS.index(preset) - 1)
            axes.plot(gains, [height] * len(gains), "o", color=OF_PRESET[preset], markersize=4, alpha=0.7)
            mean = statistics.mean(gains)
            axes.plot([mean] * 2, [height - 0.11, height + 0.11], color=OF_PRESET[preset], linewidth=3)
    for preset in PRESETS:
        if any(preset == shown for presets in rows.values() for shown, _ in presets):
            axes.plot([], [], "o", color=OF_PRESET[preset], label=preset)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set_xlabel("accuracy of the deployed model minus that of the base, same seed, in points")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=len(PRESETS), frameon=False)
    save(figure, path)


def _curves(results: Results, path: Path) -> None:
    """Accuracy over rounds of FedAvg at alpha 0.1, base and each preset that ran, mean over the seeds that all have."""
    found = {kind: results[f"fedavg-{kind}-b0.1-gn"] for kind in ("base", *PRESETS)}
    runs = _of_common_seeds({kind: of_kind for kind, of_kind in found.items() if of_kind})
    figure = Figure(figsize=(9, 5), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    _line(axes, runs["base"], "selected", "black", "base: aggregate, deployed", "-")
    _line(axes, runs["base"], "all", "black", "base: average of all clients' last uploads", ":")
    for preset in [kind for kind in runs if kind != "base"]:
        _line(axes, runs[preset], "refined", OF_PRESET[preset], f"{preset}: refined, deployed", "-")
        _line(axes, runs[preset], "selected", OF_PRESET[preset], f"{preset}: aggregate", "--")
    axes.set(xlabel="round", ylabel="test accuracy in %")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    save(figure, path)


def _of_common_seeds(runs: dict[str, Runs]) -> dict[str, Runs]:
    """Without the seeds that one of them lacks."""
    common = set.intersection(*map(set, runs.values())) if runs else set()
    return {name: {seed: run for seed, run in of_name.items() if seed in common} for name, of_name in runs.items()}


_SMOOTHED = 5
"""Evaluations that a point of a trend is the mean of; it is drawn at the last one's round."""


def _trends(results: Results, path: Path) -> None:
    """Gain of the preset fedftg over each base by round: does it last? Mean over the seeds that both have."""
    figure = Figure(figsize=(9, 5), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(0, color="black", linewidth=0.8)
    cells = [cell for cell in TABLES["A"].cells if cell.base is not None and "-fedftg-" in cell.name]
    for place, cell in enumerate(cells):
        pair = _of_common_seeds({"base": results[str(cell.base)], "refined": results[cell.name]})
        if not pair["base"]:
            continue
        by_seed = [
            [
                100 * (theirs - ours)
                for ours, theirs in zip(*(_deployed(pair[kind][seed]) for kind in pair), strict=True)
            ]
            for seed in pair["base"]
        ]
        gain = [statistics.mean(values) for values in zip(*by_seed, strict=True)]
        smooth = [statistics.mean(gain[end - _SMOOTHED : end]) for end in range(_SMOOTHED, len(gain) + 1)]
        rounds = next(iter(pair["base"].values()))["rounds"][_SMOOTHED - 1 :]
        style = "-" if place < len(COLOURS) else "--"
        label = f"{_label(str(cell.base))} ({_seeds(len(by_seed))})"
        axes.plot(rounds, smooth, style, color=COLOURS[place % len(COLOURS)], label=label)
    axes.set(xlabel="round", ylabel=f"gain of fedftg in points, mean of {_SMOOTHED} evaluations")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    save(figure, path)


_PARTS = {
    "samples_ensemble": "class-by-class teacher weights",
    "no_absent": "teacher for the absent clients",
    "no_cls": "fidelity, L_cls",
    "no_md": "hard samples, L_md",
    "no_absent-paper_labels": "even labels (without that teacher)",
    "no_dis": "diversity, L_dis",
}
"""The cells of table B by what they change, and the part that they lack."""


def _parts(results: Results, path: Path) -> None:
    """What the preset loses without each of its parts: a bar for the mean, a dot a seed."""
    figure = Figure(figsize=(9, 3.4), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    for place, change in enumerate(_PARTS):
        cell = CELLS[f"fedavg-fedftg-b0.1-gn-{change}"]
        worth = [-100 * gain for gain in differences(results, cell, cell.unchanged).values()]
        mean = statistics.mean(worth)
        axes.barh(place, mean, color=COLOURS[2], alpha=0.6)
        axes.plot(worth, [place] * len(worth), "o", color="black", markersize=4)
        axes.annotate(f"{mean:.2f}", (max(*worth, 0), place), (8, 0), textcoords="offset points", va="center")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(_PARTS)), list(_PARTS.values()))
    axes.invert_yaxis()
    axes.set_xlim(right=6.2)
    axes.set_xlabel("accuracy lost without it, in points")
    axes.grid(axis="x", alpha=0.3)
    save(figure, path)


def _deployed(run: dict[str, Any]) -> list[float]:
    values: list[float] = run["accuracy"]["refined"]
    return values


def _after(results: Results, folder: Path) -> None:
    """Accuracy right after fine-tuning minus that before, by round: a figure for each network of table C."""
    found: dict[str, list[Cell]] = {}
    for cell in TABLES["C"].cells:
        if cell.base is not None and results[cell.name]:
            found.setdefault(cell.base.rsplit("-", 1)[1], []).append(cell)
    for model, cells in found.items():
        _after_of(results, model, cells, folder)


def _after_of(results: Results, model: str, cells: Sequence[Cell], folder: Path) -> None:
    figure = Figure(figsize=(9, 5.6), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(0, color="black", linewidth=0.8)
    for place, cell in enumerate(cells):
        runs = results[cell.name]
        changes = [[100 * (right - left) for left, right in zip(*_both(run), strict=True)] for run in runs.values()]
        rounds = next(iter(runs.values()))["rounds"]
        mean = [statistics.mean(values) for values in zip(*changes, strict=True)]
        style = "-" if place < len(COLOURS) else "--"
        name = cell.name.removeprefix("fedavg-").replace(f"-b0.1-{model}", "").replace(f"-{model}", "")
        label = f"{name} ({_seeds(len(runs))})"
        axes.plot(rounds, mean, style, color=COLOURS[place % len(COLOURS)], label=label)
    axes.set(title=model, xlabel="round", ylabel="refined minus aggregate, points")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    save(figure, folder / f"accuracy_after_{model}.png")


def _both(run: dict[str, Any]) -> tuple[list[float], list[float]]:
    return run["accuracy"]["selected"], run["accuracy"]["refined"]


def _line(axes: Axes, runs: Runs, kind: str, colour: str, label: str, style: str) -> None:
    if not runs:
        return
    by_seed: Sequence[Sequence[float]] = [run["accuracy"][kind] for run in runs.values()]
    rounds = next(iter(runs.values()))["rounds"]
    mean = [100 * statistics.mean(values) for values in zip(*by_seed, strict=True)]
    axes.plot(rounds, mean, style, color=colour, label=f"{label} ({_seeds(len(runs))})", linewidth=1.6)


def _seeds(number: int) -> str:
    return f"{number} seed{'s' * (number > 1)}"


def _label(base: str) -> str:
    algorithm, _, skew, model = base.split("-")
    return f"{algorithm}, {skew.replace('b0', 'alpha 0')}, {model}"


def save(figure: Figure, path: Path) -> None:
    """Writes a figure without metadata, which would differ between machines."""
    figure.savefig(path, metadata={"Software": None})
