"""Dividing samples among clients, and measures of how skewed a division is.

The Dirichlet law is that of the FedFTG paper's experiments (and of FedDyn's): **per client over classes**. Client k
draws class proportions ``q_k ~ Dir(alpha, ..., alpha)`` and then its samples, one by one and without replacement, from
the classes with these probabilities. A class that is used up gets probability 0 and the rest is renormalised; the
public code draws again until it meets a class with samples left, which is the same law but may never end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedftg.data import flwr_laws, own_laws, saved_partition
from fedftg.data.config import PartitionConfig
from fedftg.data.own_laws import dirichlet_draws
from fedftg.errors import InputError

Indices = NDArray[np.int64]
Floats = NDArray[np.float64]

LAWS: dict[str, str] = {
    "iid": "shuffled slices; sizes equal or log-normal",
    "dirichlet": "each client draws its class proportions from Dir(alpha) (FedFTG, FedDyn); sizes equal or log-normal",
    "class_dirichlet": "each class is divided over the clients by a draw of Dir(alpha) (NIID-Bench); sizes follow",
    "pathological": "each client holds classes_per_client classes (NIID-Bench)",
    "shards": "each client gets shards_per_client blocks of the data sorted by class (FedAvg)",
    "quantity": "labels at random, sizes by one draw of Dir(alpha) over the clients (NIID-Bench)",
    "linear": "labels at random, sizes in proportion to 1, 2, 3, ...",
    "square": "labels at random, sizes in proportion to 1, 4, 9, ...",
    "exponential": "labels at random, sizes in proportion to e, e^2, e^3, ...",
    "domain": "each client holds one domain: one value of the data set's column",
    "natural": "one client per value of the data set's column",
    "file": "rows per client from a JSON file, such as partition.json",
}
"""One line on each law."""

_NO_COLUMNS: Mapping[str, NDArray[Any]] = MappingProxyType({})


def partition(
    labels: NDArray[np.integer],
    config: PartitionConfig,
    rng: np.random.Generator,
    columns: Mapping[str, NDArray[Any]] = _NO_COLUMNS,
) -> list[Indices]:
    """Disjoint index lists into ``labels`` ``(N,)``, one per client, ascending inside each.

    Every client holds at least one sample, but for the laws class_dirichlet (unless ``min_samples`` asks for it) and
    file. All samples are used, but for equal sizes of the laws iid and dirichlet (``N // num_clients`` each, as in the
    paper's setting), log-normal sizes (at most as many), law shards (``N // shards`` a shard), law pathological where
    there are fewer places than classes, and law file.

    Args:
        labels: the class of each sample, integers >= 0, at least one.
        config: the law and its settings; ``alpha`` 0.1 is very skewed, 100 nearly IID.
        rng: the only source of randomness: the same state gives the same division.
        columns: further values ``(N,)`` of each sample; the laws domain and natural need ``config.column``, see
            `needed_columns`.

    Raises:
        InputError: the law cannot be met: more clients than samples, a missing column, ...; says what to change.
    """
    classes: Indices = np.asarray(labels).astype(np.int64)
    samples, clients = len(classes), config.num_clients
    if config.law == "file":
        assert config.file is not None  # PartitionConfig sees to it
        return saved_partition.read(config.file, classes)
    if config.law == "natural":
        return flwr_laws.natural(_groups(config, columns, samples), rng)
    _check_clients(clients, samples)
    laws: dict[str, Callable[[], list[Indices]]] = {
        "iid": lambda: _iid(samples, client_sizes(samples, config, rng), rng),
        "dirichlet": lambda: _dirichlet(classes, client_sizes(samples, config, rng), config.alpha, rng),
        "class_dirichlet": lambda: flwr_laws.class_dirichlet(classes, clients, config.alpha, config.min_samples, rng),
        "pathological": lambda: flwr_laws.pathological(classes, clients, config.classes_per_client, rng),
        "shards": lambda: flwr_laws.shards(classes, clients, config.shards_per_client, rng),
        "quantity": lambda: own_laws.quantity(samples, clients, config.alpha, rng),
        "domain": lambda: own_laws.domain(_groups(config, columns, samples), clients, rng),
    }
    if config.law in laws:
        return laws[config.law]()
    return flwr_laws.growing(config.law, samples, clients, rng)


def needed_columns(config: PartitionConfig) -> tuple[str, ...]:
    """Which columns besides images and labels the law divides by."""
    return (config.column,) if config.law in ("domain", "natural") and config.column is not None else ()


def describe(config: PartitionConfig) -> str:
    """The law and those of its settings that matter to it: ``dirichlet alpha=0.3, equal sizes``."""
    sizes = f"{config.sizes} sizes" + (f" sigma={config.sigma:g}" if config.sizes == "lognormal" else "")
    alpha = f" alpha={config.alpha:g}"
    minimum = f", at least {config.min_samples} samples" if config.min_samples else ""
    settings = {
        "iid": f", {sizes}",
        "dirichlet": f"{alpha}, {sizes}",
        "class_dirichlet": alpha + minimum,
        "pathological": f", {config.classes_per_client} classes a client",
        "shards": f", {config.shards_per_client} shards a client",
        "quantity": alpha,
        "domain": f" by {config.column}",
        "natural": f" by {config.column}",
        "file": f" {config.file.name}" if config.file is not None else "",
    }
    noise = f", feature noise up to {config.feature_noise:g}" if config.feature_noise else ""
    held = f", {config.test_share:.0%} held back" if config.test_share else ""
    return config.law + settings.get(config.law, "") + noise + held


def _groups(config: PartitionConfig, columns: Mapping[str, NDArray[Any]], num_samples: int) -> Indices:
    """Values of ``config.column`` as numbers from 0 in the values' order, ``(N,)``."""
    name = config.column
    if name is None or name not in columns:
        there = f"it has {', '.join(sorted(columns))}" if columns else "it has no further columns"
        raise InputError(
            f"law {config.law} divides by partition.column {name!r}, which the data set does not have ({there}); name "
            "another column or take another partition.law"
        )
    values = np.asarray(columns[name])
    if values.shape != (num_samples,):
        raise InputError(
            f"partition.column {name!r} has shape {values.shape}; it needs one value for each of the {num_samples} "
            "training samples"
        )
    if values.dtype == object and all(isinstance(value, str) for value in values):
        values = values.astype(str)
    if values.dtype.kind not in "iubUS":
        raise InputError(
            f"partition.column {name!r} holds values of type {values.dtype}; it must hold whole numbers or strings in "
            "every row; name another column"
        )
    groups: Indices = np.unique(values, return_inverse=True)[1].reshape(-1).astype(np.int64)
    return groups


def _check_clients(num_clients: int, num_samples: int) -> None:
    if num_clients > num_samples:
        raise InputError(
            f"partition.num_clients is {num_clients}, but there are only {num_samples} training samples; "
            f"use at most {num_samples} clients, or more data"
        )


def _iid(num_samples: int, sizes: Indices, rng: np.random.Generator) -> list[Indices]:
    shuffled = rng.permutation(num_samples).astype(np.int64)
    return [np.sort(part) for part in np.split(shuffled[: sizes.sum()], np.cumsum(sizes)[:-1])]


def client_sizes(num_samples: int, config: PartitionConfig, rng: np.random.Generator) -> Indices:
    """How many samples each client gets, ``(num_clients,)``: each >= 1, together at most ``num_samples``.

    Log-normal sizes are ``exp(sigma * N(0, 1))``, scaled to the sum that equal sizes have and rounded down.

    Raises:
        InputError: more clients than samples.
    """
    clients = config.num_clients
    _check_clients(clients, num_samples)
    equal = num_samples // clients
    if config.sizes == "equal" or config.sigma == 0:
        return np.repeat(np.int64(equal), clients)
    logs = config.sigma * rng.standard_normal(clients)
    shares = np.exp(logs - logs.max())
    sizes: Indices = np.maximum((shares / shares.sum() * (equal * clients)).astype(np.int64), 1)
    # Lifting the smallest to 1 can exceed the sum; the largest give it back.
    for client in np.argsort(-sizes, kind="stable"):
        excess = int(sizes.sum()) - equal * clients
        if excess <= 0:
            break
        sizes[client] -= min(excess, int(sizes[client]) - 1)
    return sizes


def _dirichlet(labels: Indices, sizes: Indices, alpha: float, rng: np.random.Generator) -> list[Indices]:
    """Draws in passes: in each, every client that is not full draws one sample, in a new random order.

    Serving clients in turn instead of one after the other keeps the last one from getting only leftovers.
    """
    if len(sizes) == 1 and sizes[0] == len(labels):
        return [np.arange(len(labels))]  # central training: any order of drawing gives this
    num_classes = int(labels.max()) + 1
    left = np.bincount(labels, minlength=num_classes)
    shuffled = rng.permutation(len(labels))
    pool = shuffled[np.argsort(labels[shuffled], kind="stable")]
    next_in_pool = np.cumsum(left) - left
    wanted = dirichlet_draws(len(sizes), num_classes, alpha, rng)
    cumulative, starved = _open_classes(wanted, left)
    drawn: list[Indices] = []
    owners: list[Indices] = []
    for number in range(int(sizes.max())):
        waiting = rng.permutation(np.flatnonzero(sizes > number))
        # Each turn of this loop but the last uses up at least one class, so it ends.
        while len(waiting):
            classes = _draw_classes(cumulative[waiting], starved[waiting], left, rng)
            by_class = np.argsort(classes, kind="stable")
            classes, waiting = classes[by_class], waiting[by_class]
            first = np.searchsorted(classes, classes, side="left")
            rank = np.arange(len(classes)) - first
            served = rank < left[classes]
            drawn.append(pool[next_in_pool[classes[served]] + rank[served]])
            owners.append(waiting[served])
            taken = np.bincount(classes[served], minlength=num_classes)
            next_in_pool += taken
            newly_empty = bool(((left > 0) & (left == taken)).any())
            left = left - taken
            if newly_empty:
                cumulative, starved = _open_classes(wanted, left)
            waiting = waiting[~served]
    owner, sample = np.concatenate(owners), np.concatenate(drawn)
    order = np.lexsort((sample, owner))
    return np.split(sample[order].astype(np.int64), np.cumsum(sizes)[:-1])


def _open_classes(wanted: Floats, left: Indices) -> tuple[Floats, NDArray[np.bool_]]:
    """Cumulative probabilities ``(clients, C)`` over the classes with samples left, and who wants none of these."""
    still = wanted * (left > 0)
    total = still.sum(axis=1, keepdims=True)
    starved = total[:, 0] < np.finfo(np.float64).tiny * 1e8
    total[starved] = 1.0
    return np.cumsum(still / total, axis=1), starved


def _draw_classes(cumulative: Floats, starved: NDArray[np.bool_], left: Indices, rng: np.random.Generator) -> Indices:
    """One class per row; a client whose classes are all used up takes in proportion to what is left."""
    if starved.any():
        cumulative = cumulative.copy()
        cumulative[starved] = np.cumsum(left / left.sum())
    # Scaling by the last entry, which rounding may put just off 1, keeps the draw inside the table.
    level = rng.random(len(cumulative)) * cumulative[:, -1]
    classes: Indices = (level[:, None] >= cumulative).sum(axis=1)
    return classes


def hold_back(
    parts: Sequence[NDArray[np.integer]], labels: NDArray[np.integer], share: float, rng: np.random.Generator
) -> tuple[list[Indices], list[Indices]]:
    """Training and test rows of each client, both ascending; together they are its part.

    A client of n samples has ``round(share * n)`` of them held back (a half goes to the even number), but at least one
    stays for training. Each class in its proportion: rounded down, and what is left goes to the classes with the
    largest remainders, equal ones in random order.

    Args:
        parts: index lists into ``labels``, one per client.
        labels: the class of each sample, ``(N,)``.
        share: 0 holds nothing back; below 1.
        rng: decides which samples of a class are held back.
    """
    sizes = np.array([len(part) for part in parts], dtype=np.int64)
    rows = np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])
    wanted = np.minimum(np.rint(share * sizes).astype(np.int64), np.maximum(sizes - 1, 0))
    owner = np.repeat(np.arange(len(parts)), sizes)
    # All clients at once: groups are runs of one client and class, and samples inside a run are in random order.
    klass = np.asarray(labels)[rows]
    order = np.lexsort((rng.random(len(rows)), klass, owner))
    rows, owner, klass = rows[order], owner[order], klass[order]
    starts = np.ones(len(rows), dtype=bool)
    starts[1:] = (np.diff(owner) != 0) | (np.diff(klass) != 0)
    group = np.cumsum(starts) - 1
    first = np.flatnonzero(starts)
    held_by = owner[first]
    # Integers keep equal remainders equal: count * wanted / n.
    taken, remainder = np.divmod(np.bincount(group, minlength=len(first)) * wanted[held_by], sizes[held_by])
    missing = wanted - np.bincount(held_by, weights=taken, minlength=len(parts)).astype(np.int64)
    by_remainder = np.lexsort((rng.random(len(first)), -remainder, held_by))
    place = np.arange(len(first)) - np.searchsorted(held_by, held_by)  # held_by is ascending, sorted or not
    taken[by_remainder] += place < missing[held_by]
    is_test = np.arange(len(rows)) - first[group] < taken[group]
    return _per_client(rows, owner, ~is_test, len(parts)), _per_client(rows, owner, is_test, len(parts))


def _per_client(rows: Indices, owner: Indices, chosen: NDArray[np.bool_], num_clients: int) -> list[Indices]:
    rows, owner = rows[chosen], owner[chosen]
    ends = np.cumsum(np.bincount(owner, minlength=num_clients))
    return np.split(rows[np.lexsort((rows, owner))], ends[:-1])


def noise_levels(num_clients: int, noise: float) -> Floats:
    """Standard deviations of the noise on each client's images, ``(num_clients,)``: ``noise * (k + 1) / num_clients``.

    The noise-based feature imbalance of NIID-Bench (Li et al., "Federated Learning on Non-IID Data Silos", ICDE 2022),
    which adds Gaussian noise of *variance* ``sigma * i / N`` to client i of N; here ``noise`` is a standard deviation.
    0 is no noise.
    """
    return noise * np.arange(1, num_clients + 1, dtype=np.float64) / num_clients


def skew(counts: NDArray[np.integer]) -> dict[str, float]:
    """How far clients are from each other, from class counts ``(clients, C)``; clients without samples are left out.

    Returns:
        ``total_variation``: mean over clients of ``1/2 sum_c |p_k(c) - p(c)|``; 0 is IID, near 1 fully separate.
        ``effective_classes``: mean over clients of ``exp(entropy)``; 1 is one class each, C is all classes alike.
        ``size_min``, ``size_mean``, ``size_max``: samples per client, over all clients.
        ``empty_clients``: how many clients have no sample.

    Raises:
        ValueError: no client has a sample.
    """
    counts = np.asarray(counts, dtype=np.float64)
    sizes = counts.sum(axis=1)
    if not sizes.sum() > 0:
        raise ValueError("skew needs at least one client with samples")
    laws = counts[sizes > 0] / sizes[sizes > 0, None]
    overall = counts.sum(axis=0) / counts.sum()
    logs = np.log(laws, where=laws > 0, out=np.zeros_like(laws))
    return {
        "total_variation": float(0.5 * np.abs(laws - overall).sum(axis=1).mean()),
        "effective_classes": float(np.exp(-(laws * logs).sum(axis=1)).mean()),
        "size_min": float(sizes.min()),
        "size_mean": float(sizes.mean()),
        "size_max": float(sizes.max()),
        "empty_clients": float((sizes == 0).sum()),
    }
