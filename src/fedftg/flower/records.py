"""Between `Params` and Flower's records: names, order and types are kept, and what comes back is checked first.

An ``ArrayRecord`` holds one NumPy file (``.npy``) a tensor. Decoding compares everything with a template that the
receiver already has, reads the file's header by itself and takes the values as raw bytes: nothing is unpickled, and no
memory is asked for before the size is known to be right.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from numpy.lib import format as npy
from torch import Tensor

from fedftg.errors import InputError
from fedftg.params import Params, first_non_finite

ARRAYS = "arrays"
"""The record of a model: parameters, then buffers. The name is that of Flower's own strategies."""
MESSAGE = "message"
"""What a server rule sends besides the model; only there where it sends something."""
EXTRA = "extra"
"""What a local rule uploads besides the model; only there where it uploads something."""
CONFIG = "config"
METRICS = "metrics"
NUM_EXAMPLES = "num-examples"
CLASS_COUNTS = "class-counts"
PARTITION_ID = "partition-id"
LOSS = "loss"

LARGEST_COUNT = 2**53
"""Up to here float64 holds every whole number, in which Flower's strategies and ours weigh."""

_STYPE = "numpy.ndarray"
_HEADER_BYTES = 1024
"""A ``.npy`` header of a plain array takes 128 bytes; one that claims more than this is no such header."""
_NUMPY = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "float32",
    torch.complex64: "complex64",
    torch.int64: "int64",
    torch.int32: "int32",
    torch.int16: "int16",
    torch.int8: "int8",
    torch.uint8: "uint8",
    torch.bool: "bool",
}


class RecordError(InputError):
    """A record that is not what the receiver expects; the message says what was got and what is allowed."""


def encode(params: Params) -> ArrayRecord:
    """A record of tensors under their names, in their order.

    bfloat16, which NumPy does not have, travels as float32: twice the bytes, the same values. Every other type stays
    as it is, integers too.

    Raises:
        RecordError: a type that NumPy does not have.
    """
    record = ArrayRecord()
    for name, tensor in params.items():
        kind = _numpy_type(name, tensor)
        here = tensor.detach().to("cpu").contiguous()  # another order of axes would be kept in the file
        values = (here.float() if tensor.dtype == torch.bfloat16 else here).numpy()
        file = io.BytesIO()
        np.save(file, values, allow_pickle=False)
        record[name] = Array(kind, tuple(tensor.shape), _STYPE, file.getvalue())
    return record


def decode(record: ArrayRecord, template: Params, *, finite: bool = False, max_bytes: int | None = None) -> Params:
    """The tensors of a record, on the CPU, in the order and of the types of ``template``.

    Args:
        record: what was received.
        template: names, shapes and types that are expected; its values are not looked at.
        finite: refuse NaN and infinities. Without it they pass, for whoever checks the update as a whole.
        max_bytes: the most that the record may take; by default what the template takes, and a header each.

    Raises:
        RecordError: names are missing or unknown, a shape or a type differs, the record is too large or damaged, or
            a value is not finite. Nothing of the values was decoded before names, sizes and shapes were known to fit.
    """
    _check_names(record, template)
    limit = encoded_bytes(template) + _HEADER_BYTES * len(template) if max_bytes is None else max_bytes
    size = sum(len(array.data) for array in record.values())
    if size > limit:
        raise RecordError(f"the record takes {size} bytes, at most {limit} are allowed; send the model of this run")
    params = {name: _decoded(name, record[name], like) for name, like in template.items()}
    bad = first_non_finite(params) if finite else None
    if bad is not None:
        raise RecordError(f"tensor {bad!r} holds NaN or infinity; only finite values are allowed")
    return params


def encoded_bytes(params: Params) -> int:
    """What the values of tensors take in a record, headers aside."""
    return sum(tensor.numel() * np.dtype(_numpy_type(name, tensor)).itemsize for name, tensor in params.items())


def record_bytes(record: ArrayRecord) -> int:
    """What a record takes, headers included."""
    return sum(len(array.data) for array in record.values())


def counts_to_list(class_counts: Tensor) -> list[int]:
    """Class counts ``(C,)`` as a list, which Flower's metric and config records take."""
    return [int(count) for count in class_counts.tolist()]


def counts_from_list(given: object, num_classes: int) -> Tensor:
    """Class counts ``(C,)`` int64 from what a record holds.

    Raises:
        RecordError: no list of ``num_classes`` whole numbers >= 0.
    """
    whole = isinstance(given, Sequence) and not isinstance(given, str | bytes)
    if not whole or not all(isinstance(count, int) and not isinstance(count, bool) for count in given):  # type: ignore[attr-defined]
        raise RecordError(f"class counts must be a list of whole numbers, got {type(given).__name__}")
    counts: list[int] = list(given)  # type: ignore[call-overload]
    if len(counts) != num_classes or any(count < 0 for count in counts):
        raise RecordError(f"class counts must be {num_classes} whole numbers >= 0, one a class, got {counts[:20]}")
    if sum(counts) > LARGEST_COUNT:
        raise RecordError(f"class counts must be at most 2**53 in all, got {sum(counts)}")
    return torch.tensor(counts, dtype=torch.int64)


def partition_of(metrics: Mapping[str, object], key: str = PARTITION_ID) -> int | None:
    """The number that a client goes by, None where its metrics do not tell it.

    Raises:
        RecordError: no whole number from 0 to 2**63 - 1.
    """
    number = metrics.get(key)
    if number is None:
        return None
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 2**63:
        raise RecordError(f"metric {key!r} must be a whole number from 0 to 2**63 - 1, got {number}")
    return number


def weight_of(metrics: Mapping[str, object], key: str) -> float | None:
    """What an update is weighed by, None where its metrics do not tell it.

    Raises:
        RecordError: no number from 0 to 2**53.
    """
    weight = metrics.get(key)
    if weight is None:
        return None
    # A larger one would drown every other update, or overflow when they are summed.
    if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 <= weight <= LARGEST_COUNT:
        raise RecordError(f"metric {key!r} is {weight}; updates can be weighed by numbers from 0 to 2**53 only")
    return weight


def _numpy_type(name: str, tensor: Tensor) -> str:
    if tensor.dtype not in _NUMPY:
        allowed = ", ".join(str(kind).removeprefix("torch.") for kind in _NUMPY)
        raise RecordError(f"tensor {name!r} is {tensor.dtype}, which cannot be sent; allowed: {allowed}")
    return _NUMPY[tensor.dtype]


def _check_names(record: ArrayRecord, template: Params) -> None:
    missing = [name for name in template if name not in record]
    unknown = [name for name in record if name not in template]
    if missing or unknown:
        parts = [f"{kind} {names[0]!r}" for kind, names in (("lacks", missing), ("has unknown", unknown)) if names]
        raise RecordError(f"the record {' and '.join(parts)}; it must hold the {len(template)} tensors of the model")


def _decoded(name: str, array: Array, like: Tensor) -> Tensor:
    kind, shape = _numpy_type(name, like), tuple(like.shape)
    if array.stype != _STYPE or array.dtype != kind or tuple(array.shape) != shape:
        raise RecordError(
            f"tensor {name!r} is {array.dtype} {tuple(array.shape)} ({array.stype}), must be {kind} {shape} ({_STYPE})"
        )
    wanted = math.prod(shape) * np.dtype(kind).itemsize
    if not wanted <= len(array.data) <= wanted + _HEADER_BYTES:
        raise RecordError(f"tensor {name!r} takes {len(array.data)} bytes, must take {wanted} and a header")
    file = io.BytesIO(array.data)
    try:
        version = npy.read_magic(file)
        read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
        inner_shape, fortran, inner = read_header(file, max_header_size=_HEADER_BYTES)
    except Exception as error:  # whatever the parser makes of bytes that anyone may have written
        raise RecordError(f"tensor {name!r} is damaged ({type(error).__name__}); send it again") from None
    rest = len(array.data) - file.tell()
    if inner != np.dtype(kind) or inner_shape != shape or (fortran and len(shape) > 1) or rest != wanted:
        raise RecordError(
            f"tensor {name!r} holds {inner} {inner_shape} in {rest} bytes, must hold {kind} {shape} in {wanted}"
        )
    # A copy, since the record's bytes cannot be written to.
    values = np.frombuffer(array.data, dtype=inner, offset=file.tell(), count=math.prod(shape)).reshape(shape).copy()
    return torch.from_numpy(values).to(like.dtype)
