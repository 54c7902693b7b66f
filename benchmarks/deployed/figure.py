"""The README's figure: what each way to deploy gains over the round's aggregate."""

from __future__ import annotations

import statistics
from collections import defaultdict

from matplotlib.figure import Figure
from tables import PAGES, Line, mean, paired

# Okabe and Ito's colours: distinct with any colour vision.
COLOURS = {
    "ema": "#56B4E9", "all": "#E69F00", "head_prior": "#009E73", "all + prior": "#0072B2", "fedftg": "#D55E00",
}  # fmt: skip
LABELS = {"fedftg": "fedftg (default)"}


def write_figure() -> None:
    """Draws a row per cell: a dot a seed, a bar for the mean of seeds."""
    cells: dict[str, list[Line]] = defaultdict(list)
    for line in paired():
        if not line["cell"].startswith(("long", "rivals")):
            cells[line["cell"]].append(line)
    figure = Figure(figsize=(9, 1.2 + 0.5 * len(cells)), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.axvline(0, color="black", linewidth=0.8)
    for place, lines in enumerate(cells.values()):
        for number, (name, colour) in enumerate(COLOURS.items()):
            gains = [mean(line, name) - mean(line, "aggregate") for line in lines]
            height = place + 0.16 * (number - 2)
            axes.plot(gains, [height] * len(gains), "o", color=colour, markersize=4, alpha=0.7)
            axes.plot([statistics.mean(gains)] * 2, [height - 0.08, height + 0.08], color=colour, linewidth=3)
    for name, colour in COLOURS.items():
        axes.plot([], [], "o", color=colour, label=LABELS.get(name, name))
    axes.set_yticks(range(len(cells)), list(cells))
    axes.invert_yaxis()
    axes.set_xlabel("accuracy of the deployed model minus the base's aggregate, same seed, in points")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=len(COLOURS), frameon=False)
    figure.savefig(PAGES[1].parent / "figures" / "deployed_gains.png")
