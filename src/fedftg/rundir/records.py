"""JSON and JSON Lines files: one object a round, written so that a crash can tear at most the last line."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]

PHASES = ("local", "aggregate", "refine", "evaluate", "checkpoint")
"""What a record's ``seconds`` are split into; checkpoint: writing the state, and clients' records beyond the bound."""


PUT_BACK = "put the file back, or start a new run with another --out"
"""What to do where a run's file is gone or damaged."""


def finite(value: Any) -> Any:
    """The same value with NaN and infinities replaced by None, which JSON can hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def append(path: Path, record: Record) -> None:
    """Adds one line and has it written to disk."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(finite(record), allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[Record]:
    """All whole lines; a torn last line is left out."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def cut(path: Path, num_records: int) -> None:
    """Keeps the first ``num_records`` lines, to the byte."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    write_atomically(path, b"".join(lines[:num_records]))


def read_json(path: Path) -> Record:
    """The object in a JSON file."""
    value: Record = json.loads(path.read_text(encoding="utf-8"))
    return value


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file as a whole or not at all."""
    write_atomically(path, (json.dumps(finite(value), indent=2, allow_nan=False) + "\n").encode())


def write_atomically(path: Path, content: bytes) -> None:
    """Writes aside, has it written to disk, renames: a reader sees the old file or the new one, never a part."""
    write_chunks(path, (content,))


def write_chunks(path: Path, chunks: Iterable[bytes | memoryview], *, sync: bool = True) -> None:
    """As `write_atomically`, of content that comes in pieces; without ``sync`` a power cut may still take it away."""
    aside = path.with_name(path.name + ".part")
    with aside.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        if sync:
            os.fsync(file.fileno())
    os.replace(aside, path)
    if sync:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Has a folder's list of names written to disk, so that a rename survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
