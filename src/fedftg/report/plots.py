"""Plots as PNG files, drawn without a display (matplotlib's Agg) and without pyplot's global state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from fedftg.errors import InputError
from fedftg.report.load import RunRecord, display_names
from fedftg.report.table import Score, score

DPI = 100
WIDTH = 12.0
"""Inches: 1200 px."""

SMOOTH_FROM = 200
"""From so many evaluations on, lines are running means of `WINDOW` evaluations above the faint single values."""
WINDOW = 10

# Okabe and Ito's colours without yellow and black: told apart with any colour vision, readable on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LineStyle = Literal["-", "--", ":"]
_STYLES: dict[str, LineStyle] = {"deployed": "-", "selected": "--", "all": ":"}

Series = tuple[list[int], list[float]]


def accuracy_plot(runs: Sequence[RunRecord], path: Path, title: str | None = None) -> Path:
    """Test accuracies over rounds as PNG; returns ``path``.

    One run: `selected`, `all` and `refined`, a colour each. Several: a colour per run, the deployed model solid,
    `selected` dashed, `all` dotted.

    Raises:
        InputError: no run, or the file cannot be written.
    """
    if not runs:
        raise InputError("nothing to plot: give at least one run folder")
    figure = Figure(figsize=(WIDTH, 5.6 + 0.22 * math.ceil(len(runs) / 2)), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    handles = _draw_one(axes, runs[0]) if len(runs) == 1 else _draw_several(axes, runs)
    _decorate(axes, runs, title if title is not None else _default_title(runs))
    columns = 1 if max(len(str(handle.get_label())) for handle in handles) > 70 else 3 if len(runs) == 1 else 2
    legend = figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        title=f"mean of the last {WINDOW} evaluations in %",
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    if len(runs) > 1:
        _explain_styles(axes, runs)
    return _save(figure, path)


def partition_heatmap(
    class_counts: Sequence[Sequence[int]],
    class_names: Sequence[str],
    path: Path,
    title: str | None = None,
) -> Path:
    """Clients x classes as PNG, with each client's size as a bar; returns ``path``.

    Classes that a client has no sample of are white. Counts are written into the cells while they are readable. Where
    one client holds more than 8 times the median, the colours are logarithmic.

    Raises:
        ValueError: no client, no class, or rows that do not fit the names.
        InputError: the file cannot be written.
    """
    if not class_counts or not class_names or any(len(row) != len(class_names) for row in class_counts):
        raise ValueError(f"need at least one client, and {len(class_names)} counts for each")
    counts = np.asarray(class_counts, dtype=np.int64)
    clients, classes = counts.shape
    height = min(max(4.0, 1.8 + 0.26 * clients), 13.0)
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    grid = figure.add_gridspec(1, 2, width_ratios=(5, 1))
    axes = figure.add_subplot(grid[0])
    bars = figure.add_subplot(grid[1], sharey=axes)
    norm = _norm(counts)
    # From 0.15 on, so that one sample can be told from none.
    shades = ListedColormap(matplotlib.colormaps["YlGnBu"](np.linspace(0.15, 1.0, 256))).with_extremes(bad="white")
    shown = np.ma.masked_equal(counts, 0)
    image = axes.imshow(shown, aspect="auto", cmap=shades, norm=norm, interpolation="nearest")
    bar = figure.colorbar(image, ax=bars, label="samples of a class", fraction=0.2, pad=0.05, aspect=5 * height)
    if isinstance(norm, LogNorm):
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    if clients <= 45 and classes <= 20:
        _write_counts(axes, counts, norm)
    _label_classes(axes, class_names)
    axes.set(xlabel="class", ylabel="client")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=45 if clients <= 45 else 20, integer=True))
    axes.set_ylim(clients - 0.5, -0.5)
    sizes = counts.sum(axis=1)
    bars.barh(np.arange(clients), sizes, height=0.8 if clients <= 100 else 1.0, color="#5A6B7B")
    bars.set(xlabel="samples", xlim=(0, max(int(sizes.max()), 1) * 1.05))
    bars.xaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
    bars.tick_params(labelleft=False, left=False)
    bars.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title if title is not None else f"{clients} clients, {classes} classes", parse_math=False)
    return _save(figure, path)


def running_mean(values: Sequence[float], window: int = WINDOW) -> list[float]:
    """The mean of each value and up to ``window - 1`` before it."""
    parts = [values[max(0, end - window) : end] for end in range(1, len(values) + 1)]
    return [math.fsum(part) / len(part) for part in parts]


def _draw_one(axes: Axes, run: RunRecord) -> list[Line2D]:
    kinds = {"refined": "refined (deployed)", "selected": "selected", "all": "all"}
    if run.refiner == "none":
        kinds = {"selected": "selected (deployed)", "all": "all"}
    handles = []
    for index, (kind, label) in enumerate(kinds.items()):
        series = run.series("accuracy", kind)
        style = _STYLES["deployed" if index == 0 else kind]
        colour, marker = _COLOURS[index], _MARKERS[index] if len(series[0]) <= 30 else ""
        if series[0]:
            _draw_line(axes, series, colour, style, 2.0, marker)
            handles.append(_handle(label, series, colour, style, marker))
    return handles or [_handle(run.name, ([], []), _COLOURS[0], "-", "")]


def _draw_several(axes: Axes, runs: Sequence[RunRecord]) -> list[Line2D]:
    handles = []
    for index, (run, name) in enumerate(zip(runs, display_names(runs), strict=True)):
        colour = _COLOURS[index % len(_COLOURS)]
        marker = _MARKERS[index // len(_COLOURS) % len(_MARKERS)]
        if run.refiner != "none":  # without refiner it is the deployed model
            _draw_line(axes, run.series("accuracy", "selected"), colour, _STYLES["selected"], 1.0)
        _draw_line(axes, run.series("accuracy", "all"), colour, _STYLES["all"], 1.1)
        deployed = run.deployed()
        many = len(runs) > len(_COLOURS)
        _draw_line(axes, deployed, colour, _STYLES["deployed"], 2.0, marker, always_mark=many)
        handles.append(_handle(name, deployed, colour, "-", marker if many or len(deployed[0]) <= 30 else ""))
    return handles


def _draw_line(
    axes: Axes, series: Series, colour: str, style: LineStyle, width: float, marker: str = "", always_mark: bool = False
) -> None:
    rounds, values = series
    if not rounds:
        return
    percent = [100 * value for value in values]
    if len(rounds) >= SMOOTH_FROM:
        if width >= 2:
            axes.plot(rounds, percent, color=colour, linewidth=0.6, alpha=0.25)
        percent = running_mean(percent)
    mark = marker if always_mark or len(rounds) <= 30 else ""
    if not mark and len(rounds) == 1:
        mark = "."
    every = max(1, len(rounds) // 15) if len(rounds) > 30 else 1
    alpha = 1.0 if width >= 2 else 0.7
    (line,) = axes.plot(rounds, percent, color=colour, linestyle=style, linewidth=width, alpha=alpha)
    line.set(marker=mark, markersize=4.5, markevery=every)


def _handle(name: str, series: Series, colour: str, style: LineStyle, marker: str) -> Line2D:
    result: Score | None = score(*series)
    # The value comes first: matplotlib leaves out labels that start with an underscore.
    text = "no evaluation" if result is None else f"{100 * result.mean_last:.2f}"
    label = f"{text}   {_cut(name, 110)}"
    return Line2D([], [], color=colour, linestyle=style, linewidth=2, marker=marker, markersize=4.5, label=label)


def _default_title(runs: Sequence[RunRecord]) -> str:
    return f"{runs[0].name}: {runs[0].method}" if len(runs) == 1 else f"{len(runs)} runs"


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def _explain_styles(axes: Axes, runs: Sequence[RunRecord]) -> None:
    shown = {
        "deployed": True,
        "selected": any(run.refiner != "none" and run.series("accuracy", "selected")[0] for run in runs),
        "all": any(run.series("accuracy", "all")[0] for run in runs),
    }
    labels = {"deployed": "deployed (refined)", "selected": "selected (before refining)", "all": "all (last uploads)"}
    handles = [
        Line2D([], [], color="#444444", linestyle=_STYLES[kind], linewidth=2 if kind == "deployed" else 1.2, label=text)
        for kind, text in labels.items()
        if shown[kind]
    ]
    axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, borderaxespad=0.2)


def _decorate(axes: Axes, runs: Sequence[RunRecord], title: str) -> None:
    many = max(len(run.deployed()[0]) for run in runs) >= SMOOTH_FROM
    axes.set_title(_cut(title, 60), loc="left", parse_math=False)
    axes.set(xlabel="round", ylabel="test accuracy (%)")
    if many:
        axes.set_ylabel(f"test accuracy (%), running mean of {WINDOW} evaluations")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, steps=[1, 2, 5, 10], integer=True))
    axes.margins(x=0.015)
    axes.grid(color="#DDDDDD", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if not axes.lines:
        axes.text(0.5, 0.5, "no evaluation yet", transform=axes.transAxes, ha="center", va="center", color="#777777")
        axes.set(xlim=(0, 1), ylim=(0, 100))


def _norm(counts: NDArray[np.int64]) -> Normalize:
    sizes = counts.sum(axis=1)
    high = max(int(counts.max()), 1)
    if int(sizes.max()) > 8 * float(np.median(sizes)) and high > 10:
        return LogNorm(1, high)
    return Normalize(0, high)


def _write_counts(axes: Axes, counts: NDArray[np.int64], norm: Normalize) -> None:
    for client, klass in zip(*np.nonzero(counts), strict=True):
        value = int(counts[client, klass])
        colour = "white" if float(norm(value)) > 0.55 else "#222222"
        axes.text(klass, client, str(value), ha="center", va="center", fontsize=8, color=colour)


def _label_classes(axes: Axes, names: Sequence[str]) -> None:
    if len(names) > 60 or (len(names) > 25 and all(name.isdigit() for name in names)):
        axes.xaxis.set_major_locator(MaxNLocator(nbins=20, integer=True))
        axes.set_xlim(-0.5, len(names) - 0.5)
        return
    short = [_cut(name, 18) for name in names]
    turned = sum(len(name) + 2 for name in short) > 100
    axes.set_xticks(range(len(names)), short, rotation=90 if turned else 0, fontsize=8 if turned else 10)
    for label in axes.get_xticklabels():
        label.set_parse_math(False)


def _save(figure: Figure, path: Path) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png", dpi=DPI, metadata={"Software": "fedftg"})
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; choose another place") from None
    return path
