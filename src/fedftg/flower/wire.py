"""What travels between server and nodes: `Order` and tensors out, `Reply` back, each checked once, never unpickled."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message, RecordDict
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from fedftg.config import parse
from fedftg.data.dataset import Channels
from fedftg.engine.local_train import LocalConfig
from fedftg.errors import InputError, first_line
from fedftg.params import Params, first_non_finite

ARRAYS = "arrays"
"""The record of the model, under the name that Flower's own strategies use."""
MESSAGE = "message"
"""The record of what a server rule sends besides the model, if anything."""
EXTRA = "extra"
"""The record of what a local rule uploads besides the model, if anything."""
INITIAL = "initial"
"""The record of the initial model, for clients of MOON that have not taken part yet."""
CONFIG = "config"
METRICS = "metrics"
ORDER = "fedftg-order"
NUM_EXAMPLES = "num-examples"
CLASS_COUNTS = "class-counts"
PARTITION_ID = "partition-id"
LOSS = "loss"
LARGEST_COUNT = 2**53
"""The largest whole number below which float64, in which updates are weighed, is exact."""


def encode(params: Params) -> ArrayRecord:
    """Returns a record of tensors with their names, order and types; bfloat16 travels as float32."""
    return ArrayRecord({name: Array(_numpy(tensor)) for name, tensor in params.items()})


def decode(record: ArrayRecord, template: Params, *, finite: bool = False) -> Params:
    """Returns the tensors of a record, on the CPU, with the names, order, shapes and types of ``template``.

    Raises:
        InputError: other names, shapes or types, damaged data, or with ``finite`` values that are not.
    """
    missing = [name for name in template if name not in record]
    unknown = [name for name in record if name not in template]
    if missing or unknown:
        parts = [f"{kind} {names[0]!r}" for kind, names in (("lacks", missing), ("has unknown", unknown)) if names]
        raise InputError(f"the record {' and '.join(parts)}; it must hold the {len(template)} tensors of the model")
    params = {name: _decoded(name, record[name], like) for name, like in template.items()}
    bad = first_non_finite(params) if finite else None
    if bad is not None:
        raise InputError(f"tensor {bad!r} holds NaN or infinity; only finite values are allowed")
    return params


class Layout:
    """Maps the arrays of a Flower app to a model's parameters and buffers.

    The arrays' names are those of the ``state_dict``, or "0", "1", ... in its order, as ``ArrayRecord`` names a list.
    The types of the first arrays are kept: Flower's strategies turn integers into float64.
    """

    def __init__(self, module: nn.Module, arrays: ArrayRecord) -> None:
        free = {name: value for name, value in module.named_parameters() if value.requires_grad}
        frozen = {name: value for name, value in module.named_parameters() if name not in free}
        own = free, {**dict(module.named_buffers()), **frozen}
        self._params, self._buffers = list(own[0]), list(own[1])
        # A weight that two layers share has two names in a state_dict and one among the parameters.
        shared = dict([*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)])
        firsts = {id(tensor): name for values in own for name, tensor in values.items()}
        first = {name: firsts[id(tensor)] for name, tensor in shared.items()}
        state, keys = list(module.state_dict()), list(arrays)
        numbered = "0" not in state and keys == [str(number) for number in range(len(state))]
        names = state if numbered else keys
        given = {first.get(name) for name in names}
        wrong = [name for name in names if name not in first] or [name for name in state if first[name] not in given]
        if wrong:
            raise InputError(
                f"the deployment's {len(keys)} arrays {'lack' if wrong[0] in state else 'have unknown'} {wrong[0]!r}; "
                f"they must be the {len(state)} of the model's state_dict(), by name or in its order"
            )
        self.template: Params = {}
        self._first = {key: first[name] for key, name in zip(keys, names, strict=True)}
        for key, name in self._first.items():
            array, shape = arrays[key], tuple(shared[name].shape)
            if tuple(array.shape) != shape:
                raise InputError(f"array {key!r} must be {shape} as the model's {name!r} is, got {tuple(array.shape)}")
            dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
            self.template[key] = torch.empty(shape, dtype=dtype, device="meta")
        self._constant = {name: value.detach().clone() for name, value in own[1].items() if name not in given}

    def split(self, tensors: Params) -> tuple[Params, Params]:
        """Returns parameters and buffers, in float32 and in the model's order, of tensors under the arrays' names."""
        named = {name: tensor.clone() for name, tensor in self._constant.items()}
        for key, name in self._first.items():
            named[name] = tensors[key].float() if tensors[key].is_floating_point() else tensors[key]
        return {name: named[name] for name in self._params}, {name: named[name] for name in self._buffers}

    def join(self, params: Params, buffers: Params) -> Params:
        """Returns the inverse of `split`: tensors under the arrays' names, in their order and types, on the CPU."""
        values = {**params, **buffers}
        return self._cast({key: values[name] for key, name in self._first.items()})

    def accept(self, record: ArrayRecord) -> Params:
        """Returns a strategy's aggregate, whatever type it gave the arrays, in the types that travel."""
        wanted, got = ({key: tuple(one.shape) for key, one in part.items()} for part in (self.template, record))
        if wanted != got:
            raise InputError("the base strategy returned arrays of other names or shapes than it was given")
        return self._cast({key: torch.from_numpy(record[key].numpy().copy()) for key in self.template})

    def _cast(self, tensors: Params) -> Params:
        result: Params = {}
        for key, like in self.template.items():
            value = tensors[key].detach().cpu()
            if value.is_floating_point() and not like.is_floating_point():
                value = value.round()
            result[key] = value.to(like.dtype)
        return result


class Order(BaseModel):
    """What a server asks of a client besides the model: all that the client's `LocalTask` follows from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str = Field(pattern="^[A-Za-z0-9]+$")  # names a folder of the client's memory
    round: int
    seed: int
    num_clients: int
    mean_examples: float | None
    """Mean number of samples of all clients; None gives every client the relative size 1."""
    counted: dict[int, int]
    """Per client, the last round whose update was aggregated; 0 or absent: none."""
    floor: int | None = None
    """The earliest round to which the server may return, its last checkpoint; None: the client's last."""
    algorithm: dict[str, Any]
    local: LocalConfig
    client: int | None = None
    """The client that the server takes the node for; None: the server does not know yet."""
    mean: Channels | None = None
    """Per channel, of all clients' images; None: the client normalises by itself."""
    std: Channels | None = None

    def config(self) -> dict[str, str]:
        """Returns the entry of a ``ConfigRecord`` from which `of` reads the order."""
        return {ORDER: self.model_dump_json()}

    @classmethod
    def of(cls, content: RecordDict) -> Order:
        """Returns the order in a message; `InputError` where there is none."""
        for config in content.config_records.values():
            if isinstance(text := config.get(ORDER), str):
                return parse(cls, json.loads(text), "order")
        raise InputError(f"the message has no {ORDER!r}; take FedDyn, Scaffold or Moon of fedftg.flower")


@dataclass(frozen=True)
class Reply:
    """A client's reply to a training message, checked; with a ``problem`` it must not be used."""

    message: Message
    client: int
    """The partition id where the reply has one, else from the node id."""
    named: bool
    """Whether the reply has a partition id."""
    problem: str | None = None
    """Why the update cannot be used, in one line; None: it can."""
    arrays: Params = field(default_factory=dict)
    extra: Params = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    class_counts: Tensor | None = None
    """``(C,)`` int64; None where the reply has none or none was asked for."""


def read_reply(
    message: Message,
    template: Params,
    *,
    extra: Params | None = None,
    num_classes: int | None = None,
    finite: bool = True,
    arrays_key: str = ARRAYS,
    weight_keys: Collection[str] = (),
) -> Reply:
    """Checks and decodes one reply; whatever is wrong with it becomes its ``problem``.

    Args:
        message: the reply.
        template: names, shapes and types of the model's arrays.
        extra: likewise of what the local rule uploads besides it.
        num_classes: ``C``; class counts that are sent must be C whole numbers. None: they are ignored.
        finite: refuse NaN and infinities.
        arrays_key: the record of the model where a reply has several ``ArrayRecord``s.
        weight_keys: metrics by which updates are weighed; each that is sent must be a number from 0 to 2**53.
    """
    reply = Reply(message, client_of(message.metadata.src_node_id), named=False, problem=error_of(message))
    if reply.problem is not None:
        return reply
    metrics, records = all_metrics(message.content), message.content.array_records
    try:
        if PARTITION_ID in metrics:
            _check_number(metrics, PARTITION_ID, int, 2**63 - 1)
            reply = replace(reply, client=metrics[PARTITION_ID], named=True)
        if arrays_key not in records and len(records) != 1:
            raise InputError(f"the reply holds {len(records)} ArrayRecords and none is {arrays_key!r}")
        model = records[arrays_key] if arrays_key in records else next(iter(records.values()))
        arrays = decode(model, template, finite=finite)
        if extra and EXTRA not in records:
            raise InputError(f"the reply has no ArrayRecord {EXTRA!r}; reply with what local_train gives")
        uploaded = decode(records[EXTRA], extra, finite=finite) if extra else {}
        for key in weight_keys:  # a larger one would drown every other update, or overflow in a sum
            _check_number(metrics, key, int | float, LARGEST_COUNT)
        counts = None
        if num_classes is not None and CLASS_COUNTS in metrics:
            counts = _counts(metrics[CLASS_COUNTS], num_classes)
    except InputError as error:
        return replace(reply, problem=str(error))
    return replace(reply, arrays=arrays, extra=uploaded, metrics=metrics, class_counts=counts)


def read_replies(messages: Iterable[Message], template: Params, **options: Any) -> list[Reply]:
    """Reads all replies of a round, by client id, then by node id: sums of floats depend on their order.

    Of several usable replies of one client none can be used. Options are those of `read_reply`.
    """
    replies = [read_reply(message, template, **options) for message in messages]
    replies.sort(key=lambda reply: (not reply.named, reply.client, client_of(reply.message.metadata.src_node_id)))
    nodes = Counter(reply.client for reply in replies if reply.problem is None)
    for index, reply in enumerate(replies):
        if reply.problem is None and nodes[reply.client] > 1:
            problem = f"{nodes[reply.client]} nodes are client {reply.client}; give each its own {PARTITION_ID!r}"
            replies[index] = replace(reply, problem=problem)
    return replies


def error_of(message: Message) -> str | None:
    """Returns the text of an error reply in one line, or None where the reply has content."""
    if message.has_content():
        return None
    code, reason = (message.error.code, message.error.reason) if message.has_error() else (0, "an empty reply")
    return f"error {code} of its node: {' '.join(str(reason or 'no reason given').split())[:300]}"


def client_of(node: int) -> int:
    """Returns a client's number where it has no partition id: the low 63 bits of its node id, to fit into int64."""
    return node & (2**63 - 1)


def all_metrics(content: RecordDict) -> dict[str, Any]:
    """Returns the metrics of all ``MetricRecord``s of a reply."""
    return {key: value for record in content.metric_records.values() for key, value in record.items()}


def _numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    values = tensor.detach().to("cpu").contiguous()
    result: np.ndarray[Any, Any] = (values.float() if tensor.dtype == torch.bfloat16 else values).numpy()
    return result


def _decoded(name: str, array: Array, like: Tensor) -> Tensor:
    wanted = str(_numpy(torch.empty(0, dtype=like.dtype)).dtype), tuple(like.shape)
    try:
        values = array.numpy()
    except Exception as error:  # whatever NumPy makes of bytes that anyone may have written
        raise InputError(f"tensor {name!r} is damaged ({first_line(error)})") from error
    if (str(values.dtype), values.shape) != wanted:
        raise InputError(f"tensor {name!r} must be {wanted}, got {(str(values.dtype), values.shape)}")
    return torch.from_numpy(values).contiguous().to(like.dtype)


def _counts(given: object, num_classes: int) -> Tensor:
    valid = isinstance(given, list) and all(type(count) is int and count >= 0 for count in given)
    if not isinstance(given, list) or not valid or len(given) != num_classes or sum(given) > LARGEST_COUNT:
        raise InputError(f"class counts must be {num_classes} whole numbers >= 0, 2**53 in all, got {str(given)[:100]}")
    return torch.tensor(given, dtype=torch.int64)


def _check_number(metrics: Mapping[str, Any], key: str, kind: Any, most: int) -> None:
    value = metrics.get(key, 0)
    if not isinstance(value, kind) or not 0 <= value <= most:
        what = "a whole number" if kind is int else "a number"
        raise InputError(f"metric {key!r} must be {what} from 0 to {most}, got {str(value)[:40]}")
