"""What clients keep between rounds, and what they uploaded last."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fedftg import params as tree
from fedftg.algorithms.base import ClientResult, Memory
from fedftg.params import Params


@dataclass(frozen=True)
class ClientRecord:
    """One client's memory and last upload; the upload is empty where ``all`` is not tracked."""

    memory: Memory
    upload: Params


class ClientStore:
    """Memories of the clients that took part, and the running average of all clients' last uploads.

    A client that never took part costs nothing: its memory is made when asked for, and it counts in the average with
    the initial model. The average is kept as a float64 sum of weighted changes: a round costs only its active clients.

    All is kept in host memory, and nothing is changed in place.

    Args:
        init_memory: what a client that never took part remembers.
        initial: the initial global parameters and buffers together.
        num_samples: of every client; the weights of the average.
        track_uploads: False saves the memory of one model per client, and gives up the ``all`` accuracy.
    """

    def __init__(
        self, init_memory: Callable[[], Memory], initial: Params, num_samples: Sequence[int], track_uploads: bool
    ) -> None:
        self._init_memory = init_memory
        self._initial = tree.to_device(initial, "cpu")
        self._weights = [count / sum(num_samples) for count in num_samples]
        self.tracks_uploads = track_uploads
        self.records: dict[int, ClientRecord] = {}
        self.changed: set[int] = set()
        """Clients whose record changed since the last checkpoint."""
        self.change_sum: Params = (
            {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in self._initial.items()}
            if track_uploads
            else {}
        )
        """``sum_k weight_k (upload_k - initial)``."""

    def memory(self, client: int) -> Memory:
        """What a client remembers."""
        record = self.records.get(client)
        return self._init_memory() if record is None else record.memory

    def updated(self, results: Sequence[ClientResult]) -> ClientStore:
        """A store with the memories and uploads of a finished round; this one stays as it is."""
        store = copy.copy(self)
        store.records, store.changed = dict(self.records), set(self.changed)
        for result in sorted(results, key=lambda result: result.client):
            upload: Params = {}
            if self.tracks_uploads:
                upload = tree.to_device({**result.params, **result.buffers}, "cpu")
                store._add_change(result.client, upload)
            if result.memory or upload:
                store.records[result.client] = ClientRecord(tree.to_device(result.memory, "cpu"), upload)
                store.changed.add(result.client)
        return store

    def average(self) -> Params:
        """The average of every client's last upload, parameters and buffers together, weighted by size."""
        mean: Params = {}
        for name, start in self._initial.items():
            value = start.to(torch.float64) + self.change_sum[name]
            mean[name] = value.to(start.dtype) if start.is_floating_point() else value.round().to(start.dtype)
        return mean

    def _add_change(self, client: int, upload: Params) -> None:
        record = self.records.get(client)
        before = self._initial if record is None else record.upload
        weight = self._weights[client]
        self.change_sum = {
            name: total + weight * (upload[name].to(torch.float64) - before[name].to(torch.float64))
            for name, total in self.change_sum.items()
        }


def rejection(result: ClientResult) -> str | None:
    """Why an update must not be averaged, or None: the first tensor that is not finite."""
    parts = {"parameter": result.params, "buffer": result.buffers, "upload": result.extra, "memory": result.memory}
    for kind, tensors in parts.items():
        name = tree.first_non_finite(tensors)
        if name is not None:
            return f"non-finite {kind} {name}"
    return None
