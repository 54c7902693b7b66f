"""safetensors files: written tensor by tensor from where the values lie, read through a memory map."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedftg.errors import InputError
from fedftg.params import Params
from fedftg.rundir.records import PUT_BACK, write_chunks

_TYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(path: Path, tensors: Params, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file with the order of names kept in its metadata; written aside, on disk, renamed."""
    parts = {name: [tensor] for name, tensor in tensors.items()}
    write_joined(path, parts, {"order": json.dumps(list(tensors)), **(metadata or {})})


def write_joined(
    path: Path, parts: Mapping[str, Sequence[Tensor]], metadata: Mapping[str, str], *, sync: bool = True
) -> None:
    """A safetensors file in which each name holds one tensor, or several of one type flattened and joined.

    The format is written here and not by the library, which needs all values twice more in memory.

    Args:
        path: the file; written aside and renamed.
        parts: what each name holds.
        metadata: strings by name.
        sync: False leaves it to the caller to have the file written to disk.
    """
    # Wide types first, as the library does it: so each tensor starts at a multiple of its item size.
    ordered = sorted(parts.items(), key=lambda part: -part[1][0].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, tensors in ordered:
        count = sum(tensor.numel() for tensor in tensors)
        stop = offset + count * tensors[0].dtype.itemsize
        shape = list(tensors[0].shape) if len(tensors) == 1 else [count]
        header[name] = {"dtype": _TYPES[tensors[0].dtype], "shape": shape, "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def chunks() -> Iterator[bytes | memoryview]:
        yield struct.pack("<Q", len(text)) + text
        for _, tensors in ordered:
            for tensor in tensors:
                flat = tensor.detach().cpu().contiguous().reshape(-1)
                yield flat.view(torch.uint8).numpy().data

    write_chunks(path, chunks(), sync=sync)


def read_tensors(path: Path) -> Params:
    """The tensors of `write_tensors`, in the order in which they were written.

    Sums over all tensors of a model depend on their order in the last bit, and safetensors sorts names by itself.
    """
    with opened(path) as file:
        order = json.loads((file.metadata() or {}).get("order", "null")) or list(file.keys())
        return {name: file.get_tensor(name) for name in order}


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file, whose tensors are views of the file until something else is done with them.

    Raises:
        InputError: the file is missing, torn or no safetensors file.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise InputError(f"checkpoint file {path} cannot be read ({error}); {PUT_BACK}") from error
