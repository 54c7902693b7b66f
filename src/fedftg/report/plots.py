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
from fedftg.report.load import RunRecord, Series, display_names
from fedftg.report.table import score

DPI = 100
WIDTH = 12.0
"""Inches: 1200 px."""

SMOOTH_FROM = 200
"""From this many evaluations on, lines are running means of `WINDOW` evaluations above the faint single values."""
WINDOW = 10

BINNED_FROM = 401
"""From this many clients on, a heatmap's rows would be thinner than three pixels, and are means of several clients."""
_MOST_ROWS = 250
_LONGEST_TITLE = 120
"""Characters: what fits into the width."""

# Okabe and Ito's colours without yellow and black: told apart with any colour vision, readable on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LineStyle = Literal["-", "--", ":"]
_STYLES: dict[str, LineStyle] = {"deployed": "-", "selected": "--", "all": ":"}


def accuracy_plot(runs: Sequence[RunRecord], path: Path) -> Path:
    """Writes test accuracies over rounds as PNG; returns ``path``.

    One run: `selected`, `all` and `refined`, a colour each. Several: a colour per run, the deployed model solid,
    `selected` dashed, `all` dotted.

    Raises:
        InputError: the file cannot be written.
    """
    figure = Figure(figsize=(WIDTH, 5.6 + 0.22 * math.ceil(len(runs) / 2)), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    handles = _draw_one(axes, runs[0]) if len(runs) == 1 else _draw_several(axes, runs)
    _decorate(axes, runs)
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
    class_counts: Sequence[Sequence[int]], class_names: Sequence[str], path: Path, title: str
) -> Path:
    """Writes clients x classes as PNG, with each client's size as a bar; returns ``path``.

    Classes that a client has no sample of are white. Counts are written into the cells while they are readable. Where
    one client holds more than 8 times the median, the colours are logarithmic. From `BINNED_FROM` clients on, clients
    are sorted by their biggest class, and a row is the mean of several.

    Raises:
        InputError: the file cannot be written.
    """
    counts = np.asarray(class_counts, dtype=np.float64)
    clients, classes = counts.shape
    together = math.ceil(clients / _MOST_ROWS) if clients >= BINNED_FROM else 1
    if together > 1:
        counts = _binned(counts, together)
    height = min(max(4.0, 1.8 + 0.26 * clients), 13.0)
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    grid = figure.add_gridspec(1, 2, width_ratios=(5, 1))
    axes = figure.add_subplot(grid[0])
    bars = figure.add_subplot(grid[1], sharey=axes)
    norm = _norm(counts)
    # From 0.15 on, so that one sample can be told from none.
    shades = ListedColormap(matplotlib.colormaps["YlGnBu"](np.linspace(0.15, 1.0, 256))).with_extremes(bad="white")
    # A row is as high as its clients are many, so that the axis counts clients.
    extent = (-0.5, classes - 0.5, len(counts) * together - 0.5, -0.5)
    shown = np.ma.masked_equal(counts, 0)
    image = axes.imshow(shown, aspect="auto", cmap=shades, norm=norm, interpolation="nearest", extent=extent)
    label = "samples of a class" + (", mean of a row's clients" if together > 1 else "")
    bar = figure.colorbar(image, ax=bars, label=label, fraction=0.2, pad=0.05, aspect=5 * height)
    if isinstance(norm, LogNorm):
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        bar.ax.yaxis.set_major_locator(MaxNLocator(integer=counts.max() >= 5))
    if clients <= 45 and classes <= 20:
        _write_counts(axes, counts, norm)
    _label_classes(axes, class_names)
    sorted_note = f"clients, sorted by their biggest class; a row is the mean of {together}"
    axes.set(xlabel="class", ylabel=sorted_note if together > 1 else "client")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=45 if clients <= 45 else 20, integer=True))
    axes.set_ylim(clients - 0.5, -0.5)
    _size_bars(bars, counts.sum(axis=1), together)
    figure.suptitle(_cut(title, _LONGEST_TITLE), parse_math=False)
    return _save(figure, path)


def partition_sizes(sizes: Sequence[int], path: Path, title: str) -> Path:
    """Writes a histogram of the clients' sizes as PNG; returns ``path``.

    Clients without samples are counted in the note above. Where sizes span more than a factor of 50, the axis is
    logarithmic.

    Raises:
        InputError: the file cannot be written.
    """
    held = np.asarray(sizes, dtype=np.int64)
    filled = held[held > 0]
    figure = Figure(figsize=(WIDTH, 5.0), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel="samples of a client", ylabel="clients")
    _frame(axes, grid="y")
    note = f"{len(held)} clients"
    if len(filled):
        _draw_sizes(axes, filled)
        low, high, mean = int(filled.min()), int(filled.max()), float(filled.mean())
        note += f", {low} samples each" if low == high else f" of {low} to {high} samples, mean {_brief(mean)}"
    if len(filled) < len(held):
        note += f"; {len(held) - len(filled)} without samples are not drawn"
    axes.yaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.set_title(note, loc="left", fontsize=10)
    figure.suptitle(_cut(title, _LONGEST_TITLE), parse_math=False)
    return _save(figure, path)


def running_mean(values: Sequence[float], window: int = WINDOW) -> list[float]:
    """Returns the mean of each value and up to ``window - 1`` before it."""
    parts = [values[max(0, end - window) : end] for end in range(1, len(values) + 1)]
    return [math.fsum(part) / len(part) for part in parts]


def _draw_one(axes: Axes, run: RunRecord) -> list[Line2D]:
    kinds = {"refined": "refined (deployed)", "selected": "selected", "all": "all"}
    if run.refiner == "none":
        kinds = {"selected": "selected (deployed)", "all": "all"}
    handles = []
    for index, (kind, label) in enumerate(kinds.items()):
        series = run.accuracy(kind)
        style = _STYLES["deployed" if index == 0 else kind]
        colour, marker = _COLOURS[index], _MARKERS[index] if len(series[0]) <= 30 else ""
        if series[0]:
            _draw_line(axes, series, colour, style, 2.0, marker)
            handles.append(_handle(label, series, colour, style, marker))
    return handles or [_handle(run.name, ([], []), _COLOURS[0], "-", "")]


def _draw_several(axes: Axes, runs: Sequence[RunRecord]) -> list[Line2D]:
    handles = []
    for index, (run, name) in enumerate(zip(runs, display_names(runs), strict=True)):
        deployed, colour = run.accuracy("refined"), _COLOURS[index % len(_COLOURS)]
        marked = len(runs) > len(_COLOURS) or len(deployed[0]) <= 30
        marker = _MARKERS[index // len(_COLOURS) % len(_MARKERS)] if marked else ""
        if run.refiner != "none":  # without refiner it is the deployed model
            _draw_line(axes, run.accuracy("selected"), colour, _STYLES["selected"], 1.0)
        _draw_line(axes, run.accuracy("all"), colour, _STYLES["all"], 1.1)
        _draw_line(axes, deployed, colour, _STYLES["deployed"], 2.0, marker)
        handles.append(_handle(name, deployed, colour, "-", marker))
    return handles


def _draw_line(axes: Axes, series: Series, colour: str, style: LineStyle, width: float, marker: str = "") -> None:
    rounds, values = series
    if not rounds:
        return
    percent = [100 * value for value in values]
    if len(rounds) >= SMOOTH_FROM:
        if width >= 2:
            axes.plot(rounds, percent, color=colour, linewidth=0.6, alpha=0.25)
        percent = running_mean(percent)
    mark = marker or ("." if len(rounds) == 1 else "")
    every = len(rounds) // 15 if len(rounds) > 30 else 1
    alpha = 1.0 if width >= 2 else 0.7
    (line,) = axes.plot(rounds, percent, color=colour, linestyle=style, linewidth=width, alpha=alpha)
    line.set(marker=mark, markersize=4.5, markevery=every)


def _handle(name: str, series: Series, colour: str, style: LineStyle, marker: str) -> Line2D:
    result = score(series)
    # The value comes first: matplotlib leaves out labels that start with an underscore.
    text = "no evaluation" if result is None else f"{100 * result.mean_last:.2f}"
    label = f"{text}   {_cut(name, 110)}"
    return Line2D([], [], color=colour, linestyle=style, linewidth=2, marker=marker, markersize=4.5, label=label)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def _explain_styles(axes: Axes, runs: Sequence[RunRecord]) -> None:
    shown = {"deployed": "deployed (refined)"}
    if any(run.refiner != "none" and run.accuracy("selected")[0] for run in runs):
        shown["selected"] = "selected (before refining)"
    if any(run.accuracy("all")[0] for run in runs):
        shown["all"] = "all (last uploads)"
    handles = [
        Line2D([], [], color="#444444", linestyle=_STYLES[kind], linewidth=2 if kind == "deployed" else 1.2, label=text)
        for kind, text in shown.items()
    ]
    axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, borderaxespad=0.2)


def _decorate(axes: Axes, runs: Sequence[RunRecord]) -> None:
    title = f"{runs[0].name}: {runs[0].method}" if len(runs) == 1 else f"{len(runs)} runs"
    axes.set_title(_cut(title, 60), loc="left", parse_math=False)
    smooth = max(len(run.accuracy("refined")[0]) for run in runs) >= SMOOTH_FROM
    means = f", running mean of {WINDOW} evaluations" if smooth else ""
    axes.set(xlabel="round", ylabel=f"test accuracy (%){means}")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, steps=[1, 2, 5, 10], integer=True))
    axes.margins(x=0.015)
    _frame(axes, grid="both")
    if not axes.lines:
        axes.text(0.5, 0.5, "no evaluation yet", transform=axes.transAxes, ha="center", va="center", color="#777777")
        axes.set(xlim=(0, 1), ylim=(0, 100))


def _frame(axes: Axes, grid: Literal["y", "both"]) -> None:
    axes.grid(axis=grid, color="#DDDDDD", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_sizes(axes: Axes, sizes: NDArray[np.int64]) -> None:
    low, high = int(sizes.min()), int(sizes.max())
    if high > 50 * low:
        edges = np.geomspace(low - 0.5, high + 0.5, 31)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        # Bins hold equally many whole numbers, or the same law shows a comb.
        width = max(1, math.ceil((high - low + 1) / 40))
        edges = np.arange(low - 0.5, high + 0.5 + width, width)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
        # One size, or a few, stand in the middle of an axis instead of filling it.
        margin = max(width, 6 - (high - low)) * 0.75
        axes.set_xlim(edges[0] - margin, edges[-1] + margin)
    axes.hist(sizes, bins=edges.tolist(), color="#5A6B7B", rwidth=0.9)
    mean, median = float(sizes.mean()), float(np.median(sizes))
    if high > low:
        axes.axvline(mean, color=_COLOURS[1], linewidth=1.5, label=f"mean {_brief(mean)}")
        axes.axvline(median, color=_COLOURS[0], linewidth=1.5, linestyle="--", label=f"median {_brief(median)}")
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, borderaxespad=0.2)


def _brief(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


def _binned(counts: NDArray[np.float64], together: int) -> NDArray[np.float64]:
    """Returns means over ``together`` clients each, in the order of their biggest class, those with most of it first.

    Equally big classes take turns from client to client: always the first of them would bend the diagonal.
    """
    clients, classes = counts.shape
    turn = (np.arange(classes) - np.arange(clients)[:, None]) % classes / classes  # below 1: decides among equals only
    biggest = counts.max(axis=1)
    klass = np.where(biggest > 0, (counts + turn).argmax(axis=1), classes)  # clients without samples come last
    ordered = counts[np.lexsort((-biggest, klass))]
    starts = np.arange(0, clients, together)
    return np.add.reduceat(ordered, starts) / np.diff(starts, append=clients)[:, None]


def _size_bars(axes: Axes, sizes: NDArray[np.float64], together: int) -> None:
    """One bar a row, beside the heatmap; ``together`` clients are a row."""
    places = np.arange(len(sizes)) * together + (together - 1) / 2
    height = together * (0.8 if len(sizes) <= 100 else 1.0)
    axes.barh(places, sizes, height=height, color="#5A6B7B")
    axes.set(xlabel="samples" + (" (mean)" if together > 1 else ""), xlim=(0, max(float(sizes.max()), 1) * 1.05))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
    axes.tick_params(labelleft=False, left=False)
    axes.spines[["top", "right"]].set_visible(False)


def _norm(counts: NDArray[np.float64]) -> Normalize:
    sizes = counts.sum(axis=1)
    high = max(float(counts.max()), 1.0)
    if float(sizes.max()) > 8 * float(np.median(sizes)) and high > 10:
        return LogNorm(min(1.0, float(counts[counts > 0].min())), high)
    return Normalize(0, high)


def _write_counts(axes: Axes, counts: NDArray[np.float64], norm: Normalize) -> None:
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
