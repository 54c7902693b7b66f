"""Shows how a run proceeds: a bar on a terminal and in a notebook that has ipywidgets, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from rich import progress as bars
from rich.console import Console

if TYPE_CHECKING:
    from fedftg.config import RunConfig

HAS_WIDGETS = find_spec("ipywidgets") is not None  # what rich needs for a bar in a notebook
_SLOW_TO_DECODE = 5000
"""Fewer images are decoded before a bar could be read."""


class Progress:
    """Receives progress events; this class ignores them all."""

    def loading(self, done: int, total: int) -> None:
        """Receives how many images are decoded; comes before `start`, and only where they are not cached."""

    def start(self, config: RunConfig, done: int, clients: int) -> None:
        """Comes before the first round of this session; ``done`` rounds were completed by earlier sessions."""

    def note(self, text: str) -> None:
        """Receives a line about what was left out, converted or guessed."""

    def phase(self, round: int, name: str, done: int, total: int) -> None:
        """Receives ``done`` of ``total`` parts of a phase (local, aggregate, refine, evaluate) of a round."""

    def round_done(self, record: dict[str, Any]) -> None:
        """Receives the record that was just written."""

    def finish(self) -> None:
        """Comes after the last round, and when the run is stopped."""


class PlainLines(Progress):
    """Prints one line a round, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._rounds = 0
        self._started = 0.0
        self._first = 0
        self._tenth = -1

    def loading(self, done: int, total: int) -> None:
        """Prints a line at each tenth of a large set."""
        tenth = 10 * done // max(total, 1)
        if total >= _SLOW_TO_DECODE and tenth != self._tenth:
            self._tenth = tenth
            self.note(f"decoding images {done}/{total}")

    def start(self, config: RunConfig, done: int, clients: int) -> None:
        """Prints the name of the run."""
        self._rounds, self._first, self._started = config.rounds, done, time.monotonic()
        refiner = "" if config.refiner.name == "none" else f" + {config.refiner.name}"
        resumed = f", resumed after round {done}" if done else ""
        method = f"{config.algorithm.name}{refiner}"
        self.note(f"{config.name}: {method}, {config.data.name}, {clients} clients, seed {config.seed}{resumed}")

    def note(self, text: str) -> None:
        """Prints the line."""
        self._console.print(text, soft_wrap=True, highlight=False, markup=False)

    def round_done(self, record: dict[str, Any]) -> None:
        """Prints round, accuracies, seconds, and an estimate of the time left."""
        number = record["round"]
        per_round = (time.monotonic() - self._started) / (number - self._first)
        left = timedelta(seconds=round(per_round * (self._rounds - number)))
        seconds = sum(record["seconds"].values())
        self.note(f"round {number}/{self._rounds}  {_accuracies(record)}  {seconds:.1f} s  {left} left")
        self._warn(record)

    def _warn(self, record: dict[str, Any]) -> None:
        for item in record.get("rejected", ()):
            self.note(f"  client {item['client']} rejected: {item['reason']}")
        if "rolled_back" in record:
            self.note(f"  {record['rolled_back']}")


class Live(PlainLines):
    """Shows a bar with round, phase, accuracies and time left, for terminals and notebooks."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._bar = bars.Progress(
            bars.TextColumn("{task.description}"),
            bars.BarColumn(bar_width=None),
            bars.TextColumn("{task.fields[phase]}"),
            bars.TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            transient=True,
        )
        self._task = self._bar.add_task("", phase="")

    def start(self, config: RunConfig, done: int, clients: int) -> None:
        """Shows the bar."""
        super().start(config, done, clients)
        text = f"round {done}/{config.rounds}"
        self._bar.update(self._task, total=config.rounds, completed=done, description=text)
        self._bar.start()

    def phase(self, round: int, name: str, done: int, total: int) -> None:
        """Moves the bar within a round: most of its time is local training."""
        share = {"local": 0.6 * done / total, "aggregate": 0.6, "refine": 0.62, "evaluate": 0.9}[name]
        part = f"{name} {done}/{total}" if name == "local" else name
        self._bar.update(self._task, completed=round - 1 + share, phase=part)

    def round_done(self, record: dict[str, Any]) -> None:
        """Shows the accuracies of the round; warnings stay above the bar."""
        number = record["round"]
        self._warn(record)
        text = f"round {number}/{self._rounds}  {_accuracies(record)}"
        self._bar.update(self._task, completed=number, description=text)

    def finish(self) -> None:
        """Removes the bar."""
        self._bar.stop()


def for_console(console: Console) -> Progress:
    """Returns a bar for a terminal and a notebook with widgets, plain lines for anything else."""
    if console.is_jupyter and not HAS_WIDGETS:
        console = Console(force_jupyter=False, force_terminal=False)
    return Live(console) if console.is_terminal or console.is_jupyter else PlainLines(console)


def chosen(wanted: Progress | bool | None) -> Progress:
    """Returns ``wanted``, or for True a bar or lines; None is silent outside of notebooks."""
    if isinstance(wanted, Progress):
        return wanted
    console = Console()
    return for_console(console) if (console.is_jupyter if wanted is None else wanted) else Progress()


@contextmanager
def iterations(wanted: Callable[[int, int], None] | bool | None) -> Iterator[Callable[[int, int], None]]:
    """Yields what is called as ``(done, total)``: the given function, or a bar on standard error.

    The bar is shown if ``wanted``; None shows it on a terminal and in a notebook with ipywidgets.
    """
    if callable(wanted):
        yield wanted
        return
    console = Console(stderr=True)
    shown = (sys.stderr.isatty() or (console.is_jupyter and HAS_WIDGETS)) if wanted is None else wanted
    with bars.Progress(console=console, transient=True, disable=not shown) as bar:
        task = bar.add_task("refine", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _accuracies(record: dict[str, Any]) -> str:
    if not record["accuracy"]:
        return "not evaluated"
    return "  ".join(f"{kind} {100 * value:.2f} %" for kind, value in record["accuracy"].items())
