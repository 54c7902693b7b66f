"""Tables of runs and of partitions, for the terminal and for Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

from fedftg.errors import flat
from fedftg.report.load import RunRecord, Series, display_names

LAST = 10
"""How many evaluations the reported mean covers."""

SHOWN_CLIENTS = 20
"""How many clients a partition's table has a row for."""

_MEASURES = {
    "total_variation": "mean total variation, 0 if IID",
    "effective_classes": "mean effective classes of a client",
    "size_min": "fewest samples of a client",
    "size_mean": "mean samples of a client",
    "size_max": "most samples of a client",
    "empty_clients": "clients without samples",
}

_NOT_COMPARED = ("name", "refiner", "device", "threads", "plugins", "executor", "checkpoint")
"""Sections in which a run and its base may differ without a note."""


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
    """Deployed accuracy minus the base's, over rounds (up to ``until``) in which both were evaluated."""

    base: str
    final: float
    mean_last: float
    until: int
    whole: bool
    """Neither was evaluated later than ``until``."""
    differs: tuple[str, ...]
    """Settings besides the refiner in which the two differ."""


@dataclass(frozen=True)
class Row:
    """One run of a comparison."""

    name: str
    run: RunRecord
    deployed: Score | None
    """Of `refined`, or without refiner of the aggregate."""
    is_base: bool
    gain: Gain | None


@dataclass(frozen=True)
class Column:
    """One column of a comparison, right-aligned, left out where no run has a value.

    ``cell`` returns a value and a smaller one, either may be empty. ``beside`` and ``below`` format the smaller one,
    in Markdown beside the value and in the terminal below it.
    """

    header: str
    cell: Callable[[Row], tuple[str, str]]
    beside: str = " ({})"
    below: str = "{}"


def _rounds(row: Row) -> tuple[str, str]:
    done, planned = len(row.run.rounds), row.run.config["rounds"]
    return str(done), "" if done == planned else str(planned)


def _accuracy(row: Row, kind: str) -> tuple[str, str]:
    value = None if kind == "refined" and row.run.refiner == "none" else score(row.run.accuracy(kind))
    return (_percent(value.mean_last), _percent(value.final)) if value else ("", "")


def _versus(row: Row) -> tuple[str, str]:
    if row.gain is None:
        return "base" if row.is_base else "", ""
    return _percent(row.gain.mean_last, "+"), _percent(row.gain.final, "+")


def _best(row: Row) -> tuple[str, str]:
    return (_percent(row.deployed.best), str(row.deployed.best_round)) if row.deployed else ("", "")


COLUMNS = (
    Column("rounds", _rounds, beside="/{}", below="of {}"),
    Column("selected", lambda row: _accuracy(row, "selected")),
    Column("all", lambda row: _accuracy(row, "all")),
    Column("refined", lambda row: _accuracy(row, "refined")),
    Column("ensemble", lambda row: (_accuracy(row, "ensemble")[0], _accuracy(row, "ensemble_prior")[0])),
    Column("vs base", _versus),
    Column("best", _best, beside=" @{}", below="@{}"),
    Column("seconds", lambda row: (f"{row.run.seconds:.{1 if row.run.seconds < 100 else 0}f}", "")),
)
"""What is shown of each run beside its name and method; a new column is an entry here."""


def score(series: Series) -> Score | None:
    """Returns the numbers that a table shows of a series of accuracies; None where nothing was evaluated."""
    rounds, values = series
    if not values:
        return None
    last = values[-LAST:]
    valid = [(value, round) for value, round in zip(values, rounds, strict=True) if not math.isnan(value)]
    best, best_round = max(valid, key=lambda pair: pair[0], default=(math.nan, rounds[-1]))
    return Score(values[-1], math.fsum(last) / len(last), best, best_round, len(values))


def comparison_rows(runs: Sequence[RunRecord]) -> list[Row]:
    """Returns one row per run, in the order given.

    A run's base is the run of the same algorithm with refiner ``none``; where there are several, the one whose settings
    differ least, the first of equals.
    """
    names = display_names(runs)
    bases = [_base_of(run, runs) for run in runs]
    return [
        Row(
            name=name,
            run=run,
            deployed=score(run.accuracy("refined")),
            is_base=place in bases,
            gain=None if base is None else _gain(run, runs[base], names[base]),
        )
        for place, (run, name, base) in enumerate(zip(runs, names, bases, strict=True))
    ]


def terminal_table(runs: Sequence[RunRecord]) -> Table:
    """Returns a table for 80 columns: two lines per run, the mean of the last evaluations above the final value."""
    rows = comparison_rows(runs)
    columns = _columns(rows)
    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        leading=1,
        caption=Text("\n" + "\n".join(_notes(rows, below="below it the final"))),
        caption_justify="left",
    )
    table.add_column("run\nmethod", overflow="fold", min_width=10)
    for column in columns:
        table.add_column(column.header, justify="right", no_wrap=True)
    for row in rows:
        cells = [Text.assemble(row.name, "\n", (row.run.method, "dim"))]
        for column in columns:
            value, smaller = column.cell(row)
            below = ("\n" + column.below.format(smaller), "dim") if smaller else ""
            cells.append(Text.assemble((value or "-", "bold" if _is_best(row, column, rows) else ""), below))
        table.add_row(*cells)
    return table


def markdown_table(runs: Sequence[RunRecord]) -> str:
    """Returns the same numbers as a Markdown table, ``mean of the last (final)``, with its notes below."""
    rows = comparison_rows(runs)
    columns = _columns(rows)
    header = ["run", "algorithm", "refiner", *(column.header for column in columns)]
    lines = ["| " + " | ".join(header) + " |", "|---|---|---|" + "---:|" * len(columns)]
    for row in rows:
        cells = [row.name, row.run.algorithm, row.run.refiner]
        for column in columns:
            value, smaller = column.cell(row)
            bold = "**" if _is_best(row, column, rows) else ""
            cells.append(f"{bold}{value or '-'}{bold}" + (column.beside.format(smaller) if smaller else ""))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    notes = _notes(rows, below="in brackets the final one")
    return "\n".join([*lines, "", *(f"{note}  " for note in notes[:-1]), notes[-1], ""])


def partition_table(
    class_counts: Sequence[Sequence[int]],
    class_names: Sequence[str],
    skew: Mapping[str, float],
    held_back: Sequence[int] | None = None,
) -> Table:
    """Returns a row per client: size, classes, biggest class; after the first 20 one line about the rest.

    Args:
        class_counts: clients x classes.
        class_names: one name per class.
        skew: measures of the whole partition, shown below the table.
        held_back: how many of each client's samples are for its own test; None has no such column.
    """
    sizes = [sum(counts) for counts in class_counts]
    lines = [f"{len(sizes)} clients, {sum(sizes)} samples, {len(class_names)} classes"]
    lines += [f"{_MEASURES[name]}: {_measure(value)}" for name, value in skew.items()]
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, caption=Text("\n".join(lines)), caption_justify="left"
    )
    numbers: dict[str, Sequence[int]] = {"samples": sizes}
    if held_back is not None:
        numbers["of these held back"] = held_back
    numbers["classes"] = [sum(count > 0 for count in counts) for counts in class_counts]
    for header in ("client", *numbers):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("biggest class", overflow="fold")
    table.add_column("its share", justify="right", no_wrap=True)
    for client, counts in enumerate(class_counts[:SHOWN_CLIENTS]):
        most = max(counts)
        name, share = (class_names[counts.index(most)], f"{most / sizes[client]:.0%}") if most else ("-", "-")
        table.add_row(str(client), *(str(values[client]) for values in numbers.values()), Text(name), share)
    if len(sizes) > SHOWN_CLIENTS:
        table.add_section()
        spans = [_span(values[SHOWN_CLIENTS:]) for values in numbers.values()]
        table.add_row("", *spans, f"{len(sizes) - SHOWN_CLIENTS} more clients", "")
    return table


def _base_of(run: RunRecord, runs: Sequence[RunRecord]) -> int | None:
    """Returns the place of a run's base; None where it is a base itself or has none."""
    bases = [i for i, base in enumerate(runs) if base.refiner == "none" and base.algorithm == run.algorithm]
    return None if run.refiner == "none" else min(bases, key=lambda i: len(_differences(run, runs[i])), default=None)


def _gain(run: RunRecord, base: RunRecord, base_name: str) -> Gain | None:
    ours, theirs = (dict(zip(*each.accuracy("refined"), strict=True)) for each in (run, base))
    common = sorted(ours.keys() & theirs.keys())
    if not common:
        return None
    gains = [ours[round] - theirs[round] for round in common]
    last = gains[-LAST:]
    whole = common[-1] == max(*ours, *theirs)
    return Gain(base_name, gains[-1], math.fsum(last) / len(last), common[-1], whole, _differences(run, base))


def _differences(run: RunRecord, base: RunRecord) -> tuple[str, ...]:
    ours, theirs = flat(run.config), flat(base.config)
    keys = [key for key in {**ours, **theirs} if key.split(".")[0] not in _NOT_COMPARED]
    return tuple(key for key in keys if ours.get(key) != theirs.get(key))


def _columns(rows: Sequence[Row]) -> list[Column]:
    return [column for column in COLUMNS if any(column.cell(row)[0] for row in rows)]


def _is_best(row: Row, column: Column, rows: Sequence[Row]) -> bool:
    """Returns whether the column has the row's deployed accuracy, and no run's is higher."""
    kind = "selected" if row.run.refiner == "none" else "refined"
    if len(rows) == 1 or row.deployed is None or column.header != kind:
        return False
    means = [other.deployed.mean_last for other in rows if other.deployed]
    return row.deployed.mean_last == max((mean for mean in means if not math.isnan(mean)), default=math.nan)


def _notes(rows: Sequence[Row], below: str) -> list[str]:
    counts = [row.deployed.evaluations for row in rows if row.deployed]
    fewer = f" (of all {min(counts)} where fewer)" if counts and min(counts) < LAST else ""
    notes = [f"Test accuracy in %: mean of the last {LAST} evaluations{fewer}, {below}."]
    if any(row.gain for row in rows):
        notes.append("vs base: deployed minus the same algorithm without refiner, in points.")
    if any(row.run.accuracy("ensemble")[0] for row in rows):
        notes.append(
            "ensemble: of the round's clients, not deployed: by the mean of their probabilities; second, by that of "
            "their logits without label priors."
        )
    for row in rows:
        if row.gain and not row.gain.whole:
            notes.append(f"{row.name} vs {row.gain.base}: up to round {row.gain.until}, the last that both evaluated.")
        if row.gain and row.gain.differs:
            more = "" if len(row.gain.differs) <= 4 else f" and {len(row.gain.differs) - 4} more"
            notes.append(
                f"{row.name} and its base {row.gain.base} differ also in {', '.join(row.gain.differs[:4])}{more}."
            )
    for row in rows:
        measured = [record for record in row.run.rounds if "client_accuracy" in record]
        if measured:
            found = measured[-1]["client_accuracy"]["refined"]
            mean, worst, spread = (_percent(found[key]) for key in ("mean", "worst_10", "std"))
            number = measured[-1]["round"]
            notes.append(
                f"{row.name}, per client (round {number}): mean {mean}, worst 10 % {worst}, "
                f"standard deviation {spread}."
            )
    unfinished = [row.name for row in rows if row.run.summary is None]
    if unfinished:
        notes.append(f"Unfinished: {', '.join(unfinished)}.")
    return notes


def _percent(value: float, sign: str = "") -> str:
    return "nan" if math.isnan(value) else f"{100 * value:{sign}.2f}"


def _measure(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 100 and not value.is_integer() else f"{value:.0f}"


def _span(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"
