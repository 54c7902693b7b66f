"""safetensors files: written as a whole or not at all, read through a memory map."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fedftg.errors import InputError
from fedftg.params import Params, clone, to_device
from fedftg.rundir.records import PUT_BACK, write_atomically


def write_tensors(path: Path, tensors: Params, metadata: dict[str, str] | None = None) -> None:
    """Writes tensors with the order of their names in the metadata.

    Sums over all tensors of a model depend on their order in the last bit, and safetensors sorts names by itself.
    """
    # Cloned: the format holds each tensor once, contiguous, whatever shares its memory.
    values = {name: value.contiguous() for name, value in clone(to_device(tensors, "cpu")).items()}
    write_atomically(path, save(values, {"order": json.dumps(list(tensors)), **(metadata or {})}))


def read_tensors(path: Path) -> Params:
    """Returns the tensors of `write_tensors`, in the order in which they were written."""
    with _opened(path) as file:
        order = json.loads((file.metadata() or {}).get("order", "null")) or list(file.keys())
        return {name: file.get_tensor(name) for name in order}


def read_metadata(path: Path) -> dict[str, str]:
    """Returns the metadata of `write_tensors`."""
    with _opened(path) as file:
        return dict(file.metadata() or {})


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise InputError(f"checkpoint file {path} cannot be read ({error}); {PUT_BACK}") from error
