"""Who holds what: every partition law, what clients hold back, measures of skew, and partition.json.

A law is a function ``(values, config, rng)`` that returns one ascending list of rows per client. ``values`` ``(N,)``
are the labels or, for the laws domain and natural, numbers from 0 for the values of the column. ``class_dirichlet``,
``pathological`` and ``shards`` make the same draws in the same order as the partitioners of flwr-datasets 0.6 on
shuffled rows, so they give the same partitions.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedftg.data.config import PartitionConfig
from fedftg.errors import InputError

Indices = NDArray[np.int64]
Floats = NDArray[np.float64]

_REDRAWS = 10
"""Of class_dirichlet, as in flwr-datasets."""

_MOST_DRAWS = 100_000
"""Of pathological's redrawn classes; beyond it classes are dealt evenly instead, which needs no redraws."""

_NO_COLUMNS: Mapping[str, NDArray[Any]] = MappingProxyType({})


def partition(
    labels: NDArray[np.integer],
    config: PartitionConfig,
    rng: np.random.Generator,
    columns: Mapping[str, NDArray[Any]] = _NO_COLUMNS,
) -> list[Indices]:
    """Returns disjoint, ascending lists of rows of ``labels`` ``(N,)``, one per client.

    Every client holds at least one sample, except with the laws class_dirichlet and file. All samples are used, except
    with iid and dirichlet (at most ``N // num_clients`` a client, as in the paper's setting), shards (``N // shards`` a
    shard), pathological with fewer places than classes, and file.

    Args:
        labels: the class of each sample, integers >= 0, at least one.
        config: the law and its settings; ``alpha`` 0.1 is very skewed, 100 nearly IID.
        rng: the only source of randomness: the same state gives the same partition.
        columns: further values ``(N,)`` of each sample; the laws domain and natural need ``config.column``.

    Raises:
        InputError: the law cannot be met: more clients than samples, a missing column, ...; says what to change.
    """
    values: Indices = np.asarray(labels).astype(np.int64)
    if config.law not in ("natural", "file") and config.num_clients > len(values):
        raise InputError(
            f"partition.num_clients is {config.num_clients}, but there are only {len(values)} training samples; "
            f"use at most {len(values)} clients, or more data"
        )
    if needed_columns(config):
        values = _numbered_column(config, columns)
    return LAWS[config.law](values, config, rng)


def needed_columns(config: PartitionConfig) -> tuple[str, ...]:
    """Returns the columns besides images and labels that the law needs."""
    return (config.column,) if config.law in ("domain", "natural") and config.column is not None else ()


def describe(config: PartitionConfig) -> str:
    """Returns the law and those of its settings that it uses: ``dirichlet alpha=0.3, equal sizes``."""
    sizes = f", {config.sizes} sizes" + (f" sigma={config.sigma:g}" if config.sizes == "lognormal" else "")
    alpha = f" alpha={config.alpha:g}"
    settings = {
        "iid": sizes,
        "dirichlet": alpha + sizes,
        "class_dirichlet": alpha + (f", at least {config.min_samples} samples" if config.min_samples else ""),
        "pathological": f", {config.classes_per_client} classes a client",
        "shards": f", {config.shards_per_client} shards a client",
        "quantity": alpha,
        "domain": f" by {config.column}",
        "natural": f" by {config.column}",
        "file": f" {config.file.name}" if config.file is not None else "",
    }
    noise = f", feature noise up to {config.feature_noise:g}" if config.feature_noise else ""
    held_back = f", {config.test_share:.0%} held back" if config.test_share else ""
    return config.law + settings[config.law] + noise + held_back


# --- the laws


def iid(labels: Indices, config: PartitionConfig, rng: np.random.Generator) -> list[Indices]:
    """Shuffled slices; sizes equal or log-normal."""
    sizes = client_sizes(len(labels), config, rng)
    return _cut(rng.permutation(len(labels))[: sizes.sum()], sizes)


def client_sizes(num_samples: int, config: PartitionConfig, rng: np.random.Generator) -> Indices:
    """Returns the samples of each client, ``(num_clients,)``: each >= 1, together at most ``num_samples``.

    Log-normal sizes are ``exp(sigma * N(0, 1))``, scaled to the sum that equal sizes have and rounded down.
    """
    clients = config.num_clients
    equal = num_samples // clients
    if config.sizes == "equal" or config.sigma == 0:
        return np.repeat(np.int64(equal), clients)
    logs = config.sigma * rng.standard_normal(clients)
    shares = np.exp(logs - logs.max())
    sizes: Indices = np.maximum((shares / shares.sum() * (equal * clients)).astype(np.int64), 1)
    # Raising the smallest to 1 can exceed the sum; the largest give it back.
    for client in np.argsort(-sizes, kind="stable"):
        excess = int(sizes.sum()) - equal * clients
        if excess <= 0:
            break
        sizes[client] -= min(excess, int(sizes[client]) - 1)
    return sizes


def dirichlet(labels: Indices, config: PartitionConfig, rng: np.random.Generator) -> list[Indices]:
    """Each client draws its class proportions from Dir(alpha) (FedFTG, FedDyn); sizes equal or log-normal.

    Client k draws ``q_k ~ Dir(alpha, ..., alpha)``, and then its samples, one by one and without replacement, from the
    classes with these probabilities. A used-up class gets probability 0 and the rest is renormalised; the papers' code
    redraws until it meets a class with samples left, which is the same law but may never end.
    """
    sizes = client_sizes(len(labels), config, rng)
    if len(sizes) == 1 and sizes[0] == len(labels):
        return [np.arange(len(labels))]  # central training needs no draws
    left = np.bincount(labels)
    pool, next_in_pool = _shuffled_by_class(labels, rng), np.cumsum(left) - left
    wanted = dirichlet_draws(len(sizes), len(left), config.alpha, rng)
    cumulative, starved = _cumulative_over_open_classes(wanted, left)
    rows: list[Indices] = []
    owners: list[Indices] = []
    # Clients are served in turn, one sample each and in a new random order: served one after the other, the last
    # clients would get only leftovers.
    for number in range(int(sizes.max())):
        waiting = rng.permutation(np.flatnonzero(sizes > number))
        # All waiting clients draw a class at once. Where a class has fewer samples left than clients that drew it, the
        # later ones draw again; each turn but the last uses up a class, so the loop ends.
        while len(waiting):
            classes = _draw_classes(cumulative[waiting], starved[waiting], left, rng)
            by_class = np.argsort(classes, kind="stable")
            classes, waiting = classes[by_class], waiting[by_class]
            rank = np.arange(len(classes)) - np.searchsorted(classes, classes)  # among those that drew the same class
            served = rank < left[classes]
            rows.append(pool[next_in_pool[classes[served]] + rank[served]])
            owners.append(waiting[served])
            taken = np.bincount(classes[served], minlength=len(left))
            used_up = bool(((left > 0) & (left == taken)).any())
            next_in_pool, left = next_in_pool + taken, left - taken
            if used_up:
                cumulative, starved = _cumulative_over_open_classes(wanted, left)
            waiting = waiting[~served]
    return _by_client(np.concatenate(rows), np.concatenate(owners), len(sizes))


def _cumulative_over_open_classes(wanted: Floats, left: Indices) -> tuple[Floats, NDArray[np.bool_]]:
    """Returns cumulative probabilities ``(clients, C)`` over classes with samples left, and which clients want none."""
    still = wanted * (left > 0)
    total = still.sum(axis=1, keepdims=True)
    starved = total[:, 0] < np.finfo(np.float64).tiny * 1e8
    total[starved] = 1.0
    return np.cumsum(still / total, axis=1), starved


def _draw_classes(cumulative: Floats, starved: NDArray[np.bool_], left: Indices, rng: np.random.Generator) -> Indices:
    """Draws one class per row; a starved client draws in proportion to what is left."""
    if starved.any():
        cumulative = cumulative.copy()
        cumulative[starved] = np.cumsum(left / left.sum())
    # Scaling by the last entry, which rounding may put just off 1, keeps the draw inside the table.
    level = rng.random(len(cumulative)) * cumulative[:, -1]
    classes: Indices = (level[:, None] >= cumulative).sum(axis=1)
    return classes


def class_dirichlet(labels: Indices, config: PartitionConfig, rng: np.random.Generator) -> list[Indices]:
    """Each class is cut among the clients by its own draw of Dir(alpha) (NIID-Bench); sizes follow.

    flwr-datasets' DirichletPartitioner. Cuts are rounded down, so the last client gets up to one sample of each class
    more than it drew: with many classes and a small alpha it holds nearly all of these.

    Raises:
        InputError: no partition in 10 draws had ``min_samples`` samples for each client.
    """
    clients = config.num_clients
    alpha = np.clip(config.alpha, 1e-12, 1e12)  # beyond, partitions no longer change and floats overflow
    counts = np.bincount(labels)
    counts = counts[counts > 0]
    for _ in range(_REDRAWS):
        draws = np.random.default_rng(rng.integers(2**32))
        shares = draws.dirichlet(np.full(clients, alpha), size=len(counts))
        ends = (np.cumsum(shares, axis=1) * counts[:, None]).astype(np.int64)
        ends[:, -1] = counts
        sizes = np.diff(ends, axis=1, prepend=0)
        if sizes.sum(axis=0).min() >= config.min_samples:
            owners = np.repeat(np.tile(np.arange(clients), len(counts)), sizes.reshape(-1))
            return _by_client(_shuffled_by_class(labels, rng), owners, clients)
    raise InputError(
        f"law class_dirichlet found no partition of {len(labels)} samples with at least {config.min_samples} for each "
        f"of {clients} clients at alpha {alpha:g}; lower partition.min_samples or partition.num_clients, or raise "
        "partition.alpha"
    )


def pathological(labels: Indices, config: PartitionConfig, rng: np.random.Generator) -> list[Indices]:
    """Each client holds classes_per_client classes (NIID-Bench); a class is shared equally by those that hold it.

    Client k holds class k modulo C and others at random: flwr-datasets' PathologicalPartitioner, "first-deterministic".
    Where that leaves classes out (fewer clients than classes), gives a class to more clients than it has samples, or
    takes too many draws, classes are dealt evenly instead.

    Raises:
        InputError: more classes than there are, or more places than the classes' samples can fill.
    """
    clients, per_client = config.num_clients, config.classes_per_client
    counts = np.bincount(labels)
    present = np.flatnonzero(counts)
    if per_client > len(present):
        raise InputError(
            f"partition.classes_per_client is {per_client}, but the training data has {len(present)} classes; "
            f"use at most {len(present)}"
        )
    draws = np.random.default_rng(rng.integers(2**32))
    # A client draws until it has enough different classes: the coupon collector's time.
    expected = clients * len(present) * sum(1 / (len(present) - held) for held in range(1, per_client))
    if clients >= len(present) and expected <= _MOST_DRAWS:
        rows = _shuffled_by_class(labels, rng)
        holds = np.zeros((clients, len(counts)), dtype=bool)
        for client in range(clients):
            held = {client % len(present)}
            while len(held) < per_client:
                held.add(int(draws.integers(len(present))))
            holds[client, present[list(held)]] = True
        if (holds.sum(axis=0) <= counts).all():
            return _share_classes(rows, counts, holds, in_blocks=True)
        rng.integers(2**32)  # discarded: it keeps the draws below the same as in version 0.1
    holds = _deal_classes(counts, clients, per_client, rng)
    return _share_classes(_shuffled_by_class(labels, rng), counts, holds, in_blocks=False)


def _share_classes(rows: Indices, counts: Indices, holds: NDArray[np.bool_], *, in_blocks: bool) -> list[Indices]:
    """Gives the rows of each class (``rows`` is sorted by class) to its holders, in blocks or in turn."""
    kept, owners = [], []
    for of_class, held in zip(np.split(rows, np.cumsum(counts)[:-1]), holds.T, strict=True):
        holders = np.flatnonzero(held)
        if len(holders):
            turn = np.arange(len(of_class)) % len(holders)
            owners.append(holders[np.sort(turn) if in_blocks else turn])
            kept.append(of_class)
    return _by_client(np.concatenate(kept), np.concatenate(owners), len(holds))


def _deal_classes(counts: Indices, clients: int, per_client: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Deals classes evenly and at random; returns who holds which, ``(clients, C)``.

    A class with too few samples to give one to each holder is dealt less often. A solution is found if there is one.
    """
    room = np.minimum(counts, clients)
    if clients * per_client > room.sum():
        raise InputError(
            f"law pathological needs {clients * per_client} samples in different places ({clients} clients with "
            f"{per_client} classes each), but the classes' sizes allow only {room.sum()}; lower "
            "partition.num_clients or partition.classes_per_client"
        )
    left = class_places(clients * per_client, room, rng)
    holds = np.zeros((clients, len(counts)), dtype=bool)
    for served, client in enumerate(rng.permutation(clients)):
        # A class that must go to every client still to come is taken; of the others, those with more places are
        # likelier (Gumbel keys draw without replacement). At most per_client are forced: so many places are left.
        with np.errstate(divide="ignore"):
            keys = np.log(left) + rng.gumbel(size=len(counts))
        keys[left == clients - served] = np.inf
        taken = np.argpartition(-keys, per_client - 1)[:per_client]
        holds[client, taken] = True
        left[taken] -= 1
    return holds


def class_places(total: int, most: NDArray[np.integer], rng: np.random.Generator) -> Indices:
    """Returns how many clients hold each class, ``(C,)``: sums to ``total``, at most ``most`` each, else all equal.

    ``total`` is at most the sum of ``most``. Which classes get one more where it does not come out even is random.
    """
    places = np.zeros(len(most), dtype=np.int64)
    for done, klass in enumerate(np.lexsort((rng.random(len(most)), most))):
        places[klass] = min(int(most[klass]), (total - int(places.sum())) // (len(most) - done))
    return places


def shards(labels: Indices, config: PartitionConfig, rng: np.random.Generator) -> list[Indices]:
    """Each client gets shards_per_client blocks of the data sorted by class (FedAvg).

    flwr-datasets' ShardPartitioner: a shard has ``N // shards`` samples, and the rest of fewer rows than shards is
    not used.

    Raises:
        InputError: more shards than samples.
    """
    wanted = config.num_clients * config.shards_per_client
    if wanted > len(labels):
        raise InputError(
            f"law shards needs {wanted} shards ({config.num_clients} clients with {config.shards_per_client} each), "
            f"but there are only {len(labels)} training samples; lower partition.shards_per_client or "
            "partition.num_clients"
        )
    rows = _shuffled_by_class(labels, rng)
    size = len(rows) // wanted
    whole = len(rows) // size  # may be more than are wanted: which ones are left out is random too
    dealt = np.random.default_rng(rng.integers(2**32)).permutation(whole)[:wanted]
    blocks = rows[: whole * size].reshape(whole, size)[dealt]
    return list(np.sort(blocks.reshape(config.num_clients, -1)))


def quantity(labels: Indices, config: PartitionConfig, rng: np.random.Generator) -> list[Indices]:
    """Labels at random, sizes by one draw of Dir(alpha) over the clients (NIID-Bench: Li et al., ICDE 2022).

    Each client gets one sample, and the rest is split in the drawn proportions; NIID-Bench redraws until each client
    has 10, which may never end.
    """
    shares = dirichlet_draws(1, config.num_clients, config.alpha, rng)[0]
    sizes = 1 + largest_remainder(len(labels) - config.num_clients, shares)
    return _cut(rng.permutation(len(labels)), sizes)


def domain(domains: Indices, config: PartitionConfig, rng: np.random.Generator) -> list[Indices]:
    """Each client holds one domain: one value of the data set's column; clients are numbered domain by domain.

    Domains get clients in proportion to their sizes, at least one each. Inside a domain samples are dealt at random;
    all are used, so sizes differ by at most one.

    Raises:
        InputError: fewer clients than domains.
    """
    sizes = np.bincount(domains)
    if config.num_clients < len(sizes):
        raise InputError(
            f"law domain needs a client for each of the {len(sizes)} domains, got {config.num_clients}; raise "
            f"partition.num_clients to at least {len(sizes)}, or name another partition.column"
        )
    by_domain = np.split(_shuffled_by_class(domains, rng), np.cumsum(sizes)[:-1])
    clients = clients_per_domain(config.num_clients, sizes)
    return [
        np.sort(part)
        for rows, count in zip(by_domain, clients, strict=True)
        for part in np.array_split(rows, int(count))
    ]


def clients_per_domain(num_clients: int, sizes: NDArray[np.integer]) -> Indices:
    """Returns how many clients each domain gets, ``(D,)``: in proportion to ``sizes``, at least one.

    Domains whose share is below one get one, and the others split the rest by largest remainder; so no domain gets more
    clients than it has samples as long as there are not more clients than samples.
    """
    clients = np.ones(len(sizes), dtype=np.int64)
    larger = np.ones(len(sizes), dtype=bool)
    while larger.any():
        left = num_clients - int((~larger).sum())
        # In integers, so that a share of exactly one is not below one by rounding.
        small = larger & (sizes * left < sizes[larger].sum())
        if not small.any():
            clients[larger] = largest_remainder(left, sizes[larger])
            break
        larger &= ~small
    return clients


def natural(groups: Indices, _config: PartitionConfig, _rng: np.random.Generator) -> list[Indices]:
    """One client per value of the data set's column, in ascending order of the values; nothing is random."""
    return _by_client(np.arange(len(groups)), groups, int(groups.max()) + 1)


def file(labels: Indices, config: PartitionConfig, _rng: np.random.Generator) -> list[Indices]:
    """Rows per client from a JSON file, such as partition.json."""
    assert config.file is not None  # PartitionConfig requires it
    return load(config.file, labels)


LAWS: dict[str, Callable[[Indices, PartitionConfig, np.random.Generator], list[Indices]]] = {
    law.__name__: law
    for law in (iid, dirichlet, class_dirichlet, pathological, shards, quantity, domain, natural, file)
}
"""The laws by name; the first line of each docstring describes it."""


# --- arithmetic that laws share


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
    """Returns whole numbers ``(K,)`` that sum to ``total``, in proportion to ``weights``; ties go to the first."""
    exact = np.asarray(weights, dtype=np.float64) * (total / float(np.sum(weights)))
    parts: Indices = np.floor(exact).astype(np.int64)
    parts[np.argsort(-(exact - parts), kind="stable")[: total - int(parts.sum())]] += 1
    return parts


def _shuffled_by_class(classes: Indices, rng: np.random.Generator) -> Indices:
    """Returns all rows sorted by class and shuffled inside each, so that the order of the data set has no effect."""
    shuffled = rng.permutation(len(classes))
    return shuffled[np.argsort(classes[shuffled], kind="stable")]


def _cut(rows: Indices, sizes: Indices) -> list[Indices]:
    return [np.sort(part) for part in np.split(rows, np.cumsum(sizes)[:-1])]


def _by_client(rows: Indices, owners: Indices, num_clients: int) -> list[Indices]:
    """Returns the rows of each client, ascending; ``owners`` ``(N,)`` says whose each row is."""
    ends = np.cumsum(np.bincount(owners, minlength=num_clients))
    return np.split(rows[np.lexsort((rows, owners))], ends[:-1])


def _numbered_column(config: PartitionConfig, columns: Mapping[str, NDArray[Any]]) -> Indices:
    """Returns the values of ``config.column`` as numbers from 0 in the values' order, ``(N,)``."""
    name = str(config.column)
    if name not in columns:
        raise InputError(
            f"law {config.law}: the data set has no column {name!r}, only {', '.join(sorted(columns)) or 'labels'}; "
            "name another partition.column or take another partition.law"
        )
    values = np.asarray(columns[name])
    if values.dtype == object and all(isinstance(value, str) for value in values):
        values = values.astype(str)
    if values.dtype.kind not in "iubUS":
        raise InputError(
            f"partition.column {name!r} holds values of type {values.dtype}; it must hold whole numbers or strings in "
            "every row; name another column"
        )
    numbers: Indices = np.unique(values, return_inverse=True)[1].reshape(-1).astype(np.int64)
    return numbers


# --- what clients hold back, and skew


def hold_back(
    parts: Sequence[NDArray[np.integer]], labels: NDArray[np.integer], share: float, rng: np.random.Generator
) -> tuple[list[Indices], list[Indices]]:
    """Splits each client's rows into training and test rows, both ascending.

    Of n samples ``round(share * n)`` are held back (a half goes to the even number), but at least one stays for
    training. Classes keep their proportions, by largest remainder; equal remainders in random order.

    Args:
        parts: rows of each client.
        labels: the class of each sample, ``(N,)``.
        share: 0 holds nothing back; below 1.
        rng: decides which samples of a class are held back.
    """
    sizes = np.array([len(part) for part in parts], dtype=np.int64)
    wanted = np.minimum(np.rint(share * sizes).astype(np.int64), np.maximum(sizes - 1, 0))
    # All clients at once: rows are sorted into groups of one client and class, in random order inside each.
    rows = np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])
    owners = np.repeat(np.arange(len(parts)), sizes)
    classes = np.asarray(labels)[rows]
    order = np.lexsort((rng.random(len(rows)), classes, owners))
    rows, owners, classes = rows[order], owners[order], classes[order]
    starts = np.ones(len(rows), dtype=bool)
    starts[1:] = (np.diff(owners) != 0) | (np.diff(classes) != 0)
    group, first = np.cumsum(starts) - 1, np.flatnonzero(starts)
    group_owner = owners[first]
    # A group of g gives g * wanted / n, rounded down. Integers keep equal remainders equal.
    taken, remainder = np.divmod(np.bincount(group, minlength=len(first)) * wanted[group_owner], sizes[group_owner])
    missing = wanted - np.bincount(group_owner, weights=taken, minlength=len(parts)).astype(np.int64)
    # A client's groups with the largest remainders give one more each. Sorting by remainder leaves group_owner as it
    # is, for it is the first sort key and ascending.
    by_remainder = np.lexsort((rng.random(len(first)), -remainder, group_owner))
    place = np.arange(len(first)) - np.searchsorted(group_owner, group_owner)
    taken[by_remainder] += place < missing[group_owner]
    is_test = np.arange(len(rows)) - first[group] < taken[group]
    train, test = (_by_client(rows[chosen], owners[chosen], len(parts)) for chosen in (~is_test, is_test))
    return train, test


def noise_levels(num_clients: int, noise: float) -> Floats:
    """Returns the deviation of the noise on each client's images, ``noise * (k + 1) / num_clients`` for client k.

    The noise-based feature imbalance of NIID-Bench (Li et al., ICDE 2022), which adds Gaussian noise of *variance*
    ``sigma * i / N`` to client i of N; here ``noise`` is a standard deviation.
    """
    return noise * np.arange(1, num_clients + 1, dtype=np.float64) / num_clients


def class_counts(
    parts: Sequence[NDArray[np.integer]], labels: NDArray[np.integer], num_classes: int
) -> NDArray[np.int64]:
    """Returns the samples of each class that each client holds, ``(clients, C)``."""
    return np.stack([np.bincount(labels[part], minlength=num_classes) for part in parts])


def skew(counts: NDArray[np.integer]) -> dict[str, float]:
    """Measures how clients differ, from class counts ``(clients, C)``; clients without samples are left out.

    Returns:
        ``total_variation``: mean over clients of ``1/2 sum_c |p_k(c) - p(c)|``; 0 is IID, near 1 fully separate.
        ``effective_classes``: mean over clients of ``exp(entropy)``; 1 is one class each, C is all classes alike.
        ``size_min``, ``size_mean``, ``size_max``: samples per client, over all clients.
        ``empty_clients``: the number of clients without samples.

    Raises:
        ValueError: no client has a sample.
    """
    counts = np.asarray(counts, dtype=np.float64)
    sizes = counts.sum(axis=1)
    if not sizes.sum() > 0:
        raise ValueError("skew needs at least one client with samples")
    shares = counts[sizes > 0] / sizes[sizes > 0, None]
    overall = counts.sum(axis=0) / counts.sum()
    logs = np.log(shares, where=shares > 0, out=np.zeros_like(shares))
    return {
        "total_variation": float(0.5 * np.abs(shares - overall).sum(axis=1).mean()),
        "effective_classes": float(np.exp(-(shares * logs).sum(axis=1)).mean()),
        "size_min": float(sizes.min()),
        "size_mean": float(sizes.mean()),
        "size_max": float(sizes.max()),
        "empty_clients": float((sizes == 0).sum()),
    }


# --- partition.json, which the law "file" reads back


def to_json(
    parts: Sequence[NDArray[np.integer]],
    labels: NDArray[np.integer],
    *,
    law: str,
    class_names: Sequence[str],
    about: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """Returns a partition as one JSON object: law, data, class counts, skew and rows, one client a line.

    Args:
        parts: training rows of each client.
        labels: of all training rows, ``(N,)``; their digest is kept.
        law: the law's name.
        class_names: one per class.
        about: further entries, such as the settings; `load` does not read them.
    """
    counts = class_counts(parts, labels, len(class_names))
    entries = {
        "law": json.dumps(law),
        "num_samples": str(len(labels)),
        "labels_sha256": f'"{labels_digest(labels)}"',
        "class_names": json.dumps(list(class_names)),
        "class_counts": _one_client_a_line(counts),
        "skew": json.dumps(skew(counts)),
        **{name: json.dumps(value) for name, value in about.items()},
        "indices": _one_client_a_line(parts),
    }
    return "{\n  " + ",\n  ".join(f"{json.dumps(name)}: {value}" for name, value in entries.items()) + "\n}\n"


def _one_client_a_line(rows: Sequence[NDArray[np.integer]] | NDArray[np.integer]) -> str:
    return "[\n    " + ",\n    ".join(json.dumps(row.tolist(), separators=(",", ":")) for row in rows) + "\n  ]"


def labels_digest(labels: NDArray[np.integer]) -> str:
    """Returns the SHA-256 of labels ``(N,)`` as little-endian int64: which data a partition is of."""
    return hashlib.sha256(np.asarray(labels).astype("<i8").tobytes()).hexdigest()


def save(path: Path, text: str) -> Path:
    """Writes what `to_json` returned, whole or not at all; returns ``path``."""
    aside = path.with_name(path.name + ".part")
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose another folder by --out") from None
    return path


_ADVICE = "give a partition.json of 'fedftg partition', or a JSON list with one list of training rows a client"


def read_json(path: Path) -> Any:
    """Returns the content of a partition file; raises InputError where it is missing or no JSON."""
    try:
        return json.loads(path.expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read partition.file {str(path)!r}: {error.strerror}; {_ADVICE}") from None
    except ValueError as error:
        raise InputError(f"partition.file {str(path)!r} is not valid JSON: {error}; {_ADVICE}") from None


def load(path: Path, labels: NDArray[np.integer]) -> list[Indices]:
    """Returns the partition in a JSON file, each client's rows ascending.

    Args:
        path: holds a list of lists of row numbers, or an object with such a list as ``indices``.
        labels: of all training rows, ``(N,)``.

    Raises:
        InputError: no such file, no JSON, no partition of these data, or a row that is wrong or held twice.
    """
    name, content, total = f"partition.file {str(path)!r}", read_json(path), len(labels)
    if isinstance(content, dict):
        count, digest = content.get("num_samples", total), content.get("labels_sha256")
        if count != total or digest not in (None, labels_digest(labels)):
            raise InputError(
                f"{name} was made for other data (its {count} training samples or their labels are not the {total} "
                "here); set data.* as it was then, or make a new file with 'fedftg partition'"
            )
        if "digest" in content:
            raise InputError(
                f"{name} is the record of a run, which counts samples and names no rows; make a file with rows by "
                "'fedftg partition' with the settings of that run"
            )
        content = content.get("indices")
    if not isinstance(content, list) or not all(isinstance(rows, list) for rows in content) or not any(content):
        raise InputError(f"{name} holds no list of training rows for each client; {_ADVICE}")
    for client, rows in enumerate(content):
        wrong = [row for row in rows if type(row) is not int or not 0 <= row < total]
        if wrong:
            raise InputError(
                f"{name}: client {client} has row {json.dumps(wrong[0])[:40]}; rows are whole numbers from 0 to "
                f"{total - 1}; correct the file, or use the data that it was made for"
            )
    rows, times = np.unique(np.concatenate([np.array(rows, dtype=np.int64) for rows in content]), return_counts=True)
    if times.max() > 1:
        twice = int(rows[times.argmax()])
        holders = ", ".join(str(client) for client, held in enumerate(content) if twice in held)
        raise InputError(f"{name}: row {twice} is held twice, by client {holders}; each row may be held once")
    return [np.sort(np.array(rows, dtype=np.int64)) for rows in content]
