"""JSON and JSON Lines files: one object a round, written so that a crash can tear at most the last line."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

Record = dict[str, Any]
Series = tuple[list[int], list[float]]
"""Round numbers and values."""

ACCURACIES = ("selected", "all", "refined", "sent", "ensemble", "ensemble_prior", "best_client")
"""Kinds of models whose test accuracy a record may have."""
LAST = 10
"""How many evaluations the reported mean covers."""

PHASES = ("local", "aggregate", "refine", "evaluate", "checkpoint")
"""What a record's ``seconds`` are split into; aggregate includes clients' rows, checkpoint is writing the state."""
PUT_BACK = "put the file back, or start a new run with another --out"


def series(rows: Sequence[Record], part: str, name: str) -> Series:
    """Returns ``record[part][name]`` of the records that have it; null becomes NaN."""
    found = [(row["round"], row[part][name]) for row in rows if name in row.get(part, {})]
    return [number for number, _ in found], [math.nan if value is None else value for _, value in found]


def score(accuracies: Series) -> Record:
    """Returns ``final``, ``best``, ``best_round`` and ``mean_last_10`` of accuracies, or {} without an evaluation.

    The mean is that of the last `LAST`, or of all where there are fewer; of equal rounds the first is best.
    """
    if not accuracies[1]:
        return {}
    (rounds, values), best = accuracies, max(accuracies[1])
    mean = fmean(values[-LAST:])
    return {"final": values[-1], "best": best, "best_round": rounds[values.index(best)], "mean_last_10": mean}


def finite(value: Any) -> Any:
    """Returns the value with NaN and infinities replaced by None, which JSON can hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def append(path: Path, record: Record) -> None:
    """Adds one line, and returns once it is on disk."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(finite(record), allow_nan=False) + "\n")
    flush(path)


def read(path: Path) -> list[Record]:
    """Returns all whole lines, without a torn last one; none where there is no file."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def cut(path: Path, num_records: int) -> None:
    """Keeps the first ``num_records`` lines, to the byte."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    write_atomically(path, b"".join(lines[:num_records]))


def read_json(path: Path) -> Record:
    """Returns the object in a JSON file."""
    value: Record = json.loads(path.read_text(encoding="utf-8"))
    return value


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Writes a JSON file as a whole or not at all."""
    write_atomically(path, (json.dumps(finite(value), indent=indent, allow_nan=False) + "\n").encode())


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file aside, flushes it to disk and renames it: a reader sees the old file or the new one."""
    aside = path.with_name(path.name + ".part")
    aside.write_bytes(content)
    flush(aside)
    os.replace(aside, path)
    flush(path.parent)  # a rename survives a power cut once its folder is on disk


def flush(path: Path) -> None:
    """Flushes a file or folder to disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
