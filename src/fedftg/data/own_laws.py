"""Laws that are written here, and the arithmetic of shares that they have in common."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedftg.errors import InputError

Indices = NDArray[np.int64]
Floats = NDArray[np.float64]


def dirichlet_draws(num_draws: int, num_parts: int, alpha: float, rng: np.random.Generator) -> Floats:
    """Draws ``(num_draws, num_parts)`` of ``Dir(alpha)``; where an extreme alpha leaves floats' range, its limit."""
    with np.errstate(all="ignore"):
        proportions = rng.dirichlet(np.full(num_parts, alpha), size=num_draws)
    broken = ~(np.isfinite(proportions).all(axis=1) & (proportions.sum(axis=1) > 0.5))
    if broken.any():
        one_part = np.eye(num_parts)[rng.integers(num_parts, size=num_draws)]
        limit = one_part if alpha < 1 else np.full((num_draws, num_parts), 1 / num_parts)
        proportions[broken] = limit[broken]
    return proportions


def largest_remainder(total: int, weights: NDArray[np.integer] | Floats) -> Indices:
    """Whole numbers that sum to ``total``, as ``weights`` ``(K,)`` do; the first of equal remainders wins."""
    exact = np.asarray(weights, dtype=np.float64) * (total / float(np.sum(weights)))
    parts: Indices = np.floor(exact).astype(np.int64)
    parts[np.argsort(-(exact - parts), kind="stable")[: total - int(parts.sum())]] += 1
    return parts


def quantity(num_samples: int, num_clients: int, alpha: float, rng: np.random.Generator) -> list[Indices]:
    """Samples at random, sizes by ``Dir(alpha)``: quantity skew of NIID-Bench (Li et al., ICDE 2022).

    Everybody gets one sample, and the rest is divided in the drawn proportions, so that all samples are used and nobody
    is without; NIID-Bench draws again until everybody has 10, which may never end.
    """
    shares = dirichlet_draws(1, num_clients, alpha, rng)[0]
    sizes = 1 + largest_remainder(num_samples - num_clients, shares)
    return _cut(rng.permutation(num_samples), sizes)


def domain(domains: Indices, num_clients: int, rng: np.random.Generator) -> list[Indices]:
    """Each client holds samples of one domain, and clients are numbered domain by domain.

    Domains get clients in proportion to their sizes, at least one each. Inside a domain samples are dealt at random;
    all are used, so sizes differ by at most one.

    Args:
        domains: ``(N,)``, numbers from 0 without gaps.
        num_clients: at most N.
        rng: the only source of randomness.

    Raises:
        InputError: fewer clients than domains.
    """
    sizes = np.bincount(domains)
    if num_clients < len(sizes):
        raise InputError(
            f"law domain needs a client for each of the {len(sizes)} domains, got {num_clients}; raise "
            f"partition.num_clients to at least {len(sizes)}, or divide by another partition.column"
        )
    shuffled = rng.permutation(len(domains))
    by_domain = np.split(shuffled[np.argsort(domains[shuffled], kind="stable")], np.cumsum(sizes)[:-1])
    clients = clients_per_domain(num_clients, sizes)
    return [
        np.sort(part)
        for rows, count in zip(by_domain, clients, strict=True)
        for part in np.array_split(rows, int(count))
    ]


def clients_per_domain(num_clients: int, sizes: NDArray[np.integer]) -> Indices:
    """How many clients each domain gets, ``(D,)``: in proportion to ``sizes``, at least one, by largest remainder.

    Domains whose part is below one get one, and the rest share what is left; so no domain gets more clients than it has
    samples as long as there are not more clients than samples.
    """
    given = np.ones(len(sizes), dtype=np.int64)
    open_ = np.ones(len(sizes), dtype=bool)
    while open_.any():
        left = num_clients - int((~open_).sum())
        # Integers, so that a part of exactly one is not below one by rounding.
        small = open_ & (sizes * left < sizes[open_].sum())
        if not small.any():
            given[open_] = largest_remainder(left, sizes[open_])
            break
        open_ &= ~small
    return given


def deal_classes(labels: Indices, num_clients: int, classes_per_client: int, rng: np.random.Generator) -> list[Indices]:
    """Each client holds ``classes_per_client`` classes, chosen at random so that all are chosen equally often.

    A class with too few samples to give one to each is chosen less often. All classes are used where there are places
    enough, and a division is found whenever there is one. A class is divided equally among those that hold it.

    Raises:
        InputError: there are more places than the classes' samples can fill.
    """
    sizes = np.bincount(labels)
    places = num_clients * classes_per_client
    room = int(np.minimum(sizes, num_clients).sum())
    if places > room:
        raise InputError(
            f"law pathological needs {places} samples in different places ({num_clients} clients with "
            f"{classes_per_client} classes each), but the classes' sizes allow only {room}; lower "
            "partition.num_clients or partition.classes_per_client"
        )
    left = class_places(places, np.minimum(sizes, num_clients), rng)
    holds = np.zeros((num_clients, len(sizes)), dtype=bool)
    for served, client in enumerate(rng.permutation(num_clients)):
        # A class that must go to every client still to come is taken; of the others, those with more places are
        # likelier. At most classes_per_client are forced, for the places left are that many a client.
        with np.errstate(divide="ignore"):
            keys = np.log(left) + rng.gumbel(size=len(sizes))
        keys[left == num_clients - served] = np.inf
        taken = np.argpartition(-keys, classes_per_client - 1)[:classes_per_client]
        holds[client, taken] = True
        left[taken] -= 1
    shuffled = rng.permutation(len(labels))
    by_class = np.split(shuffled[np.argsort(labels[shuffled], kind="stable")], np.cumsum(sizes)[:-1])
    owners, rows = [], []
    for of_class, samples in zip(holds.T, by_class, strict=True):
        holders = np.flatnonzero(of_class)
        if len(holders):
            rows.append(samples)
            owners.append(holders[np.arange(len(samples)) % len(holders)])
    owner, row = np.concatenate(owners), np.concatenate(rows)
    order = np.lexsort((row, owner))
    return np.split(row[order], np.cumsum(np.bincount(owner, minlength=num_clients))[:-1])


def class_places(total: int, most: NDArray[np.integer], rng: np.random.Generator) -> Indices:
    """How many clients hold each class, ``(C,)``: sums to ``total``, at most ``most`` each, otherwise all alike.

    ``total`` is at most the sum of ``most``. Who gets one more where it does not come out even is random.
    """
    places = np.zeros(len(most), dtype=np.int64)
    order = np.lexsort((rng.random(len(most)), most))
    for done, klass in enumerate(order):
        places[klass] = min(int(most[klass]), (total - int(places.sum())) // (len(most) - done))
    return places


def _cut(rows: NDArray[np.integer], sizes: Indices) -> list[Indices]:
    return [np.sort(part).astype(np.int64) for part in np.split(rows, np.cumsum(sizes)[:-1])]
