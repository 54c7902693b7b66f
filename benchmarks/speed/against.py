"""Compares the seconds of each phase of a run with those at an earlier commit, in turns, so that a regression shows.

    python benchmarks/speed/against.py COMMIT [RECIPE] [--set KEY=VALUE ...] [--here KEY=VALUE ...] [--repeats 3]

A named recipe is each tree's own. Settings after ``--here`` hold for the working tree only:
`refiner.precision=bfloat16` where the commit has no such setting, or `refiner.lacking=0 refiner.last_round=0` where it
fine-tuned every round. A phase's seconds are the mean over a run's rounds but the first, which starts processes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fedftg.rundir import records

ROOT = Path(__file__).parents[2]
Seconds = dict[str, float]


def main() -> None:
    """Runs both in turns and prints the median of each phase, and before over now."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit")
    parser.add_argument("recipe", nargs="?", default="default")
    parser.add_argument("--set", nargs="*", action="extend", default=[], metavar="KEY=VALUE")
    parser.add_argument("--here", nargs="*", action="extend", default=[], metavar="KEY=VALUE")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    before, now = list[Seconds](), list[Seconds]()
    with checkout(arguments.commit) as tree:
        for _ in range(arguments.repeats):
            before.append(phases(tree, arguments.recipe, arguments.set))
            now.append(phases(ROOT, arguments.recipe, [*arguments.set, *arguments.here]))
    show({arguments.commit: before, "here": now})


def show(taken: dict[str, list[Seconds]]) -> None:
    """Prints the median seconds of each phase of two that ran in turns, and the ratio of first to second."""
    (one, other), table = taken.values(), Table("phase", *(f"{name}, s" for name in taken), box=None)
    for column in ("ratio", "lowest", "highest"):
        table.add_column(column)
    for phase in one[0]:
        pairs = [(of[phase], beside[phase]) for of, beside in zip(one, other, strict=True)]
        ratios = [left / max(right, 1e-9) for left, right in pairs]
        medians = map(statistics.median, zip(*pairs, strict=True))
        shown = (*medians, statistics.median(ratios), min(ratios), max(ratios))
        table.add_row(phase, *(f"{value:.3g}" for value in shown))
    Console().print(table)


@contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """Yields a folder with the files of a commit."""
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "archive", commit], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
        subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
        yield Path(folder)


def phases(tree: Path, recipe: str, settings: list[str]) -> Seconds:
    """Returns the `mean_phases` of a run with the code in ``tree``."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        environment = {**os.environ, "PYTHONPATH": str(tree / "src")}
        subprocess.run(command(recipe, settings, run), env=environment, stdout=subprocess.DEVNULL, check=True)
        return mean_phases(run)


def mean_phases(run: Path) -> Seconds:
    """Returns the mean seconds of each phase, and of all, over the rounds of a run but the first."""
    rows = [row["seconds"] for row in records.read(run / "rounds.jsonl")]
    return means(rows[1:] or rows)


def means(rows: list[Seconds]) -> Seconds:
    """Returns the mean seconds of each phase, and their sum as ``round``."""
    found = {phase: statistics.mean(row[phase] for row in rows) for phase in rows[0]}
    return {**found, "round": sum(found.values())}


def command(recipe: str, settings: list[str], out: Path) -> list[str]:
    """Returns the words of ``fedftg run`` with the `fedftg` that PYTHONPATH names."""
    given = [word for setting in settings for word in ("--set", setting)]
    return [sys.executable, "-c", "from fedftg.cli import main; main()", "run", recipe, *given, "--out", str(out)]


if __name__ == "__main__":
    main()
