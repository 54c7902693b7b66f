"""Plots, drawn without a display or pyplot's global state: PNG to look at, PDF and SVG for a paper's column."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from fedftg.errors import InputError
from fedftg.report.load import RunRecord, grouped
from fedftg.report.table import cut, mean_of, order_of_clients, percent
from fedftg.rundir.records import LAST, score

DPI = 100
WIDTH = 12.0
"""Inches: 1200 px."""

COLUMN = 3.3  # inches: one of two columns of a paper, with text of 8 pt that stays text

# Okabe and Ito's colours without yellow and black: told apart with any colour vision, readable on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#B8578F", "#B87700", "#3D94C7", "#7B5AB0", "#7D6A4F")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_KINDS: dict[str, tuple[str, str, Literal["-", "--", ":"], float]] = {
    "refined": ("deployed", " (refined)", "-", 2.0),
    "selected": ("selected", " (before refining)", "--", 1.0),
    "all": ("all", " (last uploads)", ":", 1.1),
}
"""What is drawn of a run: label, what is added to it where there is room, style, width."""
_IN_A_COLUMN: dict[Any, Any] = {
    "pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "fedftg",  # text stays text
    "font.size": 8, "axes.titlesize": 8, "legend.fontsize": 8, "legend.title_fontsize": 8, "axes.linewidth": 0.6,
    "legend.handlelength": 1.4, "legend.columnspacing": 0.9, "legend.handletextpad": 0.4, "legend.labelspacing": 0.2,
}  # fmt: skip
_DATED = {".png": "Software", ".pdf": "CreationDate", ".svg": "Date"}  # left out: equal plots are equal files


class _Figure(Figure):
    """A figure that notebooks show, without pyplot."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png", dpi=72)
        return file.getvalue()


def accuracy_plot(runs: Sequence[RunRecord], path: Path) -> Path:
    """Writes test accuracies over rounds as PNG, or for a paper's column as PDF or SVG; returns ``path``.

    Raises:
        InputError: the file cannot be written.
    """
    paper = path.suffix != ".png"
    with matplotlib.rc_context(_IN_A_COLUMN if paper else {}):
        return _save(accuracy_figure(runs, paper=paper), path)


def accuracy_figure(runs: Sequence[RunRecord], *, paper: bool = False) -> Figure:
    """Returns test accuracies over rounds, 12 inches wide, or for ``paper`` one column.

    A colour per setting: the deployed model solid, `selected` dashed, `all` dotted. Of several seeds the mean,
    with a band of one standard deviation around the deployed model.
    """
    lines = len(grouped(runs)) if paper else math.ceil(len(runs) / 2)
    size = (COLUMN, 2.3 + 0.14 * lines) if paper else (WIDTH, 5.6 + 0.22 * lines)
    figure = _Figure(figsize=size, dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    handles, shown = [], set()
    for index, group in enumerate(grouped(runs)):
        colour, name = _COLOURS[index % len(_COLOURS)], group.name
        marker = _MARKERS[index // len(_COLOURS) % len(_MARKERS)]
        for kind in _KINDS:
            numbers, means, spreads = mean_of([run.accuracy(kind) for run in group.runs])
            if numbers and not (kind == "selected" and group.first.refiner == "none"):  # that is the deployed model
                *_, style, width = _KINDS[kind]
                (line,) = axes.plot(numbers, [100 * m for m in means], color=colour, linestyle=style, linewidth=width)
                mark = marker if kind == "refined" else "." if len(numbers) == 1 else ""
                line.set(marker=mark, markersize=4.5, markevery=max(1, len(numbers) // 15))
                line.set_alpha(1.0 if kind == "refined" else 0.7)
                shown.add(kind)
                if kind == "refined" and len(group.runs) > 1:
                    low, high = ([100 * (m + way * s) for m, s in zip(means, spreads, strict=True)] for way in (-1, 1))
                    axes.fill_between(numbers, low, high, color=colour, alpha=0.15, linewidth=0)
        result = score(mean_of([run.accuracy("refined") for run in group.runs])[:2])
        # The value comes first: matplotlib leaves out labels that start with an underscore.
        shown_name = cut(name, 38 if paper else 110)
        label = f"{percent(result['mean_last_10']) if result else 'no evaluation'}   {shown_name}"
        handles.append(Line2D([], [], color=colour, linewidth=2, marker=marker, markersize=4.5, label=label))
    legend = figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=1 if paper or max(len(str(handle.get_label())) for handle in handles) > 70 else 2,
        frameon=False,
        title=f"deployed: mean of the last {LAST} evaluations in %",
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    styles = [
        Line2D([], [], color="#444444", linestyle=style, linewidth=width, label=label + ("" if paper else more))
        for kind, (label, more, style, width) in _KINDS.items()
        if kind in shown
    ]
    axes.legend(handles=styles, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, borderaxespad=0.2)
    title = f"{runs[0].name}: {runs[0].method}" if len(runs) == 1 else f"{len(runs)} runs"
    axes.set_title("" if paper else cut(title, 60), loc="left", parse_math=False)
    axes.set(xlabel="round", ylabel="test accuracy (%)")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6 if paper else 12, steps=[1, 2, 5, 10], integer=True))
    axes.margins(x=0.015)
    axes.grid(color="#DDDDDD", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    for line in axes.lines if paper else ():
        line.set(linewidth=0.6 * line.get_linewidth(), markersize=2.5)
    return figure


def images_figure(files: Sequence[tuple[int, Path, bool]], class_names: Sequence[str]) -> Figure:
    """Returns grids of `fedftg.rundir.pictures.found` side by side, at most 6, the last one too.

    Where rows are classes, the first 20, their names are beside the first grid.
    """
    places, names = sorted({round(place) for place in np.linspace(0, len(files) - 1, 6)}), class_names[:20]
    figure = _Figure(figsize=(WIDTH, 3.2), dpi=DPI, layout="constrained")
    for place, axes in zip(places, np.atleast_1d(figure.subplots(1, len(places))), strict=True):
        number, file, labelled = files[place]
        grid = imread(file)
        axes.imshow(grid, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(f"round {number}")
        rows = (np.arange(len(names)) + 0.5) * len(grid) / len(names) - 0.5
        axes.set_yticks(*((rows, [cut(name, 18) if place == 0 else "" for name in names]) if labelled else ([],)))
        axes.tick_params(bottom=False, labelbottom=False, left=False)
    return figure


def partition_heatmap(
    class_counts: Sequence[Sequence[int]], class_names: Sequence[str], path: Path, title: str
) -> Path:
    """Writes clients x classes as PNG, with each client's size as a bar; returns ``path``.

    Classes that a client has no sample of are white. Counts are written into the cells while they are readable.
    From 401 clients on, rows are thinner than three pixels, and are sorted by their biggest class.
    """
    counts = np.asarray(class_counts, dtype=np.float64)
    clients, classes = counts.shape
    order, note = order_of_clients(counts)
    counts = counts[order]
    height = min(max(4.0, 1.8 + 0.26 * clients), 13.0)
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    grid = figure.add_gridspec(1, 2, width_ratios=(5, 1))
    axes = figure.add_subplot(grid[0])
    bars = figure.add_subplot(grid[1], sharey=axes)
    norm = Normalize(0, max(float(counts.max()), 1.0))
    # From 0.15 on, so that one sample can be told from none.
    shades = ListedColormap(matplotlib.colormaps["YlGnBu"](np.linspace(0.15, 1.0, 256))).with_extremes(bad="white")
    image = axes.imshow(np.ma.masked_equal(counts, 0), aspect="auto", cmap=shades, norm=norm, interpolation="nearest")
    bar = figure.colorbar(image, ax=bars, label="samples of a class", fraction=0.2, pad=0.05, aspect=5 * height)
    bar.ax.yaxis.set_major_locator(MaxNLocator(integer=counts.max() >= 5))
    if clients <= 45 and classes <= 20:
        for client, klass in zip(*np.nonzero(counts), strict=True):
            colour = "white" if float(norm(counts[client, klass])) > 0.55 else "#222222"
            axes.text(klass, client, f"{counts[client, klass]:.0f}", ha="center", va="center", fontsize=8, color=colour)
    _label_classes(axes, class_names)
    axes.set(xlabel="class", ylabel=f"clients{note}" if note else "client")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=45 if clients <= 45 else 20, integer=True))
    sizes = counts.sum(axis=1)
    bars.stairs(sizes, np.arange(clients + 1) - 0.5, orientation="horizontal", fill=True, color="#5A6B7B")
    bars.set(xlabel="samples", xlim=(0, max(float(sizes.max()), 1) * 1.05))
    bars.xaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
    bars.tick_params(labelleft=False, left=False)
    bars.spines[["top", "right"]].set_visible(False)
    axes.set_ylim(clients - 0.5, -0.5)
    figure.suptitle(cut(title, 120), parse_math=False)
    return _save(figure, path)


def _label_classes(axes: Axes, names: Sequence[str]) -> None:
    if len(names) > 60 or (len(names) > 25 and all(name.isdigit() for name in names)):
        axes.xaxis.set_major_locator(MaxNLocator(nbins=20, integer=True))
        axes.set_xlim(-0.5, len(names) - 0.5)
        return
    short = [cut(name, 18) for name in names]
    turned = sum(len(name) + 2 for name in short) > 100
    axes.set_xticks(range(len(names)), short, rotation=90 if turned else 0, fontsize=8 if turned else 10)
    for label in axes.get_xticklabels():
        label.set_parse_math(False)


def _save(figure: Figure, path: Path) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI, metadata={_DATED[path.suffix]: None})
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; choose another place") from None
    return path
