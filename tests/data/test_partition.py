"""Every partition law: what holds for all of them, what each promises, and the one line for an impossible request."""

import hashlib
import json
import math
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedftg.data.config import Law, PartitionConfig
from fedftg.data.partition import (
    LAWS,
    class_counts,
    client_sizes,
    clients_per_domain,
    describe,
    hold_back,
    largest_remainder,
    noise_levels,
    partition,
    skew,
)
from fedftg.errors import InputError

USES_ALL = {"class_dirichlet", "quantity", "natural", "domain"}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def make(labels: Any, seed: int = 0, columns: Any = None, **settings: Any) -> list[Any]:
    return partition(np.asarray(labels), PartitionConfig(**settings), rng(seed), columns or {})


def counts_of(labels: Any, parts: list[Any]) -> Any:
    return class_counts(parts, labels, int(labels.max()) + 1)


def same(first: list[Any], second: list[Any]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@settings(max_examples=300, deadline=None)
@given(
    labels=st.lists(st.integers(0, 12), min_size=1, max_size=120),
    share=st.floats(0, 1.2),
    alpha_exponent=st.floats(-300, 300),
    law=st.sampled_from(sorted(set(LAWS) - {"file"})),
    number=st.integers(1, 14),
    min_samples=st.integers(0, 3),
    sigma=st.sampled_from([0.0, 0.0, 0.5, 5.0, 1000.0]),
    strings=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_each_sample_at_most_once_or_advice(
    labels: list[int], share: float, alpha_exponent: float, law: str, number: int, min_samples: int, sigma: float,
    strings: bool, seed: int,
) -> None:  # fmt: skip
    """For any request: a partition that keeps the promises, reproducibly, or one line that says what to change."""
    values = np.array(labels)
    groups = (values * 7 + np.arange(len(values))) % 5
    sigma = sigma if law in ("iid", "dirichlet") else 0.0
    config = PartitionConfig(
        law=law, num_clients=max(1, round(share * len(values))), alpha=10**alpha_exponent, min_samples=min_samples,
        sizes="lognormal" if sigma else "equal", sigma=sigma, classes_per_client=number, shards_per_client=number,
        column="group",
    )  # fmt: skip
    columns = {"group": np.array([f"g{group}" for group in groups]) if strings else groups}
    try:
        parts = partition(values, config, rng(seed), columns)
    except InputError as error:
        assert law not in ("iid", "dirichlet", "quantity") or config.num_clients > len(values)
        message = str(error)
        assert "; " in message
        assert "\n" not in message
        return
    sizes, together = [len(part) for part in parts], np.concatenate(parts)
    assert len(np.unique(together)) == len(together)
    assert together.min() >= 0
    assert together.max() < len(values)
    assert all(part.dtype == np.int64 and (np.diff(part) > 0).all() for part in parts)
    assert min(sizes) >= (min_samples if law == "class_dirichlet" else 1)
    assert law not in USES_ALL or sum(sizes) == len(values)
    assert same(parts, partition(values, config, rng(seed), columns))
    assert len(parts) == (len(np.unique(groups)) if law == "natural" else config.num_clients)
    if law in ("iid", "dirichlet"):
        equal = len(values) // config.num_clients
        assert sum(sizes) <= equal * config.num_clients
        assert sigma or set(sizes) == {equal}
    if law == "pathological":
        assert ((counts_of(values, parts) > 0).sum(axis=1) == number).all()
        scarce = min(np.unique(values, return_counts=True)[1]) < config.num_clients
        assert scarce or config.num_clients * number < len(set(labels)) or sum(sizes) == len(values)
    if law == "shards":
        assert set(sizes) == {number * (len(values) // (number * config.num_clients))}
    if law in ("domain", "natural"):
        assert all(len(set(groups[part])) == 1 for part in parts)


@pytest.mark.parametrize(
    ("config", "digest"),
    [
        ({"law": "iid", "num_clients": 7}, "b18db9b41f96d460"),
        ({"law": "dirichlet", "num_clients": 20, "alpha": 0.1}, "c0539087df250b02"),
        ({"law": "quantity", "num_clients": 20, "alpha": 0.5}, "0f3f40daa43c0399"),
        ({"law": "class_dirichlet", "num_clients": 10, "alpha": 0.3}, "a426ec10130ce9e5"),
        ({"law": "class_dirichlet", "num_clients": 10, "alpha": 0.3, "min_samples": 70}, "8bdf7e434d5ee865"),
        ({"law": "pathological", "num_clients": 20, "classes_per_client": 3}, "68cf647a57abde59"),
        ({"law": "pathological", "num_clients": 10, "classes_per_client": 10}, "eb4171e5b3e6182a"),
        ({"law": "shards", "num_clients": 10, "shards_per_client": 2}, "ac1f0a02738d37fd"),
        ({"law": "shards", "num_clients": 37, "shards_per_client": 3}, "413d9a539a07eadb"),
        ({"law": "domain", "num_clients": 9, "column": "c"}, "4bb2f2fa21d1d368"),
        ({"law": "natural", "column": "c"}, "87587b2f5ad41aee"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_partitions_are_those_of_version_0_1(config: dict[str, Any], digest: str) -> None:
    """Made by version 0.1, which called flwr-datasets 0.6.1 for class_dirichlet, pathological, shards and natural."""
    parts = make(rng().permutation(np.arange(1000) % 10), 3, {"c": np.arange(1000) * 7 % 9 // 2}, **config)
    assert hashlib.sha256(repr([part.tolist() for part in parts]).encode()).hexdigest()[:16] == digest


def test_position_in_the_file_does_not_matter() -> None:
    """Cut consecutive rows of a class, and client 0 gets the first ones: mean position 0.1 instead of 0.5."""
    labels = np.repeat(np.arange(4), 1000)
    for law in ("class_dirichlet", "pathological", "shards", "quantity"):
        for part in make(labels, law=law, num_clients=8, alpha=100, classes_per_client=2):
            assert np.mean(part % 1000) == pytest.approx(500, abs=150), law


def test_every_law_is_described() -> None:
    assert set(LAWS) == set(get_args(Law))
    for law in LAWS:
        assert describe(PartitionConfig(law=law, column="c", file="f.json")).startswith(law)
    config = PartitionConfig(law="iid", sizes="lognormal", sigma=0.5, test_share=0.2)
    assert describe(config) == "iid, sizes=lognormal, sigma=0.5, test_share=0.2"
    assert describe(PartitionConfig(law="quantity", num_clients=5)) == "quantity, alpha=0.3, num_clients=5"


# --- dirichlet and iid


def test_one_client_and_one_sample_each_and_a_remainder() -> None:
    labels = np.arange(40) % 4
    (only,) = make(labels, num_clients=1)
    assert np.array_equal(only, np.arange(40))
    assert sorted(int(part[0]) for part in make(labels, num_clients=40)) == list(range(40))
    assert [len(part) for part in make(np.zeros(23, dtype=int), num_clients=5, law="iid")] == [4] * 5


def test_proportions_follow_the_dirichlet_law_while_pools_last() -> None:
    """Among 400 clients of alpha 5 the pools last nearly to the end, so shares are Dir(5) plus counting noise.

    With C = 4 and a = 5: Var q = (1/4)(3/4)/(20 + 1) = 0.00893; a multinomial of n adds (E[q] - E[q^2])/n with
    E[q^2] = 0.00893 + 1/16, so 0.1786/n.
    """
    labels = np.arange(40_000) % 4
    counts = [counts_of(labels, make(labels, seed, num_clients=400, alpha=5.0)) for seed in range(5)]
    shares = np.concatenate(counts) / 100
    assert shares.var() == pytest.approx(0.00893 + 0.1786 / 100, rel=0.1)


def test_used_up_and_missing_classes_give_what_is_left() -> None:
    """One client per sample and hardly any of class 1; and classes 1 to 4 have no sample: all are assigned."""
    assert sorted(np.concatenate(make([0] * 90 + [1] * 10, num_clients=100, alpha=1e-3))) == list(range(100))
    assert sorted(np.concatenate(make([0, 0, 0, 5, 5, 5], num_clients=2, alpha=0.1))) == list(range(6))


def test_lognormal_sizes() -> None:
    config = PartitionConfig(num_clients=100, sizes="lognormal", sigma=1.0)
    sizes = client_sizes(50_000, config, rng())
    assert sizes.min() >= 1
    assert 49_900 <= sizes.sum() <= 50_000
    assert np.log(sizes).std() == pytest.approx(1.0, rel=0.25)
    sizes = client_sizes(101, config.model_copy(update={"sigma": 4.0}), rng())  # raised to 1, the largest give back
    assert sizes.min() == 1
    assert sizes.sum() <= 101
    assert set(client_sizes(701, config.model_copy(update={"sigma": 0.0}), rng())) == {7}


# --- the other laws


def test_class_dirichlet_is_per_class() -> None:
    """Dir(0.1) over 5 clients: the biggest of 5 has over half of a class (0.76 in the mean), in every class."""
    labels = np.arange(20_000) % 10
    shares = counts_of(labels, make(labels, law="class_dirichlet", num_clients=5, alpha=0.1)) / 2000
    assert shares.sum(axis=0) == pytest.approx(np.ones(10))
    assert shares.max(axis=0).mean() == pytest.approx(0.76, abs=0.12)


def test_pathological_with_a_rare_class() -> None:
    """Class 9 has 3 samples: at most 3 of 40 clients hold it."""
    labels = np.array([9] * 3 + [row % 9 for row in range(997)])
    counts = counts_of(labels, make(labels, law="pathological", num_clients=40, classes_per_client=4)) > 0
    assert (counts.sum(axis=1) == 4).all()
    assert counts[:, 9].sum() == 3


def test_largest_remainder_by_hand() -> None:
    """10 in 1:1:1 is 3.33 each, the first gets the one left; 7 in 1:2:4 is exact; 5 in 1:2:4: 0.71, 1.43, 2.86."""
    assert largest_remainder(10, np.array([1, 1, 1])).tolist() == [4, 3, 3]
    assert largest_remainder(7, np.array([1, 2, 4])).tolist() == [1, 2, 4]
    assert largest_remainder(5, np.array([1, 2, 4])).tolist() == [1, 1, 3]
    assert largest_remainder(0, np.array([1.0, 2.0])).tolist() == [0, 0]


def test_clients_per_domain_by_hand() -> None:
    """10 clients, sizes 1, 9: 1 and 9. Sizes 1, 1, 98: 0.1 each lifts two to 1, 8 are left.

    Sizes 5, 3, 2 with 4 clients: 2, 1.2 and 0.8; the last is lifted, and 3 clients go 5:3, 1.875 and 1.125.
    """
    assert clients_per_domain(10, np.array([1, 9])).tolist() == [1, 9]
    assert clients_per_domain(10, np.array([1, 1, 98])).tolist() == [1, 1, 8]
    assert clients_per_domain(4, np.array([5, 3, 2])).tolist() == [2, 1, 1]
    assert clients_per_domain(3, np.array([5, 3, 2])).tolist() == [1, 1, 1]


def test_domain_and_natural_by_hand() -> None:
    """Domains of 6 and 3 samples and 3 clients: 2 clients of 3, and one of 3; 4 clients: 2.67 and 1.33 is 3 and 1."""
    columns = {"style": np.array(["b"] * 3 + ["a"] * 6, dtype=object)}
    parts = make(np.zeros(9, dtype=int), 0, columns, law="domain", column="style", num_clients=3)
    assert [len(part) for part in parts] == [3, 3, 3]
    assert parts[2].tolist() == [0, 1, 2]
    parts = make(np.zeros(9, dtype=int), 0, columns, law="domain", column="style", num_clients=4)
    assert [len(part) for part in parts] == [2, 2, 2, 3]
    parts = make(np.zeros(9, dtype=int), 0, columns, law="natural", column="style")
    assert [part.tolist() for part in parts] == [[3, 4, 5, 6, 7, 8], [0, 1, 2]]


# --- errors


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"num_clients": 31}, "num_clients 31 exceeds the 30 training samples; lower it"),
        ({"law": "pathological", "classes_per_client": 4}, "client 0 needs 4 classes, 3 .*; lower"),
        ({"law": "pathological", "num_clients": 30}, "needs 2 classes, . have samples left; lower"),
        ({"law": "shards", "num_clients": 20}, "needs 40 samples, got 30; lower partition.shards_per_client"),
        (
            {"law": "class_dirichlet", "num_clients": 10, "alpha": 0.01, "min_samples": 3},
            "min_samples=3; lower it or partition.num_clients, or raise partition.alpha",
        ),
        ({"law": "domain", "column": "style", "num_clients": 1}, "2 domains, but 1 clients; raise"),
        ({"law": "domain", "column": "artist"}, "unknown column 'artist'; .*allowed: odd, ratio, style"),
        ({"law": "natural", "column": "ratio"}, "'ratio' must hold whole numbers or strings"),
        ({"law": "natural", "column": "odd"}, "'odd' must hold whole numbers or strings"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_impossible_requests(config: dict[str, Any], expected: str) -> None:
    columns = {
        "style": np.arange(30) % 2,
        "ratio": np.linspace(0, 1, 30),
        "odd": np.array(["a", None] * 15, dtype=object),
    }
    with pytest.raises(InputError, match=expected) as error:
        make(np.arange(30) % 3, 0, columns, **config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"alpha": math.inf}, "finite"),
        ({"law": "linear"}, "should be 'iid'"),
        ({"sigma": 0.5}, "set sizes to 'lognormal'"),
        ({"sizes": "lognormal", "law": "shards"}, "goes with law iid or dirichlet, got shards"),
        ({"law": "natural"}, "needs partition.column"),
        ({"law": "file"}, "needs partition.file"),
    ],
)
def test_config_rejects(wrong: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValidationError, match=expected):
        PartitionConfig(**wrong)


# --- held back, noise, skew


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=12),
    share=st.floats(0, 0.999),
    seed=st.integers(0, 100),
)
def test_held_back(sizes: list[int], share: float, seed: int) -> None:
    total = sum(sizes)
    labels = rng(seed).integers(0, 4, size=total + 5)
    parts = [np.sort(part) for part in np.split(rng(seed).permutation(total + 5)[:total], np.cumsum(sizes)[:-1])]
    train, test = hold_back(parts, labels, share, rng(seed))
    for part, kept, held in zip(parts, train, test, strict=True):
        assert len(held) == min(round(share * len(part)), max(len(part) - 1, 0))
        assert np.array_equal(np.sort(np.concatenate([kept, held])), part)
        assert kept.dtype == held.dtype == np.int64
        assert (np.diff(kept) > 0).all()
        assert (np.diff(held) > 0).all()
        exact = np.bincount(labels[part], minlength=4) * (len(held) / max(len(part), 1))
        assert (np.abs(np.bincount(labels[held], minlength=4) - exact) < 1).all()


def test_held_back_by_hand() -> None:
    """Of 6, 3 and 1 samples of three classes 40% are 4: 2.4, 1.2 and 0.4; the one left goes to a 0.4."""
    labels = np.array([0] * 6 + [1] * 3 + [2])
    found = set()
    for seed in range(20):
        (_,), (test,) = hold_back([np.arange(10)], labels, 0.4, rng(seed))
        found.add(tuple(np.bincount(labels[test], minlength=3)))
    assert found == {(3, 1, 0), (2, 1, 1)}
    train, test = hold_back([np.array([2]), np.array([0, 1])], np.zeros(3, dtype=int), 0.99, rng())
    assert [len(part) for part in train] == [1, 1]  # one sample always stays
    assert [len(part) for part in test] == [0, 1]


def test_noise_levels_by_hand() -> None:
    assert noise_levels(4, 0.2) == pytest.approx([0.05, 0.1, 0.15, 0.2])
    assert noise_levels(3, 0.0).tolist() == [0, 0, 0]


def test_skew_by_hand() -> None:
    """Laws (1, 0) and (1/2, 1/2); overall (3/4, 1/4): distances 1/4 and 1/4; effective classes 1 and 2."""
    measured = skew(np.array([[4, 0], [2, 2], [0, 0]]))
    assert measured["total_variation"] == pytest.approx(0.25)
    assert measured["effective_classes"] == pytest.approx(1.5)
    assert (measured["size_min"], measured["size_max"]) == (0, 4)
    assert measured["size_mean"] == pytest.approx(8 / 3)
    assert measured["empty_clients"] == 1
