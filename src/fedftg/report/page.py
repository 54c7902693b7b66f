"""One self-contained HTML page of a run or a comparison: interactive figures (plotly), and their numbers as tables."""

from __future__ import annotations

import base64
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from html import escape
from importlib import resources
from statistics import fmean
from typing import Any

import numpy as np
import tomli_w
from numpy.typing import NDArray

from fedftg.errors import flat
from fedftg.report import table
from fedftg.report.load import Group, RunRecord, differing, grouped
from fedftg.rundir import pictures
from fedftg.rundir.records import PHASES, finite

Names = tuple[str, ...]
Trace = dict[str, Any]
"""A trace of plotly whose look the page chooses by ``meta``: ``run`` (its place), ``kind``, ``part``, ``phase``."""

KINDS = {
    "refined": "deployed",
    "selected": "selected (before refining)",
    "all": "all (last uploads)",
    "sent": "sent to clients",
    "ensemble": "ensemble",
    "ensemble_prior": "ensemble without priors",
    "best_client": "best client alone",
}
"""Label of each kind of model; the first two are shown at first."""


def html_page(runs: Sequence[RunRecord]) -> str:
    """Returns one HTML file that needs no network: about 5 MB, most of it plotly.

    Raises:
        InputError: a file of a run is damaged.
    """
    from plotly.offline import get_plotlyjs

    groups, rows = grouped(runs), table.comparison_rows(runs)
    title = f"{groups[0].name}: {groups[0].first.method}" if len(groups) == 1 else f"{len(groups)} settings compared"
    title = " and ".join(group.name for group in groups) if len(groups) == 2 else title
    sections = {
        "Does distillation help?": [*_verdict(rows), *_accuracies(groups)],
        "Which classes gain?": _classes(groups),
        "What the refiner did": [*_metrics(groups), *_images(groups)],
        "Who holds what": _partitions(groups),
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


def _verdict(rows: Sequence[table.Row]) -> Iterator[str]:
    """Yields a sentence for each row that has a base, and the table."""
    for row, gain in ((row, row.gain) for row in rows if row.gain):
        means, proof = gain.means, "of one seed, which proves little: add <code>--seeds 0,1,2</code>"
        if len(means) > 1:
            low, high = ends = table.interval(means)
            proof = f"paired over {len(means)} seeds, 95 % interval {' to '.join(table.percent(e, '+') for e in ends)}"
            proof += "" if low * high > 0 else "; that includes 0, so it takes more seeds to know"
        points = f"<strong>{table.percent(fmean(means), '+')} points</strong> over {escape(gain.base)}"
        yield f"<p class=verdict><b>{escape(row.name)}</b>: {points}, {proof}.</p>"
    if not any(row.gain for row in rows):
        yield "<p class=verdict>To see what a refiner gives, <code>fedftg compare</code> a run with one without it.</p>"
    header, *body = table.table_cells(rows, "{}")
    notes = " ".join(table.table_notes(rows, below="in brackets the final one", intervals=False))
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
    caption: str, traces: Sequence[Trace], header: Any, rows: Any, layout: dict[str, Any], keys: str = ""
) -> str:
    """Returns a figure that the page's script draws, and its numbers; of lines the first three are described."""
    lines = [one for one in traces if "type" not in one and one["meta"].get("part", "mean") == "mean"]
    ends = [f"{one['name']} from {one['y'][0]:.4g} to {one['y'][-1]:.4g}" for one in lines[:3]]
    seen = f"{'; '.join([caption, *ends])}; the numbers are below"
    spec = json.dumps(finite({"data": traces, "layout": layout}), allow_nan=False).replace("<", r"\u003c")
    return (
        f"<figure><figcaption>{escape(caption)}{keys}</figcaption>"
        f'<div class=plot role=img style="height:{layout["height"]}px" aria-label="{escape(seen)}"></div>'
        f"<script type=application/json>{spec}</script>"
        f"<details><summary>Numbers</summary>{_table(header, rows)}</details></figure>"
    )


def _table(header: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    head = "".join(f"<th scope=col>{escape(str(cell))}</th>" for cell in header)
    lines = [[escape(str(cell)) for cell in row] for row in rows]
    body = "".join(f"<tr><th scope=row>{'<td>'.join(line)}</tr>" for line in lines)
    return f"<div class=scroll tabindex=0><table><thead><tr>{head}<tbody>{body}</table></div>"


def _lines(groups: Sequence[Group], part: str, kind: str, scale: float = 1.0) -> Iterator[Trace]:
    """Yields a line per group, the mean over its seeds, and where there are several a band and a line per seed."""
    for place, group in enumerate(groups):
        series = [run.series(part, kind) for run in group.runs]
        numbers, *both = table.mean_of(series)
        if not numbers or (kind == "selected" and group.first.refiner == "none"):  # that is the deployed model
            continue
        name = f"{group.name}, {KINDS[kind]}" if kind in KINDS else group.name
        means, spreads = (scale * np.array(values) for values in both)
        meta = {"run": place, "kind": kind}
        if len(group.runs) > 1:
            edges = [*(means + spreads), *(means - spreads)[::-1]]
            yield {"x": numbers + numbers[::-1], "y": edges, "name": name, "meta": {**meta, "part": "band"}}
            for run, (rounds, values) in zip(group.runs, series, strict=True):
                own = {"x": rounds, "y": [scale * value for value in values], "name": f"{name}, seed {run.seed}"}
                yield {**own, "meta": {**meta, "part": "seed"}}
        text = [f" ± {spread:.3g}" if len(group.runs) > 1 else "" for spread in spreads]
        yield {"x": numbers, "y": [*means], "text": text, "name": name, "meta": {**meta, "part": "mean"}}


def _over_rounds(caption: str, groups: Sequence[Group], traces: Sequence[Trace], height: int) -> str:
    """Returns a figure of lines over rounds, or nothing where there are none."""
    means = [trace for trace in traces if trace["meta"]["part"] == "mean"]
    if not means:
        return ""
    rounds = sorted({number for trace in means for number in trace["x"]})
    cells = [{x: f"{y:.4g}{sd}" for x, y, sd in zip(t["x"], t["y"], t["text"], strict=True)} for t in means]
    header = ["round", *(t["name"] for t in means)]
    last = max(row["round"] for group in groups for run in group.runs for row in run.rounds)
    axis = {"title": {"text": "round"}, "dtick": 1 if last <= 12 else None, "range": [1 - last / 50, last * 1.02]}
    body = [[number, *(column.get(number, "") for column in cells)] for number in rounds]
    return _figure(caption, traces, header, body, {"height": height, "xaxis": axis})


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


def _names(group: Group) -> Names:
    return tuple(table.cut(name, 18) for name in group.first.read("partition.json").get("class_names", []))


def _kinds(group: Group) -> tuple[str, ...]:
    """Returns before and after refining; without a refiner both are one."""
    return ("refined",) if group.first.refiner == "none" else ("selected", "refined")


def _ticks(names: Names) -> dict[str, Any]:
    return {"tickvals": [*range(len(names))], "ticktext": names, "showgrid": False}


def _evaluated(groups: Sequence[Group]) -> str:
    """Returns the round of ``evaluation.json``, an earlier one where a run was extended; where runs differ, all."""
    files = [run.read("evaluation.json") for group in groups for run in group.runs]
    return f"after round {' or '.join(map(str, sorted({file['round'] for file in files if file})))}"


def _classes(groups: Sequence[Group]) -> Iterator[str]:
    """Yields accuracies of classes and confusions, for each data set that groups have."""
    for names in dict.fromkeys(map(_names, groups)):
        own = {place: group for place, group in enumerate(groups) if _names(group) == names}
        bars, heatmaps = [], []
        for place, group in own.items():
            before = None
            for kind in _kinds(group):
                found = [run.read("evaluation.json").get("confusion", {}).get(kind) for run in group.runs]
                counts = np.array([one for one in found if one]).sum(axis=0)
                if not counts.any():
                    continue
                name = f"{group.name}, {KINDS[kind]}"
                share = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
                right = np.diag(share).round(2)
                bar = {"type": "bar", "x": [*range(len(names))], "y": right.tolist(), "text": names}
                bars.append({**bar, "name": name, "meta": {"run": place, "kind": kind}})
                heatmaps.append(_heatmap(name, counts, share, ("true class", names), ("predicted class", names)))
                if before is not None and (right != before).any():
                    best, worst = (int(at(right - before)) for at in (np.argmax, np.argmin))
                    gain, loss = right[best] - before[best], right[worst] - before[worst]
                    said = f"{group.name}, refining: {gain:+.1f} points for class {names[best]}, the largest gain, "
                    yield f"<p>{escape(f'{said}and {loss:+.1f} for class {names[worst]}.')}</p>"
                before = right
        if bars:
            axes = {"xaxis": {"title": {"text": "class"}, **_ticks(names)}, "height": 320}
            after = _evaluated([*own.values()])
            caption = f"Accuracy of each class {after} in % (pale: before refining)"
            cells = [*zip(names, *(bar["y"] for bar in bars), strict=True)]
            yield _figure(caption, bars, ["class", *(bar["name"] for bar in bars)], cells, axes)
            several = ", sum over seeds" if any(len(group.runs) > 1 for group in own.values()) else ""
            yield f"<h3>Confusion {after}{several}</h3><div class=grid>{''.join(heatmaps)}</div>"


def _heatmap(
    caption: str, counts: NDArray[Any], shades: NDArray[Any], rows: tuple[str, Names], columns: tuple[str, Names]
) -> str:
    """Returns a heatmap whose numbers are ``counts``; rows and columns have a title and names."""
    (axis, lines), (other, names) = rows, columns
    text = [[str(count) if count else "" for count in line] for line in counts.tolist()]
    trace = {"type": "heatmap", "z": shades.round(2).tolist(), "text": text, "zmin": 0}
    if max(counts.shape) <= 60:
        trace |= {"xgap": 1, "ygap": 1} | ({"texttemplate": "%{text}"} if len(names) <= 20 else {})
    axes = {"xaxis": {"title": {"text": other}, **_ticks(names)}, "height": min(110 + 22 * max(len(counts), 7), 500)}
    axes["yaxis"] = {"title": {"text": axis}, "autorange": "reversed", **_ticks(lines)}
    body = [[name, *line] for name, line in zip(lines, counts.tolist(), strict=True)]
    return _figure(caption, [trace], [axis, *names], body, axes)


def _images(groups: Sequence[Group]) -> Iterator[str]:
    """Yields, for the first seed of each group, the images of each round that has some."""
    for group in groups:
        mosaics, names = [], _names(group)[:20]
        for number, file, labelled in pictures.found(group.first.folder / "images"):
            classes = "".join(f"<span>{escape(name)}</span>" for name in names) if labelled else ""
            what = f"a row a class, from {names[0]} to {names[-1]}" if classes else "without labels"
            mosaics.append(
                f"<figure class=mosaic><figcaption>round {number}</figcaption><div><div class=names>{classes}</div>"
                f'<img alt="{escape(f"Images of {group.name} in round {number}, {what}")}" '
                f'src="data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"></div></figure>'
            )
        if mosaics:
            yield f"<h3>Images that {escape(group.name)} distils on, seed {group.first.seed}</h3>"
            yield "<p class=notes>The last batch of a round, at most 8 images a row.</p>"
            yield f"<div class=mosaics>{''.join(mosaics)}</div>"


def _partitions(groups: Sequence[Group]) -> Iterator[str]:
    """Yields the class counts of the first seed of each group, each partition once."""
    found: dict[str, tuple[Group, NDArray[Any]]] = {}
    for group in groups:
        if record := group.first.read("partition.json"):
            found.setdefault(record["digest"], (group, np.array(record["class_counts"])))
    for group, counts in found.values():
        order, note = table.order_of_clients(counts)
        of = f"{group.name}, " if len(found) > 1 else ""
        caption = f"Samples of each class at each client{note}: {of}seed {group.first.seed}"
        rows = ("client", tuple(map(str, order)))
        yield _heatmap(caption, counts[order], counts[order], rows, ("class", _names(group)))


def _clients(groups: Sequence[Group]) -> Iterator[str]:
    traces: list[Trace] = []
    rows: list[list[str]] = []
    for place, group in enumerate(groups):
        for kind in _kinds(group):
            values = [
                (100 * value, f"client {client}, seed {run.seed}")
                for run in group.runs
                for client, value in run.read("evaluation.json").get("clients", {}).get(kind, {}).items()
            ]
            name, ordered = f"{group.name}, {KINDS[kind]}", sorted(values)
            rows += [[name, client, f"{value:.2f}"] for value, client in ordered]
            share = [100 * (rank + 0.5) / len(ordered) for rank in range(len(ordered))]
            line = {"y": [value for value, _ in ordered], "text": [f" {client}" for _, client in ordered]}
            traces += [{"name": name, "x": share, **line, "meta": {"run": place, "kind": kind}}] if values else []
    if traces:
        caption = f"Accuracy of each client on what it holds back {_evaluated(groups)} in %, from worst to best"
        axes = {"xaxis": {"title": {"text": "share of clients in %"}}, "yaxis": {"range": [-3, 103]}, "height": 320}
        yield _figure(caption, traces, ["run", "client", "accuracy"], rows, axes)


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
    axes = {
        "yaxis": {"autorange": "reversed", **_ticks(tuple(table.cut(name, 24) for name in names))},
        "height": 80 + 44 * len(rows),
    }
    yield _figure(caption, traces, ["run", *PHASES, "total"], body, {"barmode": "stack", **axes}, keys)


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
    settings = differing([group.first for group in groups])
    differ = [[key, *values] for key, values in settings.items() if None not in values]
    yield _table(["settings that differ", *(group.name for group in groups)], differ) if differ else ""
    for group in groups:
        yield f"<details class=settings><summary>All settings of {escape(group.name)}</summary>"
        yield f"<pre tabindex=0>{escape(tomli_w.dumps(group.first.config))}</pre></details>"
    values: dict[str, dict[str, None]] = {}
    for key, value in (item for one in sessions for item in flat(one).items() if item[0] not in ("command", "started")):
        values.setdefault(key.removeprefix("packages."), {})[str(value)] = None
    rows = [[key, "; ".join(found)] for key, found in values.items()]
    yield f"<details class=settings><summary>Environment</summary>{_table(['', 'value'], rows)}</details>"
