"""Checkpoints: ``checkpoint.json`` names the state's file and the row of each client (`fedftg.rundir.clients`).

It is written last, aside and renamed, and nothing that it names is changed before the next one is. So whenever the
process dies it names a whole state. There is no random state: seeds are derived from (run, round, client, purpose).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedftg import params as tree
from fedftg.algorithms.base import ServerState
from fedftg.errors import InputError
from fedftg.params import Params
from fedftg.rundir.clients import ClientStore
from fedftg.rundir.records import PUT_BACK, write_atomically
from fedftg.rundir.tensors import read_tensors, write_tensors

__all__ = ["Checkpoint", "Index", "commit", "load", "load_state", "save", "sweep", "write", "write_tensors"]

FORMAT = 3
_SERVER_PARTS = ("params", "buffers", "server", "refiner")

Index = dict[str, Any]
"""The content of ``checkpoint.json``."""


@dataclass(frozen=True)
class Checkpoint:
    """A state read back."""

    state: ServerState
    clients: Index
    """With ``change_sum``, the arguments of `ClientStore.restore`."""
    change_sum: Params


def save(state: ServerState, clients: ClientStore) -> None:
    """Writes the state after ``state.round`` rounds; on return it is on disk."""
    commit(write(state, clients), clients)


def write(state: ServerState, clients: ClientStore) -> Index:
    """Writes a state to the folder of ``clients``; the last checkpoint stays the valid one until `commit`."""
    folder = clients.folder
    folder.mkdir(parents=True, exist_ok=True)
    saved = clients.flush()
    state_file = f"state-{state.round:06d}.safetensors"
    tensors: Params = tree.prefixed(clients.change_sum, "change_sum/")
    for part in _SERVER_PARTS:
        tensors |= tree.prefixed(getattr(state, part), part + "/")
    write_tensors(folder / state_file, tensors)
    return {"format": FORMAT, "round": state.round, "state": state_file, **saved}


def commit(index: Index, clients: ClientStore) -> None:
    """Makes what `write` wrote the checkpoint to resume from, and removes older files."""
    write_atomically(clients.folder / "checkpoint.json", json.dumps(index).encode())
    clients.commit()
    sweep(clients.folder)


def sweep(folder: Path) -> None:
    """Removes files of states and clients that the checkpoint does not name: what a killed session left."""
    path = folder / "checkpoint.json"
    index = _read_index(path) if path.exists() else {"state": None, "layouts": []}
    named = {index["state"], *(f"clients-{number}.bin" for number in range(len(index["layouts"])))}
    for pattern in ("state-*", "clients-*"):
        for file in folder.glob(pattern):
            if file.name not in named:
                file.unlink()


def load(folder: Path) -> Checkpoint | None:
    """Returns the last whole state, on the CPU, or None where none was written yet.

    Raises:
        InputError: a file is missing, torn or of another format.
    """
    path = folder / "checkpoint.json"
    if not path.exists():
        return None
    index = _read_index(path)
    if index["format"] != FORMAT:
        raise InputError(
            f"{path} has format {index['format']}, this version resumes format {FORMAT}; "
            "resume with the version that wrote it"
        )
    state, change_sum = _read_state(folder, index)
    return Checkpoint(state, index, change_sum)


def load_state(folder: Path) -> ServerState | None:
    """Returns the server's state as `load` does, of older formats too; files of clients are not read."""
    path = folder / "checkpoint.json"
    return _read_state(folder, _read_index(path))[0] if path.exists() else None


def _read_state(folder: Path, index: Index) -> tuple[ServerState, Params]:
    """Returns the server's state, and the sum of clients' changes."""
    tensors = read_tensors(folder / index["state"])
    parts = {part: tree.unprefixed(tensors, part + "/") for part in _SERVER_PARTS}
    return ServerState(round=int(index["round"]), **parts), tree.unprefixed(tensors, "change_sum/")


def _read_index(path: Path) -> Index:
    try:
        index: Index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"checkpoint file {path} cannot be read ({error}); {PUT_BACK}") from error
    return index
