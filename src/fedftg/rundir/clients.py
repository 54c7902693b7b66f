"""What clients keep between rounds: a row of fixed size per client, in files that are read and written in place.

A new row goes to a slot that neither the last checkpoint nor the current state uses. So a round that is undone and a
process that is killed leave the rows of before whole. The page cache of the system decides what stays in memory.
"""

from __future__ import annotations

import copy
import itertools
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedftg import params as tree
from fedftg.algorithms.base import ClientResult, Memory
from fedftg.errors import InputError
from fedftg.params import Params
from fedftg.rundir.records import PUT_BACK

_ALIGNMENT = 64

Layout = dict[str, Any]
"""A row's tensors, ``memory`` and ``upload`` as ``[name, type, shape, start, stop]``, and its ``size`` in bytes."""


class ClientStore:
    """Memories of the clients that took part, and the running average of all clients' last uploads.

    A client that never took part takes no space: its memory is made on demand, and the average counts it with the
    initial model. The average is kept as a float64 sum of weighted changes, so a round costs only its cohort.

    Args:
        init_memory: returns the memory of a client that never took part.
        initial: the initial global parameters and buffers together.
        num_samples: of every client; the weights of the average.
        track_uploads: False saves one model per client, and gives up the ``all`` accuracy.
        folder: where the rows lie; None: a temporary folder until `keep_in`.
    """

    def __init__(
        self,
        init_memory: Callable[[], Memory],
        initial: Params,
        num_samples: Sequence[int],
        track_uploads: bool,
        folder: Path | None = None,
    ) -> None:
        self._init_memory = init_memory
        self._initial = tree.to_device(initial, "cpu")
        self._weights = _shares(num_samples)
        self._rows = _Rows(folder)
        self._places: dict[int, tuple[int, int]] = {}
        """The layout and the slot of each client's row."""
        self.tracks_uploads = track_uploads
        self.change_sum: Params = (
            {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in self._initial.items()}
            if track_uploads
            else {}
        )
        """``sum_k weight_k (upload_k - initial)``."""

    @property
    def folder(self) -> Path:
        """Where the rows lie."""
        return self._rows.folder

    def keep_in(self, folder: Path) -> None:
        """Sets the folder of the rows; before the first row is written."""
        self._rows = _Rows(folder)

    def memory(self, client: int) -> Memory:
        """Returns a client's memory, on the CPU."""
        return self._rows.read(self._places[client], "memory") if client in self._places else self._init_memory()

    def upload(self, client: int) -> Params:
        """Returns a client's last upload, parameters and buffers together; the initial model before its first."""
        return self._rows.read(self._places[client], "upload") if client in self._places else self._initial

    def updated(self, results: Sequence[ClientResult]) -> ClientStore:
        """Returns a store with the memories and uploads of a finished round.

        This store stays valid until `updated` is called on the new one, which may reuse slots.
        """
        store = copy.copy(self)
        store._places = dict(self._places)
        used = self._rows.committed.union(slot for _, slot in self._places.values())
        free = (slot for slot in itertools.count() if slot not in used)
        changes: list[tuple[float, Params, Params]] = []
        for result in sorted(results, key=lambda result: result.client):
            upload: Params = {}
            if self.tracks_uploads:
                upload = _on_cpu({**result.params, **result.buffers})
                changes.append((self._weights[result.client], upload, self.upload(result.client)))
            if result.memory or upload:
                slot = next(free)
                store._places[result.client] = self._rows.write(slot, _on_cpu(result.memory), upload), slot
        if changes:
            store.change_sum = tree.add_changes(self.change_sum, changes)
        return store

    def reweighed(self, num_samples: Sequence[int]) -> ClientStore:
        """Returns a store for other client sizes; reads the upload of every client that took part."""
        store = copy.copy(self)
        store._weights = _shares(num_samples)
        store.change_sum = {name: torch.zeros_like(tensor) for name, tensor in self.change_sum.items()}
        for client in sorted(self._places) if self.tracks_uploads else ():
            change = (store._weights[client], self.upload(client), self._initial)
            store.change_sum = tree.add_changes(store.change_sum, [change])
        return store

    def average(self) -> Params:
        """Returns the average of every client's last upload, parameters and buffers together, weighted by size."""
        mean: Params = {}
        for name, start in self._initial.items():
            value = start.to(torch.float64) + self.change_sum[name]
            mean[name] = value.to(start.dtype) if start.is_floating_point() else value.round().to(start.dtype)
        return mean

    def flush(self) -> dict[str, Any]:
        """Writes all rows to disk (fsync) and returns what `restore` needs to find them, as JSON values."""
        self._rows.sync()
        return {"layouts": list(self._rows.layouts), "clients": {str(k): self._places[k] for k in sorted(self._places)}}

    def commit(self) -> None:
        """Protects this store's rows: call it once a checkpoint names them."""
        self._rows.committed = {slot for _, slot in self._places.values()}

    def restore(self, saved: dict[str, Any], change_sum: Params) -> None:
        """Takes over the rows that a checkpoint names; none is read before its client is active.

        Args:
            saved: what `flush` returned, in a run of the same folder.
            change_sum: of the store that was flushed.

        Raises:
            InputError: a file is missing or too short.
        """
        self._rows.layouts = list(saved["layouts"])
        self._places = {int(client): (layout, slot) for client, (layout, slot) in saved["clients"].items()}
        self.change_sum = change_sum
        self._rows.check(self._places.values())
        self.commit()


class _Rows:
    """Files ``clients-<n>.bin``, one per layout; a run has one, unless its rule keeps other tensors for some clients.

    A slot's number is unique over all files.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self.layouts: list[Layout] = []
        self.committed: set[int] = set()
        """Slots that the last checkpoint names."""

    @property
    def folder(self) -> Path:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="fedftg-clients-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        return self._folder

    def write(self, slot: int, memory: Memory, upload: Params) -> int:
        """Writes a row and returns the number of its layout."""
        layout = _layout(memory, upload)
        if layout not in self.layouts:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file(len(self.layouts)).write_bytes(b"")
            self.layouts.append(layout)
        number = self.layouts.index(layout)
        row = torch.zeros(layout["size"], dtype=torch.uint8)
        for part, values in (("upload", upload), ("memory", memory)):
            for name, view in _views(row, layout[part], 0).items():
                view.copy_(values[name])
        with self._file(number).open("r+b") as file:
            file.seek(slot * layout["size"])
            file.write(row.numpy().data)
        return number

    def read(self, place: tuple[int, int], part: str) -> Params:
        """Reads the memory or the upload of a row."""
        number, slot = place
        entries, size = self.layouts[number][part], self.layouts[number]["size"]
        if not entries:
            return {}
        start, stop = entries[0][3], entries[-1][4]
        content = np.fromfile(self._file(number), np.uint8, count=stop - start, offset=slot * size + start)
        return _views(torch.from_numpy(content), entries, start)

    def sync(self) -> None:
        """Flushes all rows to disk."""
        for number in range(len(self.layouts)):
            with self._file(number).open("rb") as file:
                os.fsync(file.fileno())

    def check(self, places: Collection[tuple[int, int]]) -> None:
        """Raises InputError unless the files hold all of these rows."""
        for number, layout in enumerate(self.layouts):
            path = self._file(number)
            needed = max((slot + 1 for other, slot in places if other == number), default=0) * layout["size"]
            if not path.exists() or path.stat().st_size < needed:
                raise InputError(f"checkpoint file {path} is missing or cut off; {PUT_BACK}")

    def _file(self, number: int) -> Path:
        return self.folder / f"clients-{number}.bin"


def _layout(memory: Memory, upload: Params) -> Layout:
    """Returns where each tensor lies in a row; memory that repeats the upload bit for bit (MOON's) takes no space."""
    pairs = list(zip(memory.values(), upload.values(), strict=False))
    shared = len(memory) == len(upload) and all(_same_bits(*pair) for pair in pairs)
    entries: list[list[Any]] = []
    size = 0
    for name, tensor in [*upload.items(), *(() if shared else memory.items())]:
        entries.append([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), size, size + tensor.nbytes])
        size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    uploaded, kept = entries[: len(upload)], entries[len(upload) :]
    if shared:
        kept = [[name, *entry[1:]] for name, entry in zip(memory, uploaded, strict=True)]
    return {"memory": kept, "upload": uploaded, "size": size}


def _views(content: Tensor, entries: Sequence[list[Any]], start: int) -> Params:
    """Returns tensors as views of the bytes of a row from ``start`` on."""
    return {
        name: content[first - start : stop - start].view(getattr(torch, kind)).view(shape)
        for name, kind, shape, first, stop in entries
    }


def _shares(num_samples: Sequence[int]) -> list[float]:
    total = sum(num_samples)
    return [count / total for count in num_samples]


def _on_cpu(params: Params) -> Params:
    return {name: tensor.detach().to("cpu") for name, tensor in params.items()}


def _same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors hold the same bytes (0 and -0 do not); most that do not differ in the first few."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    one, other = (tensor.reshape(-1).view(torch.uint8) for tensor in (left, right))
    return torch.equal(one[:64], other[:64]) and torch.equal(one, other)
