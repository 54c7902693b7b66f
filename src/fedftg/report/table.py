"""Tables of runs and of partitions, for the terminal, Markdown, LaTeX and other programs."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.table import Table
from rich.text import Text

from fedftg.errors import flat, unknown
from fedftg.report.load import Group, RunRecord, differing, grouped
from fedftg.rundir.records import ACCURACIES, LAST, Record, Series, score

SHOWN_CLIENTS = 20
"""How many clients a partition's table has a row for."""

SORTED_FROM = 401
"""From this many clients on, a heatmap's rows are sorted."""

_MEASURES = {
    "total_variation": "mean total variation, 0 if IID",
    "effective_classes": "mean effective classes of a client",
    "size_min": "fewest samples of a client",
    "size_mean": "mean samples of a client",
    "size_max": "most samples of a client",
    "empty_clients": "clients without samples",
}


@dataclass(frozen=True)
class Gain:
    """Deployed accuracy minus the base's of the same seed, in rounds that both evaluated."""

    base: str
    scores: dict[int, Record]
    """`score` of the differences, by each seed that both have; of two single runs by ours, whatever the base's."""
    until: int | None
    """The last round that both evaluated, where one of them was evaluated later."""
    differs: list[str]
    """Settings besides the refiner in which the two differ."""

    @property
    def means(self) -> list[float]:
        """Returns the mean gain of the last evaluations, one a seed."""
        return [one["mean_last_10"] for one in self.scores.values()]


@dataclass(frozen=True)
class Row:
    """One run of a comparison, or the runs of one setting with several seeds."""

    name: str
    runs: tuple[RunRecord, ...]
    deployed: list[Record]
    """`score` of `refined`, or without refiner of the aggregate; one a seed, or empty where a run has none."""
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
    name: str = ""
    """What ``--columns`` calls it; empty: as its header."""


def _rounds(row: Row) -> tuple[str, str]:
    done, planned = min(len(run.rounds) for run in row.runs), row.runs[0].config["rounds"]
    return str(done), "" if done == planned else str(planned)


def _accuracy(row: Row, kind: str) -> tuple[str, str]:
    hidden = kind == "refined" and row.runs[0].refiner == "none"
    return _pair([] if hidden else _scores(row.runs, kind))


def _versus(row: Row) -> tuple[str, str]:
    if row.gain is None:
        return "base" if row.is_base else "", ""
    return _pair([*row.gain.scores.values()], sign="+")


def _best(row: Row) -> tuple[str, str]:
    if len(row.runs[0].accuracy("refined")[0]) == 1:
        return "", ""  # the only evaluation
    value, smaller = _pair(row.deployed, "best")
    return value, f"@{row.deployed[0]['best_round']}" if len(row.deployed) == 1 else smaller


def _seconds(row: Row) -> tuple[str, str]:
    seconds = fmean(run.seconds for run in row.runs)
    return f"{seconds:.{1 if seconds < 100 else 0}f}", ""


COLUMNS = (
    Column("rounds", _rounds, beside="/{}", below="of {}"),
    Column("selected", lambda row: _accuracy(row, "selected")),
    Column("all", lambda row: _accuracy(row, "all")),
    Column("refined", lambda row: _accuracy(row, "refined")),
    Column("ensemble", lambda row: (_accuracy(row, "ensemble")[0], _accuracy(row, "ensemble_prior")[0])),
    Column("vs base", _versus, name="gain"),
    Column("best", _best, beside=" {}"),
    Column("seconds", _seconds),
)
"""What is shown of each run beside its name and method; a new column is an entry here."""

_NAMED = {kind: Column(kind, partial(_accuracy, kind=kind)) for kind in ACCURACIES}
_NAMED |= {column.name or column.header: column for column in COLUMNS}
_NAMED["deployed"] = Column("deployed", lambda row: _pair(row.deployed))


def chosen_columns(text: str) -> list[str]:
    """Returns the names in ``"deployed,gain,partition.alpha"``; raises `InputError` for one that no table has.

    ``deployed`` is `refined`, of runs without refiner too; any setting is a column by its key, which has a point.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if wrong := [name for name in names if name not in _NAMED and "." not in name]:
        raise unknown("column", wrong[0], _NAMED)
    return list(dict.fromkeys(names))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Returns the 95 % confidence interval of the mean of two or more values (Student's t)."""
    from scipy.stats import t

    half = float(t.ppf(0.975, len(values) - 1)) * deviation(values) / math.sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


def comparison_rows(runs: Sequence[RunRecord]) -> list[Row]:
    """Returns one row per setting, its seeds together, in the order given.

    A row's base is that of the same algorithm with refiner ``none``; where there are several, the one whose settings
    differ least, the first of equals.
    """
    groups = grouped(runs)
    bases = [_base_of(group.first, groups) for group in groups]
    return [
        Row(one.name, one.runs, _scores(one.runs, "refined"), one in bases, _gain(one, base) if base else None)
        for one, base in zip(groups, bases, strict=True)
    ]


def _scores(runs: Sequence[RunRecord], kind: str) -> list[Record]:
    found = [score(run.accuracy(kind)) for run in runs]
    return found if all(found) else []


def terminal_table(runs: Sequence[RunRecord], chosen: Sequence[str] = ()) -> Table:
    """Returns a table for 80 columns: two lines per run, the mean of the last evaluations above the final value.

    It has the ``chosen`` columns, as `markdown_table` and `latex_table`; () is all of `COLUMNS` that have a value.
    """
    rows = comparison_rows(runs)
    columns = _columns(rows, chosen)
    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        leading=1,
        caption=Text("\n" + "\n".join(table_notes(rows, below="below it the final"))),
        caption_justify="left",
    )
    table.add_column("run\nmethod", overflow="fold", min_width=10)
    for column in columns:
        table.add_column(column.header, justify="right", no_wrap=True)
    for row in rows:
        seeds = f", {len(row.runs)} seeds" if len(row.runs) > 1 else ""
        cells = [Text.assemble(row.name, "\n", (row.runs[0].method + seeds, "dim"))]
        for column in columns:
            value, smaller = column.cell(row)
            below = ("\n" + column.below.format(smaller), "dim") if smaller else ""
            cells.append(Text.assemble((value or "-", "bold" if _is_best(row, column, rows) else ""), below))
        table.add_row(*cells)
    return table


def markdown_table(runs: Sequence[RunRecord], chosen: Sequence[str] = ()) -> str:
    """Returns the same numbers as a Markdown table, ``mean of the last (final)``, with its notes below."""
    rows = comparison_rows(runs)
    header, *body = table_cells(rows, "**{}**", chosen)
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in (header, *body)]
    lines.insert(1, "|---|---|---|" + "---:|" * (len(header) - 3))
    notes = table_notes(rows, below="in brackets the final one")
    return "\n".join([*lines, "", *(f"{note}  " for note in notes[:-1]), notes[-1], ""])


def latex_table(runs: Sequence[RunRecord], chosen: Sequence[str] = ()) -> str:
    """Returns the same as a LaTeX ``tabular`` for the package booktabs, its notes as comments."""
    rows = comparison_rows(runs)
    header, *body = table_cells(rows, "\x02{}\x03", chosen)
    lines = [" & ".join(map(_escaped, line)) + r" \\" for line in (header, *body)]
    notes = [f"% {note}" for note in (*table_notes(rows, below="in brackets the final one"), r"\usepackage{booktabs}")]
    begin = rf"\begin{{tabular}}{{lll{'r' * (len(header) - 3)}}}"
    middle = [r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"]
    return "\n".join([*notes, begin, *middle, r"\end{tabular}", ""])


def csv_table(runs: Sequence[RunRecord], chosen: Sequence[str] = ()) -> str:
    """Returns a line a run, with its seed and the common settings in which runs differ; accuracies are fractions.

    A ``chosen`` accuracy is four columns, a gain is two; () is all that a run has.
    """
    differ = differing(runs, ["algorithm.name", "refiner.name"])
    settings = {key: values for key, values in differ.items() if None not in values}
    kinds = [kind for kind in ACCURACIES if any(run.accuracy(kind)[0] for run in runs)]
    gains = {run.folder: row.gain for row in comparison_rows(runs) for run in row.runs}
    rows: list[dict[str, object]] = []
    for place, run in enumerate(runs):
        about = {"run": run.name, "algorithm": run.algorithm, "refiner": run.refiner, "seed": run.seed}
        rows.append({**about, **{key: values[place] for key, values in settings.items()}})
        for name in chosen or ("rounds", "seconds", "gain", *kinds):
            rows[-1] |= _numbers(run, gains[run.folder], name)
    text = io.StringIO()
    lines = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    lines.writeheader()
    lines.writerows(rows)
    return text.getvalue()


def _numbers(run: RunRecord, gain: Gain | None, name: str) -> dict[str, object]:
    if name in ("rounds", "seconds"):
        return {name: run.seconds if name == "seconds" else len(run.rounds)}
    if name not in _NAMED:
        return {name: flat(run.config).get(name, "")}
    found = score(run.accuracy("refined" if name in ("best", "deployed") else name))
    if name == "best":
        return {part: found.get(part, "") for part in ("best", "best_round")}
    parts = ["mean_last_10", "final", "best", "best_round"]
    if name == "gain":
        found, parts = gain.scores.get(run.seed, {}) if gain else {}, parts[:2]
    return {f"{name}_{part.removesuffix('_10')}": found.get(part, "") for part in parts}


def table_cells(rows: Sequence[Row], bold: str, chosen: Sequence[str] = ()) -> list[list[str]]:
    """Returns the header and the cells of each row; ``bold`` marks the best deployed accuracy."""
    columns = _columns(rows, chosen)
    table = [["run", "algorithm", "refiner", *(column.header for column in columns)]]
    for row in rows:
        cells = [row.name, row.runs[0].algorithm, row.runs[0].refiner]
        for column in columns:
            value, smaller = column.cell(row)
            shown = bold.format(value) if _is_best(row, column, rows) else value or "-"
            cells.append(shown + (column.beside.format(smaller) if smaller else ""))
        table.append(cells)
    return table


def _escaped(text: str) -> str:
    """Returns a cell for LaTeX; control characters are where it is bold."""
    text = re.sub(r"([&%$#_{}])", r"\\\1", text.replace("\\", r"\textbackslash "))
    text = re.sub(r"(?<![\w.])-(?=\d)", "$-$", text)
    for plain, command in (("±", r"$\pm$"), ("|", r"\textbar "), ("\x02", r"\textbf{"), ("\x03", "}")):
        text = text.replace(plain, command)
    return text


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


def _base_of(run: RunRecord, groups: Sequence[Group]) -> Group | None:
    """Returns a run's base; None where it is a base itself or has none."""
    found = [one for one in groups if one.first.refiner == "none" and one.first.algorithm == run.algorithm]
    nearest = min(found, key=lambda one: len(differing([run, one.first], ["refiner"])), default=None)
    return None if run.refiner == "none" else nearest


def _gain(group: Group, base: Group) -> Gain | None:
    scores: dict[int, Record] = {}
    untils = []
    # A single run has a base of another seed rather than none.
    single = len(group.runs) == len(base.runs) == 1
    by_seed = {group.first.seed if single else run.seed: run for run in base.runs}
    for run in (run for run in group.runs if run.seed in by_seed):
        ours, theirs = (dict(zip(*one.accuracy("refined"), strict=True)) for one in (run, by_seed[run.seed]))
        common = sorted(ours.keys() & theirs.keys())
        if gain := score((common, [ours[number] - theirs[number] for number in common])):
            scores[run.seed] = gain
            untils += common[-1:] if common[-1] < max(*ours, *theirs) else []
    if not scores:
        return None
    differs = ["seed"] if single and group.first.seed != base.first.seed else []
    differs += differing([group.first, base.first], ["refiner"])
    return Gain(base.name, scores, min(untils, default=None), differs)


def _columns(rows: Sequence[Row], chosen: Sequence[str]) -> list[Column]:
    found = [column for column in COLUMNS if any(column.cell(row)[0] for row in rows)]
    return [_NAMED.get(name) or Column(name, partial(_setting, name)) for name in chosen] or found


def _setting(key: str, row: Row) -> tuple[str, str]:
    return str(flat(row.runs[0].config).get(key, "")), ""


def _is_best(row: Row, column: Column, rows: Sequence[Row]) -> bool:
    """Returns whether the column has the row's deployed accuracy, and no run's is higher."""
    kinds = "deployed", "selected" if row.runs[0].refiner == "none" else "refined"
    if len(rows) == 1 or not row.deployed or column.header not in kinds:
        return False
    return _deployed_mean(row) == max(_deployed_mean(other) for other in rows if other.deployed)


def _deployed_mean(row: Row) -> float:
    return fmean(one["mean_last_10"] for one in row.deployed)


def table_notes(rows: Sequence[Row], below: str, intervals: bool = True) -> list[str]:
    """Returns what a reader of a table must know, a sentence a line; ``below`` says where the smaller value is."""
    counts = [len(run.accuracy("refined")[0]) for row in rows if row.deployed for run in row.runs]
    fewer = f" (of all {min(counts)} where fewer)" if counts and min(counts) < LAST else ""
    several = any(len(row.runs) > 1 for row in rows)
    spread = ", of several seeds the standard deviation over seeds" if several else ""
    notes = [f"Test accuracy in %: mean of the last {LAST} evaluations{fewer}, {below}{spread}."]
    if any(row.gain for row in rows):
        paired = ", paired by seed" if several else ""
        notes.append(f"vs base: deployed minus the same algorithm without refiner, in points{paired}.")
    if any(row.runs[0].accuracy("ensemble")[0] for row in rows):
        notes.append(
            "ensemble: of the round's clients, not deployed: by the mean of their probabilities; second, by that of "
            "their logits without label priors."
        )
    alone = {row.name: value for row in rows if (value := _accuracy(row, "best_client")[0])}
    if alone:
        found = {*alone.values()} if len({*alone.values()}) == 1 else [" ".join(pair) for pair in alone.items()]
        notes.append(f"best client of the round, alone: {', '.join(found)}.")
    for row, gain in ((row, row.gain) for row in rows if row.gain):
        versus, differs = f"{row.name} vs {gain.base}", gain.differs
        if intervals and len(gain.scores) > 1:
            low, high = (percent(end, "+") for end in interval(gain.means))
            notes.append(f"{versus}: 95 % interval {low} to {high} (t, {len(gain.scores)} seeds).")
        if gain.until:
            notes.append(f"{versus}: up to round {gain.until}, the last that both evaluated.")
        if differs:
            more = "" if len(differs) <= 4 else f" and {len(differs) - 4} more"
            notes.append(f"{row.name} and its base {gain.base} differ also in {', '.join(differs[:4])}{more}.")
    for row in rows:
        rounds = [record for run in row.runs for record in run.rounds]
        tuned = sum("student" in record["refine"] for record in rounds)
        if row.runs[0].config["refiner"]["name"] == "fedftg" and tuned < len(rounds):
            notes.append(f"{row.name}: fine-tuned in {tuned} of {len(rounds)} rounds.")
        if measured := [record for record in row.runs[0].rounds if "client_accuracy" in record]:
            last = measured[-1]["client_accuracy"]["refined"]
            mean, worst, spread = (percent(last[key]) for key in ("mean", "worst_10", "std"))
            about = f"mean {mean}, worst 10 % {worst}, standard deviation {spread}"
            notes.append(f"{row.name}, per client (round {measured[-1]['round']}): {about}.")
    unfinished = [run.name for row in rows for run in row.runs if run.summary is None]
    if unfinished:
        notes.append(f"Unfinished: {', '.join(unfinished)}.")
    return notes


def _pair(scores: Sequence[Record], part: str = "mean_last_10", sign: str = "") -> tuple[str, str]:
    """Returns the mean over seeds and its standard deviation; of one seed its value and the final one."""
    values = [one[part] for one in scores]
    if len(values) <= 1:
        return (percent(values[0], sign), percent(scores[0]["final"], sign)) if values else ("", "")
    return percent(fmean(values), sign), f"± {percent(deviation(values))}"


def deviation(values: Sequence[float]) -> float:
    """Returns the standard deviation (n - 1), 0 of one value, NaN where a value is."""
    return float(np.std(values, ddof=min(len(values) - 1, 1)))


def mean_of(series: Sequence[Series]) -> tuple[list[int], list[float], list[float]]:
    """Returns rounds that all have, the mean over series, and the standard deviation."""
    values = [dict(zip(*one, strict=True)) for one in series]
    numbers = sorted(set.intersection(*(set(one) for one in values)))
    columns = [[one[number] for one in values] for number in numbers]
    return numbers, [fmean(column) for column in columns], [deviation(column) for column in columns]


def order_of_clients(counts: NDArray[Any]) -> tuple[NDArray[np.intp], str]:
    """Returns the order of a heatmap's rows (clients x classes), and what to call it where it is not their own."""
    if len(counts) < SORTED_FROM:
        return np.arange(len(counts)), ""
    return np.lexsort((-counts.max(axis=1), counts.argmax(axis=1))), ", sorted by their biggest class"


def cut(text: str, length: int) -> str:
    """Returns a text without its middle where it is longer: runs of a sweep differ at the end of their names."""
    start = (length - 3) // 2
    return text if len(text) <= length else f"{text[:start]}...{text[3 + start - length :]}"


def percent(value: float, sign: str = "") -> str:
    """Returns a fraction as percent with two digits."""
    return f"{100 * value:{sign}.2f}"


def _measure(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 100 and not value.is_integer() else f"{value:.0f}"


def _span(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"
