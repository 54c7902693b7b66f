"""Who holds what: every partition law, what clients hold back, measures of skew, and partition.json.

A law ``(values, config, rng)`` returns one ascending list of rows per client. ``values`` ``(N,)`` are the labels or,
for domain and natural, numbers from 0 for the values of the column. ``class_dirichlet``, ``pathological`` and
``shards`` draw in the order of flwr-datasets 0.6 on shuffled rows, so they give the same partitions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedftg.data.config import PartitionConfig
from fedftg.errors import InputError, first_line, unknown

Indices = NDArray[np.int64]
Floats = NDArray[np.float64]


def partition(
    labels: NDArray[np.integer],
    config: PartitionConfig,
    rng: np.random.Generator,
    columns: Mapping[str, NDArray[Any]] = MappingProxyType({}),
) -> list[Indices]:
    """Returns disjoint, ascending lists of rows of ``labels`` ``(N,)``, one per client.

    Every client holds at least one sample, except with the laws class_dirichlet and file. ``rng`` is the only source
    of randomness. The laws domain and natural need ``config.column`` in ``columns``, which has values ``(N,)``.
    """
    values: Indices = np.asarray(labels).astype(np.int64)
    if config.law not in ("natural", "file") and config.num_clients > len(values):
        raise InputError(
            f"partition.num_clients {config.num_clients} exceeds the {len(values)} training samples; lower it"
        )
    if needed_columns(config):
        values = _numbered_column(config, columns)
    return LAWS[config.law](values, config, rng)


def needed_columns(config: PartitionConfig) -> tuple[str, ...]:
    """Returns the columns besides images and labels that the law needs."""
    return (config.column,) if config.law in ("domain", "natural") and config.column is not None else ()


def describe(config: PartitionConfig) -> str:
    """Returns the law, its alpha, and the settings that differ from the defaults: ``dirichlet, alpha=0.3``."""
    used = {"alpha": config.alpha} if config.law in ("dirichlet", "class_dirichlet", "quantity") else {}
    used |= config.model_dump(exclude={"law", "alpha"}, exclude_defaults=True)
    return ", ".join([config.law, *(f"{name}={value}" for name, value in used.items())])


# --- the laws


def iid(labels: Indices, config: PartitionConfig, rng: np.random.Generator) -> list[Indices]:
    """Each client gets a random slice of all samples, so that all have the same classes."""
    sizes = client_sizes(len(labels), config, rng)
    return _cut(rng.permutation(len(labels))[: sizes.sum()], sizes)


def client_sizes(num_samples: int, config: PartitionConfig, rng: np.random.Generator) -> Indices:
    """Returns the samples of each client, at least 1: ``N // num_clients``, or log-normal sizes scaled to that sum."""
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
    """Each client draws class proportions from Dir(alpha), and its samples in these (FedFTG).

    Without replacement: a used-up class gets probability 0 and the rest is renormalised; the papers' code redraws until
    it meets a class with samples left, which is the same law but may never end.
    """
    sizes = client_sizes(len(labels), config, rng)
    if len(sizes) == 1 and sizes[0] == len(labels):
        return [np.arange(len(labels))]  # central training needs no draws
    left = np.bincount(labels)
    pool, next_in_pool = _shuffled_by_class(labels, rng), np.cumsum(left) - left
    wanted = dirichlet_draws(len(sizes), len(left), config.alpha, rng)
    rows, owners = [], []
    # One sample each, in a new random order: served one after the other, the last clients would get only leftovers.
    for number in range(int(sizes.max())):
        waiting = rng.permutation(np.flatnonzero(sizes > number))
        # Where a class has fewer samples left than clients that drew it, the later ones draw again; each turn but the
        # last uses up a class, so the loop ends.
        while len(waiting):
            classes = _draw_classes(wanted[waiting], left, rng)
            by_class = np.argsort(classes, kind="stable")
            classes, waiting = classes[by_class], waiting[by_class]
            rank = np.arange(len(classes)) - np.searchsorted(classes, classes)  # among those that drew the same class
            served = rank < left[classes]
            rows.append(pool[next_in_pool[classes[served]] + rank[served]])
            owners.append(waiting[served])
            taken = np.bincount(classes[served], minlength=len(left))
            next_in_pool, left = next_in_pool + taken, left - taken
            waiting = waiting[~served]
    return _by_client(np.concatenate(rows), np.concatenate(owners), len(sizes))


def _draw_classes(wanted: Floats, left: Indices, rng: np.random.Generator) -> Indices:
    """Draws one class per client with probabilities ``wanted`` ``(clients, C)`` over classes with samples left."""
    still = wanted * (left > 0)
    still[still.sum(axis=1) < 1e-300] = left  # a client that wants none of them
    cumulative = np.cumsum(still / still.sum(axis=1, keepdims=True), axis=1)
    # Scaling by the last entry, which rounding may put just off 1, keeps the draw inside the table.
    level = rng.random(len(cumulative)) * cumulative[:, -1]
    classes: Indices = (level[:, None] >= cumulative).sum(axis=1)
    return classes


def class_dirichlet(labels: Indices, config: PartitionConfig, rng: np.random.Generator) -> list[Indices]:
    """Each class is cut among the clients by its own draw of Dir(alpha) (NIID-Bench), rounded down but for the last."""
    clients = config.num_clients
    counts = np.bincount(labels)
    counts = counts[counts > 0]
    for _ in range(10):  # as flwr-datasets does
        draws = np.random.default_rng(rng.integers(2**32))
        shares = dirichlet_draws(len(counts), clients, config.alpha, draws)
        ends = (np.cumsum(shares, axis=1) * counts[:, None]).astype(np.int64)
        ends[:, -1] = counts
        sizes = np.diff(ends, axis=1, prepend=0)
        if sizes.sum(axis=0).min() >= config.min_samples:
            owners = np.repeat(np.tile(np.arange(clients), len(counts)), sizes.reshape(-1))
            return _by_client(_shuffled_by_class(labels, rng), owners, clients)
    raise InputError(
        f"law class_dirichlet: no draw of 10 reached partition.min_samples={config.min_samples}; lower it or "
        "partition.num_clients, or raise partition.alpha"
    )


def pathological(labels: Indices, config: PartitionConfig, rng: np.random.Generator) -> list[Indices]:
    """Each client holds classes_per_client classes (NIID-Bench); a class is shared equally by those that hold it.

    Client k holds class k modulo C and others at random. Fewer than C clients also hold the classes k + num_clients,
    k + 2 num_clients, ..., so that none is left out. A class never has more clients than samples.
    """
    clients, per_client = config.num_clients, config.classes_per_client
    counts = np.bincount(labels)
    counts = counts[counts > 0]
    draws = np.random.default_rng(rng.integers(2**32))
    holds = np.zeros((clients, len(counts)), dtype=bool)
    room = counts.copy()  # how many more clients may hold each class
    for client in range(clients):
        if per_client > (room > 0).sum():
            raise InputError(
                f"law pathological: client {client} needs {per_client} classes, {(room > 0).sum()} have samples left; "
                "lower partition.classes_per_client or partition.num_clients"
            )
        held = [klass for klass in range(client % len(counts), len(counts), clients) if room[klass]][:per_client]
        while len(held) < per_client:
            klass = int(draws.integers(len(counts)))
            if room[klass] and klass not in held:
                held.append(klass)
        holds[client, held] = True
        room[held] -= 1
    parts: list[list[Indices]] = [[] for _ in range(clients)]
    by_class = np.split(_shuffled_by_class(labels, rng), np.cumsum(counts)[:-1])
    for rows, holders in zip(by_class, map(np.flatnonzero, holds.T), strict=True):
        if len(holders):
            for holder, share in zip(holders, np.array_split(rows, len(holders)), strict=True):
                parts[holder].append(share)
    return [np.sort(np.concatenate(part)) for part in parts]


def shards(labels: Indices, config: PartitionConfig, rng: np.random.Generator) -> list[Indices]:
    """Each client gets shards_per_client blocks of ``N // shards`` rows of the data sorted by class (FedAvg)."""
    wanted = config.num_clients * config.shards_per_client
    if wanted > len(labels):
        raise InputError(f"law shards needs {wanted} samples, got {len(labels)}; lower partition.shards_per_client")
    rows = _shuffled_by_class(labels, rng)
    size = len(rows) // wanted
    whole = len(rows) // size  # may be more than are wanted: which ones are left out is random too
    dealt = np.random.default_rng(rng.integers(2**32)).permutation(whole)[:wanted]
    blocks = rows[: whole * size].reshape(whole, size)[dealt]
    return list(np.sort(blocks.reshape(config.num_clients, -1)))


def quantity(labels: Indices, config: PartitionConfig, rng: np.random.Generator) -> list[Indices]:
    """Labels are random; sizes are one sample and a share of the rest by a draw of Dir(alpha) (NIID-Bench)."""
    shares = dirichlet_draws(1, config.num_clients, config.alpha, rng)[0]
    sizes = 1 + largest_remainder(len(labels) - config.num_clients, shares)
    return _cut(rng.permutation(len(labels)), sizes)


def domain(domains: Indices, config: PartitionConfig, rng: np.random.Generator) -> list[Indices]:
    """Each client holds random samples of one domain, a value of the data set's column; all are used."""
    sizes = np.bincount(domains)
    if config.num_clients < len(sizes):
        raise InputError(
            f"law domain: {len(sizes)} domains, but {config.num_clients} clients; raise partition.num_clients"
        )
    by_domain = np.split(_shuffled_by_class(domains, rng), np.cumsum(sizes)[:-1])
    clients = clients_per_domain(config.num_clients, sizes)
    found = zip(by_domain, clients, strict=True)
    return [np.sort(part) for rows, count in found for part in np.array_split(rows, int(count))]


def clients_per_domain(num_clients: int, sizes: NDArray[np.integer]) -> Indices:
    """Returns how many clients each domain gets: those whose share is below one get one, the others split the rest."""
    clients, larger = np.ones(len(sizes), dtype=np.int64), sizes > 0
    # In integers, so that a share of exactly one is not below one by rounding.
    while (small := larger & (sizes * (num_clients - (~larger).sum()) < sizes[larger].sum())).any():
        larger &= ~small
    clients[larger] = largest_remainder(num_clients - int((~larger).sum()), sizes[larger])
    return clients


def natural(groups: Indices, _config: PartitionConfig, _rng: np.random.Generator) -> list[Indices]:
    """One client per value of the data set's column, in ascending order of the values; nothing is random."""
    return _by_client(np.arange(len(groups)), groups, int(groups.max()) + 1)


def file(labels: Indices, config: PartitionConfig, _rng: np.random.Generator) -> list[Indices]:
    """Rows of each client are read from a JSON file: that of 'fedftg partition', or a list of lists."""
    assert config.file is not None  # PartitionConfig requires it
    name, total = f"partition.file {str(config.file)!r}", len(labels)
    try:
        content = json.loads(config.file.expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {name}: {first_line(error)}") from None
    if isinstance(content, dict):
        same = content.get("labels_sha256") in (None, labels_digest(labels))
        if not same or content.get("num_samples", total) != total:
            raise InputError(f"{name} was made for other data than these {total} samples; set data.* as it was then")
        content = content.get("indices")
    if not isinstance(content, list) or not all(isinstance(rows, list) for rows in content) or not any(content):
        raise InputError(f"{name} has no list of rows for each client; give one of 'fedftg partition'")
    seen: set[int] = set()
    for client, rows in enumerate(content):
        for row in rows:
            if type(row) is not int or not 0 <= row < total or row in seen:
                raise InputError(f"{name}: client {client} has row {row!r:.40}; rows are 0 to {total - 1}, each once")
            seen.add(row)
    return [np.sort(np.array(rows, dtype=np.int64)) for rows in content]


LAWS: dict[str, Callable[[Indices, PartitionConfig, np.random.Generator], list[Indices]]] = {
    law.__name__: law
    for law in (iid, dirichlet, class_dirichlet, pathological, shards, quantity, domain, natural, file)
}


# --- arithmetic that laws share


def dirichlet_draws(num_draws: int, num_parts: int, alpha: float, rng: np.random.Generator) -> Floats:
    """Draws ``(num_draws, num_parts)`` of ``Dir(alpha)``; beyond 1e-12 and 1e12 alpha has no further effect."""
    return rng.dirichlet(np.full(num_parts, np.clip(alpha, 1e-12, 1e12)), size=num_draws)


def largest_remainder(total: int, weights: NDArray[np.integer] | Floats) -> Indices:
    """Returns whole numbers ``(K,)`` that sum to ``total``, in proportion to ``weights``; ties go to the first."""
    exact = np.asarray(weights, dtype=np.float64) * (total / float(np.sum(weights)))
    parts: Indices = np.floor(exact).astype(np.int64)
    parts[np.argsort(-(exact - parts), kind="stable")[: total - int(parts.sum())]] += 1
    return parts


def _shuffled_by_class(classes: Indices, rng: np.random.Generator) -> Indices:
    """Returns all rows sorted by class and shuffled inside each."""
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
        raise unknown("column", name, columns)
    values = np.asarray(np.asarray(columns[name]).tolist())  # strings may come as objects
    if values.dtype.kind not in "iubUS":
        raise InputError(f"partition.column {name!r} must hold whole numbers or strings in every row")
    return np.unique(values, return_inverse=True)[1].reshape(-1).astype(np.int64)


# --- what clients hold back, and skew


def hold_back(
    parts: Sequence[NDArray[np.integer]], labels: NDArray[np.integer], share: float, rng: np.random.Generator
) -> tuple[list[Indices], list[Indices]]:
    """Splits each client's rows into training and test rows, both ascending.

    Of n samples ``round(share * n)`` are held back, but at least one stays. Classes keep their proportions, by largest
    remainder; equal remainders in random order.
    """
    if share == 0:
        return [np.sort(np.asarray(part, dtype=np.int64)) for part in parts], [np.empty(0, np.int64)] * len(parts)
    train, test = [], []
    keys = rng.random(sum(map(len, parts)))
    for part, key in zip(parts, np.split(keys, np.cumsum([len(part) for part in parts])[:-1]), strict=True):
        of_rows = labels[part]
        counts = np.unique(of_rows, return_counts=True)[1]
        wanted = max(min(round(share * len(part)), len(part) - 1), 0)
        taken, remainder = np.divmod(counts * wanted, len(part))
        taken[np.lexsort((rng.random(len(counts)), -remainder))[: wanted - taken.sum()]] += 1
        rows = np.asarray(part, dtype=np.int64)[np.lexsort((key, of_rows))]
        place = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        is_test = place < np.repeat(taken, counts)
        train.append(np.sort(rows[~is_test]))
        test.append(np.sort(rows[is_test]))
    return train, test


def noise_levels(num_clients: int, noise: float) -> Floats:
    """Returns the deviation of the noise on each client's images, as NIID-Bench (there: the variance)."""
    return noise * np.arange(1, num_clients + 1, dtype=np.float64) / num_clients


def class_counts(
    parts: Sequence[NDArray[np.integer]], labels: NDArray[np.integer], num_classes: int
) -> NDArray[np.int64]:
    """Returns the samples of each class that each client holds, ``(clients, C)``."""
    return np.stack([np.bincount(labels[part], minlength=num_classes) for part in parts])


def skew(counts: NDArray[np.integer]) -> dict[str, float]:
    """Measures how clients differ, from class counts ``(clients, C)``.

    ``total_variation`` is the mean of ``1/2 sum_c |p_k(c) - p(c)|`` over clients with samples, ``effective_classes``
    that of ``exp(entropy)``; sizes are over all clients.
    """
    counts = np.asarray(counts, dtype=np.float64)
    sizes = counts.sum(axis=1)
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
    """Returns a partition as one JSON object: law, data, class counts, skew, what ``about`` adds, and rows."""
    counts = class_counts(parts, labels, len(class_names))
    content = {
        "law": law,
        "num_samples": len(labels),
        "labels_sha256": labels_digest(labels),
        "class_names": list(class_names),
        "class_counts": counts.tolist(),
        "skew": skew(counts),
        **about,
        "indices": [part.tolist() for part in parts],
    }
    return json.dumps(content) + "\n"


def labels_digest(labels: NDArray[np.integer]) -> str:
    """Returns the SHA-256 of labels ``(N,)`` as little-endian int64."""
    return hashlib.sha256(np.asarray(labels).astype("<i8").tobytes()).hexdigest()
