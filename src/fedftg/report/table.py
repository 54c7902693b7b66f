"""Tables of runs and of partitions, for the terminal, Markdown, LaTeX and other programs."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from rich import box
from rich.table import Table
from rich.text import Text

from fedftg.errors import flat, unknown
from fedftg.report.load import Group, RunRecord, Series, grouped

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

_NOT_COMPARED = ("name", "refiner", "device", "threads", "plugins", "executor", "checkpoint", "track")
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
    """Deployed accuracy minus the base's of the same seed, in rounds (up to ``until``) that both evaluated."""

    base: str
    final: tuple[float, ...]
    """One number a seed that both have."""
    mean_last: tuple[float, ...]
    until: int
    whole: bool
    """Neither was evaluated later than ``until``."""
    differs: tuple[str, ...]
    """Settings besides the refiner in which the two differ."""


@dataclass(frozen=True)
class Row:
    """One run of a comparison, or the runs of one setting with several seeds."""

    name: str
    runs: tuple[RunRecord, ...]
    deployed: tuple[Score, ...]
    """Of `refined`, or without refiner of the aggregate; one a seed, or empty where a run has none."""
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
    found = () if hidden else _scores(row.runs, kind)
    return _pair([one.mean_last for one in found], [one.final for one in found])


def _versus(row: Row) -> tuple[str, str]:
    if row.gain is None:
        return "base" if row.is_base else "", ""
    return _pair(row.gain.mean_last, row.gain.final, "+")


def _best(row: Row) -> tuple[str, str]:
    if not row.deployed:
        return "", ""
    value, smaller = _pair([one.best for one in row.deployed], [])
    return value, smaller or f"@{row.deployed[0].best_round}"


def _seconds(row: Row) -> tuple[str, str]:
    seconds = math.fsum(run.seconds for run in row.runs) / len(row.runs)
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

_KINDS = ("selected", "all", "refined", "sent", "ensemble", "ensemble_prior")
_NAMED = {kind: Column(kind, partial(_accuracy, kind=kind)) for kind in _KINDS}
_NAMED |= {column.name or column.header: column for column in COLUMNS}


def chosen_columns(text: str) -> list[str]:
    """Returns the names in ``"refined,gain"``; raises `InputError` for one that no table has."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if wrong := [name for name in names if name not in _NAMED]:
        raise unknown("column", wrong[0], _NAMED)
    return list(dict.fromkeys(names))


def score(series: Series) -> Score | None:
    """Returns the numbers that a table shows of a series of accuracies; None where nothing was evaluated."""
    rounds, values = series
    if not values:
        return None
    last = values[-LAST:]
    valid = [(value, round) for value, round in zip(values, rounds, strict=True) if not math.isnan(value)]
    best, best_round = max(valid, key=lambda pair: pair[0], default=(math.nan, rounds[-1]))
    return Score(values[-1], math.fsum(last) / len(last), best, best_round, len(values))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Returns the 95 % confidence interval of the mean of two or more values (Student's t)."""
    from scipy.stats import t

    half = float(t.ppf(0.975, len(values) - 1)) * deviation(values) / math.sqrt(len(values))
    mean = math.fsum(values) / len(values)
    return mean - half, mean + half


def comparison_rows(runs: Sequence[RunRecord]) -> list[Row]:
    """Returns one row per setting, its seeds together, in the order given.

    A row's base is that of the same algorithm with refiner ``none``; where there are several, the one whose settings
    differ least, the first of equals.
    """
    groups = grouped(runs)
    bases = [_base_of(group.first, [other.first for other in groups]) for group in groups]
    return [
        Row(
            name=group.name,
            runs=group.runs,
            deployed=_scores(group.runs, "refined"),
            is_base=place in bases,
            gain=None if base is None else _gain(group, groups[base]),
        )
        for place, (group, base) in enumerate(zip(groups, bases, strict=True))
    ]


def _scores(runs: Sequence[RunRecord], kind: str) -> tuple[Score, ...]:
    found = [score(run.accuracy(kind)) for run in runs]
    return tuple(one for one in found if one is not None) if None not in found else ()


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
        cells = [
            Text.assemble(
                row.name, "\n", (row.runs[0].method + (f", {len(row.runs)} seeds" if len(row.runs) > 1 else ""), "dim")
            )
        ]
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
    settings = [flat(run.config) for run in runs]
    names = ("name", "device", "threads", "executor", "checkpoint", "track", "algorithm.name", "refiner.name", "seed")
    keys = [key for key in settings[0] if all(key in one for one in settings) and not key.startswith(names)]
    keys = [key for key in keys if any(one[key] != settings[0][key] for one in settings)]
    kinds = [kind for kind in _KINDS if any(run.accuracy(kind)[0] for run in runs)]
    rows: list[dict[str, object]] = []
    for run, one in zip(runs, settings, strict=True):
        about = {"run": run.name, "algorithm": run.algorithm, "refiner": run.refiner, "seed": run.config.get("seed")}
        rows.append({**about, **{key: one[key] for key in keys}})
        for name in chosen or ("rounds", "seconds", "gain", *kinds):
            rows[-1] |= _numbers(run, runs, name)
    text = io.StringIO()
    lines = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    lines.writeheader()
    lines.writerows(rows)
    return text.getvalue()


def _numbers(run: RunRecord, runs: Sequence[RunRecord], name: str) -> dict[str, object]:
    if name in ("rounds", "seconds"):
        return {name: run.seconds if name == "seconds" else len(run.rounds)}
    if name == "gain":
        groups = grouped(runs)
        base = _base_of(run, [group.first for group in groups])
        gain = None if base is None else _gain(Group(run.name, (run,)), groups[base])
        return {f"gain_{part}": getattr(gain, part)[0] if gain else "" for part in ("mean_last", "final")}
    found = score(run.accuracy("refined" if name == "best" else name))
    parts = ("best", "best_round") if name == "best" else ("mean_last", "final", "best", "best_round")
    return {part if name == "best" else f"{name}_{part}": getattr(found, part, "") for part in parts}


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


def _base_of(run: RunRecord, runs: Sequence[RunRecord]) -> int | None:
    """Returns the place of a run's base; None where it is a base itself or has none."""
    bases = [i for i, base in enumerate(runs) if base.refiner == "none" and base.algorithm == run.algorithm]
    return None if run.refiner == "none" else min(bases, key=lambda i: len(_differences(run, runs[i])), default=None)


def _gain(group: Group, base: Group) -> Gain | None:
    final, last, untils, whole = [], [], [], True
    theirs_by_seed = {run.config.get("seed"): run for run in base.runs}
    # A single run has a base of another seed rather than none.
    pairs = [(run, theirs_by_seed.get(run.config.get("seed"))) for run in group.runs]
    if len(group.runs) == len(base.runs) == 1:
        pairs = [(group.first, base.first)]
    for run, other in pairs:
        if other is None:
            continue
        ours, theirs = (dict(zip(*each.accuracy("refined"), strict=True)) for each in (run, other))
        common = sorted(ours.keys() & theirs.keys())
        if common:
            gains = [ours[number] - theirs[number] for number in common]
            final.append(gains[-1])
            last.append(math.fsum(gains[-LAST:]) / len(gains[-LAST:]))
            untils.append(common[-1])
            whole = whole and common[-1] == max(*ours, *theirs)
    if not last:
        return None
    differs = tuple(key for key in _differences(group.first, base.first) if key != "seed" or len(pairs) == 1)
    return Gain(base.name, tuple(final), tuple(last), min(untils), whole, differs)


def _differences(run: RunRecord, base: RunRecord) -> tuple[str, ...]:
    ours, theirs = flat(run.config), flat(base.config)
    keys = [key for key in {**ours, **theirs} if key.split(".")[0] not in _NOT_COMPARED]
    return tuple(key for key in keys if ours.get(key) != theirs.get(key))


def _columns(rows: Sequence[Row], chosen: Sequence[str]) -> list[Column]:
    found = [column for column in COLUMNS if any(column.cell(row)[0] for row in rows)]
    return [_NAMED[name] for name in chosen] or found


def _is_best(row: Row, column: Column, rows: Sequence[Row]) -> bool:
    """Returns whether the column has the row's deployed accuracy, and no run's is higher."""
    kind = "selected" if row.runs[0].refiner == "none" else "refined"
    if len(rows) == 1 or not row.deployed or column.header != kind:
        return False
    means = [_deployed_mean(other) for other in rows if other.deployed]
    return _deployed_mean(row) == max((mean for mean in means if not math.isnan(mean)), default=math.nan)


def _deployed_mean(row: Row) -> float:
    return math.fsum(one.mean_last for one in row.deployed) / len(row.deployed)


def table_notes(rows: Sequence[Row], below: str) -> list[str]:
    """Returns what a reader of a table must know, a sentence a line; ``below`` says where the smaller value is."""
    counts = [one.evaluations for row in rows for one in row.deployed]
    fewer = f" (of all {min(counts)} where fewer)" if counts and min(counts) < LAST else ""
    notes = [f"Test accuracy in %: mean of the last {LAST} evaluations{fewer}, {below}."]
    if any(row.gain for row in rows):
        notes.append("vs base: deployed minus the same algorithm without refiner, in points.")
    if any(len(row.runs) > 1 for row in rows):
        notes.append("Of several seeds: the mean and its standard deviation over seeds; vs base is paired by seed.")
    if any(row.runs[0].accuracy("ensemble")[0] for row in rows):
        notes.append(
            "ensemble: of the round's clients, not deployed: by the mean of their probabilities; second, by that of "
            "their logits without label priors."
        )
    for row in rows:
        if row.gain and len(row.gain.mean_last) > 1:
            low, high = (percent(end, "+") for end in interval(row.gain.mean_last))
            notes.append(
                f"{row.name} vs {row.gain.base}: 95 % interval {low} to {high} (t, {len(row.gain.mean_last)} seeds)."
            )
        if row.gain and not row.gain.whole:
            notes.append(f"{row.name} vs {row.gain.base}: up to round {row.gain.until}, the last that both evaluated.")
        if row.gain and row.gain.differs:
            more = "" if len(row.gain.differs) <= 4 else f" and {len(row.gain.differs) - 4} more"
            notes.append(
                f"{row.name} and its base {row.gain.base} differ also in {', '.join(row.gain.differs[:4])}{more}."
            )
    for row in rows:
        measured = [record for record in row.runs[0].rounds if "client_accuracy" in record]
        if measured:
            found = measured[-1]["client_accuracy"]["refined"]
            mean, worst, spread = (percent(found[key]) for key in ("mean", "worst_10", "std"))
            number = measured[-1]["round"]
            notes.append(
                f"{row.name}, per client (round {number}): mean {mean}, worst 10 % {worst}, "
                f"standard deviation {spread}."
            )
    unfinished = [run.name for row in rows for run in row.runs if run.summary is None]
    if unfinished:
        notes.append(f"Unfinished: {', '.join(unfinished)}.")
    return notes


def _pair(values: Sequence[float], of_one: Sequence[float], sign: str = "") -> tuple[str, str]:
    """Returns the mean over seeds and its standard deviation; of one seed its value, and that of ``of_one``."""
    if not values:
        return "", ""
    if len(values) == 1:
        return percent(values[0], sign), percent(of_one[0], sign) if of_one else ""
    return percent(math.fsum(values) / len(values), sign), f"± {percent(deviation(values))}"


def deviation(values: Sequence[float]) -> float:
    """Returns the standard deviation (n - 1), NaN where a value is."""
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1))


def mean_of(series: Sequence[Series]) -> tuple[list[int], list[float], list[float]]:
    """Returns rounds that all have, the mean over series, and the standard deviation."""
    values = [dict(zip(*one, strict=True)) for one in series]
    numbers = sorted(set.intersection(*(set(one) for one in values)))
    columns = [[one[number] for one in values] for number in numbers]
    means = [math.fsum(column) / len(column) for column in columns]
    return numbers, means, [deviation(column) for column in columns]


def percent(value: float, sign: str = "") -> str:
    """Returns a fraction as percent with two digits."""
    return "nan" if math.isnan(value) else f"{100 * value:{sign}.2f}"


def _measure(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 100 and not value.is_integer() else f"{value:.0f}"


def _span(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"
