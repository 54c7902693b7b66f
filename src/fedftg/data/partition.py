"""Dividing samples among clients, and measures of how skewed a division is.

The Dirichlet law is that of the FedFTG paper's experiments (and of FedDyn's): **per client over classes**. Client k
draws class proportions ``q_k ~ Dir(alpha, ..., alpha)`` and then its samples, one by one and without replacement, from
the classes with these probabilities. A class that is used up gets probability 0 and the rest is renormalised; the
public code draws again until it meets a class with samples left, which is the same law but may never end.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedftg.data.config import PartitionConfig
from fedftg.errors import InputError

Indices = NDArray[np.int64]
Floats = NDArray[np.float64]


def partition(labels: NDArray[np.integer], config: PartitionConfig, rng: np.random.Generator) -> list[Indices]:
    """Disjoint index lists into ``labels`` ``(N,)``, one per client, ascending inside each.

    With equal sizes every client gets ``N // num_clients`` samples and the remainder (fewer than ``num_clients``
    samples, chosen at random) is not used, as in the paper's setting; with log-normal sizes at least 1 each.

    Args:
        labels: the class of each sample, integers >= 0.
        config: the law; ``alpha`` 0.1 is very skewed, 100 nearly IID.
        rng: the only source of randomness: the same state gives the same division.

    Raises:
        InputError: more clients than samples.
    """
    labels = np.asarray(labels)
    sizes = client_sizes(len(labels), config, rng)
    if config.law == "iid":
        shuffled = rng.permutation(len(labels)).astype(np.int64)
        return [np.sort(part) for part in np.split(shuffled[: sizes.sum()], np.cumsum(sizes)[:-1])]
    if config.law != "dirichlet":
        raise InputError(f"partition.law {config.law!r} is not there yet; take iid or dirichlet")
    return _dirichlet(labels.astype(np.int64), sizes, config.alpha, rng)


def client_sizes(num_samples: int, config: PartitionConfig, rng: np.random.Generator) -> Indices:
    """How many samples each client gets, ``(num_clients,)``: each >= 1, together at most ``num_samples``.

    Log-normal sizes are ``exp(sigma * N(0, 1))``, scaled to the sum that equal sizes have and rounded down.

    Raises:
        InputError: more clients than samples.
    """
    clients = config.num_clients
    if clients > num_samples:
        raise InputError(
            f"partition.num_clients is {clients}, but there are only {num_samples} training samples; "
            f"use at most {num_samples} clients, or more data"
        )
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
    num_classes = int(labels.max()) + 1
    left = np.bincount(labels, minlength=num_classes)
    shuffled = rng.permutation(len(labels))
    pool = shuffled[np.argsort(labels[shuffled], kind="stable")]
    next_in_pool = np.cumsum(left) - left
    wanted = _class_proportions(len(sizes), num_classes, alpha, rng)
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


def _class_proportions(num_clients: int, num_classes: int, alpha: float, rng: np.random.Generator) -> Floats:
    """Dirichlet draws ``(num_clients, C)``; where an extreme alpha leaves the range of floats, its limit."""
    with np.errstate(all="ignore"):
        proportions = rng.dirichlet(np.full(num_classes, alpha), size=num_clients)
    broken = ~(np.isfinite(proportions).all(axis=1) & (proportions.sum(axis=1) > 0.5))
    if broken.any():
        one_class = np.eye(num_classes)[rng.integers(num_classes, size=num_clients)]
        limit = one_class if alpha < 1 else np.full((num_clients, num_classes), 1 / num_classes)
        proportions[broken] = limit[broken]
    return proportions


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


def skew(counts: NDArray[np.integer]) -> dict[str, float]:
    """How far clients are from each other, from class counts ``(clients, C)``; clients without samples are left out.

    Returns:
        ``total_variation``: mean over clients of ``1/2 sum_c |p_k(c) - p(c)|``; 0 is IID, near 1 fully separate.
        ``effective_classes``: mean over clients of ``exp(entropy)``; 1 is one class each, C is all classes alike.
        ``size_min``, ``size_mean``, ``size_max``: samples per client, over all clients.

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
    }
