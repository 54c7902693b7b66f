"""Tensors passed between processes in anonymous memory: no file is left behind, however a process ends."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Mapping
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedftg.params import Params

_ALIGNMENT = 64
"""As torch's allocator aligns, so that kernels take the same path on shared tensors as on others."""


class _Place(NamedTuple):
    """Where a tensor lies in shared memory, or in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int
    """In bytes."""
    file: str | None = None


class Outbox:
    """Copies of CPU tensors in memory that other processes map, reused: new pages cost more than copying into old ones.

    Write only when no receiver reads the previous tensors any more.
    """

    def __init__(self) -> None:
        self._descriptor = -1
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._layout: dict[str, dict[str, _Place]] = {}
        self._mapped_by: set[Connection] = set()

    def write(self, groups: Mapping[str, Params], *, files: bool = False) -> None:
        """Copies groups of tensors in; a tensor under two names is copied once.

        Args:
            files: tensors that are memory maps of files are not copied; receivers map the file.
        """
        unique: dict[int, tuple[Tensor, _Place]] = {}
        size = 0
        for tensor in (tensor for group in groups.values() for tensor in group.values()):
            if id(tensor) in unique:
                continue
            file, start = (file_behind(tensor) if files else None) or (None, size)
            unique[id(tensor)] = tensor, _Place(tensor.dtype, tuple(tensor.shape), dense_strides(tensor), start, file)
            if file is None:
                size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        self._layout = {
            group: {name: unique[id(tensor)][1] for name, tensor in tensors.items()}
            for group, tensors in groups.items()
        }
        if self._descriptor < 0 or size > len(self._memory):
            self.close()
            self._descriptor = _anonymous(size)
            self._memory = _mapped(self._descriptor)
        for tensor, place in unique.values():
            if place.file is None:
                _view(self._memory, place).copy_(tensor.detach())

    def send(self, connection: Connection) -> None:
        """Sends what was written last to an `Inbox` of another process."""
        is_new = connection not in self._mapped_by
        connection.send((self._layout, is_new))
        if is_new:
            send_handle(connection, self._descriptor, 0)
            self._mapped_by.add(connection)

    def close(self) -> None:
        """Closes this process's access; receivers keep theirs."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1
        self._mapped_by.clear()


class Inbox:
    """Receives what one `Outbox` of another process sends."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def receive(self, connection: Connection, *, copy: bool = False) -> dict[str, Params]:
        """Returns the groups of tensors: views of the shared memory, which the next ones overwrite, or copies."""
        layout: dict[str, dict[str, _Place]]
        layout, is_new = connection.recv()
        if is_new:
            descriptor = recv_handle(connection)
            self._memory = _mapped(descriptor)
            os.close(descriptor)
        tensors: dict[_Place, Tensor] = {}
        for place in (place for group in layout.values() for place in group.values()):
            if place not in tensors:
                tensors[place] = _view(self._memory, place)
                if copy:  # not by clone, which may choose other strides for sides of length 1
                    own = torch.empty_strided(place.shape, place.stride, dtype=place.dtype)
                    tensors[place] = own.copy_(tensors[place])
        return {group: {name: tensors[place] for name, place in places.items()} for group, places in layout.items()}


def dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """The tensor's strides where they leave no gap, else those of its clone.

    All strides are kept: that of a side of length 1 has no effect on values, but decides which kernel a convolution
    takes, and so the last bits of its gradients (measured with grey 8x8 images).
    """
    extent = 1 + sum((side - 1) * step for side, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.stride() if extent == tensor.numel() else torch.empty_like(tensor, device="meta").stride()


def file_behind(tensor: Tensor) -> tuple[str, int] | None:
    """Path and offset of the file that a CPU tensor is a memory map of; None where there is none.

    A private map counts while nothing was written to it, and a file while it was neither deleted nor replaced.
    """
    start, stop = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    found: tuple[str, int] | None = None
    try:
        lines = Path("/proc/self/smaps").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None
    for line in lines:
        fields = line.split(maxsplit=5)
        if "-" in fields[0]:  # the first line of a map: 7f00-7fff rw-p OFFSET DEVICE INODE PATH
            low, high = (int(end, 16) for end in fields[0].split("-"))
            inside = low <= start and stop <= high and len(fields) == 6
            found = (fields[5], int(fields[2], 16) + start - low) if inside else None
        elif found is not None and fields[0] == "Anonymous:":  # pages that are no longer the file's
            # The kernel appends " (deleted)" to the path of a file that was deleted or replaced.
            return found if fields[1] == "0" and os.path.isfile(found[0]) and tensor.is_contiguous() else None
    return None


def _anonymous(size: int) -> int:
    """A file descriptor of memory without a name, freed with the last process that holds it."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("fedftg")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size)
    return descriptor


def _mapped(descriptor: int) -> Tensor:
    size = os.fstat(descriptor).st_size
    return torch.frombuffer(mmap.mmap(descriptor, size) if size else bytearray(1), dtype=torch.uint8)


def _view(memory: Tensor, place: _Place) -> Tensor:
    size = torch.Size(place.shape).numel() * place.dtype.itemsize
    if place.file is None:
        flat = memory[place.start : place.start + size]
    else:
        flat = torch.from_numpy(np.memmap(place.file, np.uint8, "c", place.start, (size,)))
    return flat.view(place.dtype).as_strided(place.shape, place.stride)
