import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedftg.data import PartitionConfig, partition, skew
from fedftg.data.partition import client_sizes
from fedftg.errors import InputError


def check_disjoint(parts, num_samples):
    together = np.concatenate(parts)
    assert len(np.unique(together)) == len(together)
    assert together.min() >= 0
    assert together.max() < num_samples
    for part in parts:
        assert part.dtype == np.int64
        assert (np.diff(part) > 0).all()


@settings(max_examples=150, deadline=None)
@given(
    labels=st.lists(st.integers(0, 12), min_size=1, max_size=300),
    share=st.floats(0, 1),
    alpha_exponent=st.floats(-3, 3),
    law=st.sampled_from(["iid", "dirichlet"]),
    sigma=st.sampled_from([0.0, 0.5, 5.0, 1000.0]),
    seed=st.integers(0, 2**32),
)
def test_every_sample_at_most_once_and_sizes_as_asked(labels, share, alpha_exponent, law, sigma, seed):
    labels = np.array(labels)
    clients = max(1, round(share * len(labels)))
    sizes = "lognormal" if sigma else "equal"
    config = PartitionConfig(law=law, num_clients=clients, alpha=10**alpha_exponent, sizes=sizes, sigma=sigma)
    parts = partition(labels, config, np.random.default_rng(seed))
    assert len(parts) == clients
    check_disjoint(parts, len(labels))
    lengths = [len(part) for part in parts]
    assert min(lengths) >= 1
    if sigma == 0:
        assert set(lengths) == {len(labels) // clients}
    assert sum(lengths) <= (len(labels) // clients) * clients


@pytest.mark.parametrize("alpha", [1e-300, 1e-12, 1e-3, 1e3, 1e12, 1e300])
def test_extreme_alphas_terminate(alpha):
    labels = np.arange(1000) % 10
    parts = partition(labels, PartitionConfig(num_clients=50, alpha=alpha), np.random.default_rng(0))
    check_disjoint(parts, 1000)
    assert sum(map(len, parts)) == 1000


def test_same_seed_same_parts_other_seed_other_parts():
    labels = np.arange(500) % 10
    config = PartitionConfig(num_clients=10)
    first, again, other = (partition(labels, config, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_remainder_is_not_used():
    parts = partition(np.zeros(23, dtype=int), PartitionConfig(num_clients=5, law="iid"), np.random.default_rng(0))
    assert [len(part) for part in parts] == [4] * 5


def test_one_client_holds_all_and_num_samples_clients_hold_one_each():
    labels = np.arange(40) % 4
    (only,) = partition(labels, PartitionConfig(num_clients=1), np.random.default_rng(0))
    assert np.array_equal(only, np.arange(40))
    singles = partition(labels, PartitionConfig(num_clients=40), np.random.default_rng(0))
    assert sorted(int(part[0]) for part in singles) == list(range(40))


def test_more_clients_than_samples_says_what_to_do():
    with pytest.raises(InputError, match=r"partition\.num_clients is 11, but there are only 10 .*use at most 10"):
        partition(np.zeros(10, dtype=int), PartitionConfig(num_clients=11), np.random.default_rng(0))


def counts_of(labels, parts):
    return np.stack([np.bincount(labels[part], minlength=labels.max() + 1) for part in parts])


def test_alpha_orders_skew():
    labels = np.arange(20_000) % 10
    measured = []
    for alpha in (0.05, 0.3, 1.0, 100.0):
        parts = partition(labels, PartitionConfig(num_clients=20, alpha=alpha), np.random.default_rng(0))
        measured.append(skew(counts_of(labels, parts))["total_variation"])
    assert measured == sorted(measured, reverse=True)
    assert measured[0] > 0.6
    assert measured[-1] < 0.06


def test_proportions_follow_the_dirichlet_law_while_pools_last():
    """Among 400 clients of alpha 5 the pools last nearly to the end, so shares are Dir(5) plus counting noise.

    With C = 4 and a = 5: Var q = (1/4)(3/4)/(20 + 1) = 0.00893; a multinomial of n adds (E[q] - E[q^2])/n with
    E[q^2] = 0.00893 + 1/16, so 0.1786/n.
    """
    labels = np.arange(40_000) % 4
    config = PartitionConfig(num_clients=400, alpha=5.0)
    shares = []
    for seed in range(5):
        counts = counts_of(labels, partition(labels, config, np.random.default_rng(seed)))
        shares.append(counts / counts.sum(axis=1, keepdims=True))
    variance = np.concatenate(shares).var()
    assert variance == pytest.approx(0.00893 + 0.1786 / 100, rel=0.1)


def test_no_client_is_served_last():
    """Everybody's skew is alike: the last tenth of the clients gets no more leftovers than the first."""
    labels = np.arange(10_000) % 10
    first, last = [], []
    for seed in range(5):
        parts = partition(labels, PartitionConfig(num_clients=100, alpha=0.3), np.random.default_rng(seed))
        counts = counts_of(labels, parts)
        first.append(skew(counts[:20])["effective_classes"])
        last.append(skew(counts[-20:])["effective_classes"])
    assert np.mean(first) == pytest.approx(np.mean(last), rel=0.15)


def test_classes_used_up_give_what_is_left():
    """Ninety samples of class 0, ten of class 1, one client per sample: all are handed out whatever is wanted."""
    labels = np.array([0] * 90 + [1] * 10)
    parts = partition(labels, PartitionConfig(num_clients=100, alpha=1e-3), np.random.default_rng(0))
    assert sorted(np.concatenate(parts)) == list(range(100))


def test_missing_class_in_the_middle():
    labels = np.array([0, 0, 0, 5, 5, 5])
    parts = partition(labels, PartitionConfig(num_clients=2, alpha=0.1), np.random.default_rng(0))
    check_disjoint(parts, 6)


def test_lognormal_sizes_spread_and_keep_the_sum():
    config = PartitionConfig(num_clients=100, sizes="lognormal", sigma=1.0)
    sizes = client_sizes(50_000, config, np.random.default_rng(0))
    assert sizes.min() >= 1
    assert 49_900 <= sizes.sum() <= 50_000
    assert np.log(sizes).std() == pytest.approx(1.0, rel=0.25)


def test_lognormal_with_a_sample_each_left_to_give():
    config = PartitionConfig(num_clients=100, sizes="lognormal", sigma=4.0)
    sizes = client_sizes(101, config, np.random.default_rng(0))
    assert sizes.min() == 1
    assert sizes.sum() <= 101


def test_lognormal_with_sigma_zero_is_equal():
    config = PartitionConfig(num_clients=7, sizes="lognormal", sigma=0.0)
    assert set(client_sizes(100, config, np.random.default_rng(0))) == {14}


@pytest.mark.parametrize(("clients", "classes"), [(100, 10), (100, 100), (10_000, 100)])
def test_fast_enough(clients, classes):
    labels = np.arange(50_000) % classes
    start = time.perf_counter()
    partition(labels, PartitionConfig(num_clients=clients), np.random.default_rng(0))
    assert time.perf_counter() - start < 60


@pytest.mark.parametrize(
    "wrong",
    [{"alpha": 0}, {"alpha": -1}, {"alpha": math.inf}, {"num_clients": 0}, {"sigma": -1}, {"law": "x"}, {"a": 1}],
)
def test_config_refuses(wrong):
    with pytest.raises(ValidationError):
        PartitionConfig(**wrong)


def test_sigma_without_lognormal_sizes_is_a_mistake():
    with pytest.raises(ValidationError, match="set sizes to 'lognormal'"):
        PartitionConfig(sigma=0.5)


def test_skew_by_hand():
    """Laws (1, 0) and (1/2, 1/2); overall (3/4, 1/4): distances 1/4 and 1/4; effective classes 1 and 2."""
    measured = skew(np.array([[4, 0], [2, 2], [0, 0]]))
    assert measured["total_variation"] == pytest.approx(0.25)
    assert measured["effective_classes"] == pytest.approx(1.5)
    assert (measured["size_min"], measured["size_max"]) == (0, 4)
    assert measured["size_mean"] == pytest.approx(8 / 3)
    assert measured["empty_clients"] == 1
    assert list(measured)[-1] == "empty_clients"


def test_skew_of_nothing():
    with pytest.raises(ValueError, match="at least one client"):
        skew(np.zeros((2, 3), dtype=int))
