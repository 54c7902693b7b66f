"""Shows how a run in another process proceeds, from what it writes to its folder."""

from __future__ import annotations

import math
import time
from datetime import timedelta
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from fedftg.report.load import RunRecord, load_run


def watch(folder: Path, console: Console, every: float = 1.0) -> None:
    """Shows a run until it is finished, read anew ``every`` seconds; once where the console is no terminal."""
    run = load_run(folder)
    if not console.is_terminal:
        console.print(view(run))
        return
    with Live(view(run), console=console, auto_refresh=False) as live:
        while run.summary is None:
            time.sleep(every)
            live.update(view(run := load_run(folder)), refresh=True)


def view(run: RunRecord) -> Group:
    """Returns state, time left, the last evaluated rounds, the deployed accuracy as a sparkline, and rejections."""
    done, planned = len(run.rounds), run.config["rounds"]
    seconds = {row["round"]: sum(row["seconds"].values()) for row in run.rounds}
    quiet = time.time() - (run.folder / ("rounds.jsonl" if done else "config.toml")).stat().st_mtime
    left = run.seconds / max(done, 1) * (planned - done)
    state = f"running, {timedelta(seconds=round(left))} left" if done else "running"
    if run.summary is not None:
        state = f"finished in {timedelta(seconds=round(run.seconds))}"
    elif quiet > 30 + 3 * max(seconds.values(), default=0):
        state = f"no new round for {timedelta(seconds=round(quiet))}"
    parts: list[Text | Table] = [Text(f"{run.name}: {run.method}, round {done} of {planned}, {state}")]
    if rows := [row for row in run.rounds if row["accuracy"]][-10:]:
        kinds = list(dict.fromkeys(kind for row in rows for kind in row["accuracy"]))
        table = Table(*(Column(name, justify="right") for name in ("round", *kinds, "seconds")), box=None)
        for row in rows:
            cells = (row["accuracy"].get(kind) for kind in kinds)
            shown = ("-" if cell is None else f"{100 * cell:.2f}" for cell in cells)
            table.add_row(str(row["round"]), *shown, f"{seconds[row['round']]:.1f}")
        parts += [table, Text(f"refined {sparkline(run.accuracy('refined')[1])}")]
    if rejected := [(row["round"], item) for row in run.rounds for item in row.get("rejected", ())]:
        number, item = rejected[-1]
        text = f"{len(rejected)} rejected, the last: client {item['client']} in round {number}: {item['reason']}"
        parts.append(Text(text, style="yellow"))
    return Group(*parts)


def sparkline(values: list[float], width: int = 60) -> str:
    """Returns a block a value, from the lowest to the highest; of more than ``width`` values every n-th."""
    shown = values[:: -max(1, math.ceil(len(values) / width))][::-1]
    span = max(shown) - min(shown) or 1 if shown else 1
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (value - min(shown)) / span)] for value in shown)
