"""One self-contained HTML page of a run or a comparison: interactive figures (plotly), and their numbers as tables."""

from __future__ import annotations

import base64
import json
import math
import re
import shlex
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from typing import Any

import numpy as np
import tomli_w
from numpy.typing import NDArray

from fedftg.errors import flat
from fedftg.report.load import Group, RunRecord, grouped
from fedftg.report.table import Row, comparison_rows, interval, mean_of, percent, table_cells, table_notes
from fedftg.rundir.records import PHASES, finite

Trace = dict[str, Any]
"""A trace of plotly whose colours the page chooses by ``meta``: ``run`` (its place), ``kind``, ``part``, ``phase``."""

KINDS = {
    "refined": ("deployed", "solid"),
    "selected": ("selected: before refining", "dash"),
    "all": ("all: mean of last uploads", "dot"),
    "sent": ("sent to clients", "longdash"),
    "ensemble": ("ensemble of the clients", "dashdot"),
    "ensemble_prior": ("ensemble without label priors", "longdashdot"),
}
"""Label and line of each kind of model; the first two are shown at first."""

METRICS = {
    "local_loss": ("server", "clients' local loss"),
    "discrepancy": ("refine", "discrepancy of teachers and student"),
    "fidelity": ("refine", "fidelity: teachers' loss on the labels"),
    "diversity": ("refine", "diversity term of the images"),
    "batchnorm": ("refine", "distance from BatchNorm statistics"),
    "student": ("refine", "student's loss"),
    "teacher_agreement": ("refine", "share of images whose label the teachers predict"),
    "least_share": ("refine", "least share of a class among the round's clients"),
}
MOST_CELLS = 20_000
"""Larger tables of numbers are left out of the page."""
DETAILED = 20
"""Up to this many classes a heatmap has numbers in its cells."""


def html_page(runs: Sequence[RunRecord]) -> str:
    """Returns one HTML file that needs no network: about 5 MB, most of it plotly.

    Raises:
        InputError: a file of a run is damaged.
    """
    from plotly.offline import get_plotlyjs

    groups, rows = grouped(runs), comparison_rows(runs)
    title = f"{groups[0].name}: {groups[0].first.method}" if len(groups) == 1 else " · ".join(g.name for g in groups)
    sections = {
        "Does distillation help?": [_verdict(rows), _table(*_summary(rows)), _notes(rows), *_accuracies(groups)],
        "Which classes gain?": _classes(groups),
        "What the refiner did": [*_metrics(groups), *_images(groups)],
        "What the clients told the server": _partitions(groups),
        "How clients fare": _clients(groups),
        "Where the time goes": _seconds(groups),
        "Run it again": _settings(groups),
    }
    found = {name: "".join(parts) for name, parts in sections.items()}
    body = "".join(f"<section><h2>{name}</h2>{text}</section>" for name, text in found.items() if text)
    parts = {
        "title": escape(title),
        "about": escape(_about(groups)),
        "show": _toggles(groups),
        "body": body,
        "plotly": get_plotlyjs(),
    }
    template = (resources.files("fedftg.report") / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _about(groups: Sequence[Group]) -> str:
    """Returns what was run where, in a line; where groups differ, all values."""
    settings = [flat(group.first.config) for group in groups]
    names = {
        "data.name": "{}", "partition.law": "{} clients", "partition.alpha": "alpha {}",
        "partition.num_clients": "{} clients", "cohort.size": "{} a round", "model.name": "{}", "rounds": "{} rounds",
    }  # fmt: skip
    texts = []
    for key, form in names.items():
        values = dict.fromkeys(str(one[key]) for one in settings if key in one)
        texts += [form.format(" or ".join(values))] if values else []
    seeds = dict.fromkeys(str(run.config.get("seed", 0)) for group in groups for run in group.runs)
    return ", ".join([*texts, f"seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}"])


def _verdict(rows: Sequence[Row]) -> str:
    """Returns a sentence for each row that has a base, or else what there is to say of a run alone."""
    lines = []
    for row in rows:
        if row.gain is None:
            continue
        gains, seeds = row.gain.mean_last, len(row.gain.mean_last)
        text = f"<strong>{percent(math.fsum(gains) / seeds, '+')} points</strong> by <b>{escape(row.name)}</b> over "
        text += f"{escape(row.gain.base)}"
        if seeds > 1:
            low, high = interval(gains)
            text += f", paired over {seeds} seeds; 95 % interval {percent(low, '+')} to {percent(high, '+')}"
            text += "" if low * high > 0 else ", which includes 0: more seeds are needed"
        else:
            text += ", of one seed, which proves little: add <code>--seeds 0,1,2</code>"
        lines.append(text)
    for row in [] if lines else rows:
        deployed, before = ([_last(run, kind) for run in row.runs] for kind in ("refined", "selected"))
        text = f"<b>{escape(row.name)}</b> deploys <strong>{percent(_mean(deployed))} %</strong> after its last round"
        if row.runs[0].refiner != "none":
            text += f", {percent(_mean(deployed) - _mean(before), '+')} points beside its own aggregate, which is no "
            text += 'fair base. Compare it with a run of <code>refiner.name = "none"</code>'
        lines.append(text)
    return "".join(f"<p class=verdict>{line}.</p>" for line in lines)


def _last(run: RunRecord, kind: str) -> float:
    return (run.accuracy(kind)[1] or [math.nan])[-1]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _summary(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    header, *body = table_cells(rows, "{}")
    return header, body


def _notes(rows: Sequence[Row]) -> str:
    return f"<p class=notes>{' '.join(map(escape, table_notes(rows, below='in brackets the final one')))}</p>"


def _toggles(groups: Sequence[Group]) -> str:
    """Returns the checkboxes, which are the legend too: runs, kinds of models, and what is drawn of seeds."""

    def box(name: str, value: object, label: str, key: str, on: bool = True) -> str:
        checked = " checked" if on else ""
        return f'<label><input type=checkbox name={name} value="{value}"{checked}>{key}<span>{label}</span></label>'

    runs = [
        box("run", place, escape(group.name), f'<i class=key style="background:var(--c{place % 6})"></i>')
        for place, group in enumerate(groups)
    ]
    kinds = [
        box("kind", kind, label, f'<svg class="key {dash}" aria-hidden=true><path d="M0 6h28"/></svg>', place < 2)
        for place, (kind, (label, dash)) in enumerate(KINDS.items())
        if any(run.accuracy(kind)[0] for group in groups for run in group.runs)
    ]
    seeds = [box("part", "band", "± deviation over seeds", ""), box("part", "seed", "each seed", "", False)]
    several = any(len(group.runs) > 1 for group in groups)
    parts = {"Run": runs, "Model": kinds, "Seeds": seeds if several else []}
    return "".join(
        f"<fieldset><legend>{name}</legend>{''.join(boxes)}</fieldset>" for name, boxes in parts.items() if boxes
    )


def _figure(caption: str, seen: str, traces: Sequence[Trace], numbers: tuple[Any, Any], **layout: Any) -> str:
    """Returns a figure that the page's script draws; ``seen`` says what it shows, ``numbers`` are a header and rows."""
    spec = json.dumps(finite({"data": traces, "layout": {"height": 340, **layout}}), allow_nan=False)
    return (
        f'<figure><figcaption>{caption}</figcaption><div class=plot role=img aria-label="{escape(seen)}"></div>'
        f"<script type=application/json>{spec.replace('<', chr(92) + 'u003c')}</script>"
        f"<details><summary>Numbers</summary>{_table(*numbers)}</details></figure>"
    )


def _table(header: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    if len(header) * len(rows) > MOST_CELLS:
        return f"<p>{len(rows)} rows and {len(header)} columns: see the files of the run.</p>"
    head = "".join(f"<th scope=col>{escape(str(cell))}</th>" for cell in header)
    body = "".join(
        f"<tr><th scope=row>{escape(str(first))}</th>{''.join(f'<td>{escape(str(cell))}</td>' for cell in rest)}</tr>"
        for first, *rest in rows
    )
    return f"<div class=scroll tabindex=0><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _lines(groups: Sequence[Group], part: str, kind: str, label: str, scale: float = 1.0) -> list[Trace]:
    """Returns a line per group, the mean over its seeds, and where there are several a band and a line per seed."""
    traces: list[Trace] = []
    for place, group in enumerate(groups):
        series = [run.series(part, kind) for run in group.runs]
        numbers, *both = mean_of(series)
        if not numbers or (kind == "selected" and group.first.refiner == "none"):  # that is the deployed model
            continue
        means, spreads = ([scale * value for value in values] for values in both)
        meta = {"run": place, "kind": kind}
        name = ", ".join(filter(None, (escape(group.name), label)))
        line = {"dash": KINDS[kind][1] if kind in KINDS else "solid"}
        common = {"type": "scatter", "mode": "lines+markers" if len(numbers) <= 30 else "lines", "name": name}
        if len(group.runs) > 1:
            edges = [m + s for m, s in zip(means, spreads, strict=True)]
            edges += [m - s for m, s in zip(means[::-1], spreads[::-1], strict=True)]
            band = {"x": numbers + numbers[::-1], "y": edges, "fill": "toself", "hoverinfo": "skip", "mode": "lines"}
            traces.append({**common, **band, "meta": {**meta, "part": "band"}})
            for run, (rounds, values) in zip(group.runs, series, strict=True):
                own = {"x": rounds, "y": [scale * value for value in values], "line": {**line, "width": 1}}
                hover = f"%{{y:.4~g}}<extra>{name}, seed {run.config.get('seed')}</extra>"
                traces.append(
                    {**common, **own, "mode": "lines", "hovertemplate": hover, "meta": {**meta, "part": "seed"}}
                )
        text = [f" ± {spread:.3g}" if len(group.runs) > 1 else "" for spread in spreads]
        mean = {"x": numbers, "y": means, "text": text, "line": {**line, "width": 2.5 if kind == "refined" else 1.5}}
        hover = f"round %{{x}}: %{{y:.4~g}}%{{text}}<extra>{name}</extra>"
        traces.append(
            {**common, **mean, "marker": {"size": 5}, "hovertemplate": hover, "meta": {**meta, "part": "mean"}}
        )
    return traces


def _over_rounds(caption: str, unit: str, traces: Sequence[Trace], **layout: Any) -> str:
    """Returns a figure of lines over rounds, or nothing where there are none."""
    means = [trace for trace in traces if trace["meta"]["part"] == "mean"]
    if not means:
        return ""
    ends = "; ".join(f"{t['name']} goes from {t['y'][0]:.4g} to {t['y'][-1]:.4g}" for t in means)
    rounds = sorted({number for trace in means for number in trace["x"]})
    columns = [dict(zip(t["x"], zip(t["y"], t["text"], strict=True), strict=True)) for t in means]
    body = [[n, *("" if n not in c else f"{c[n][0]:.4g}{c[n][1]}" for c in columns)] for n in rounds]
    axes = {"xaxis": {"title": {"text": "round"}, "dtick": 1 if rounds[-1] <= 12 else None}}
    seen = f"Line plot of {caption}{unit} over rounds {rounds[0]} to {rounds[-1]}: {ends}."
    return _figure(caption + unit, seen, traces, (["round", *(t["name"] for t in means)], body), **axes, **layout)


def _accuracies(groups: Sequence[Group]) -> Iterable[str]:
    for part, caption, unit, scale in (("accuracy", "Test accuracy", " in %", 100.0), ("loss", "Test loss", "", 1.0)):
        traces = [
            t for kind, (label, _) in KINDS.items() for t in _lines(groups, part, kind, label.split(":")[0], scale)
        ]
        yield _over_rounds(caption, unit, traces, height=420 if part == "accuracy" else 300)


def _metrics(groups: Sequence[Group]) -> Iterable[str]:
    figures = [
        _over_rounds(caption.capitalize(), "", _lines(groups, part, kind, ""), height=230)
        for kind, (part, caption) in METRICS.items()
    ]
    yield f"<div class=grid>{''.join(figures)}</div>"


def _names(group: Group) -> list[str]:
    return [name if len(name) <= 18 else f"{name[:16]}…" for name in group.first.read("partition.json")["class_names"]]


def _confusion(group: Group) -> dict[str, NDArray[np.int64]]:
    """Returns the sum over seeds ``(C, C)`` of each kind, of the runs that measured it."""
    sums: dict[str, NDArray[np.int64]] = {}
    for found in (run.read("evaluation.json").get("confusion", {}) for run in group.runs):
        for kind in found if group.first.refiner != "none" else found.keys() & {"refined"}:
            sums[kind] = sums.get(kind, 0) + np.array(found[kind], dtype=np.int64)
    return {kind: sums[kind] for kind in ("selected", "refined") if kind in sums}


def _ticks(names: Sequence[str]) -> dict[str, Any]:
    step = max(1, len(names) // 50)
    return {"tickvals": [*range(0, len(names), step)], "ticktext": [*map(escape, names[::step])], "showgrid": False}


def _classes(groups: Sequence[Group]) -> Iterable[str]:
    bars: list[Trace] = []
    heatmaps, columns, seen = [], {}, []
    for place, group in enumerate(groups):
        shares: dict[str, NDArray[np.float64]] = {}
        for kind, counts in _confusion(group).items():
            names, label = _names(group), KINDS[kind][0].split(":")[0]
            part = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
            shares[kind] = np.diag(part).round(2)
            name = f"{group.name}, {label}"
            columns[name] = shares[kind]
            bar = {"type": "bar", "x": [*range(len(names))], "y": shares[kind].tolist(), "name": escape(name)}
            look = {"opacity": 0.5 if kind == "selected" else 1.0, "meta": {"run": place, "kind": kind}}
            hover = f"%{{customdata}}: %{{y:.1f}} %<extra>{escape(name)}</extra>"
            bars.append({**bar, **look, "customdata": [*map(escape, names)], "hovertemplate": hover})
            heatmaps.append(_heatmap(f"Confusion, {escape(name)}", counts, part, names, names))
        if len(shares) == 2:
            gains = shares["refined"] - shares["selected"]
            best, worst = int(gains.argmax()), int(gains.argmin())
            seen.append(
                f"{group.name} after refining: {gains[best]:+.1f} points for class {names[best]}, its largest gain, "
                f"and {gains[worst]:+.1f} for class {names[worst]}"
            )
    if not bars:
        return
    yield "".join(f"<p>{escape(text)}.</p>" for text in seen)
    table = ["class", *columns], [[name, *(c[i] for c in columns.values())] for i, name in enumerate(names)]
    text = f"Bars of the last round's accuracy on each of {len(names)} classes. {'; '.join(seen)}."
    axes = {"xaxis": {"title": {"text": "class"}, **_ticks(names)}, "yaxis": {"range": [0, 100]}}
    yield _figure("Accuracy of each class after the last round in %", text, bars, table, **axes, bargap=0.3)
    yield f"<div class=grid>{''.join(heatmaps)}</div>"


def _heatmap(
    caption: str, counts: NDArray[Any], shades: NDArray[Any], rows: Sequence[str], names: Sequence[str]
) -> str:
    """Returns a heatmap of rows and classes whose numbers are ``counts``; where rows are classes, it is a confusion."""
    square = rows is names
    text = {"texttemplate": "%{customdata}"} if len(names) <= DETAILED and len(rows) <= 60 else {}
    axis, unit = ("true class", "predicted") if square else ("client", "samples of class")
    hover = f"{axis} %{{y}}, {unit} %{{x}}: %{{customdata}}<extra></extra>"
    trace = {"type": "heatmap", "z": shades.round(2).tolist(), "customdata": counts.tolist(), "showscale": False}
    trace |= {"zmin": 0, "hovertemplate": hover, "xgap": 1, "ygap": 1 if len(rows) <= 60 else 0, **text}
    layout = {
        "xaxis": {"title": {"text": "predicted class" if square else "class"}, **_ticks(names)},
        "yaxis": {"title": {"text": axis}, "autorange": "reversed", **_ticks(rows)},
        "height": min(max(120 + 22 * len(rows), 260), 900),
    }
    if square:
        most = counts * (1 - np.eye(len(names), dtype=np.int64))
        row, column = divmod(int(most.argmax()), len(names))
        seen = f"{np.trace(counts)} of {counts.sum()} test images lie on the diagonal; the most frequent confusion is "
        seen += f"{names[row]} taken for {names[column]}, {most[row, column]} times"
    else:
        empty = (counts == 0).mean()
        seen = f"{len(rows)} clients, {len(names)} classes; {100 * empty:.0f} % of the cells are empty"
    numbers = [axis, *names], [[row, *line] for row, line in zip(rows, counts.tolist(), strict=True)]
    return _figure(caption, f"Heatmap: {caption}: {seen}.", [trace], numbers, **layout)


def _images(groups: Sequence[Group]) -> Iterable[str]:
    """Yields, for the first seed of each group, the images of each round that has some."""
    for group in groups:
        files = sorted((group.first.folder / "images").glob("*.png"))
        if not files:
            continue
        known = {row["round"] for row in group.first.rounds if "teacher_agreement" in row.get("refine", {})}
        names = _names(group)[:20]
        shape = group.first.read("partition.json")["image_shape"]
        side = 8 * shape[2] * max(1, round(24 / shape[2]))
        mosaics = []
        for file in files:
            number, labelled = int(file.stem), int(file.stem) in known
            rows = "".join(f"<span>{escape(name)}</span>" for name in names) if labelled else ""
            what = (
                f"up to 8 for each class from {names[0]} to {names[-1]}, a row a class" if labelled else "in no order"
            )
            alt = escape(f"Images that the refiner of {group.name} showed in round {number}: {what}.")
            data = base64.b64encode(file.read_bytes()).decode()
            mosaics.append(
                f"<figure class=mosaic><figcaption>round {number}</figcaption><div><div class=names aria-hidden=true>"
                f'{rows}</div><img alt="{alt}" width={side} src="data:image/png;base64,{data}"></div></figure>'
            )
        seed = f", seed {group.first.config.get('seed')}" if len(group.runs) > 1 else ""
        yield f"<h3>Images that {escape(group.name)} distils on{seed}</h3>"
        yield "<p>The last batch of a round, as clients' images would look; a white cell has none.</p>"
        yield f"<div class=mosaics>{''.join(mosaics)}</div>"


def _partitions(groups: Sequence[Group]) -> Iterable[str]:
    """Yields the class counts of the first seed of each group, each partition once."""
    digests = set()
    for group in groups:
        record = group.first.read("partition.json")
        if not record or record["digest"] in digests:
            continue
        digests.add(record["digest"])
        counts = np.array(record["class_counts"])
        order = np.arange(len(counts))
        if len(counts) > 400:
            order = np.lexsort((-counts.max(axis=1), counts.argmax(axis=1)))
        caption = "Samples of each class at each client" + (", by biggest class" if len(counts) > 400 else "")
        if len(group.runs) > 1:
            caption += f", seed {group.first.config.get('seed')}"
        yield _heatmap(caption, counts[order], counts[order], [*map(str, order)], _names(group))
    if digests:
        yield "<p class=notes>Beside its update a client sends these counts, without the samples it holds back.</p>"


def _clients(groups: Sequence[Group]) -> Iterable[str]:
    traces: list[Trace] = []
    rows: list[list[str]] = []
    for place, group in enumerate(groups):
        for kind in ("selected", "refined") if group.first.refiner != "none" else ("refined",):
            found = [
                (100 * value, f"client {client}, seed {run.config.get('seed')}")
                for run in group.runs
                for client, value in run.read("evaluation.json").get("clients", {}).get(kind, {}).items()
            ]
            if not found:
                continue
            values, names = zip(*sorted(found), strict=True)
            name = f"{group.name}, {KINDS[kind][0].split(':')[0]}"
            rows += [[name, text, f"{value:.2f}"] for value, text in zip(values, names, strict=True)]
            look = {"mode": "lines+markers", "line": {"dash": KINDS[kind][1]}, "meta": {"run": place, "kind": kind}}
            hover = f"%{{text}}: %{{y:.1f}} %<extra>{escape(name)}</extra>"
            share = [100 * (i + 0.5) / len(values) for i in range(len(values))]
            data = {"type": "scatter", "x": share, "y": values, "text": names, "name": name, "hovertemplate": hover}
            traces.append({**data, **look})
    if traces:
        caption = "Accuracy of each client on the samples that it holds back, in %, from worst to best"
        seen = "; ".join(f"{t['name']} from {t['y'][0]:.1f} to {t['y'][-1]:.1f}" for t in traces)
        axes = {"xaxis": {"title": {"text": "clients in %, worst first"}}, "yaxis": {"range": [-2, 102]}}
        yield _figure(caption, f"{caption}: {seen}.", traces, (["run", "client", "accuracy"], rows), **axes)


def _seconds(groups: Sequence[Group]) -> Iterable[str]:
    rows = []
    for group in groups:
        records = [row for run in group.runs for row in run.rounds]
        rows.append([math.fsum(row["seconds"].get(p, 0) for row in records) / max(len(records), 1) for p in PHASES])
    names = [escape(group.name) for group in groups]
    traces = [
        {
            "type": "bar", "orientation": "h", "x": [row[i] for row in rows], "y": [*range(len(rows))], "name": phase,
            "meta": {"phase": i}, "customdata": names,
            "hovertemplate": f"%{{customdata}}: %{{x:.3~g}} s {phase}<extra></extra>",
        }
        for i, phase in enumerate(PHASES)
    ]  # fmt: skip
    keys = " ".join(f'<i class=key style="background:var(--p{i})"></i>{phase}' for i, phase in enumerate(PHASES))
    numbers = [[g.name, *(f"{s:.3f}" for s in (*row, sum(row)))] for g, row in zip(groups, rows, strict=True)]
    seen = "; ".join(f"{line[0]} takes {line[-1]} s" for line in numbers)
    axes = {"barmode": "stack", "height": 110 + 44 * len(rows), "xaxis": {"title": {"text": "seconds"}}}
    axes["yaxis"] = {"autorange": "reversed", **_ticks([name[:24] for name in names])}
    yield _figure(
        f"Seconds of a round, mean over rounds <span class=keys>{keys}</span>",
        f"Bars of a round's mean seconds by phase: {seen}.",
        traces,
        (["run", *PHASES, "total"], numbers),
        **axes,
    )


def _settings(groups: Sequence[Group]) -> Iterable[str]:
    """Yields commands, the settings in which groups differ, all settings, and the environment."""
    sessions = [s for group in groups for run in group.runs for s in run.read("environment.json").get("sessions", [])]
    given = dict.fromkeys(shlex.join(s["command"]) for s in sessions if s.get("command"))
    files = [shlex.quote(f"{run.folder}/config.toml") for group in groups for run in group.runs]
    again = f"fedftg run {files[0]} --out again" if len(files) == 1 else f"fedftg compare {' '.join(files)} --out again"
    if given:
        yield f"<p>It was started by</p><pre tabindex=0>{escape(chr(10).join(given))}</pre>"
    yield "<p>From the settings in the runs' folders, the same numbers on the same machine:</p>"
    yield f"<pre tabindex=0>{escape(again)}</pre>"
    flats = [flat(group.first.config) for group in groups]
    keys = [key for key in dict.fromkeys(key for one in flats for key in one) if key not in ("name", "seed")]
    differ = [
        [key, *(one.get(key, "") for one in flats)] for key in keys if len({str(one.get(key)) for one in flats}) > 1
    ]
    if differ:
        yield f"<h3>Settings that differ</h3>{_table(['', *(group.name for group in groups)], differ)}"
    for group in groups:
        toml = escape(tomli_w.dumps(group.first.config))
        name = escape(group.name)
        yield f"<details class=settings><summary>All settings of {name}</summary><pre tabindex=0>{toml}</pre></details>"
    values: dict[str, dict[str, None]] = {}
    for key, value in (item for session in sessions for item in flat(session).items()):
        if key not in ("command", "started", "resumed_after_round"):
            values.setdefault(key.removeprefix("packages."), {})[str(value)] = None
    if values:
        table = _table(["", "value"], [[key, "; ".join(found)] for key, found in values.items()])
        yield f"<details class=settings><summary>Environment</summary>{table}</details>"
