"""What clients keep, on disk: files of many clients' records, read back by memory map when a client is active again.

A file is never changed. Once each of its clients has a newer record elsewhere it goes away, and the store of clients
moves what is left out of files that are mostly out of date (`fedftg.engine.memory`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedftg import params as tree
from fedftg.params import Params
from fedftg.rundir.tensors import opened, write_joined

PACK_BYTES = 64_000_000
"""A file takes records up to this size: small models share files, since a file costs milliseconds to have on disk, and
a ResNet-18 has its own, since moving it to another file would cost more."""


@dataclass(frozen=True)
class ClientRecord:
    """One client's memory and last upload; the upload is empty where ``all`` is not tracked."""

    memory: Params
    upload: Params

    @cached_property
    def nbytes(self) -> int:
        """What the values take; those that memory and upload share count once."""
        return sum(
            {id(tensor): tensor.nbytes for part in (self.memory, self.upload) for tensor in part.values()}.values()
        )


class Packs:
    """The files of clients' records in the checkpoint's folder.

    Nothing is made until the first record is written. A file is named ``clients-<number>-<records>.safetensors``.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._last: int | None = None
        self._fresh: set[str] = set()
        """Files that no checkpoint names yet."""

    def write(self, records: Iterable[tuple[int, ClientRecord]]) -> dict[int, str]:
        """Writes records, and says which file each client's is in; only `sync` makes sure that they are on disk."""
        places: dict[int, str] = {}
        for group in _grouped(records):
            name = self._new_name(len(group))
            _write_pack(self._folder / name, group)
            self._fresh.add(name)
            places |= dict.fromkeys((client for client, _ in group), name)
        return places

    def read(self, name: str, client: int) -> ClientRecord:
        """A client's record as views of the file: what is not looked at is not read.

        Raises:
            InputError: the file is missing or damaged.
        """
        with opened(self._folder / name) as file:
            if name.startswith("clients/"):  # one record a file, as format 1 has it
                kept = {key: file.get_tensor(key) for key in json.loads(file.metadata()["order"])}
                return ClientRecord(tree.unprefixed(kept, "memory/"), tree.unprefixed(kept, "upload/"))
            metadata = file.metadata()
            layout = json.loads(metadata["layouts"])[json.loads(metadata["clients"])[str(client)]]
            return _laid_out(layout, {kind: file.get_tensor(f"{client}/{kind}") for kind in layout["types"]})

    def sync(self, used: Collection[str]) -> None:
        """Has the files in use written to disk; call it before a checkpoint names them."""
        for name in self._fresh.intersection(used):
            with (self._folder / name).open("rb") as file:
                os.fsync(file.fileno())
        self.drop_unused(used)
        self._fresh.clear()

    def drop_unused(self, used: Collection[str]) -> None:
        """Removes files that are not in use and that no checkpoint names."""
        for name in self._fresh.difference(used):
            (self._folder / name).unlink(missing_ok=True)
            self._fresh.discard(name)

    def _new_name(self, count: int) -> str:
        if self._last is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._last = max((int(path.name.split("-")[1]) for path in self._folder.glob("clients-*")), default=0)
        self._last += 1
        return f"clients-{self._last:06d}-{count}.safetensors"


def capacity(name: str) -> int:
    """How many records were written to a file."""
    return 1 if name.startswith("clients/") else int(name.removesuffix(".safetensors").split("-")[2])


def _grouped(records: Iterable[tuple[int, ClientRecord]]) -> Iterator[list[tuple[int, ClientRecord]]]:
    group: list[tuple[int, ClientRecord]] = []
    size = 0
    for client, record in records:
        if group and size + record.nbytes > PACK_BYTES:
            yield group
            group, size = [], 0
        group.append((client, record))
        size += record.nbytes
    if group:
        yield group


def _write_pack(path: Path, group: list[tuple[int, ClientRecord]]) -> None:
    """One flat tensor per client and type; names and shapes stand in the metadata, once for all that have the same.

    A name for each tensor of each client would make the header of 100 clients of ResNet-18 two megabytes, which has to
    be read before the first value can be.
    """
    parts: dict[str, list[Tensor]] = {}
    layouts: list[dict[str, Any]] = []
    numbers: dict[int, int] = {}
    for client, record in group:
        layout, values = _layout(record)
        if layout not in layouts:
            layouts.append(layout)
        numbers[client] = layouts.index(layout)
        parts |= {f"{client}/{kind}": tensors for kind, tensors in values.items()}
    write_joined(path, parts, {"layouts": json.dumps(layouts), "clients": json.dumps(numbers)}, sync=False)


def _layout(record: ClientRecord) -> tuple[dict[str, Any], dict[str, list[Tensor]]]:
    """Where each tensor of a record lies in the flat tensors, and what these are made of; shared values once."""
    values: dict[str, list[Tensor]] = {}
    sizes: dict[str, int] = {}
    places: dict[int, tuple[str, int, list[int]]] = {}
    layout: dict[str, Any] = {}
    for part in ("memory", "upload"):
        layout[part] = []
        for name, tensor in getattr(record, part).items():
            if id(tensor) not in places:
                kind = str(tensor.dtype).removeprefix("torch.")
                places[id(tensor)] = (kind, sizes.get(kind, 0), list(tensor.shape))
                sizes[kind] = sizes.get(kind, 0) + tensor.numel()
                values.setdefault(kind, []).append(tensor.reshape(-1))
            layout[part].append([name, *places[id(tensor)]])
    layout["types"] = list(values)
    return layout, values


def _laid_out(layout: dict[str, Any], flat: dict[str, Tensor]) -> ClientRecord:
    made: dict[tuple[str, int], Tensor] = {}
    parts: dict[str, Params] = {"memory": {}, "upload": {}}
    for part, values in parts.items():
        for name, kind, start, shape in layout[part]:
            size = torch.Size(shape)
            if (kind, start) not in made or made[kind, start].shape != size:
                made[kind, start] = flat[kind][start : start + size.numel()].view(size)
            values[name] = made[kind, start]
    return ClientRecord(**parts)
