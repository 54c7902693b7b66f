"""Tables of runs and of partitions, for the terminal and for Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from fedftg.report.load import RunRecord, display_names

LAST = 10
"""How many evaluations the reported mean covers."""

SHOWN_CLIENTS = 20

_MEASURES = {
    "total_variation": "mean total variation, 0 if IID",
    "effective_classes": "mean effective classes of a client",
    "size_min": "fewest samples of a client",
    "size_mean": "mean samples of a client",
    "size_max": "most samples of a client",
    "empty_clients": "clients without samples",
}
"""What the measures of a partition are called where people read them."""

_NOT_COMPARED = ("name", "refiner", "device", "threads", "plugins", "executor", "checkpoint")
"""Settings in which a run and its base may differ without a note: they change no result, or are the comparison."""


@dataclass(frozen=True)
class Score:
    """One accuracy of a run, as fractions; NaN where a value is missing in the record."""

    final: float
    mean_last: float
    """Mean of the last `LAST` evaluations, or of all where there are fewer."""
    best: float
    best_round: int
    evaluations: int


@dataclass(frozen=True)
class Gain:
    """Deployed accuracy minus the base's, over rounds in which both were evaluated."""

    base: str
    final: float
    mean_last: float
    until: int
    """The last round that both have evaluated."""
    whole: bool
    """Whether neither was evaluated later than that."""
    differs: tuple[str, ...]
    """Settings besides the refiner in which the two differ."""


@dataclass(frozen=True)
class Row:
    """One run of a comparison."""

    name: str
    algorithm: str
    refiner: str
    """With its preset: ``fedftg (paper)``; ``none`` without refiner."""
    rounds: int
    rounds_planned: int | None
    finished: bool
    selected: Score | None
    all: Score | None
    refined: Score | None
    """None without refiner, where the deployed model is the aggregate."""
    deployed: Score | None
    is_base: bool
    gain: Gain | None
    """None where the run is a base or has none in this comparison."""
    seconds: float
    clients: str | None
    """Accuracy of the deployed model over clients on what they hold back, as a sentence; None where they do not."""


def score(rounds: Sequence[int], values: Sequence[float]) -> Score | None:
    """The numbers that a table shows of a series of accuracies; None where nothing was evaluated."""
    if not values:
        return None
    last = values[-LAST:]
    valid = [(value, round) for value, round in zip(values, rounds, strict=True) if not math.isnan(value)]
    best, best_round = max(valid, key=lambda pair: pair[0], default=(math.nan, rounds[-1]))
    return Score(values[-1], math.fsum(last) / len(last), best, best_round, len(values))


def comparison_rows(runs: Sequence[RunRecord]) -> list[Row]:
    """One row per run, in the order given.

    A run's base is the run of the same algorithm with refiner ``none``; where there are several, the one whose settings
    differ least, the first of equals.
    """
    names = display_names(runs)
    bases = [run for run in runs if run.refiner == "none"]
    rows = []
    for run, name in zip(runs, names, strict=True):
        base = _base_of(run, bases)
        gain = _gain(run, base, names[_index(runs, base)]) if base is not None else None
        rows.append(
            Row(
                name=name,
                algorithm=run.algorithm,
                refiner=run.refiner_label,
                rounds=run.rounds_done,
                rounds_planned=run.rounds_planned,
                finished=run.summary is not None,
                selected=score(*run.series("accuracy", "selected")),
                all=score(*run.series("accuracy", "all")),
                refined=None if run.refiner == "none" else score(*run.series("accuracy", "refined")),
                deployed=score(*run.deployed()),
                is_base=run.refiner == "none" and any(_base_of(other, bases) is run for other in runs),
                gain=gain,
                seconds=run.seconds,
                clients=_client_accuracy(run, name),
            )
        )
    return rows


def terminal_table(runs: Sequence[RunRecord]) -> Table:
    """A table for 80 columns: two lines per run, the mean of the last evaluations above the final value."""
    rows = comparison_rows(runs)
    with_all = any(row.all for row in rows)
    with_gain = any(row.gain for row in rows)
    best = _best_value(rows)
    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        leading=1,
        caption=Text("\n" + "\n".join(_notes(rows, below="below it the final"))),
        caption_justify="left",
    )
    table.add_column("run\nmethod", overflow="fold", min_width=12)
    for header in [
        "rounds",
        "selected",
        *(["all"] if with_all else []),
        "refined",
        *(["vs base"] if with_gain else []),
    ]:
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("best", justify="right", no_wrap=True)
    table.add_column("seconds", justify="right", no_wrap=True)
    for row in rows:
        is_best = len(rows) > 1 and row.deployed is not None and row.deployed.mean_last == best
        cells = [_name_cell(row), Text(_rounds(row, "\nof "))]
        cells.append(_score_cell(row.selected, bold=is_best and row.refined is None))
        if with_all:
            cells.append(_score_cell(row.all))
        cells.append(_score_cell(row.refined, bold=is_best))
        if with_gain:
            cells.append(_gain_cell(row))
        cells.append(_best_cell(row.deployed))
        cells.append(Text(_seconds(row.seconds)))
        table.add_row(*cells)
    return table


def markdown_table(runs: Sequence[RunRecord]) -> str:
    """The same numbers as a Markdown table, ``mean of the last (final)``, with its notes below."""
    rows = comparison_rows(runs)
    best = _best_value(rows)
    header = ["run", "algorithm", "refiner", "rounds", "selected", "all", "refined", "vs base", "best", "seconds"]
    lines = ["| " + " | ".join(header) + " |", "|---|---|---|" + "---:|" * (len(header) - 3)]
    for row in rows:
        is_best = len(rows) > 1 and row.deployed is not None and row.deployed.mean_last == best
        cells = [
            row.name,
            row.algorithm,
            row.refiner,
            _rounds(row, "/"),
            _markdown_score(row.selected, bold=is_best and row.refined is None),
            _markdown_score(row.all),
            _markdown_score(row.refined, bold=is_best),
            "base"
            if row.is_base
            else f"{_points(row.gain.mean_last)} ({_points(row.gain.final)})"
            if row.gain
            else "-",
            f"{_percent(row.deployed.best)} @{row.deployed.best_round}" if row.deployed else "-",
            _seconds(row.seconds),
        ]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    notes = _notes(rows, below="in brackets the final one")
    return "\n".join([*lines, "", *(f"{note}  " for note in notes[:-1]), notes[-1], ""])


def partition_table(
    class_counts: Sequence[Sequence[int]],
    class_names: Sequence[str],
    skew: Mapping[str, float],
    held_back: Sequence[int] | None = None,
    groups: Sequence[str] | None = None,
) -> Table:
    """Per client: size, number of classes, biggest class; after the first 20 clients one line about the rest.

    Args:
        class_counts: clients x classes.
        class_names: one name per class.
        skew: measures of the whole partition, shown below the table.
        held_back: how many of each client's samples are for its own test; None has no such column.
        groups: the domain or natural client that each one is; None has no such column.
    """
    sizes = [sum(counts) for counts in class_counts]
    present = [sum(count > 0 for count in counts) for counts in class_counts]
    lines = [f"{len(sizes)} clients, {sum(sizes)} samples, {len(class_names)} classes"]
    lines += [f"{_MEASURES.get(name, name)}: {_measure(value)}" for name, value in skew.items()]
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, caption=Text("\n".join(lines)), caption_justify="left"
    )
    held = {"of these held back": held_back} if held_back is not None else {}
    columns = {"samples": sizes, **held, "classes": present}
    for header in ("client", *columns):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("biggest class", overflow="fold")
    table.add_column("its share", justify="right", no_wrap=True)
    if groups is not None:
        table.add_column("group", overflow="fold")
    for client, counts in enumerate(class_counts[:SHOWN_CLIENTS]):
        top = max(range(len(counts)), key=lambda index: counts[index])
        name, share = (class_names[top], f"{counts[top] / sizes[client]:.0%}") if sizes[client] else ("-", "-")
        group = [Text(groups[client])] if groups is not None else []
        table.add_row(str(client), *(str(values[client]) for values in columns.values()), Text(name), share, *group)
    if len(sizes) > SHOWN_CLIENTS:
        rest = slice(SHOWN_CLIENTS, None)
        table.add_section()
        spans = [_span(values[rest]) for values in columns.values()]
        table.add_row("", *spans, f"{len(sizes[rest])} more clients", "")
    return table


def _base_of(run: RunRecord, bases: Sequence[RunRecord]) -> RunRecord | None:
    same = [base for base in bases if base.algorithm == run.algorithm]
    if run.refiner == "none" or not same:
        return None
    return min(same, key=lambda base: len(_differences(run, base)))


def _index(runs: Sequence[RunRecord], wanted: RunRecord) -> int:
    return next(index for index, run in enumerate(runs) if run is wanted)


def _gain(run: RunRecord, base: RunRecord, base_name: str) -> Gain | None:
    ours, theirs = (dict(zip(*series, strict=True)) for series in (run.deployed(), base.deployed()))
    common = sorted(ours.keys() & theirs.keys())
    if not common:
        return None
    gains = [ours[round] - theirs[round] for round in common]
    last = gains[-LAST:]
    whole = common[-1] == max(*ours, *theirs)
    return Gain(base_name, gains[-1], math.fsum(last) / len(last), common[-1], whole, _differences(run, base))


def _differences(run: RunRecord, base: RunRecord) -> tuple[str, ...]:
    ours, theirs = (
        {key: value for key, value in _leaves(each.config).items() if key.split(".")[0] not in _NOT_COMPARED}
        for each in (run, base)
    )
    return tuple(key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key))


def _leaves(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in config.items():
        leaves |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return leaves


def _best_value(rows: Sequence[Row]) -> float:
    means = [row.deployed.mean_last for row in rows if row.deployed]
    return max((mean for mean in means if not math.isnan(mean)), default=math.nan)


def _notes(rows: Sequence[Row], below: str) -> list[str]:
    counts = [row.deployed.evaluations for row in rows if row.deployed]
    fewer = f" (of all {min(counts)} where fewer)" if counts and min(counts) < LAST else ""
    notes = [f"Test accuracy in %: mean of the last {LAST} evaluations{fewer}, {below}."]
    if any(row.gain for row in rows):
        notes.append("vs base: deployed minus the same algorithm without refiner, in points.")
    for row in rows:
        if row.gain and not row.gain.whole:
            notes.append(f"{row.name} vs {row.gain.base}: up to round {row.gain.until}, the last that both evaluated.")
        if row.gain and row.gain.differs:
            more = "" if len(row.gain.differs) <= 4 else f" and {len(row.gain.differs) - 4} more"
            notes.append(
                f"{row.name} and its base {row.gain.base} differ also in {', '.join(row.gain.differs[:4])}{more}."
            )
    notes += [row.clients for row in rows if row.clients]
    unfinished = [row.name for row in rows if not row.finished]
    if unfinished:
        notes.append(f"Unfinished: {', '.join(unfinished)}.")
    return notes


def _client_accuracy(run: RunRecord, name: str) -> str | None:
    kind = "selected" if run.refiner == "none" else "refined"
    found = [(record["round"], record["client_accuracy"][kind]) for record in run.rounds if "client_accuracy" in record]
    if not found:
        return None
    number, values = found[-1]
    mean, worst, spread = (_percent(float(values[key])) for key in ("mean", "worst_10", "std"))
    return f"{name}, per client (round {number}): mean {mean}, worst 10 % {worst}, standard deviation {spread}."


def _name_cell(row: Row) -> Text:
    method = row.algorithm if row.refiner == "none" else f"{row.algorithm} + {row.refiner}"
    return Text.assemble(row.name, "\n", (method, "dim"))


def _score_cell(value: Score | None, bold: bool = False) -> Text:
    if value is None:
        return Text("-")
    return Text.assemble((_percent(value.mean_last), "bold" if bold else ""), "\n", (_percent(value.final), "dim"))


def _gain_cell(row: Row) -> Text:
    if row.gain is None:
        return Text("base" if row.is_base else "-")
    return Text.assemble(_points(row.gain.mean_last), "\n", (_points(row.gain.final), "dim"))


def _best_cell(value: Score | None) -> Text:
    return Text("-") if value is None else Text.assemble(_percent(value.best), "\n", (f"@{value.best_round}", "dim"))


def _markdown_score(value: Score | None, bold: bool = False) -> str:
    if value is None:
        return "-"
    mean = f"**{_percent(value.mean_last)}**" if bold else _percent(value.mean_last)
    return f"{mean} ({_percent(value.final)})"


def _percent(value: float) -> str:
    return "nan" if math.isnan(value) else f"{100 * value:.2f}"


def _points(value: float) -> str:
    return "nan" if math.isnan(value) else f"{100 * value:+.2f}"


def _rounds(row: Row, of: str) -> str:
    short = row.rounds_planned is not None and row.rounds != row.rounds_planned
    return f"{row.rounds}{of}{row.rounds_planned}" if short else str(row.rounds)


def _seconds(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _measure(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 100 and not value.is_integer() else f"{value:.0f}"


def _span(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"
