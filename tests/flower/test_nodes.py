"""What nodes say of themselves is checked before anything depends on it."""

from typing import Any

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.common import Metadata

import fedftg
from fedftg.flower.nodes import ClientFacts, NodeFederation, facts_of, joint_normalisation

ANSWER: dict[str, Any] = {
    "partition-id": 1, "num-clients": 3, "class-counts": [2, 3], "held-back": 0, "class-names": ["a", "b"],
    "image-shape": [1, 8, 8], "mean": [0.5], "std": [0.25], "data-digest": "d", "settings-digest": "s",
    "version": fedftg.__version__,
}  # fmt: skip


def facts(**changes: Any) -> ClientFacts:
    answer = ANSWER | {name.replace("_", "-"): value for name, value in changes.items()}
    metadata = Metadata(1, "m", 1, 0, "", "", 0.0, 60.0, "query")
    reply = Message(metadata=metadata, content=RecordDict({"config": ConfigRecord(answer)}))  # type: ignore[call-overload]
    return ClientFacts.of(reply)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "0.0.1"}, "runs fedftg 0.0.1"),
        ({"partition_id": 3}, "its partition-id 3 must be below its 3 clients"),
        ({"partition_id": -1}, "must be >= 0"),
        ({"partition_id": 1.5}, "must be a whole number"),
        ({"class_counts": [2, -3]}, "must be >= 0"),
        ({"class_counts": [5]}, "do not fit together"),
        ({"image_shape": [1, 8]}, "image-shape"),
        ({"mean": [0.5, 0.5]}, "do not fit together"),
        ({"std": [0.0]}, "must be > 0"),
        ({"mean": [float("nan")]}, "must be a finite number|finite"),
        ({"num_clients": "many"}, "must be a whole number"),
    ],
)
def test_impossible_answers_are_refused(changes: dict[str, Any], message: str) -> None:
    assert facts().class_counts == (2, 3)
    with pytest.raises(fedftg.InputError, match=message) as caught:
        facts(**changes)
    assert "\n" not in str(caught.value)


def test_a_failed_node_is_named_with_its_reason() -> None:
    metadata = Metadata(1, "m", 1, 0, "", "", 0.0, 60.0, "query")
    with pytest.raises(fedftg.InputError, match="error 2 of its node: by hand"):
        ClientFacts.of(Message(metadata=metadata, error=Error(2, "by hand")))  # type: ignore[call-overload]


def federation(*known: ClientFacts) -> NodeFederation:
    return NodeFederation({one.partition_id: one for one in known}, ((0.5,), (0.25,)), None, "cpu")


def test_sizes_of_those_that_were_seen() -> None:
    seen = federation(facts(), facts(partition_id=0, class_counts=[15, 0], held_back=4))
    assert [seen.num_samples(client) for client in range(3)] == [15, 5, 0]
    assert [seen.relative_size(client) for client in range(3)] == [1.5, 0.5, 0.0]
    assert [seen.num_held_back(client) for client in range(3)] == [4, 0, 0]
    assert seen.may_train(2)
    assert not federation(facts(), facts(partition_id=2, class_counts=[0, 0])).may_train(2)
    assert (seen.num_clients, seen.num_classes, seen.image_shape) == (3, 2, (1, 8, 8))
    assert not seen.has_test_data
    assert not seen.holds_back
    assert list(seen.test_batches(5)) == []


def test_partition_json_holds_all_that_was_learnt() -> None:
    seen = federation(facts(), facts(partition_id=0, class_counts=[15, 0], held_back=4))
    record = seen.record("key")
    assert record["class_counts"] == [[15, 0], [2, 3], [0, 0]]
    assert record["digests"] == ["d", "d", None]
    assert record["held_back"] == [4, 0, 0]
    read = facts_of(record, "s")
    assert {client: one.model_dump(exclude={"mean", "std"}) for client, one in read.items()} == {
        client: one.model_dump(exclude={"mean", "std"}) for client, one in seen.known.items()
    }
    with pytest.raises(fedftg.InputError, match="not made by a Flower server"):
        facts_of({"class_counts": [[1]]}, "s")


def test_normalisation_of_all_together() -> None:
    """0, 0 of two pixels and 1, 1, 1, 1 of four: mean 2/3, variance 2/9."""
    zeros = facts(class_counts=[2, 0], mean=[0.0], std=[1e-9])
    ones = facts(class_counts=[4, 0], mean=[1.0], std=[1e-9])
    mean, std = joint_normalisation([zeros, ones])
    assert mean == pytest.approx((2 / 3,))
    assert std == pytest.approx(((2 / 9) ** 0.5,))
    assert joint_normalisation([zeros, zeros]) == ((0.0,), (1e-9,))
