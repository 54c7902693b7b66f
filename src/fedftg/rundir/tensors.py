"""safetensors files: written tensor by tensor from where the values lie, read through a memory map."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fedftg.errors import InputError
from fedftg.params import Params
from fedftg.rundir.records import PUT_BACK, write_atomically

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
    """Writes a safetensors file as a whole or not at all, with the order of names in its metadata.

    The format is written here because the library copies all values twice.
    """
    # Wide types first, as the library does it: each tensor then starts at a multiple of its item size.
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    header: dict[str, Any] = {"__metadata__": {"order": json.dumps(list(tensors)), **(metadata or {})}}
    offset = 0
    for name, tensor in ordered.items():
        stop = offset + tensor.nbytes
        header[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def chunks() -> Iterator[bytes | memoryview]:
        yield struct.pack("<Q", len(text)) + text
        for tensor in ordered.values():
            yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data

    write_atomically(path, chunks())


def read_tensors(path: Path) -> Params:
    """Returns the tensors of `write_tensors`, in the order in which they were written.

    Sums over all tensors of a model depend on their order in the last bit, and safetensors sorts names by itself.

    Raises:
        InputError: the file is missing, torn or no safetensors file.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            order = json.loads((file.metadata() or {}).get("order", "null")) or list(file.keys())
            return {name: file.get_tensor(name) for name in order}
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise InputError(f"checkpoint file {path} cannot be read ({error}); {PUT_BACK}") from error
