"""What nodes say of themselves: read, kept in partition.json, and joined."""

from typing import Any

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.common import Metadata

import fedftg
from fedftg.flower.nodes import ClientFacts, NodeFederation, facts_of, joint_normalisation

ANSWER: dict[str, Any] = {
    "partition_id": 1, "num_clients": 3, "class_counts": [2, 3], "held_back": 0, "class_names": ["a", "b"],
    "image_shape": [1, 8, 8], "mean": [0.5], "std": [0.25], "data_digest": "d",
}  # fmt: skip
METADATA = Metadata(1, "m", 1, 0, "", "", 0.0, 60.0, "query")


def facts(**changes: Any) -> ClientFacts:
    content = RecordDict({"config": ConfigRecord(ANSWER | changes)})
    return ClientFacts.of(Message(metadata=METADATA, content=content))  # type: ignore[call-overload]


def test_answers_of_other_kinds_and_failures_are_refused() -> None:
    assert facts().class_counts == (2, 3)
    for changes, message in (
        ({"version": "0.0.1"}, "version"),
        ({"num_clients": "many"}, "must be a whole number"),
        ({"image_shape": [1, 8]}, "image_shape"),
        ({"mean": [float("nan")]}, "finite"),
    ):
        with pytest.raises(fedftg.InputError, match=message):
            facts(**changes)
    with pytest.raises(fedftg.InputError, match="error 2 of its node: by hand"):
        ClientFacts.of(Message(metadata=METADATA, error=Error(2, "by hand")))  # type: ignore[call-overload]


def federation(*known: ClientFacts) -> NodeFederation:
    return NodeFederation({one.partition_id: one for one in known}, ((0.5,), (0.25,)), None, "cpu")


def test_sizes_of_those_that_were_seen() -> None:
    seen = federation(facts(), facts(partition_id=0, class_counts=[15, 0]))
    assert [seen.num_samples(client) for client in range(3)] == [15, 5, 0]
    assert [seen.relative_size(client) for client in range(3)] == [1.5, 0.5, 0.0]
    assert seen.candidates == [0, 1, 2]
    assert federation(facts(), facts(partition_id=2, class_counts=[0, 0])).candidates == [0, 1]
    assert (seen.num_clients, seen.num_classes, seen.image_shape) == (3, 2, (1, 8, 8))
    assert not seen.has_test_data
    assert not seen.holds_back


def test_partition_json_holds_what_nodes_said() -> None:
    seen = federation(facts(), facts(partition_id=0, class_counts=[15, 0], held_back=4))
    record = seen.record("key")
    assert record["class_counts"] == [[15, 0], [2, 3], [0, 0]]
    assert record["digests"] == ["d", "d", None]
    assert record["held_back"] == [4, 0, 0]
    assert facts_of(record) == seen.known
    with pytest.raises(fedftg.InputError, match="not made by a Flower server"):
        facts_of({"class_counts": [[1]]})


def test_normalisation_of_all_together() -> None:
    """0, 0 of two pixels and 1, 1, 1, 1 of four: mean 2/3, variance 2/9."""
    zeros = facts(class_counts=[2, 0], mean=[0.0], std=[1e-9])
    ones = facts(class_counts=[4, 0], mean=[1.0], std=[1e-9])
    mean, std = joint_normalisation([zeros, ones])
    assert mean == pytest.approx((2 / 3,))
    assert std == pytest.approx(((2 / 9) ** 0.5,))
    assert joint_normalisation([zeros, zeros]) == ((0.0,), (1e-9,))
