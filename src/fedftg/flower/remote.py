"""What a server learns of its clients from their nodes, as one value that is written to ``partition.json``."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedftg import __version__
from fedftg.data.dataset import Channels, ImageDataset
from fedftg.data.federated import FederatedData
from fedftg.errors import InputError
from fedftg.flower import records
from fedftg.rundir.records import Record

_MOST_CLIENTS = 10_000_000
_MOST_CLASSES = 1_000_000
_MOST_PIXELS = 1 << 16
"""Of a side; what is more is a mistake or an attack, and nothing is made for it."""


@dataclass(frozen=True)
class ClientFacts:
    """What a node says of its client."""

    client: int
    num_clients: int
    num_samples: int
    held_back: int
    class_counts: tuple[int, ...]
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    mean: Channels
    std: Channels
    digest: str
    """SHA-256 of the client's data (`FederatedData.digest`)."""
    settings: str
    version: str

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> ClientFacts:
        """Facts from a node's answer.

        Raises:
            InputError: something is missing, or is not what it should be.
        """
        try:
            names = tuple(str(name) for name in given["class-names"])
            depth, height, width = (_whole(size) for size in given["image-shape"])
            counts = records.counts_from_list(given[records.CLASS_COUNTS], len(names))
            facts = cls(
                client=_whole(given[records.PARTITION_ID]),
                num_clients=_whole(given["num-clients"]),
                num_samples=_whole(given[records.NUM_EXAMPLES]),
                held_back=_whole(given["held-back"]),
                class_counts=tuple(records.counts_to_list(counts)),
                class_names=names,
                image_shape=(depth, height, width),
                mean=tuple(float(value) for value in given["mean"]),
                std=tuple(float(value) for value in given["std"]),
                digest=str(given["data-digest"]),
                settings=str(given["settings-digest"]),
                version=str(given["version"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"its answer is not that of this package ({type(error).__name__}: {error})") from None
        facts._check()
        return facts

    def _check(self) -> None:
        numbers = (*self.mean, *self.std)
        if self.version != __version__:
            raise InputError(f"it runs fedftg {self.version}, the server {__version__}; install the same version")
        in_range = 0 <= self.client < self.num_clients <= _MOST_CLIENTS and 0 <= self.held_back <= 2**53
        if not in_range or self.num_samples != sum(self.class_counts):
            raise InputError(f"its counts do not fit together (client {self.client} of {self.num_clients})")
        if not 1 <= len(self.class_names) <= _MOST_CLASSES or not all(1 <= n <= _MOST_PIXELS for n in self.image_shape):
            raise InputError("its classes or its image shape are impossible")
        if len(self.mean) != self.image_shape[0] or len(self.std) != self.image_shape[0]:
            raise InputError("its normalisation does not fit its images")
        if not all(map(math.isfinite, numbers)) or min(self.std) <= 0:
            raise InputError("its normalisation is not finite")


def _whole(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{str(value)[:20]!r} is no whole number")
    return value


class RemoteFederation:
    """Sizes of clients that are elsewhere, and test data of the server's own: a `fedftg.data.federated.Federation`.

    Args:
        like: any client's facts: classes, image shape and number of clients are those of all.
        mean: of all clients' images, per channel.
        std: likewise.
        device: where the server computes.
        test: a data set whose test images are the server's; None: accuracy is not measured.

    Raises:
        InputError: the server's test data is of other classes or another shape.
    """

    def __init__(
        self,
        like: ClientFacts,
        mean: Channels,
        std: Channels,
        device: torch.device,
        test: ImageDataset | None,
    ) -> None:
        self.like, self.mean, self.std, self.device = like, mean, std, device
        self.known: dict[int, ClientFacts] = {}
        self._test: FederatedData | None = None
        if test is not None:
            problem = other_data(like, test)
            if problem is not None:
                raise InputError(f"{problem}; give the same data, or server-data=none")
            only_test = replace(
                test,
                train_images=test.train_images[:0],
                train_labels=test.train_labels[:0],
                columns={},
                mean=mean,
                std=std,
            )
            self._test = FederatedData(only_test, [torch.empty(0, dtype=torch.int64).numpy()], device)

    @property
    def num_clients(self) -> int:
        """How many clients are expected, whether their nodes are there or not."""
        return self.like.num_clients

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.like.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(D, H, W)``."""
        return self.like.image_shape

    @property
    def has_test_data(self) -> bool:
        """Whether the server measures accuracy."""
        return self._test is not None

    @property
    def holds_back(self) -> bool:
        """What clients hold back stays on their nodes."""
        return False

    def num_samples(self, client: int) -> int:
        """How many training samples a client holds; 0 where its node was never there."""
        return self.known[client].num_samples if client in self.known else 0

    def may_train(self, client: int) -> bool:
        """Whether a client can be drawn: all but those that are known to hold nothing."""
        return client not in self.known or self.known[client].num_samples > 0

    def num_held_back(self, client: int) -> int:
        """How many samples a client keeps for testing."""
        return self.known[client].held_back if client in self.known else 0

    def relative_size(self, client: int) -> float:
        """A client's number of samples over the mean of all clients that are known."""
        mean = sum(facts.num_samples for facts in self.known.values()) / max(len(self.known), 1)
        return self.num_samples(client) / mean if mean else 0.0

    def test_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The server's test images, normalised, and labels."""
        return iter(()) if self._test is None else self._test.test_batches(batch_size)

    def held_back_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:  # noqa: ARG002
        """None: they stay on the nodes."""
        return iter(())

    def mismatch(self, facts: ClientFacts) -> str | None:
        """Why a node cannot take part, or None."""
        like = self.like
        same = {
            "number of clients": (facts.num_clients, like.num_clients),
            "class names": (facts.class_names, like.class_names),
            "image shape": (facts.image_shape, like.image_shape),
            "recipe's settings": (facts.settings[:12], like.settings[:12]),
        }
        for what, (got, wanted) in same.items():
            if got != wanted:
                return f"its {what} differ from the others': {str(got)[:80]} against {str(wanted)[:80]}"
        before = self.known.get(facts.client)
        if before is not None and before.digest != facts.digest:
            return f"its data is not what client {facts.client} had before (see partition.json)"
        return None

    def record(self, run: str) -> Record:
        """The content of ``partition.json``; a client that was never there has no counts and no digest."""
        clients = range(self.num_clients)
        nothing = (0,) * self.num_classes
        digests = [self.known[client].digest if client in self.known else None for client in clients]
        record: Record = {
            "class_names": list(self.like.class_names),
            "class_counts": [
                list(self.known[client].class_counts if client in self.known else nothing) for client in clients
            ],
            "digest": hashlib.sha256(",".join(map(str, digests)).encode()).hexdigest(),
            "digests": digests,
            "image_shape": list(self.image_shape),
            "mean": list(self.mean),
            "std": list(self.std),
            "run": run,
        }
        if any(facts.held_back for facts in self.known.values()):
            record["held_back"] = [self.num_held_back(client) for client in clients]
        return record


def other_data(facts: ClientFacts, test: ImageDataset) -> str | None:
    """How a node's classes or images differ from those of the server's test data, or None."""
    if facts.image_shape != test.image_shape:
        return f"its images are {facts.image_shape}, those of the server's test data {test.image_shape}"
    if len(facts.class_names) != test.num_classes:
        return f"it has {len(facts.class_names)} classes, the server's test data {test.num_classes}"
    pairs = enumerate(zip(facts.class_names, test.class_names, strict=True))
    for number, (theirs, ours) in pairs:
        if theirs != ours:
            return f"its class {number} is {theirs[:40]!r}, that of the server's test data {ours[:40]!r}"
    return None


def facts_of(record: Mapping[str, Any], settings: str) -> list[ClientFacts]:
    """The facts of the clients that a ``partition.json`` knows.

    Raises:
        InputError: the file was not written by a server of real machines.
    """
    try:
        held_back = record.get("held_back", [0] * len(record["digests"]))
        depth, height, width = record["image_shape"]
        return [
            ClientFacts(
                client=client,
                num_clients=len(record["digests"]),
                num_samples=sum(record["class_counts"][client]),
                held_back=held_back[client],
                class_counts=tuple(record["class_counts"][client]),
                class_names=tuple(record["class_names"]),
                image_shape=(depth, height, width),
                mean=tuple(record["mean"]),
                std=tuple(record["std"]),
                digest=digest,
                settings=settings,
                version=__version__,
            )
            for client, digest in enumerate(record["digests"])
            if digest is not None
        ]
    except (KeyError, TypeError, IndexError, ValueError):
        raise InputError(
            "the run was not made by a Flower server (see its partition.json); resume it by 'fedftg run --resume'"
        ) from None


def joint_normalisation(facts: list[ClientFacts]) -> tuple[Channels, Channels]:
    """Means and deviations ``(D,)`` of all clients' images together, from each client's own, weighted by size.

    Where all say the same, as with one data set divided by the recipe, that is it, to the last bit.
    """
    if len({(one.mean, one.std) for one in facts}) == 1:
        return facts[0].mean, facts[0].std
    sizes = [float(one.num_samples) for one in facts]
    if not sum(sizes):
        return facts[0].mean, facts[0].std

    def mean_of(values: list[float]) -> float:
        return sum(size * value for size, value in zip(sizes, values, strict=True)) / sum(sizes)

    means, deviations = [], []
    for channel in range(len(facts[0].mean)):
        mean = mean_of([one.mean[channel] for one in facts])
        square = mean_of([one.std[channel] ** 2 + one.mean[channel] ** 2 for one in facts])
        means.append(mean)
        deviations.append(math.sqrt(max(square - mean**2, 1e-12)))
    return tuple(means), tuple(deviations)
