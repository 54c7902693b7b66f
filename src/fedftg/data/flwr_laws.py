"""Laws that flwr-datasets has: its partitioners, asked for row numbers only.

A partitioner wants a ``datasets.Dataset``; it gets one in memory with what it divides by and the row numbers, and no
image. Rows are shuffled first, because the partitioners cut consecutive rows: otherwise a client's samples would depend
on the order in the data's files.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedftg.data.own_laws import deal_classes
from fedftg.errors import InputError

Indices = NDArray[np.int64]

ATTEMPTS = 10
"""How often class_dirichlet draws a division before it gives up; as many as flwr-datasets repeats it."""

_MOST_DRAWS = 100_000
"""From so many draws on, flwr-datasets' pathological law takes more than 2 s (20 microseconds a draw, one core)."""

_DRAWN_FROM = "by"
_ROW = "row"


def class_dirichlet(
    labels: Indices, num_clients: int, alpha: float, min_samples: int, rng: np.random.Generator
) -> list[Indices]:
    """Each class divided over the clients by its own draw of ``Dir(alpha)``; flwr's DirichletPartitioner.

    It rounds the places where it cuts a class down, so the last client has up to one sample of each class more than it
    drew: with many classes and a small alpha it holds nearly all of them.

    Args:
        labels: ``(N,)``.
        num_clients: at most N.
        alpha: > 0. Beyond 1e-12 and 1e12 a division no longer changes, and floats overflow.
        min_samples: the division is drawn again, up to `ATTEMPTS` times, until everybody holds so many.
        rng: of the seeds.

    Raises:
        InputError: no division among `ATTEMPTS` had ``min_samples`` samples for everybody.
    """
    _libraries()  # told as what it is, not as a division that cannot be found
    alpha = float(np.clip(alpha, 1e-12, 1e12))
    seed = _seed_that_suffices(labels, num_clients, alpha, min_samples, rng)

    def make(partitioners: Any, _: int) -> Any:
        return partitioners.DirichletPartitioner(
            num_partitions=num_clients,
            partition_by=_DRAWN_FROM,
            alpha=alpha,
            min_partition_size=min_samples,
            self_balancing=False,
            shuffle=False,
            seed=seed,
        )

    try:
        return _divide(make, labels, rng)
    except ValueError as error:
        raise _too_few(num_clients, alpha, min_samples, len(labels)) from error


def _seed_that_suffices(
    labels: Indices, num_clients: int, alpha: float, min_samples: int, rng: np.random.Generator
) -> int:
    """The first of `ATTEMPTS` seeds whose division gives everybody ``min_samples``.

    The partitioner draws one vector a class from a generator with this seed, so sizes are known before it builds any
    list. Its own repeats take 17 s (10 classes) to 31 s (100) before they fail for 10,000 clients; these take 1 s.
    """
    counts = np.bincount(labels)
    counts = counts[counts > 0]
    if min_samples * num_clients > len(labels):
        raise _too_few(num_clients, alpha, min_samples, len(labels))
    for _ in range(ATTEMPTS if min_samples else 1):
        seed = int(rng.integers(2**32))
        if not min_samples:
            return seed
        shares = np.random.default_rng(seed).dirichlet(np.full(num_clients, alpha), size=len(counts))
        ends = (np.cumsum(shares, axis=1) * counts[:, None]).astype(np.int64)
        ends[:, -1] = counts
        if np.diff(ends, axis=1, prepend=0).sum(axis=0).min() >= min_samples:
            return seed
    raise _too_few(num_clients, alpha, min_samples, len(labels))


def _too_few(num_clients: int, alpha: float, min_samples: int, num_samples: int) -> InputError:
    return InputError(
        f"law class_dirichlet found no division of {num_samples} samples with at least {min_samples} for each of "
        f"{num_clients} clients at alpha {alpha:g}; lower partition.min_samples or partition.num_clients, or raise "
        "partition.alpha"
    )


def pathological(labels: Indices, num_clients: int, classes_per_client: int, rng: np.random.Generator) -> list[Indices]:
    """Each client holds ``classes_per_client`` classes; a class is divided equally among those that hold it.

    flwr's PathologicalPartitioner with its mode "first-deterministic", NIID-Bench's law: client k holds class k modulo
    C, and others at random. Of its modes only this one uses every class, and only from C clients on; "random" may leave
    classes out, "deterministic" gives neighbours nearly the same classes. Where it leaves classes out (fewer clients
    than classes), fails (a class drawn by more clients than it has samples), or is slow (nearly all classes for
    everybody), `own_laws.deal_classes` chooses the classes: each equally often, at random otherwise.

    Raises:
        InputError: more classes than there are, or more places than the classes' samples can fill.
    """
    _libraries()  # or the division would silently be another one where the package is missing
    present = int(np.count_nonzero(np.bincount(labels)))
    if classes_per_client > present:
        raise InputError(
            f"partition.classes_per_client is {classes_per_client}, but the training data has {present} classes; "
            f"use at most {present}"
        )
    seed = int(rng.integers(2**32))
    # A client draws until it has so many different classes: the coupon collector's time.
    draws = num_clients * present * sum(1 / (present - held) for held in range(1, classes_per_client))
    if num_clients >= present and draws <= _MOST_DRAWS:

        def make(partitioners: Any, _: int) -> Any:
            return partitioners.PathologicalPartitioner(
                num_partitions=num_clients,
                partition_by=_DRAWN_FROM,
                num_classes_per_partition=classes_per_client,
                class_assignment_mode="first-deterministic",
                shuffle=False,
                seed=seed,
            )

        with contextlib.suppress(ValueError):
            return _divide(make, labels, rng)
    return deal_classes(labels, num_clients, classes_per_client, rng)


def shards(labels: Indices, num_clients: int, shards_per_client: int, rng: np.random.Generator) -> list[Indices]:
    """Rows sorted by class, cut into ``num_clients * shards_per_client`` equal blocks, dealt at random.

    flwr's ShardPartitioner, FedAvg's law. A shard has ``N // shards`` samples; what is left, fewer rows than there are
    shards, is not used.

    Raises:
        InputError: more shards than samples.
    """
    wanted = num_clients * shards_per_client
    if wanted > len(labels):
        raise InputError(
            f"law shards needs {wanted} shards ({num_clients} clients with {shards_per_client} each), but there are "
            f"only {len(labels)} training samples; lower partition.shards_per_client or partition.num_clients"
        )

    def make(partitioners: Any, seed: int) -> Any:
        return partitioners.ShardPartitioner(
            num_partitions=num_clients,
            partition_by=_DRAWN_FROM,
            num_shards_per_partition=shards_per_client,
            shuffle=False,
            seed=seed,
        )

    return _divide(make, labels, rng)


_GROWTH: dict[str, tuple[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]]] = {
    "linear": ("LinearPartitioner", lambda ids: ids / ids[-1]),
    "square": ("SquarePartitioner", lambda ids: np.square(ids / ids[-1])),
    "exponential": ("ExponentialPartitioner", lambda ids: np.exp(ids - ids[-1])),
}


def growing(law: str, num_samples: int, num_clients: int, rng: np.random.Generator) -> list[Indices]:
    """Sizes in proportion to k, k squared or e^k for client k = 1, 2, ...; labels at random.

    flwr's Linear-, Square- and ExponentialPartitioner. Sizes are rounded down, and the last client gets what is left.

    Raises:
        InputError: the first client would get no sample.
    """
    name, weights = _GROWTH[law]
    most = _most_clients(weights, num_samples)
    advice = InputError(
        f"law {law} would leave the first of {num_clients} clients without samples: with {num_samples} training "
        f"samples it takes at most {most} clients; lower partition.num_clients, or take law quantity for unequal sizes"
    )
    if num_clients > most:  # asked before flwr does, for e^k overflows from 710 clients on
        raise advice
    try:
        return _divide(
            lambda partitioners, _: getattr(partitioners, name)(num_partitions=num_clients),
            np.zeros(num_samples, dtype=np.int64),
            rng,
        )
    except ValueError as error:
        raise advice from error


def _most_clients(weights: Callable[[NDArray[np.float64]], NDArray[np.float64]], num_samples: int) -> int:
    """With how many clients the first one, whose part is the smallest, still gets a sample."""
    low, high = 1, num_samples
    while low < high:
        middle = (low + high + 1) // 2
        parts = weights(np.arange(1, middle + 1, dtype=np.float64))
        low, high = (middle, high) if parts[0] / parts.sum() * num_samples >= 1 else (low, middle - 1)
    return low


def natural(groups: Indices, rng: np.random.Generator) -> list[Indices]:
    """One client per value of ``groups`` ``(N,)``, ascending; flwr's NaturalIdPartitioner. Nothing is random."""
    return _divide(lambda partitioners, _: partitioners.NaturalIdPartitioner(partition_by=_DRAWN_FROM), groups, rng)


def _divide(make: Callable[[Any, int], Any], by: Indices, rng: np.random.Generator) -> list[Indices]:
    """Row numbers per client, ascending, of the partitioner that ``make(flwr_datasets.partitioner, seed)`` gives."""
    order = rng.permutation(len(by))
    seed = int(rng.integers(2**32))
    with _quiet():
        datasets, partitioners = _libraries()
        shown = datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()
        try:
            partitioner = make(partitioners, seed)
            partitioner.dataset = datasets.Dataset.from_dict({_DRAWN_FROM: by[order], _ROW: order})
            return [np.sort(part) for part in _assignment(partitioner)]
        finally:
            if not shown:
                datasets.enable_progress_bars()


def _assignment(partitioner: Any) -> list[Indices]:
    """What the partitioner gave to whom, as numbers in the column of rows.

    One list of positions per client is made by the first `load_partition`. It is read from the attribute that all these
    partitioners keep it in, for loading 10,000 clients one by one takes 22 s; positions count in the partitioner's own
    data set, which the shard law has sorted. Where a version has no such attribute, clients are loaded one by one.
    """
    first = partitioner.load_partition(0)
    count = partitioner.num_partitions
    positions = getattr(partitioner, "_partition_id_to_indices", None)
    if not isinstance(positions, dict) or len(positions) != count:
        parts = [first, *(partitioner.load_partition(client) for client in range(1, count))]
        return [np.asarray(part.with_format("numpy")[_ROW][:], dtype=np.int64) for part in parts]
    rows = np.asarray(partitioner.dataset.with_format("numpy")[_ROW][:], dtype=np.int64)
    return [rows[np.asarray(positions[client], dtype=np.int64)] for client in range(count)]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No warning and no bar of the libraries: what a user must know is raised as an `InputError`."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _libraries() -> tuple[Any, Any]:
    try:
        # Imported here: they take 2 s, and only these laws need them.
        import datasets
        from flwr_datasets import partitioner
    except ImportError as error:
        raise InputError(
            "this partition.law comes with flwr-datasets, which is not installed; pip install 'fedftg[data]', or take "
            "law iid, dirichlet, quantity, domain or file"
        ) from error
    return datasets, partitioner
