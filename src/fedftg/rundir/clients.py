"""What clients keep between rounds: rows of fixed size in one file, written and read in place.

A new row goes to a slot that neither the last checkpoint nor the current state uses, so a round that is undone and a
process that is killed leave the rows of before.
"""

from __future__ import annotations

import copy
import itertools
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fedftg import params as tree
from fedftg.algorithms.base import ClientResult, Memory
from fedftg.errors import InputError
from fedftg.params import Params
from fedftg.rundir.records import PUT_BACK, flush

FILE = "clients.bin"


class ClientStore:
    """Memories of the clients that took part, and the running average of all clients' last uploads.

    A client that never took part takes no space: its memory is made on demand, and the average counts it with the
    initial model. The average is kept as a float64 sum of weighted changes, so a round costs only its cohort.

    Args:
        init_memory: returns the memory of a client that never took part.
        num_samples: of every client; the weights of the average.
        track_uploads: False saves one model per client, and gives up the ``all`` accuracy.
    """

    def __init__(
        self, init_memory: Callable[[], Memory], initial: Params, num_samples: Sequence[int], track_uploads: bool
    ) -> None:
        self._init_memory = init_memory
        self._initial = tree.to_device(initial, "cpu")
        total = sum(num_samples)
        self._weights = [count / total for count in num_samples]
        self._rows = _Rows()
        self._slots: dict[int, int] = {}  # by client
        self.tracks_uploads = track_uploads
        self.change_sum: Params = {}  # sum_k weight_k (upload_k - initial)
        if track_uploads:
            self.change_sum = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in self._initial.items()}

    @property
    def folder(self) -> Path:
        """Returns where the rows are; a temporary folder until `keep_in`."""
        return self._rows.folder

    def keep_in(self, folder: Path) -> None:
        """Sets the folder of the rows; before the first row is written."""
        self._rows.folder = folder

    def memory(self, client: int) -> Memory:
        """Returns a client's memory, on the CPU."""
        return self._rows.read(self._slots[client], "memory/") if client in self._slots else self._init_memory()

    def __contains__(self, client: int) -> bool:
        """Returns whether a client took part."""
        return client in self._slots

    def upload(self, client: int) -> Params:
        """Returns a client's last upload, parameters and buffers together; the initial model before its first."""
        return self._rows.read(self._slots[client], "upload/") if client in self._slots else self._initial

    def updated(self, results: Sequence[ClientResult]) -> ClientStore:
        """Returns a store after a round; this one stays valid until the new one is updated, which may reuse slots."""
        store = copy.copy(self)
        store._slots = dict(self._slots)
        used = self._rows.committed.union(self._slots.values())
        free = (slot for slot in itertools.count() if slot not in used)
        changes: list[tuple[float, Params, Params]] = []
        for result in sorted(results, key=lambda result: result.client):
            client = result.client
            upload: Params = {}
            if self.tracks_uploads:
                upload = tree.to_device({**result.params, **result.buffers}, "cpu")
                changes.append((self._weights[client], upload, self.upload(client)))
            row = tree.prefixed(upload, "upload/") | tree.prefixed(result.memory, "memory/")
            if row:
                store._slots[client] = next(free)
                self._rows.write(store._slots[client], row)
        if changes:
            store.change_sum = tree.add_changes(self.change_sum, changes)
        return store

    def average(self) -> Params:
        """Returns the average of every client's last upload, parameters and buffers together, weighted by size."""
        mean: Params = {}
        for name, start in self._initial.items():
            value = start.to(torch.float64) + self.change_sum[name]
            mean[name] = value.to(start.dtype) if start.is_floating_point() else value.round().to(start.dtype)
        return mean

    def flush(self) -> dict[str, Any]:
        """Flushes all rows to disk (fsync) and returns what `restore` needs to find them, as JSON values."""
        if self._slots:
            flush(self.folder / FILE)
        return {"layout": self._rows.layout, "clients": {str(k): self._slots[k] for k in sorted(self._slots)}}

    def commit(self) -> None:
        """Protects this store's rows: call it once a checkpoint names them."""
        self._rows.committed = set(self._slots.values())

    def restore(self, saved: dict[str, Any], change_sum: Params) -> None:
        """Takes over the rows that a checkpoint names; given are what `flush` returned and that store's sum."""
        self._rows.layout = saved["layout"]
        self._slots = {int(client): slot for client, slot in saved["clients"].items()}
        self.change_sum = change_sum
        self.commit()
        path, size = self.folder / FILE, (max(self._slots.values(), default=-1) + 1) * self._rows.size
        if size and (not path.exists() or path.stat().st_size < size):
            raise InputError(f"checkpoint file {path} is missing or cut off; {PUT_BACK}")


class _Rows:
    """The file of the rows, shared by the stores of a run."""

    def __init__(self) -> None:
        self.layout: list[list[Any]] = []  # the tensors of a row as [name, type, shape, bytes]
        self.committed: set[int] = set()  # slots that the last checkpoint names

    @cached_property
    def folder(self) -> Path:
        """Returns a temporary folder, removed with the last store, unless another is set."""
        folder = Path(tempfile.mkdtemp(prefix="fedftg-clients-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return folder

    @property
    def size(self) -> int:
        """Returns the bytes of a row."""
        return sum(nbytes for *_, nbytes in self.layout)

    def write(self, slot: int, row: Params) -> None:
        layout = [
            [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), tensor.nbytes]
            for name, tensor in row.items()
        ]
        if not self.layout:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / FILE).write_bytes(b"")
            self.layout = layout
        if layout != self.layout:
            raise InputError("a local rule must keep tensors of the same names, types and shapes for every client")
        with (self.folder / FILE).open("r+b") as file:
            file.seek(slot * self.size)
            for tensor in row.values():
                file.write(_bytes(tensor.detach().cpu()))

    def read(self, slot: int, part: str) -> Params:
        found: Params = {}
        with (self.folder / FILE).open("rb") as file:
            file.seek(slot * self.size)
            for name, kind, shape, nbytes in self.layout:
                if name.startswith(part):
                    found[name.removeprefix(part)] = tensor = torch.empty(shape, dtype=getattr(torch, kind))
                    file.readinto(_bytes(tensor))
                else:
                    file.seek(nbytes, os.SEEK_CUR)
        return found


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data
