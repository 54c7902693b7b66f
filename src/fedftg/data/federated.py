"""A data set on one device, partitioned among clients, and batches made from it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fedftg.augment import augment, moved
from fedftg.data import sources
from fedftg.data.config import DataConfig, PartitionConfig
from fedftg.data.dataset import ImageDataset
from fedftg.data.partition import Indices, class_counts, hold_back, needed_columns, noise_levels, partition
from fedftg.errors import InputError
from fedftg.seeds import SERVER, numpy_rng, torch_rng

_DIGESTED_BYTES = 256 << 20


class FederatedData:
    """Images once on the device as unsigned bytes, and batches made from them.

    Args:
        dataset: images, labels and normalisation.
        parts: rows of the training images that each client trains on; may be empty.
        device: where batches are made, and images are kept unless they would take over half of a GPU's free memory.
        held_back: rows that each client keeps for testing; None holds nothing back.
        noise: per client, the standard deviation of Gaussian noise on its normalised images; None is 0 for all.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        parts: Sequence[NDArray[np.integer]],
        device: torch.device | str = "cpu",
        *,
        held_back: Sequence[NDArray[np.integer]] | None = None,
        noise: Sequence[float] | NDArray[np.float64] | None = None,
    ) -> None:
        self.dataset = dataset
        self.device = torch.device(device)
        self.parts = _as_tensors(parts)
        self._held_back = _as_tensors([[]] * len(parts) if held_back is None else held_back)
        self.noise = [0.0] * len(parts) if noise is None else [float(level) for level in noise]
        counts = class_counts([part.numpy() for part in self.parts], dataset.train_labels.numpy(), dataset.num_classes)
        self.class_counts = torch.from_numpy(counts)  # (clients, C) int64, on the CPU
        self._mean_size = sum(len(part) for part in self.parts) / len(self.parts)
        self._train_images = _resident(dataset.train_images, self.device)
        self._train_labels = dataset.train_labels.to(self.device)
        self._test_images = _resident(dataset.test_images, self.device)
        self._test_labels = dataset.test_labels.to(self.device)
        self._mean = torch.tensor(dataset.mean, device=self.device).view(1, -1, 1, 1)
        self._std = torch.tensor(dataset.std, device=self.device).view(1, -1, 1, 1)

    @property
    def digest(self) -> str:
        """SHA-256 of all that training sees; of large sets, about 256 MB of evenly spaced images a split are read."""
        data, total = self.dataset, hashlib.sha256()
        for part in [data.train_labels, data.test_labels, *self.parts, *self._held_back]:
            total.update(f"{len(part)};".encode())
            total.update(part.numpy().astype("<i8").tobytes())
        for images in (data.train_images, data.test_images):
            step = max(1, -(-images.nbytes // _DIGESTED_BYTES))
            total.update(f"{tuple(images.shape)};".encode())
            for start in range(0, len(images), step * 1024):
                total.update(images[start : start + step * 1024 : step].contiguous().numpy().data)
        total.update(repr((data.mean, data.std, data.augment, self.noise)).encode())
        return total.hexdigest()

    @property
    def num_clients(self) -> int:
        """Clients without samples included."""
        return len(self.parts)

    @property
    def num_classes(self) -> int:
        """C."""
        return self.dataset.num_classes

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(D, H, W)``."""
        return self.dataset.image_shape

    def num_samples(self, client: int) -> int:
        """Returns the client's number of training samples."""
        return len(self.parts[client])

    def num_held_back(self, client: int) -> int:
        """Returns how many samples the client keeps for testing."""
        return len(self._held_back[client])

    @property
    def has_test_data(self) -> bool:
        """Whether `test_batches` yields anything; data on a node has no test images."""
        return len(self._test_labels) > 0

    @property
    def holds_back(self) -> bool:
        """Whether `held_back_batches` yields anything."""
        return any(len(part) for part in self._held_back)

    @property
    def unlabelled_images(self) -> Tensor:
        """Returns the training images ``(N, D, H, W)`` that no client holds, as bytes on the CPU."""
        free = torch.ones(len(self.dataset.train_images), dtype=torch.bool)
        free[torch.cat([*self.parts, *self._held_back])] = False
        return self.dataset.train_images[free]

    def relative_size(self, client: int) -> float:
        """Returns the client's number of samples over the mean of all clients; 1 where all hold the same."""
        return self.num_samples(client) / self._mean_size

    def _normalise(self, images: Tensor) -> Tensor:
        return (images.to(self.device, torch.float32) / 255 - self._mean) / self._std

    def steps_per_epoch(self, client: int, batch_size: int, min_batch: int = 1) -> int:
        """Returns the batches of one pass over the client's samples; 0 where it holds fewer than ``min_batch``."""
        full, rest = divmod(self.num_samples(client), batch_size)
        return full + (rest >= min_batch)

    def batches(
        self,
        client: int,
        *,
        num_epochs: int,
        num_steps: int | None,
        batch_size: int,
        rng: torch.Generator,
        min_batch: int = 1,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields a client's training batches: normalised, augmented images ``(B, D, H, W)`` and labels ``(B,)``.

        Args:
            client: its number, from 0.
            num_epochs: passes over the client's samples.
            num_steps: the number of batches, in as many passes as that takes; None uses ``num_epochs``.
            batch_size: more than the client holds gives one batch of all of them.
            rng: a CPU generator: each pass has a new order.
            min_batch: smaller batches, at the end of a pass, are skipped; 2 for a model with BatchNorm.
        """
        per_epoch = self.steps_per_epoch(client, batch_size, min_batch)
        wanted = num_epochs * per_epoch if num_steps is None else num_steps
        part = order = self.parts[client]
        for step in range(wanted if per_epoch else 0):
            at = step % per_epoch
            if at == 0:
                order = moved(part[torch.randperm(len(part), generator=rng)], self.device)
            rows = order[at * batch_size : (at + 1) * batch_size]
            images, labels = self._train(rows)
            yield self._noisy(self._normalise(augment(images, self.dataset.augment, rng)), client, rng), labels

    def _train(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        images = self._train_images[rows.to(self._train_images.device)].to(self.device)
        return images, self._train_labels[rows.to(self.device)]

    def _noisy(self, images: Tensor, client: int, rng: torch.Generator) -> Tensor:
        if not self.noise[client]:
            return images
        return images + self.noise[client] * moved(torch.randn(images.shape, generator=rng), self.device)

    def test_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields test images ``(B, D, H, W)``, normalised and not augmented, and labels ``(B,)``, in stored order."""
        for start in range(0, len(self._test_labels), batch_size):
            stop = start + batch_size
            yield self._normalise(self._test_images[start:stop]), self._test_labels[start:stop]

    def held_back_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yields held-back images ``(B, D, H, W)``, labels and owners' numbers ``(B,)``; noise is always the same."""
        if not any(self.noise):
            rows = torch.cat(self._held_back)
            sizes = torch.tensor([len(part) for part in self._held_back])
            owners = torch.repeat_interleave(torch.arange(len(sizes)), sizes).to(self.device)
            for start in range(0, len(rows), batch_size):
                images, labels = self._train(rows[start : start + batch_size])
                yield self._normalise(images), labels, owners[start : start + batch_size]
            return
        for client, part in enumerate(self._held_back):
            # All of a client's noise is drawn at once, so that it does not depend on the batch size.
            images, labels = self._train(part)
            images = self._noisy(self._normalise(images), client, torch_rng(0, 0, client, "held-back noise"))
            for start in range(0, len(part), batch_size):
                few = labels[start : start + batch_size]
                yield images[start : start + batch_size], few, torch.full_like(few, client)


def load(
    data: DataConfig,
    config: PartitionConfig,
    seed: int,
    device: torch.device | str = "cpu",
    *,
    dataset: ImageDataset | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> FederatedData:
    """Returns the data that the settings name, or ``dataset``, partitioned among clients.

    ``progress`` is called as ``progress(images decoded, of)``, only where they are not in the cache.
    """
    if dataset is None:
        dataset = sources.load(data, columns=needed_columns(config), progress=progress)
    _, train, held_back = partition_dataset(dataset, config, seed)
    if config.test_share > 0 and not any(map(len, held_back)):
        raise InputError(
            f"partition.test_share {config.test_share:g} holds no sample back; raise it, or lower partition.num_clients"
        )
    noise = noise_levels(len(train), config.feature_noise)
    return FederatedData(dataset, train, device, held_back=held_back, noise=noise)


def partition_dataset(
    dataset: ImageDataset, config: PartitionConfig, seed: int
) -> tuple[list[Indices], list[Indices], list[Indices]]:
    """Returns ascending training rows per client: all, those to train on, and those held back for testing."""
    labels = dataset.train_labels.numpy()
    share, draws = config.unlabelled_share, numpy_rng(seed, 0, SERVER, "unlabelled")
    (rows,), _ = hold_back([np.arange(len(labels))], labels, share, draws)
    columns = {name: values[rows] for name, values in dataset.columns.items()}
    places = partition(labels[rows], config, numpy_rng(seed, 0, SERVER, "partition"), columns)
    whole = [rows[place] for place in places]
    return whole, *hold_back(whole, labels, config.test_share, numpy_rng(seed, 0, SERVER, "hold_back"))


def _as_tensors(parts: Sequence[ArrayLike]) -> list[Tensor]:
    return [torch.from_numpy(np.array(part, dtype=np.int64)) for part in parts]


def _resident(images: Tensor, device: torch.device) -> Tensor:
    """Returns the images on the device, unless they would take more than half of its free memory."""
    if images.shape[1] == 1:
        # The same bytes with the strides of channels-last: convolutions on a CPU take a quarter less time.
        images = images.reshape(len(images), *images.shape[2:], 1).permute(0, 3, 1, 2)
    if device.type == "cuda" and images.nbytes > torch.cuda.mem_get_info(device)[0] / 2:
        return images
    return images.to(device)
