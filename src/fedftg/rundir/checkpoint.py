"""Checkpoints: safetensors for values, one JSON file that names those of a consistent state.

New files are written beside the old ones; ``checkpoint.json`` is renamed into place last and only then are files that
it no longer names removed. So whenever the process dies, ``checkpoint.json`` names a whole state. Clients' records are
written only when they changed, many to a file (`fedftg.rundir.packs`). There is no random state: seeds are derived
from (run, round, client, purpose).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedftg import params as tree
from fedftg.algorithms.base import ServerState
from fedftg.engine.memory import ClientStore
from fedftg.errors import InputError
from fedftg.params import Params
from fedftg.rundir.records import PUT_BACK, write_json
from fedftg.rundir.tensors import opened, read_tensors, write_tensors

__all__ = [
    "Checkpoint", "Index", "commit", "load", "load_state", "read_tensors", "save", "sweep", "write", "write_tensors",
]  # fmt: skip

FORMAT = 2
_READABLE = (1, 2)
"""Format 1 had one file per client and no other difference."""
_SERVER_PARTS = ("params", "buffers", "server", "refiner")

Index = dict[str, Any]
"""The content of ``checkpoint.json``."""


@dataclass(frozen=True)
class Checkpoint:
    """A state read back: the server's, and what goes into the client store."""

    state: ServerState
    places: dict[int, str]
    """The file that each client's record is in; none is read yet."""
    change_sum: Params


def save(folder: Path, state: ServerState, clients: ClientStore) -> None:
    """Writes the state after ``state.round`` rounds; on return it is on disk and older files are gone."""
    commit(folder, write(folder, state, clients))


def write(folder: Path, state: ServerState, clients: ClientStore) -> Index:
    """Writes a state's files; the last checkpoint stays the valid one until `commit`."""
    folder.mkdir(parents=True, exist_ok=True)
    places = clients.flush(folder)
    state_file = f"state-{state.round:06d}.safetensors"
    tensors: Params = tree.prefixed(clients.change_sum, "change_sum/")
    for part in _SERVER_PARTS:
        tensors |= tree.prefixed(getattr(state, part), part + "/")
    write_tensors(folder / state_file, tensors)
    files: dict[str, list[int]] = {}
    for client in sorted(places):
        files.setdefault(places[client], []).append(client)
    return {"format": FORMAT, "round": state.round, "state": state_file, "clients": files}


def commit(folder: Path, index: Index) -> None:
    """Makes what `write` wrote the checkpoint to resume from, and removes older files."""
    write_json(folder / "checkpoint.json", index)
    _remove_unnamed(folder, {index["state"], *index["clients"]})


def sweep(folder: Path) -> None:
    """Removes what a session that died left behind; only for the one session that goes on with the run."""
    named: set[str] = set()
    if (folder / "checkpoint.json").exists():
        index = _read_index(folder)
        named = {index["state"], *index["clients"]}
    _remove_unnamed(folder, named)


def load(folder: Path) -> Checkpoint | None:
    """The last whole state, in host memory but for the clients' records, or None where none was written yet.

    Raises:
        InputError: a file is missing, torn or of another format.
    """
    if not (folder / "checkpoint.json").exists():
        return None
    index = _read_index(folder)
    places: dict[int, str] = {}
    for name, clients in index["clients"].items():
        with opened(folder / name):  # tells a torn file now, and not in the round that needs it
            places |= dict.fromkeys(clients, name)
    state, change_sum = _read_state(folder, index)
    return Checkpoint(state, places, change_sum)


def load_state(folder: Path) -> ServerState | None:
    """As `load`, of the server alone: no file of clients is looked at.

    Raises:
        InputError: the state's file or the index is missing, torn or of another format.
    """
    return _read_state(folder, _read_index(folder))[0] if (folder / "checkpoint.json").exists() else None


def _read_state(folder: Path, index: Index) -> tuple[ServerState, Params]:
    """The server's state, and the sum of clients' changes."""
    tensors = read_tensors(folder / index["state"])
    parts = {part: tree.unprefixed(tensors, part + "/") for part in _SERVER_PARTS}
    return ServerState(round=int(index["round"]), **parts), tree.unprefixed(tensors, "change_sum/")


def _read_index(folder: Path) -> Index:
    path = folder / "checkpoint.json"
    try:
        index: Index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"checkpoint file {path} cannot be read ({error}); {PUT_BACK}") from error
    if index.get("format") not in _READABLE:
        raise InputError(
            f"{path} has format {index.get('format')}, this version reads {' and '.join(map(str, _READABLE))}; "
            "resume with the version that wrote it"
        )
    if index["format"] == 1:
        index["clients"] = {name: [int(client)] for client, name in index["clients"].items()}
    return index


def _remove_unnamed(folder: Path, named: set[str]) -> None:
    for path in _files(folder):
        if path.relative_to(folder).as_posix() not in named:
            path.unlink()


def _files(folder: Path) -> Iterator[Path]:
    for pattern in ("state-*", "clients-*", "clients/*"):
        yield from folder.glob(pattern)
