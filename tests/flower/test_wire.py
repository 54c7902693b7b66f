"""Tensors, orders and replies: nothing is lost on the way, and nothing that does not fit comes in."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common import Metadata

from fedftg.engine.local_train import LocalConfig
from fedftg.errors import InputError
from fedftg.flower.wire import Order, decode, encode, read_replies, read_reply

PARAMS = {
    "z.weight": torch.randn(3, 4, dtype=torch.float32),
    "a.bias": torch.randn(4, dtype=torch.float64),
    "half": torch.randn(2, 2).to(torch.bfloat16),
    "sixteen": torch.randn(3).half(),
    "count": torch.tensor(2**62 + 1),
    "mask": torch.tensor([True, False]),
    "empty": torch.zeros(0, 3),
    "strided": torch.randn(4, 6).t(),
}
MODEL = {"w": torch.tensor([1.0, 2.0])}


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def reply(node: int, metrics: dict[str, Any], arrays: dict[str, ArrayRecord] | None = None) -> Message:
    records = {"arrays": encode(MODEL)} if arrays is None else arrays
    content = RecordDict({**records, "metrics": MetricRecord(metrics)})
    metadata = Metadata(1, f"m{node}", node, 0, "", "", 0.0, 60.0, "train")
    return Message(metadata=metadata, content=content)  # type: ignore[call-overload]


def test_names_order_types_and_bits_are_kept() -> None:
    record = encode(dict(reversed(PARAMS.items())))
    back = decode(record, PARAMS)
    assert list(back) == list(PARAMS)
    for name, tensor in PARAMS.items():
        assert (back[name].dtype, back[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(back[name], tensor)
        back[name].zero_()  # its memory is its own
    assert torch.equal(record.to_torch_state_dict()["z.weight"], PARAMS["z.weight"])  # Flower reads it too


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": npy(np.zeros((4, 3), np.float32))}, r"must be .*, got \('float32', \(4, 3\)"),
        ({"data": npy(np.zeros((3, 4)))}, "must be .*, got .'float64'"),
        ({"stype": "pickle"}, "is damaged"),
        ({"data": encode(PARAMS)["z.weight"].data[:-1]}, "is damaged"),
        ({"data": npy(np.array([{"a": 1}] * 4, dtype=object))}, "is damaged"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    record = encode(PARAMS)
    array = record["z.weight"]
    fields = {"dtype": array.dtype, "shape": array.shape, "stype": array.stype, "data": array.data} | changes
    record["z.weight"] = Array(**fields)
    with pytest.raises(InputError, match=message):
        decode(record, PARAMS)


def test_an_order_arrives_to_the_bit() -> None:
    order = Order(run="a1", round=3, seed=2**63 - 1, num_clients=4, mean_examples=100 / 3, counted={0: 2, 9: 1},
                  algorithm={"name": "feddyn", "alpha": 0.1 + 0.2}, local=LocalConfig(lr=1 / 3), client=9,
                  mean=(1 / 3, 1e-17), std=(0.1, 2 / 3))  # fmt: skip
    content = RecordDict({"any name": ConfigRecord({"more": 1, **order.config()})})
    assert Order.of(content) == order
    with pytest.raises(InputError, match="take FedDyn"):
        Order.of(RecordDict({"config": ConfigRecord({"more": 1})}))


def test_a_reply_is_read() -> None:
    extra = {"c": torch.tensor([3.0])}
    counts = {"num-examples": 12, "class-counts": [0, 5, 7], "loss": 0.5, "partition-id": 4}
    read = read_reply(reply(1, counts, {"arrays": encode(MODEL), "extra": encode(extra)}), MODEL, extra=extra,
                      num_classes=3, weight_keys=("num-examples",))  # fmt: skip
    assert (read.problem, read.client, read.named, read.metrics["num-examples"]) == (None, 4, True, 12)
    assert torch.equal(read.arrays["w"], MODEL["w"])
    assert torch.equal(read.extra["c"], extra["c"])
    assert read.class_counts is not None
    assert read.class_counts.tolist() == [0, 5, 7]
    other = read_reply(reply(2**63 + 5, {"n": 1}, {"model": encode(MODEL)}), MODEL, num_classes=3)
    assert (other.problem, other.client, other.named, other.class_counts) == (None, 5, False, None)


@pytest.mark.parametrize(
    ("metrics", "problem"),
    [
        ({"partition-id": 0.5}, "'partition-id' must be a whole number"),
        ({"weight": float("nan")}, "'weight' must be a number from 0"),
        ({"weight": 2.0**60}, "'weight' must be a number from 0"),
        ({"class-counts": [0, 5]}, "class counts must be 3 whole numbers"),
        ({"class-counts": [0.0, 5.0, 1.0]}, "class counts must be 3 whole numbers"),
        ({"class-counts": [0, 5, 2**60]}, "class counts must be 3 whole numbers"),
    ],
)
def test_metrics_that_do_not_fit_are_a_problem(metrics: dict[str, Any], problem: str) -> None:
    read = read_reply(reply(1, metrics), MODEL, num_classes=3, weight_keys=("weight",))
    assert problem in str(read.problem)
    assert read.arrays == {}


def test_replies_are_in_the_order_of_clients_and_twins_are_refused() -> None:
    given = [reply(5, {}), reply(9, {"partition-id": 3}), reply(2, {"partition-id": 1}), reply(4, {"partition-id": 3})]
    read = read_replies(given, MODEL)
    assert [(one.client, one.message.metadata.src_node_id) for one in read] == [(1, 2), (3, 4), (3, 9), (5, 5)]
    assert [one.problem is None for one in read] == [True, False, False, True]
    assert read[1].problem == "2 nodes are client 3; give each its own 'partition-id'"
