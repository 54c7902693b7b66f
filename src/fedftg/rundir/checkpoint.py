"""Checkpoints: ``checkpoint.json`` names the server's state and the row of each client.

It is written last, aside and renamed, and nothing that it names is changed before the next one is: whenever the
process dies it names a whole state.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from fedftg import params as tree
from fedftg.algorithms.base import ServerState
from fedftg.errors import InputError
from fedftg.params import Params
from fedftg.rundir.clients import ClientStore
from fedftg.rundir.records import PUT_BACK, write_atomically
from fedftg.rundir.tensors import read_tensors, write_tensors

FORMAT = 3
Index = dict[str, Any]
PARTS = ("params", "buffers", "server", "refiner", "deployed")


def save(state: ServerState, clients: ClientStore) -> None:
    """Writes the state after ``state.round`` rounds; on return it is on disk."""
    commit(write(state, clients), clients)


def write(state: ServerState, clients: ClientStore) -> Index:
    """Writes a state to the folder of ``clients``; the last checkpoint stays the valid one until `commit`."""
    clients.folder.mkdir(parents=True, exist_ok=True)
    state_file = f"state-{state.round:06d}.safetensors"
    rows = clients.flush()
    tensors = tree.prefixed(clients.change_sum, "change_sum/")
    for part in PARTS:
        tensors |= tree.prefixed(getattr(state, part), part + "/")
    write_tensors(clients.folder / state_file, tensors)
    return {"format": FORMAT, "round": state.round, "state": state_file, **rows}


def commit(index: Index, clients: ClientStore) -> None:
    """Makes what `write` wrote the checkpoint to resume from, and removes older files."""
    write_atomically(clients.folder / "checkpoint.json", json.dumps(index).encode())
    clients.commit()
    sweep(clients.folder)


def sweep(folder: Path) -> None:
    """Removes states that the checkpoint does not name: older ones, and what a killed session left."""
    index = _read_index(folder) or {"state": None}
    for file in folder.glob("state-*"):
        if file.name != index["state"]:
            file.unlink()


def load(clients: ClientStore, device: torch.device | str = "cpu") -> ServerState | None:
    """Returns the last whole state and restores ``clients`` from their folder; None if there is none."""
    index = _read_index(clients.folder)
    if index is None:
        return None
    if index["format"] != FORMAT:
        raise InputError(f"{clients.folder} has format {index['format']}, not {FORMAT}; resume with its own version")
    tensors = read_tensors(clients.folder / index["state"])
    clients.restore(index, tree.unprefixed(tensors, "change_sum/"))
    return _state(index, tensors, device)


def load_state(folder: Path) -> ServerState | None:
    """Returns the server's state as `load` does, of older formats too; what clients keep is not read."""
    index = _read_index(folder)
    return None if index is None else _state(index, read_tensors(folder / index["state"]), "cpu")


def _state(index: Index, tensors: Params, device: torch.device | str) -> ServerState:
    parts = {part: tree.to_device(tree.unprefixed(tensors, part + "/"), device) for part in PARTS}
    return ServerState(round=int(index["round"]), **parts)


def _read_index(folder: Path) -> Index | None:
    path = folder / "checkpoint.json"
    try:
        index: Index = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"checkpoint file {path} cannot be read ({error}); {PUT_BACK}") from error
    return index
