"""Named tensors in anonymous memory that processes share: no file is left behind, whoever dies."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedftg.params import Params

Layout = dict[str, Any]
"""Where tensors lie in a `Segment`; plain values that JSON can carry."""

_ALIGNMENT = 64
"""As torch's allocator aligns, so that kernels take the same path on shared tensors as on others."""


def anonymous(size: int = 0) -> int:
    """A file descriptor of memory without a name; it is gone when the last process that holds it is."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("fedftg")
    else:
        with tempfile.TemporaryFile(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size)
    return descriptor


class Segment:
    """Shared memory that grows with what is written to it.

    One process writes and tells the other the layout; the other reads. Who may touch it when is up to them.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        self.descriptor = anonymous() if descriptor is None else descriptor
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def write(self, groups: Mapping[str, Params]) -> Layout:
        """Copies tensors in; one tensor under two names is written once."""
        places: dict[int, int] = {}
        unique: list[Tensor] = []
        specs: list[list[Any]] = []
        end = 0
        names: dict[str, dict[str, int]] = {group: {} for group in groups}
        for group, tensors in groups.items():
            for name, tensor in tensors.items():
                if id(tensor) not in places:
                    places[id(tensor)] = len(specs)
                    unique.append(tensor)
                    kind = str(tensor.dtype).removeprefix("torch.")
                    specs.append([kind, list(tensor.shape), list(dense_strides(tensor)), end])
                    end += -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT
                names[group][name] = places[id(tensor)]
        layout: Layout = {"size": end, "tensors": specs, "groups": names}
        if os.fstat(self.descriptor).st_size < end:
            os.ftruncate(self.descriptor, end)
        self._map(end)
        for spec, tensor in zip(specs, unique, strict=True):
            self._view(spec).copy_(tensor.detach())
        return layout

    def read(self, layout: Layout, *, copy: bool) -> dict[str, Params]:
        """The groups of a layout: views of the shared memory, or copies of one's own."""
        self._map(layout["size"])
        tensors = [self._view(spec) for spec in layout["tensors"]]
        if copy:
            # Not clone: it is free to choose other strides for sides of length 1.
            fresh = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype) for t in tensors]
            tensors = [own.copy_(tensor) for own, tensor in zip(fresh, tensors, strict=True)]
        return {
            group: {name: tensors[index] for name, index in names.items()} for group, names in layout["groups"].items()
        }

    def close(self) -> None:
        """Gives the memory up; views that are still held keep their part of it."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self.descriptor = -1
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def _map(self, size: int) -> None:
        if len(self._bytes) < size:
            self._bytes = mapped(self.descriptor, os.fstat(self.descriptor).st_size)

    def _view(self, spec: list[Any]) -> Tensor:
        dtype, shape, stride, start = spec
        kind: torch.dtype = getattr(torch, dtype)
        count = 1
        for side in shape:
            count *= side
        flat = self._bytes[start : start + count * kind.itemsize].view(kind)
        return flat.as_strided(shape, stride)


def dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """The tensor's strides where they leave no gap, else those of its clone.

    Kept to the last one: that of a side of length 1 points nowhere, but decides which kernel a convolution takes, and
    so the last bits of its gradients (measured with grey 8x8 images).
    """
    extent = 1 + sum((side - 1) * step for side, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.stride() if extent == tensor.numel() else torch.empty_like(tensor, device="meta").stride()


def mapped(descriptor: int, size: int, *, private: bool = False) -> Tensor:
    """The first bytes of a file as a tensor; ``private`` keeps what is written to it from the file and from others."""
    if size == 0:
        return torch.empty(0, dtype=torch.uint8)
    access = mmap.ACCESS_COPY if private else mmap.ACCESS_WRITE
    return torch.frombuffer(mmap.mmap(descriptor, size, access=access), dtype=torch.uint8)


def file_behind(tensor: Tensor) -> tuple[int, int] | None:
    """An open descriptor of the file that a CPU tensor is a memory map of, and where in it; None where it is none.

    A map that lets this process write without changing the file counts only as long as nothing was written.
    """
    if not tensor.is_contiguous() or tensor.numel() == 0:
        return None
    start, stop = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    found: tuple[str, str, int] | None = None
    try:
        with open("/proc/self/smaps", encoding="utf-8", errors="surrogateescape") as lines:
            for line in lines:
                parts = line.rstrip("\n").split(maxsplit=5)
                if found is None and parts[0].count("-") == 1 and parts[0].replace("-", "").isalnum():
                    low, high = (int(part, 16) for part in parts[0].split("-"))
                    if low <= start and stop <= high:
                        if len(parts) < 6 or not parts[5].startswith("/"):
                            return None
                        found = parts[5], parts[4], int(parts[2], 16) + start - low
                elif found is not None and parts[0] == "Anonymous:":
                    return _opened(*found) if parts[1] == "0" else None
    except OSError:
        pass
    return None


def _opened(path: str, inode: str, offset: int) -> tuple[int, int] | None:
    """None where the file was deleted or replaced since."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    if str(os.fstat(descriptor).st_ino) != inode:
        os.close(descriptor)
        return None
    return descriptor, offset
