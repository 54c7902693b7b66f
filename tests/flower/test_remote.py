"""What nodes say of themselves is checked before anything stands on it."""

from typing import Any

import pytest
import torch

import fedftg
from fedftg.flower.remote import ClientFacts, RemoteFederation, facts_of, joint_normalisation

ANSWER: dict[str, Any] = {
    "partition-id": 1, "num-clients": 3, "num-examples": 5, "class-counts": [2, 3], "held-back": 0,
    "class-names": ["a", "b"], "image-shape": [1, 8, 8], "mean": [0.5], "std": [0.25], "data-digest": "d",
    "settings-digest": "s", "version": fedftg.__version__,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "0.0.1"}, "runs fedftg 0.0.1"),
        ({"partition-id": 3}, "client 3 of 3"),
        ({"partition-id": -1}, "do not fit together"),
        ({"num-examples": 6}, "do not fit together"),
        ({"class-counts": [2, -3]}, "class counts"),
        ({"class-counts": [5]}, "class counts"),
        ({"image-shape": [1, 8]}, "not that of this package"),
        ({"image-shape": [0, 8, 8]}, "impossible"),
        ({"image-shape": [1, 8, 1 << 40]}, "impossible"),
        ({"num-examples": float("inf")}, "no whole number"),
        ({"partition-id": True}, "no whole number"),
        ({"partition-id": 1.5}, "no whole number"),
        ({"num-clients": 1 << 60}, "do not fit together"),
        ({"mean": [0.5, 0.5]}, "normalisation"),
        ({"std": [0.0]}, "not finite"),
        ({"std": [float("nan")]}, "not finite"),
        ({"num-clients": "many"}, "not that of this package"),
    ],
)
def test_impossible_answers_are_refused(changes: dict[str, Any], message: str) -> None:
    assert ClientFacts.of(ANSWER).class_counts == (2, 3)
    with pytest.raises(fedftg.InputError, match=message):
        ClientFacts.of(ANSWER | changes)
    with pytest.raises(fedftg.InputError, match="KeyError"):
        ClientFacts.of({key: value for key, value in ANSWER.items() if key not in changes})


def remote(*known: dict[str, Any]) -> RemoteFederation:
    facts = [ClientFacts.of(ANSWER | changes) for changes in known]
    federation = RemoteFederation(facts[0], (0.5,), (0.25,), torch.device("cpu"), None)
    federation.known = {one.client: one for one in facts}
    return federation


def test_sizes_of_those_that_were_seen() -> None:
    federation = remote({}, {"partition-id": 0, "num-examples": 15, "class-counts": [15, 0]})
    assert [federation.num_samples(client) for client in range(3)] == [15, 5, 0]
    assert [federation.relative_size(client) for client in range(3)] == [1.5, 0.5, 0.0]
    assert federation.may_train(2)
    assert not remote({}, {"partition-id": 2, "num-examples": 0, "class-counts": [0, 0]}).may_train(2)
    assert not federation.has_test_data
    assert list(federation.test_batches(5)) == []


def test_a_record_has_all_that_was_learnt() -> None:
    federation = remote({}, {"partition-id": 0, "num-examples": 15, "class-counts": [15, 0], "held-back": 4})
    record = federation.record("key")
    assert record["class_counts"] == [[15, 0], [2, 3], [0, 0]]
    assert record["digests"] == ["d", "d", None]
    assert record["held_back"] == [4, 0, 0]
    assert {one.client: one for one in facts_of(record, "s")} == federation.known
    with pytest.raises(fedftg.InputError, match="not made by a Flower server"):
        facts_of({"class_counts": [[1]]}, "s")


def test_nodes_must_fit_the_others() -> None:
    federation = remote({})
    assert federation.mismatch(ClientFacts.of(ANSWER)) is None
    for changes, word in (
        ({"num-clients": 4}, "number of clients"),
        ({"class-names": ["a", "c"]}, "class names"),
        ({"image-shape": [1, 8, 9]}, "image shape"),
        ({"settings-digest": "t"}, "settings"),
        ({"data-digest": "e"}, "not what client 1 had before"),
    ):
        assert word in str(federation.mismatch(ClientFacts.of(ANSWER | changes)))


def test_normalisation_of_all_together() -> None:
    """0, 0 of two pixels and 1, 1, 1, 1 of four: mean 2/3, variance 2/9."""
    zeros = ClientFacts.of(ANSWER | {"num-examples": 2, "class-counts": [2, 0], "mean": [0.0], "std": [1e-9]})
    ones = ClientFacts.of(ANSWER | {"num-examples": 4, "class-counts": [4, 0], "mean": [1.0], "std": [1e-9]})
    mean, std = joint_normalisation([zeros, ones])
    assert mean == pytest.approx((2 / 3,))
    assert std == pytest.approx(((2 / 9) ** 0.5,))
    assert joint_normalisation([zeros, zeros]) == ((0.0,), (1e-9,))
