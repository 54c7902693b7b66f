"""A data set on one device, divided among clients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedftg.data.augment import flip_crop
from fedftg.data.dataset import ImageDataset
from fedftg.errors import InputError


class FederatedData:
    """Images once on the device as unsigned bytes, index lists of the clients, and batches made from them.

    Args:
        dataset: where images, labels and normalisation come from.
        parts: one index list into the training images per client; lists may be empty.
        device: where the images stay and batches are made.

    Raises:
        ValueError: no client, or an index that is no training sample.
    """

    def __init__(
        self, dataset: ImageDataset, parts: Sequence[NDArray[np.integer]], device: torch.device | str = "cpu"
    ) -> None:
        if len(parts) == 0:
            raise ValueError("FederatedData needs at least one client")
        self.dataset = dataset
        self.device = torch.device(device)
        self._parts = [torch.from_numpy(np.asarray(part, dtype=np.int64).copy()) for part in parts]
        total = len(dataset.train_labels)
        if any(len(part) and (int(part.min()) < 0 or int(part.max()) >= total) for part in self._parts):
            raise ValueError(f"a client's index is outside the {total} training samples")
        self.class_counts = torch.stack(
            [torch.bincount(dataset.train_labels[part], minlength=dataset.num_classes) for part in self._parts]
        )
        """``(clients, C)`` int64, on the CPU."""
        self._mean_size = sum(len(part) for part in self._parts) / len(self._parts)
        self._train_images = dataset.train_images.to(self.device)
        self._train_labels = dataset.train_labels.to(self.device)
        self._test_images = dataset.test_images.to(self.device)
        self._test_labels = dataset.test_labels.to(self.device)
        self._mean = torch.tensor(dataset.mean, device=self.device).view(1, -1, 1, 1)
        self._std = torch.tensor(dataset.std, device=self.device).view(1, -1, 1, 1)

    @property
    def num_clients(self) -> int:
        """How many clients there are, those without samples included."""
        return len(self._parts)

    @property
    def num_classes(self) -> int:
        """C."""
        return self.dataset.num_classes

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(D, H, W)``."""
        return self.dataset.image_shape

    def num_samples(self, client: int) -> int:
        """How many training samples the client holds."""
        return len(self._parts[client])

    def relative_size(self, client: int) -> float:
        """The client's number of samples over the mean of all clients; 1 where all hold the same."""
        return self.num_samples(client) / self._mean_size if self._mean_size else 0.0

    def normalise(self, images: Tensor) -> Tensor:
        """Float images ``(B, D, H, W)`` with about mean 0 and deviation 1 per channel, from unsigned bytes."""
        return (images.to(self.device, torch.float32) / 255 - self._mean) / self._std

    def steps_per_epoch(self, client: int, batch_size: int, min_batch: int = 1) -> int:
        """How many batches one pass over the client's samples gives; 0 where it holds fewer than ``min_batch``."""
        full, rest = divmod(self.num_samples(client), batch_size)
        return full + (rest >= max(min_batch, 1))

    def batches(
        self,
        client: int,
        *,
        num_epochs: float,
        num_steps: int | None,
        batch_size: int,
        rng: torch.Generator,
        min_batch: int = 1,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Training batches of one client: normalised, augmented images ``(B, D, H, W)`` and labels ``(B,)``.

        Each pass over the samples has a new order. Its last batch may be smaller; it is left out where it is smaller
        than ``min_batch``.

        Args:
            client: its number, from 0.
            num_epochs: passes over the client's samples; a fraction is rounded to whole batches, at least one.
                0 gives no batch.
            num_steps: when given, exactly so many batches instead of ``num_epochs`` passes, in as many passes as
                that takes.
            batch_size: samples per batch, >= 1; more than the client holds gives one batch of all of them.
            rng: a CPU generator that order and augmentation are drawn from.
            min_batch: the smallest batch that the model can train on: 2 for BatchNorm. A client with fewer samples
                gives no batch.

        Raises:
            InputError: ``batch_size`` is below 1 or below ``min_batch``.
        """
        if batch_size < max(min_batch, 1):
            why = "a model with BatchNorm cannot train on single samples" if batch_size == 1 else "it counts samples"
            raise InputError(f"batch_size must be >= {max(min_batch, 1)}, got {batch_size}; {why}")
        per_epoch = self.steps_per_epoch(client, batch_size, min_batch)
        wanted = max(round(num_epochs * per_epoch), 1 if num_epochs > 0 else 0) if num_steps is None else num_steps
        return self._batches(self._parts[client], per_epoch, wanted if per_epoch else 0, batch_size, rng)

    def _batches(
        self, part: Tensor, per_epoch: int, wanted: int, batch_size: int, rng: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        order = part
        for step in range(wanted):
            at = step % per_epoch
            if at == 0:
                order = part[torch.randperm(len(part), generator=rng)].to(self.device)
            rows = order[at * batch_size : (at + 1) * batch_size]
            images = self._train_images[rows]
            if self.dataset.augment == "flip_crop":
                images = flip_crop(images, rng)
            yield self.normalise(images), self._train_labels[rows]

    def test_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All test images ``(B, D, H, W)``, normalised, never augmented, and labels ``(B,)``, in stored order."""
        for start in range(0, len(self._test_labels), batch_size):
            stop = start + batch_size
            yield self.normalise(self._test_images[start:stop]), self._test_labels[start:stop]
