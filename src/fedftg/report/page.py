"""One self-contained HTML page of a run or a comparison: interactive figures (plotly), and their numbers as tables."""

from __future__ import annotations

import base64
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from html import escape
from importlib import resources
from itertools import zip_longest
from statistics import fmean
from typing import Any

import numpy as np
import tomli_w
from numpy.typing import NDArray

from fedftg.errors import flat
from fedftg.report.load import Group, RunRecord, grouped
from fedftg.report.table import Row, comparison_rows, interval, mean_of, percent, table_cells, table_notes
from fedftg.rundir.records import PHASES, finite

Names = Sequence[str]
Trace = dict[str, Any]
"""A trace of plotly whose look the page chooses by ``meta``: ``run`` (its place), ``kind``, ``part``, ``phase``."""

KINDS = {
    "refined": "deployed",
    "selected": "selected (before refining)",
    "all": "all (last uploads)",
    "sent": "sent to clients",
    "ensemble": "ensemble",
    "ensemble_prior": "ensemble without priors",
}
"""Label of each kind of model; the first two are shown at first."""

MOST_CELLS = 20_000
"""Larger tables of numbers are left out of the page."""


def html_page(runs: Sequence[RunRecord]) -> str:
    """Returns one HTML file that needs no network: about 5 MB, most of it plotly.

    Raises:
        InputError: a file of a run is damaged.
    """
    from plotly.offline import get_plotlyjs

    groups, rows = grouped(runs), comparison_rows(runs)
    title = f"{groups[0].name}: {groups[0].first.method}" if len(groups) == 1 else f"{len(groups)} settings compared"
    title = " and ".join(group.name for group in groups) if len(groups) == 2 else title
    sections = {
        "Does distillation help?": [*_verdict(rows), *_accuracies(groups)],
        "Which classes gain?": _classes(groups),
        "What the refiner did": [*_metrics(groups), *_images(groups)],
        "What the clients told the server": _partitions(groups),
        "How clients fare": _clients(groups),
        "Where the time goes": _seconds(groups),
        "Run it again": _settings(groups),
    }
    texts = {name: "".join(parts) for name, parts in sections.items()}
    parts = {
        "title": escape(title),
        "about": escape(_about(groups)),
        "show": "".join(_toggles(groups)),
        "body": "".join(f"<section><h2>{name}</h2>{text}</section>" for name, text in texts.items() if text),
        "plotly": get_plotlyjs(),
    }
    template = (resources.files("fedftg.report") / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _about(groups: Sequence[Group]) -> str:
    """Returns what was run, in a line; where groups differ, all values."""
    runs = [{"seed": 0, **flat(run.config)} for group in groups for run in group.runs]
    keys = ("data.name", "partition.law", "partition.alpha", "partition.num_clients", "cohort.size", "model.name")
    values = {key: dict.fromkeys(str(run[key]) for run in runs if key in run) for key in (*keys, "rounds", "seed")}
    return ", ".join(f"{key.removesuffix('.name')} {' or '.join(found)}" for key, found in values.items() if found)


def _verdict(rows: Sequence[Row]) -> Iterator[str]:
    """Yields a sentence for each row that has a base, and the table."""
    for row, gain in ((row, row.gain) for row in rows if row.gain):
        means, proof = gain.mean_last, "of one seed, which proves little: add <code>--seeds 0,1,2</code>"
        if len(means) > 1:
            low, high = interval(means)
            proof = f"paired over {len(means)} seeds, 95 % interval {percent(low, '+')} to {percent(high, '+')}"
            proof += "" if low * high > 0 else "; that includes 0, so it takes more seeds to know"
        points = f"<strong>{percent(fmean(means), '+')} points</strong> over {escape(gain.base)}"
        yield f"<p class=verdict><b>{escape(row.name)}</b>: {points}, {proof}.</p>"
    if not any(row.gain for row in rows):
        yield "<p class=verdict>To see what a refiner gives, <code>fedftg compare</code> a run with one without it.</p>"
    header, *body = table_cells(rows, "{}")
    notes = " ".join(table_notes(rows, below="in brackets the final one"))
    yield f"{_table(header, body)}<p class=notes>{escape(notes)}</p>"


def _toggles(groups: Sequence[Group]) -> Iterator[str]:
    """Yields the checkboxes, which are the legend too: runs, kinds of models, and what is drawn of seeds."""
    runs = [
        ("run", place, f'<i class=key style="background:var(--c{place % 8})"></i>{escape(group.name)}', True)
        for place, group in enumerate(groups)
    ]
    line = '<svg class="key {}" aria-hidden=true><path d="M0 6h28"/></svg>{}'
    kinds = [
        ("kind", kind, line.format(kind, label), kind in ("refined", "selected"))
        for kind, label in KINDS.items()
        if any(run.accuracy(kind)[0] for group in groups for run in group.runs)
    ]
    seeds = [("part", "band", "± deviation over seeds", True), ("part", "seed", "each seed", False)]
    several = any(len(group.runs) > 1 for group in groups)
    for legend, boxes in (("Run", runs), ("Model", kinds), ("Seeds", seeds if several else [])):
        inputs = [
            f"<label><input type=checkbox name={name} value={value}{' checked' if on else ''}>{label}</label>"
            for name, value, label, on in boxes
        ]
        yield f"<fieldset><legend>{legend}</legend>{''.join(inputs)}</fieldset>" if inputs else ""


def _figure(
    caption: str, seen: str, traces: Sequence[Trace], header: Any, rows: Any, layout: dict[str, Any], keys: str = ""
) -> str:
    """Returns a figure that the page's script draws, and its numbers; ``seen`` says what it shows."""
    spec = json.dumps(finite({"data": traces, "layout": layout}), allow_nan=False).replace("<", r"\u003c")
    return (
        f"<figure><figcaption>{escape(caption)}{keys}</figcaption>"
        f'<div class=plot role=img style="height:{layout["height"]}px" aria-label="{escape(seen)}"></div>'
        f"<script type=application/json>{spec}</script>"
        f"<details><summary>Numbers</summary>{_table(header, rows)}</details></figure>"
    )


def _table(header: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    if len(header) * len(rows) > MOST_CELLS:
        return f"<p>{len(rows)} rows and {len(header)} columns: see the files of the run.</p>"
    head = "".join(f"<th scope=col>{escape(str(cell))}</th>" for cell in header)
    lines = [[escape(str(cell)) for cell in row] for row in rows]
    body = "".join(f"<tr><th scope=row>{'<td>'.join(line)}</tr>" for line in lines)
    return f"<div class=scroll tabindex=0><table><thead><tr>{head}<tbody>{body}</table></div>"


def _lines(groups: Sequence[Group], part: str, kind: str, scale: float = 1.0) -> Iterator[Trace]:
    """Yields a line per group, the mean over its seeds, and where there are several a band and a line per seed."""
    for place, group in enumerate(groups):
        series = [run.series(part, kind) for run in group.runs]
        numbers, *both = mean_of(series)
        if not numbers or (kind == "selected" and group.first.refiner == "none"):  # that is the deployed model
            continue
        name = f"{group.name}, {KINDS[kind]}" if kind in KINDS else group.name
        means, spreads = (scale * np.array(values) for values in both)
        meta = {"run": place, "kind": kind}
        if len(group.runs) > 1:
            edges = [*(means + spreads), *(means - spreads)[::-1]]
            yield {"x": numbers + numbers[::-1], "y": edges, "name": name, "meta": {**meta, "part": "band"}}
            for run, (rounds, values) in zip(group.runs, series, strict=True):
                own = {"x": rounds, "y": [scale * value for value in values], "name": f"{name}, {_seed(run)}"}
                yield {**own, "meta": {**meta, "part": "seed"}}
        text = [f" ± {spread:.3g}" if len(group.runs) > 1 else "" for spread in spreads]
        yield {"x": numbers, "y": [*means], "text": text, "name": name, "meta": {**meta, "part": "mean"}}


def _seed(run: RunRecord) -> str:
    return f"seed {run.config.get('seed', 0)}"


def _over_rounds(caption: str, groups: Sequence[Group], traces: Sequence[Trace], height: int) -> str:
    """Returns a figure of lines over rounds, or nothing where there are none."""
    means = [trace for trace in traces if trace["meta"]["part"] == "mean"]
    if not means:
        return ""
    rounds = sorted({number for trace in means for number in trace["x"]})
    cells = [{x: f"{y:.4g}{sd}" for x, y, sd in zip(t["x"], t["y"], t["text"], strict=True)} for t in means]
    header = ["round", *(t["name"] for t in means)]
    ends = "; ".join(f"{t['name']}, from {t['y'][0]:.4g} to {t['y'][-1]:.4g}" for t in means)
    seen = f"Lines over rounds {rounds[0]} to {rounds[-1]}: {caption}: {ends}."
    last = max(row["round"] for group in groups for run in group.runs for row in run.rounds)
    axis = {"title": {"text": "round"}, "dtick": 1 if last <= 12 else None, "range": [1 - last / 50, last * 1.02]}
    body = [[number, *(column.get(number, "") for column in cells)] for number in rounds]
    return _figure(caption, seen, traces, header, body, {"height": height, "xaxis": axis})


def _accuracies(groups: Sequence[Group]) -> Iterator[str]:
    for part, caption, scale, height in (("accuracy", "Test accuracy in %", 100, 360), ("loss", "Test loss", 1, 260)):
        yield _over_rounds(caption, groups, [t for kind in KINDS for t in _lines(groups, part, kind, scale)], height)


def _metrics(groups: Sequence[Group]) -> Iterator[str]:
    rows = [row for group in groups for run in group.runs for row in run.rounds]
    names = dict.fromkeys((part, name) for part in ("server", "refine") for row in rows for name in row.get(part, {}))
    found = [
        _over_rounds(f"{part}: {name.replace('_', ' ')}", groups, [*_lines(groups, part, name)], 230)
        for part, name in names
    ]
    yield f"<div class=grid>{''.join(found)}</div>" if found else ""


def _names(group: Group) -> list[str]:
    names = group.first.read("partition.json").get("class_names", [])
    return [name if len(name) <= 18 else f"{name[:16]}…" for name in names]


def _kinds(group: Group) -> tuple[str, ...]:
    """Returns before and after refining; without a refiner both are one."""
    return ("refined",) if group.first.refiner == "none" else ("selected", "refined")


def _ticks(names: Names) -> dict[str, Any]:
    return {"tickvals": [*range(len(names))], "ticktext": names, "showgrid": False}


def _classes(groups: Sequence[Group]) -> Iterator[str]:
    bars: list[Trace] = []
    heatmaps, columns, seen = [], {}, ""
    for place, group in enumerate(groups):
        names, before = _names(group), None
        for kind in _kinds(group):
            found = [run.read("evaluation.json").get("confusion", {}).get(kind) for run in group.runs]
            counts = sum(np.array(one) for one in found if one)
            if not isinstance(counts, np.ndarray):
                continue
            name = f"{group.name}, {KINDS[kind]}"
            share = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
            columns[name] = right = np.diag(share).round(2)
            bar = {"type": "bar", "x": [*range(len(names))], "y": right.tolist(), "text": names}
            bars.append({**bar, "name": name, "meta": {"run": place, "kind": kind}})
            heatmaps.append(_heatmap(name, counts, share, names, names))
            if before is not None and (right != before).any():
                best, worst = (int(at(right - before)) for at in (np.argmax, np.argmin))
                gain, loss = right[best] - before[best], right[worst] - before[worst]
                seen += f"{group.name}, refining: {gain:+.1f} points for class {names[best]}, the largest gain, "
                seen += f"and {loss:+.1f} for class {names[worst]}.\n"
            before = right
    if bars:
        yield "".join(f"<p>{escape(line)}</p>" for line in seen.splitlines())
        names = max(map(_names, groups), key=len)
        cells = zip_longest(names, *columns.values(), fillvalue="")
        axes = {"xaxis": {"title": {"text": "class"}, **_ticks(names)}, "height": 320}
        caption = "Accuracy of each class after the last round in % (pale: before refining)"
        yield _figure(caption, f"Bars: {caption}. {seen}", bars, ["class", *columns], [*cells], axes)
        several = ", sum over seeds" if any(len(group.runs) > 1 for group in groups) else ""
        yield f"<h3>Confusion{several}</h3><div class=grid>{''.join(heatmaps)}</div>"


def _heatmap(caption: str, counts: NDArray[Any], shades: NDArray[Any], rows: Names, names: Names) -> str:
    """Returns a heatmap of rows and classes whose numbers are ``counts``; where rows are classes, it is a confusion."""
    axis, other = ("true class", "predicted class") if rows is names else ("client", "class")
    text = [[str(count) if count else "" for count in line] for line in counts.tolist()]
    trace = {"type": "heatmap", "z": shades.round(2).tolist(), "text": text, "zmin": 0}
    if max(len(rows), len(names)) <= 60:
        trace |= {"xgap": 1, "ygap": 1} | ({"texttemplate": "%{text}"} if len(names) <= 20 else {})
    seen = f"{len(rows)} clients, {len(names)} classes; {100 * (counts == 0).mean():.0f} % of the cells are empty"
    if rows is names:
        off = counts * (1 - np.eye(len(names), dtype=np.int64))
        row, column = divmod(int(off.argmax()), len(names))
        seen = f"{np.trace(counts)} of {counts.sum()} images are on the diagonal; most often {names[row]} is taken for "
        seen += f"{names[column]}, {off.max()} times"
    axes = {"xaxis": {"title": {"text": other}, **_ticks(names)}, "height": min(110 + 22 * max(len(rows), 7), 500)}
    axes["yaxis"] = {"title": {"text": axis}, "autorange": "reversed", **_ticks(rows)}
    body = [[row, *line] for row, line in zip(rows, counts.tolist(), strict=True)]
    return _figure(caption, f"Heatmap of {axis} and {other}: {caption}: {seen}.", [trace], [axis, *names], body, axes)


def _images(groups: Sequence[Group]) -> Iterator[str]:
    """Yields, for the first seed of each group, the images of each round that has some."""
    for group in groups:
        mosaics, names = [], _names(group)[:20]
        labelled = {row["round"] for row in group.first.rounds if "teacher_agreement" in row.get("refine", {})}
        for file in sorted((group.first.folder / "images").glob("*.png")):
            number, data = int(file.stem), file.read_bytes()
            width = int.from_bytes(data[16:20])  # of a PNG file
            classes = "".join(f"<span>{escape(name)}</span>" for name in names) if number in labelled else ""
            what = f"a row a class, from {names[0]} to {names[-1]}" if classes else "without labels"
            mosaics.append(
                f"<figure class=mosaic><figcaption>round {number}</figcaption><div><div class=names>{classes}</div>"
                f'<img alt="{escape(f"Images of {group.name} in round {number}, {what}")}" '
                f"width={width * max(1, round(256 / width))} "
                f'src="data:image/png;base64,{base64.b64encode(data).decode()}"></div></figure>'
            )
        if mosaics:
            yield f"<h3>Images that {escape(group.name)} distils on, {_seed(group.first)}</h3>"
            yield "<p class=notes>The last batch of a round, at most 8 images of a class.</p>"
            yield f"<div class=mosaics>{''.join(mosaics)}</div>"


def _partitions(groups: Sequence[Group]) -> Iterator[str]:
    """Yields the class counts of the first seed of each group, each partition once."""
    found: dict[str, tuple[Group, NDArray[Any]]] = {}
    for group in groups:
        if record := group.first.read("partition.json"):
            found.setdefault(record["digest"], (group, np.array(record["class_counts"])))
    for group, counts in found.values():
        caption, order = f"Samples of each class at each client, {_seed(group.first)}", np.arange(len(counts))
        if len(counts) > 400:
            caption, order = f"{caption}, by biggest class", np.lexsort((-counts.max(axis=1), counts.argmax(axis=1)))
        yield _heatmap(caption, counts[order], counts[order], [*map(str, order)], _names(group))


def _clients(groups: Sequence[Group]) -> Iterator[str]:
    traces: list[Trace] = []
    rows: list[list[str]] = []
    for place, group in enumerate(groups):
        for kind in _kinds(group):
            values = [
                (100 * value, f"client {client}, {_seed(run)}")
                for run in group.runs
                for client, value in run.read("evaluation.json").get("clients", {}).get(kind, {}).items()
            ]
            name, ordered = f"{group.name}, {KINDS[kind]}", sorted(values)
            rows += [[name, client, f"{value:.2f}"] for value, client in ordered]
            share = [100 * (rank + 0.5) / len(ordered) for rank in range(len(ordered))]
            line = {"y": [value for value, _ in ordered], "text": [f" {client}" for _, client in ordered]}
            traces += [{"name": name, "x": share, **line, "meta": {"run": place, "kind": kind}}] if values else []
    if traces:
        caption = "Accuracy of each client on what it holds back in %, from worst to best"
        seen = "; ".join(f"{t['name']}: {t['y'][0]:.1f} to {t['y'][-1]:.1f}" for t in traces)
        axes = {"xaxis": {"title": {"text": "share of clients in %"}}, "yaxis": {"range": [-3, 103]}, "height": 320}
        yield _figure(caption, f"Lines: {caption}. {seen}.", traces, ["run", "client", "accuracy"], rows, axes)


def _seconds(groups: Sequence[Group]) -> Iterator[str]:
    names, rows = [group.name for group in groups], []
    for group in groups:
        records = [row["seconds"] for run in group.runs for row in run.rounds]
        rows.append([sum(row.get(phase, 0) for row in records) / max(len(records), 1) for phase in PHASES])
    common = {"type": "bar", "orientation": "h", "y": [*range(len(rows))], "text": names}
    traces = [{**common, "x": [row[i] for row in rows], "name": p, "meta": {"phase": i}} for i, p in enumerate(PHASES)]
    keys = "".join(f'<i class=key style="background:var(--p{i})"></i>{phase}' for i, phase in enumerate(PHASES))
    caption = "Seconds of a round, mean over rounds"
    body = [[name, *(f"{s:.3f}" for s in (*row, sum(row)))] for name, row in zip(names, rows, strict=True)]
    seen = f"Bars by phase: {caption}: {'; '.join(f'{line[0]}, {line[-1]}' for line in body)}."
    axes = {
        "yaxis": {"autorange": "reversed", **_ticks([name if len(name) <= 24 else f"…{name[-22:]}" for name in names])},
        "height": 80 + 44 * len(rows),
    }
    yield _figure(caption, seen, traces, ["run", *PHASES, "total"], body, {"barmode": "stack", **axes}, keys)


def _settings(groups: Sequence[Group]) -> Iterator[str]:
    """Yields commands, the settings in which groups differ, all settings, and the environment."""
    runs = [run for group in groups for run in group.runs]
    sessions = [one for run in runs for one in run.read("environment.json").get("sessions", [])]
    if given := dict.fromkeys(shlex.join(one["command"]) for one in sessions if one.get("command")):
        yield f"<p>Started by</p><pre tabindex=0>{escape(chr(10).join(given))}</pre>"
    files = [str(run.folder / "config.toml") for run in runs]
    again = shlex.join(["fedftg", "run" if len(files) == 1 else "compare", *files, "--out", "again"])
    yield "<p>From the settings kept in the run folders; on the same machine, the same numbers</p>"
    yield f"<pre tabindex=0>{escape(again)}</pre>"
    flats = [flat(group.first.config) for group in groups]
    common = [key for key in flats[0] if all(key in one for one in flats) and key not in ("name", "seed")]
    differ = [[key, *(one[key] for one in flats)] for key in common if any(one[key] != flats[0][key] for one in flats)]
    yield _table(["settings that differ", *(group.name for group in groups)], differ) if differ else ""
    for group in groups:
        yield f"<details class=settings><summary>All settings of {escape(group.name)}</summary>"
        yield f"<pre tabindex=0>{escape(tomli_w.dumps(group.first.config))}</pre></details>"
    values: dict[str, dict[str, None]] = {}
    for key, value in (item for one in sessions for item in flat(one).items() if item[0] not in ("command", "started")):
        values.setdefault(key.removeprefix("packages."), {})[str(value)] = None
    rows = [[key, "; ".join(found)] for key, found in values.items()]
    yield f"<details class=settings><summary>Environment</summary>{_table(['', 'value'], rows)}</details>"
