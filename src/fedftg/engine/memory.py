"""What clients keep between rounds, and what they uploaded last."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fedftg import params as tree
from fedftg.algorithms.base import ClientResult, Memory
from fedftg.params import Params
from fedftg.rundir.packs import ClientRecord, Packs, capacity


class ClientStore:
    """Memories of the clients that took part, and the running average of all clients' last uploads.

    A client that never took part costs nothing: its memory is made when asked for, and it counts in the average with
    the initial model. The average is kept as a float64 sum of weighted changes: a round costs only its active clients.

    Records stay in host memory up to a bound. What goes beyond it, the clients that have been idle longest first, is
    read from files when a client is active again; results do not depend on it. No value is changed in place.

    Args:
        init_memory: what a client that never took part remembers.
        initial: the initial global parameters and buffers together.
        num_samples: of every client; the weights of the average.
        track_uploads: False saves one model per client, and gives up the ``all`` accuracy.
        bound: bytes of records that stay in host memory between rounds; 0 keeps none there. During a round its
            cohort comes on top.
        packs: where records go beyond the bound; without it all stay in memory.
    """

    def __init__(
        self,
        init_memory: Callable[[], Memory],
        initial: Params,
        num_samples: Sequence[int],
        track_uploads: bool,
        *,
        bound: float = math.inf,
        packs: Packs | None = None,
    ) -> None:
        self._init_memory = init_memory
        self._initial = tree.to_device(initial, "cpu")
        total = sum(num_samples)
        self._weights = [count / total for count in num_samples]
        self._bound = bound
        self.packs = packs
        self.tracks_uploads = track_uploads
        self._held: dict[int, ClientRecord] = {}
        """Records in memory, those of the clients that have been idle longest first."""
        self._places: dict[int, str] = {}
        """The file of each record that is on disk; it may be in memory as well."""
        self.change_sum: Params = (
            {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in self._initial.items()}
            if track_uploads
            else {}
        )
        """``sum_k weight_k (upload_k - initial)``."""

    @property
    def held(self) -> list[int]:
        """Clients whose record is in memory, those that have been idle longest first."""
        return list(self._held)

    @property
    def changed(self) -> set[int]:
        """Clients whose record is not on disk yet."""
        return self._held.keys() - self._places.keys()

    def memory(self, client: int) -> Memory:
        """What a client remembers."""
        record = self._record(client)
        return self._init_memory() if record is None else record.memory

    def updated(self, results: Sequence[ClientResult]) -> ClientStore:
        """A store with the memories and uploads of a finished round; this one stays as it is."""
        store = copy.copy(self)
        store._held, store._places = dict(self._held), dict(self._places)
        changes: list[tuple[float, Params, Params]] = []
        for result in sorted(results, key=lambda result: result.client):
            upload: Params = {}
            if self.tracks_uploads:
                upload = {name: _own(tensor) for name, tensor in {**result.params, **result.buffers}.items()}
                before = self._record(result.client)
                changes.append(
                    (self._weights[result.client], upload, self._initial if before is None else before.upload)
                )
            if result.memory or upload:
                store._held.pop(result.client, None)
                store._places.pop(result.client, None)
                store._held[result.client] = ClientRecord(_memory_of(result, upload), upload)
        if changes:
            store.change_sum = tree.add_changes(self.change_sum, changes)
        return store

    def reweighed(self, num_samples: Sequence[int]) -> ClientStore:
        """A store for clients of other sizes than was thought; this one stays as it is.

        The sum behind `average` is made anew from the records, which reads those of every client that took part.
        """
        store = copy.copy(self)
        store._held, store._places = dict(self._held), dict(self._places)
        total = sum(num_samples)
        store._weights = [count / total for count in num_samples]
        store.change_sum = {name: torch.zeros_like(tensor) for name, tensor in self.change_sum.items()}
        for client in sorted({*self._held, *self._places}) if self.tracks_uploads else ():
            record = self._record(client)
            if record is not None:
                change = (store._weights[client], record.upload, self._initial)
                store.change_sum = tree.add_changes(store.change_sum, [change])
        return store

    def average(self) -> Params:
        """The average of every client's last upload, parameters and buffers together, weighted by size."""
        mean: Params = {}
        for name, start in self._initial.items():
            value = start.to(torch.float64) + self.change_sum[name]
            mean[name] = value.to(start.dtype) if start.is_floating_point() else value.round().to(start.dtype)
        return mean

    def settle(self, before: ClientStore) -> None:
        """Keeps to the bound; no value changes.

        Files go that neither this store nor ``before`` needs, the one that it follows and that stays valid: older
        stores lose theirs.
        """
        if self.packs is None:
            return
        size = sum(record.nbytes for record in self._held.values())
        idle = []
        for client, record in self._held.items():
            if size <= self._bound:
                break
            idle.append(client)
            size -= record.nbytes
        self._write(self.packs, [client for client in idle if client not in self._places])
        for client in idle:
            del self._held[client]
        self.packs.drop_unused({*self._places.values(), *before._places.values()})

    def flush(self, folder: Path) -> Mapping[int, str]:
        """Has every record on disk, and returns the file of each; ``folder`` is for a store without files so far."""
        if self.packs is None:
            self.packs = Packs(folder)
        self._write(self.packs, list(self.changed))
        self.packs.sync(set(self._places.values()))
        return self._places

    def restore(self, places: Mapping[int, str], change_sum: Params) -> None:
        """Takes over the records that a checkpoint has on disk; none is read before its client is active."""
        self._held, self._places, self.change_sum = {}, dict(places), change_sum

    def _record(self, client: int) -> ClientRecord | None:
        if client in self._held:
            return self._held[client]
        if client in self._places:
            assert self.packs is not None
            return self.packs.read(self._places[client], client)
        return None

    def _write(self, packs: Packs, clients: list[int]) -> None:
        """Writes records, and with them what is still of use in files that are for the greater part out of date.

        So files hold at most twice what is of use, and a record is moved once on average in the long run.
        """
        if not clients:
            return
        used = Counter(self._places.values())
        sparse = {name for name, count in used.items() if 2 * count < capacity(name)}
        moved = [client for client, name in self._places.items() if name in sparse]

        def records() -> list[tuple[int, ClientRecord]]:
            found = ((client, self._record(client)) for client in sorted([*clients, *moved]))
            return [(client, record) for client, record in found if record is not None]

        self._places |= packs.write(records())


def rejection(result: ClientResult) -> str | None:
    """Why an update must not be averaged, or None: the first tensor that is not finite."""
    parts = {"parameter": result.params, "buffer": result.buffers, "upload": result.extra, "memory": result.memory}
    for kind, tensors in parts.items():
        name = tree.first_non_finite(tensors)
        if name is not None:
            return f"non-finite {kind} {name}"
    return None


def _memory_of(result: ClientResult, upload: Params) -> Memory:
    """The memory in host memory; what equals the upload bit for bit is the upload's tensor (all of MOON's memory)."""
    sent = {**result.params, **result.buffers}
    memory: Memory = {}
    for name, tensor in result.memory.items():
        twin = name.rpartition("/")[2]
        if twin in upload and _same_values(tensor, sent[twin]):
            memory[name] = upload[twin]
        else:
            own = _own(tensor)
            memory[name] = upload[twin] if twin in upload and _same_bits(own, upload[twin]) else own
    return memory


def _own(tensor: Tensor) -> Tensor:
    """In host memory, and not a part of something larger that it would keep alive, such as a file or a stack."""
    here = tensor.detach().to("cpu")
    return here.clone() if here.untyped_storage().nbytes() > here.nbytes else here


def _same_values(left: Tensor, right: Tensor) -> bool:
    """Whether both are one place in memory."""
    return (left.data_ptr(), left.shape, left.stride(), left.dtype, left.device) == (
        right.data_ptr(), right.shape, right.stride(), right.dtype, right.device
    )  # fmt: skip


def _same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors in host memory hold the same; most that do not differ in the first few values."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    one, other = (tensor.reshape(-1).view(torch.uint8) for tensor in (left, right))
    return torch.equal(one[:64], other[:64]) and torch.equal(one, other)
