"""Every partition law: what holds for all of them, what each promises, and what an impossible request is told."""

import builtins
import json
import sys
import time
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedftg.data import PartitionConfig, partition, skew
from fedftg.data.config import Law
from fedftg.data.own_laws import class_places, clients_per_domain, deal_classes, largest_remainder, quantity
from fedftg.data.partition import LAWS, describe, hold_back, needed_columns, noise_levels
from fedftg.errors import InputError

WHOLE = {"class_dirichlet", "quantity", "linear", "square", "exponential", "natural", "domain"}
"""Laws that use every sample."""
MAY_BE_EMPTY = {"class_dirichlet"}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def check(parts: list[Any], num_samples: int, law: str) -> None:
    together = np.concatenate(parts)
    assert len(np.unique(together)) == len(together)
    assert together.min() >= 0
    assert together.max() < num_samples
    for part in parts:
        assert part.dtype == np.int64
        assert (np.diff(part) > 0).all()
        assert len(part) or law in MAY_BE_EMPTY
    if law in WHOLE:
        assert len(together) == num_samples


def counts_of(labels: Any, parts: list[Any]) -> Any:
    return np.stack([np.bincount(labels[part], minlength=labels.max() + 1) for part in parts])


@settings(max_examples=300, deadline=None)
@given(
    labels=st.lists(st.integers(0, 12), min_size=1, max_size=120),
    share=st.floats(0, 1.2),
    alpha_exponent=st.floats(-300, 300),
    law=st.sampled_from(sorted(set(get_args(Law)) - {"file"})),
    number=st.integers(1, 14),
    min_samples=st.integers(0, 3),
    strings=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_each_sample_at_most_once_or_advice(
    labels: list[int],
    share: float,
    alpha_exponent: float,
    law: str,
    number: int,
    min_samples: int,
    strings: bool,
    seed: int,
) -> None:
    """Whatever is asked: a division that keeps the promises, twice the same, or one line that says what to change."""
    values = np.array(labels)
    groups = (values * 7 + np.arange(len(values))) % 5
    config = PartitionConfig(
        law=law, num_clients=max(1, round(share * len(values))), alpha=10**alpha_exponent, min_samples=min_samples,
        classes_per_client=number, shards_per_client=number, column="group",
    )  # fmt: skip
    columns = {"group": np.array([f"g{group}" for group in groups]) if strings else groups}
    try:
        parts = partition(values, config, rng(seed), columns)
    except InputError:
        assert law not in ("iid", "dirichlet", "quantity") or config.num_clients > len(values)
        with pytest.raises(InputError, match=r"^[^\n]*; [^\n]*$"):
            partition(values, config, rng(seed), columns)
        return
    check(parts, len(values), law)
    again = partition(values, config, rng(seed), columns)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
    assert len(parts) == (len(np.unique(groups)) if law == "natural" else config.num_clients)
    sizes = [len(part) for part in parts]
    if law == "pathological":
        assert ((counts_of(values, parts) > 0).sum(axis=1) == number).all()
        if config.num_clients * number >= len(set(labels)):
            assert sum(sizes) == len(values)
    if law == "shards":
        assert set(sizes) == {number * (len(values) // (number * config.num_clients))}
    if law in ("linear", "square", "exponential"):
        assert sizes == sorted(sizes)
    if law == "class_dirichlet":
        assert min(sizes) >= min_samples
    if law in ("domain", "natural"):
        assert all(len(set(groups[part])) == 1 for part in parts)


def test_other_seed_other_parts() -> None:
    labels = np.arange(600) % 10
    columns = {"group": np.arange(600) % 4}
    for law in sorted(set(LAWS) - {"file", "natural"}):
        config = PartitionConfig(law=law, num_clients=6, column="group")
        first, other = (partition(labels, config, rng(seed), columns) for seed in (3, 4))
        assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True)), law


def test_position_in_the_file_does_not_matter() -> None:
    """Cut consecutive rows of a class, and client 0 gets the first ones: mean position 0.1 instead of 0.5."""
    labels = np.repeat(np.arange(4), 1000)
    for law in ("class_dirichlet", "pathological", "shards", "linear", "quantity"):
        config = PartitionConfig(law=law, num_clients=8, alpha=100, classes_per_client=2)
        for part in partition(labels, config, rng()):
            assert np.mean(part % 1000) == pytest.approx(500, abs=150), law


def test_every_law_has_its_line() -> None:
    assert set(LAWS) == set(get_args(Law))
    assert all("\n" not in line for line in LAWS.values())
    for law in LAWS:
        text = describe(PartitionConfig(law=law, column="c", file="f.json", feature_noise=0.1, test_share=0.2))
        assert text.startswith(law)
        assert text.endswith(", feature noise up to 0.1, 20% held back")


def test_needed_columns() -> None:
    assert needed_columns(PartitionConfig(law="domain", column="style")) == ("style",)
    assert needed_columns(PartitionConfig(column="style")) == ()


# --- flwr-datasets' laws


def test_class_dirichlet_is_per_class() -> None:
    """Dir(0.1) over 5 clients: the biggest of 5 has over half of a class (0.76 in the mean), in every class."""
    labels = np.arange(20_000) % 10
    parts = partition(labels, PartitionConfig(law="class_dirichlet", num_clients=5, alpha=0.1), rng())
    shares = counts_of(labels, parts) / 2000
    assert shares.sum(axis=0) == pytest.approx(np.ones(10))
    assert shares.max(axis=0).mean() == pytest.approx(0.76, abs=0.12)


def test_class_dirichlet_draws_again_for_small_clients() -> None:
    labels = np.arange(1000) % 10
    config = PartitionConfig(law="class_dirichlet", num_clients=10, alpha=0.3, min_samples=20)
    for seed in range(10):
        assert min(len(part) for part in partition(labels, config, rng(seed))) >= 20


def test_sizes_that_grow_by_hand() -> None:
    """100 samples, 4 clients: 1:2:3:4 is 10, 20, 30, 40. 1:4:9:16 of 30 is 3.3, 13.3, 30, 53.3, the last gets 54.
    e^k: e^(k-4) (1 - 1/e) / (1 - e^-4) is .0321, .0871, .2369, .6439; the last gets 66."""
    labels = np.zeros(100, dtype=int)
    sizes = {
        law: [len(part) for part in partition(labels, PartitionConfig(law=law, num_clients=4), rng())]
        for law in ("linear", "square", "exponential")
    }
    assert sizes == {"linear": [10, 20, 30, 40], "square": [3, 13, 30, 54], "exponential": [3, 8, 23, 66]}


def test_most_clients_of_the_advice_do_it() -> None:
    labels = np.zeros(5000, dtype=int)
    for law in ("linear", "square", "exponential"):
        with pytest.raises(InputError, match="at most") as told:
            partition(labels, PartitionConfig(law=law, num_clients=5000), rng())
        most = int(str(told.value).split("at most ")[1].split()[0])
        assert len(partition(labels, PartitionConfig(law=law, num_clients=most), rng())) == most
        with pytest.raises(InputError, match=f"at most {most} "):
            partition(labels, PartitionConfig(law=law, num_clients=most + 1), rng())


def test_shards_hold_at_most_one_class_more_than_they_are() -> None:
    labels = rng().permutation(np.arange(1000) % 10)
    parts = partition(labels, PartitionConfig(law="shards", num_clients=50), rng())
    counts = counts_of(labels, parts)
    assert (counts.sum(axis=1) == 20).all()
    assert ((counts > 0).sum(axis=1) <= 2).all()  # 100 shards of 10 in classes of 100: none crosses a border


@pytest.mark.parametrize(("clients", "k"), [(5, 2), (4, 3), (10, 1), (100, 10), (50, 9), (200, 5)])
def test_pathological_uses_all_classes_and_samples(clients: int, k: int) -> None:
    """Also with fewer clients than classes, with all classes for all, and at one sample a place (200 x 5 = 1000)."""
    labels = rng().permutation(np.arange(1000) % 10)
    for seed in range(5):
        parts = partition(labels, PartitionConfig(law="pathological", num_clients=clients, classes_per_client=k),
                          rng(seed))  # fmt: skip
        check(parts, 1000, "pathological")
        assert sum(map(len, parts)) == 1000
        assert ((counts_of(labels, parts) > 0).sum(axis=1) == k).all()


def test_natural_clients_are_ascending() -> None:
    labels = np.zeros(6, dtype=int)
    columns = {"writer": np.array(["b", "a", "c", "a", "b", "b"], dtype=object)}
    parts = partition(labels, PartitionConfig(law="natural", column="writer"), rng(), columns)
    assert [part.tolist() for part in parts] == [[1, 3], [0, 4, 5], [2]]


def test_nothing_is_printed_or_written_and_bars_are_as_before(
    capfd: pytest.CaptureFixture[str], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    columns = {"group": np.arange(300) % 4}
    datasets.enable_progress_bars()
    for law in ("natural", "shards", "class_dirichlet"):
        partition(np.arange(300) % 3, PartitionConfig(law=law, num_clients=3, column="group"), rng(), columns)
    assert not datasets.are_progress_bars_disabled()
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_partitioners_without_the_private_list_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    partitioners = pytest.importorskip("flwr_datasets.partitioner")
    labels = rng().permutation(np.arange(60) % 3)
    config = PartitionConfig(law="shards", num_clients=5)
    expected = partition(labels, config, rng())

    class Renamed(partitioners.ShardPartitioner):  # type: ignore[name-defined, misc]
        def __getattribute__(self, name: str) -> Any:
            if name == "_partition_id_to_indices" and sys._getframe(1).f_code.co_name == "_assignment":
                raise AttributeError(name)
            return super().__getattribute__(name)

    monkeypatch.setattr(partitioners, "ShardPartitioner", Renamed)
    found = partition(labels, config, rng())
    assert all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True))


def test_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name.split(".")[0] == "flwr_datasets":
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"pip install 'fedftg\[data\]'"):
        partition(np.zeros(10, dtype=int), PartitionConfig(law="shards", num_clients=2), rng())
    assert len(partition(np.zeros(10, dtype=int), PartitionConfig(law="quantity", num_clients=2), rng())) == 2


# --- our own laws


def test_largest_remainder_by_hand() -> None:
    """10 in 1:1:1 is 3.33 each, the first gets the one left; 7 in 1:2:4 is exact; 5 in 1:2:4: 0.71, 1.43, 2.86."""
    assert largest_remainder(10, np.array([1, 1, 1])).tolist() == [4, 3, 3]
    assert largest_remainder(7, np.array([1, 2, 4])).tolist() == [1, 2, 4]
    assert largest_remainder(5, np.array([1, 2, 4])).tolist() == [1, 1, 3]
    assert largest_remainder(0, np.array([1.0, 2.0])).tolist() == [0, 0]


def test_quantity_sizes_by_hand() -> None:
    """Everybody gets 1 of 13, and the other 10 go out in the drawn proportions: 1, 2 and 7 of 10."""

    class Drawn:
        def dirichlet(self, alpha: Any, size: int) -> Any:
            return np.array([[0.1, 0.2, 0.7]])

        def permutation(self, count: int) -> Any:
            return np.arange(count)[::-1]

    parts = quantity(13, 3, 1.0, Drawn())  # type: ignore[arg-type]
    assert [part.tolist() for part in parts] == [[11, 12], [8, 9, 10], [0, 1, 2, 3, 4, 5, 6, 7]]


def test_quantity_follows_alpha() -> None:
    labels = np.arange(20_000) % 10
    spread = []
    for alpha in (0.1, 1.0, 100.0):
        parts = partition(labels, PartitionConfig(law="quantity", num_clients=20, alpha=alpha), rng())
        sizes = np.array([len(part) for part in parts])
        spread.append(sizes.std() / 1000)
        big = counts_of(labels, parts)[sizes > 200]
        assert skew(big)["total_variation"] < 0.12
    # Var of a share is (1/K)(1 - 1/K)/(K alpha + 1): 20 sqrt(0.0475/(20 alpha + 1)) is 2.5, 0.95 and 0.097.
    assert spread == [pytest.approx(2.5, rel=0.5), pytest.approx(0.95, rel=0.5), pytest.approx(0.097, rel=0.5)]


def test_clients_per_domain_by_hand() -> None:
    """10 clients, sizes 1, 9: 1 and 9. Sizes 1, 1, 98: 0.1 each lifts two to 1, 8 are left.

    Sizes 5, 3, 2 with 4 clients: 2, 1.2 and 0.8; the last is lifted, and 3 clients go 5:3, 1.875 and 1.125.
    """
    assert clients_per_domain(10, np.array([1, 9])).tolist() == [1, 9]
    assert clients_per_domain(10, np.array([1, 1, 98])).tolist() == [1, 1, 8]
    assert clients_per_domain(4, np.array([5, 3, 2])).tolist() == [2, 1, 1]
    assert clients_per_domain(3, np.array([5, 3, 2])).tolist() == [1, 1, 1]


@settings(max_examples=200, deadline=None)
@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=12), share=st.floats(0, 1))
def test_no_domain_gets_more_clients_than_samples(sizes: list[int], share: float) -> None:
    clients = len(sizes) + round(share * (sum(sizes) - len(sizes)))
    given_ = clients_per_domain(clients, np.array(sizes))
    assert given_.sum() == clients
    assert (given_ >= 1).all()
    assert (given_ <= np.array(sizes)).all()


def test_domain_by_hand() -> None:
    """Domains of 6 and 3 samples and 3 clients: 2 clients of 3, and one of 3; 4 clients: 2.67 and 1.33 is 3 and 1."""
    labels = np.zeros(9, dtype=int)
    columns = {"style": np.array(["b"] * 3 + ["a"] * 6)}
    parts = partition(labels, PartitionConfig(law="domain", column="style", num_clients=3), rng(), columns)
    assert [len(part) for part in parts] == [3, 3, 3]
    assert parts[2].tolist() == [0, 1, 2]
    parts = partition(labels, PartitionConfig(law="domain", column="style", num_clients=4), rng(), columns)
    assert [len(part) for part in parts] == [2, 2, 2, 3]


def test_class_places_by_hand() -> None:
    """10 places over classes that allow 1, 9, 9 and 9: one for the first, three each for the rest."""
    assert class_places(10, np.array([9, 1, 9, 9]), rng()).tolist() == [3, 1, 3, 3]
    assert sorted(class_places(5, np.array([9, 9]), rng()).tolist()) == [2, 3]
    assert class_places(4, np.array([2, 0, 2]), rng()).tolist() == [2, 0, 2]


@settings(max_examples=150, deadline=None)
@given(
    labels=st.lists(st.integers(0, 8), min_size=1, max_size=80),
    clients=st.integers(1, 40),
    k=st.integers(1, 9),
    seed=st.integers(0, 100),
)
def test_classes_are_dealt_wherever_it_is_possible(labels: list[int], clients: int, k: int, seed: int) -> None:
    values = np.array(labels)
    room = int(np.minimum(np.bincount(values), clients).sum())
    if clients * k > room:
        with pytest.raises(InputError, match=f"allow only {room}"):
            deal_classes(values, clients, k, rng(seed))
        return
    parts = deal_classes(values, clients, k, rng(seed))
    assert ((counts_of(values, parts) > 0).sum(axis=1) == k).all()


# --- errors


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"law": "pathological", "classes_per_client": 4}, "classes_per_client is 4, but .* 3 classes; use at most 3"),
        ({"law": "pathological", "num_clients": 30, "classes_per_client": 2}, "needs 60 samples .* only 30; lower"),
        ({"law": "shards", "num_clients": 20}, "needs 40 shards .* only 30 .*; lower partition.shards_per_client"),
        ({"law": "shards", "num_clients": 31}, "num_clients is 31, but there are only 30"),
        ({"law": "class_dirichlet", "num_clients": 10, "alpha": 0.01, "min_samples": 3}, "found no division .* raise"),
        ({"law": "class_dirichlet", "num_clients": 10, "min_samples": 4}, "found no division .* lower"),
        ({"law": "exponential", "num_clients": 30}, "at most 3 clients; lower partition.num_clients"),
        ({"law": "linear", "num_clients": 8}, "at most 7 clients"),
        ({"law": "domain", "column": "style", "num_clients": 1}, "each of the 2 domains, got 1; raise"),
        (
            {"law": "domain", "column": "artist"},
            r"'artist', which .* \(it has odd, ratio, short, style\); name another",
        ),
        ({"law": "natural", "column": "short"}, r"shape \(29,\); it needs one value for each of the 30"),
        ({"law": "natural", "column": "ratio"}, "type float64; it must hold whole numbers or strings"),
        ({"law": "natural", "column": "odd"}, "type object; it must hold whole numbers or strings"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_impossible_requests(config: dict[str, Any], told: str) -> None:
    columns = {
        "style": np.arange(30) % 2,
        "short": np.arange(29),
        "ratio": np.linspace(0, 1, 30),
        "odd": np.array(["a", None] * 15, dtype=object),
    }
    with pytest.raises(InputError, match=told) as error:
        partition(np.arange(30) % 3, PartitionConfig(**config), rng(), columns)
    assert "\n" not in str(error.value)


def test_no_columns_at_all() -> None:
    with pytest.raises(InputError, match="it has no further columns"):
        partition(np.zeros(3, dtype=int), PartitionConfig(law="natural", column="x"), rng())


# --- held back, noise


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
    seen = set()
    for seed in range(20):
        (_,), (test,) = hold_back([np.arange(10)], labels, 0.4, rng(seed))
        seen.add(tuple(np.bincount(labels[test], minlength=3)))
    assert seen == {(3, 1, 0), (2, 1, 1)}


def test_nothing_held_back() -> None:
    parts = [np.array([1, 4, 5]), np.array([], dtype=np.int64)]
    train, test = hold_back(parts, np.arange(6) % 2, 0.0, rng())
    assert [part.tolist() for part in train] == [[1, 4, 5], []]
    assert [part.tolist() for part in test] == [[], []]


def test_one_sample_stays() -> None:
    train, test = hold_back([np.array([2]), np.array([0, 1])], np.zeros(3, dtype=int), 0.99, rng())
    assert [len(part) for part in train] == [1, 1]
    assert [len(part) for part in test] == [0, 1]


def test_noise_levels_by_hand() -> None:
    assert noise_levels(4, 0.2) == pytest.approx([0.05, 0.1, 0.15, 0.2])
    assert noise_levels(3, 0.0).tolist() == [0, 0, 0]


# --- time


@pytest.mark.slow
@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("law", sorted(set(LAWS) - {"file"}))
def test_fast_enough(law: str, classes: int) -> None:
    """Also the answer that it cannot be done, which linear, square and exponential give for so many clients.

    In seconds of this process, and ten times what a slow machine takes: what is quadratic in clients takes hours."""
    labels = np.arange(50_000) % classes
    columns = {"column": np.arange(50_000) % (10_000 if law == "natural" else 6)}
    config = PartitionConfig(law=law, num_clients=10_000, column="column")
    start = time.process_time()
    try:
        parts = partition(labels, config, rng(), columns)
        assert len(parts) == 10_000
    except InputError:
        assert law in ("linear", "square", "exponential")
        parts = partition(labels, config.model_copy(update={"num_clients": 10}), rng(), columns)
    train, _ = hold_back(parts, labels, 0.2, rng())
    assert len(train) == len(parts)
    assert time.process_time() - start < 60
