"""Checkpoints: safetensors for values, one JSON file that names those of a consistent state.

New files are written beside the old ones; ``checkpoint.json`` is renamed into place last and only then are files that
it no longer names removed. So whenever the process dies, ``checkpoint.json`` names a whole state. Clients' files are
written only when they changed. There is no random state: seeds are derived from (run, round, client, purpose).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise

from fedftg import params as tree
from fedftg.algorithms.base import ServerState
from fedftg.engine.memory import ClientRecord, ClientStore
from fedftg.errors import InputError
from fedftg.params import Params
from fedftg.rundir.records import write_atomically, write_json

FORMAT = 1
_SERVER_PARTS = ("params", "buffers", "server", "refiner")


@dataclass(frozen=True)
class Checkpoint:
    """A state read back: the server's, and what goes into the client store."""

    state: ServerState
    clients: dict[int, ClientRecord]
    change_sum: Params


def save(folder: Path, state: ServerState, clients: ClientStore) -> None:
    """Writes the state after ``state.round`` rounds; on return it is on disk and older files are gone."""
    (folder / "clients").mkdir(parents=True, exist_ok=True)
    index = _read_index(folder) if (folder / "checkpoint.json").exists() else {"clients": {}}
    state_file = f"state-{state.round:06d}.safetensors"
    tensors: Params = tree.prefixed(clients.change_sum, "change_sum/")
    for part in _SERVER_PARTS:
        tensors |= tree.prefixed(getattr(state, part), part + "/")
    write_tensors(folder / state_file, tensors)
    client_files: dict[str, str] = dict(index["clients"])
    for client in sorted(clients.changed):
        record = clients.records[client]
        name = f"clients/{client:06d}-{state.round:06d}.safetensors"
        write_tensors(
            folder / name, {**tree.prefixed(record.memory, "memory/"), **tree.prefixed(record.upload, "upload/")}
        )
        client_files[str(client)] = name
    new_index = {"format": FORMAT, "round": state.round, "state": state_file, "clients": client_files}
    write_json(folder / "checkpoint.json", new_index)
    clients.changed.clear()
    _remove_unnamed(folder, {state_file, *client_files.values()})


def load(folder: Path) -> Checkpoint | None:
    """The last whole state, in host memory, or None where none was written yet.

    Raises:
        InputError: a file is missing, torn or of another format.
    """
    if not (folder / "checkpoint.json").exists():
        return None
    index = _read_index(folder)
    tensors = read_tensors(folder / index["state"])
    parts = {part: tree.unprefixed(tensors, part + "/") for part in _SERVER_PARTS}
    clients = {}
    for client, name in index["clients"].items():
        kept = read_tensors(folder / name)
        clients[int(client)] = ClientRecord(tree.unprefixed(kept, "memory/"), tree.unprefixed(kept, "upload/"))
    state = ServerState(round=int(index["round"]), **parts)
    return Checkpoint(state, clients, tree.unprefixed(tensors, "change_sum/"))


def write_tensors(path: Path, tensors: Params, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file with the order of names kept in its metadata; written aside, on disk, renamed."""
    # Copies, because safetensors refuses tensors that share memory.
    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_atomically(path, serialise(whole, metadata={"order": json.dumps(list(tensors)), **(metadata or {})}))


def read_tensors(path: Path) -> Params:
    """The tensors of `write_tensors`, in the order in which they were written.

    Sums over all tensors of a model depend on their order in the last bit, and safetensors sorts names by itself.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            order = json.loads((file.metadata() or {}).get("order", "null")) or list(file.keys())
            return {name: file.get_tensor(name) for name in order}
    except (OSError, SafetensorError, ValueError) as error:
        raise InputError(
            f"checkpoint file {path} cannot be read ({error}); start the run anew without --resume"
        ) from error


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / "checkpoint.json"
    try:
        index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"checkpoint file {path} cannot be read ({error}); start the run anew without --resume"
        ) from error
    if index.get("format") != FORMAT:
        raise InputError(
            f"{path} has format {index.get('format')}, this version reads {FORMAT}; "
            "resume with the version that wrote it"
        )
    return index


def _remove_unnamed(folder: Path, named: set[str]) -> None:
    for path in _files(folder):
        if path.relative_to(folder).as_posix() not in named:
            path.unlink()


def _files(folder: Path) -> Iterator[Path]:
    for pattern in ("state-*", "clients/*"):
        yield from folder.glob(pattern)
