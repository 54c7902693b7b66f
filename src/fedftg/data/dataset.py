"""A data set as one value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedftg.augment import Augmentation
from fedftg.data.classes import RawLabels, check_names, resolve
from fedftg.errors import InputError

Channels = tuple[float, ...]


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """Images ``(N, D, H, W)`` as unsigned bytes and labels ``(N,)`` int64, all on the CPU.

    The images may be a memory-mapped file: index them by rows, and do not copy them as a whole.
    """

    train_images: Tensor = field(repr=False)
    train_labels: Tensor = field(repr=False)
    test_images: Tensor = field(repr=False)
    test_labels: Tensor = field(repr=False)
    class_names: tuple[str, ...]
    mean: Channels
    std: Channels  # mean and std: per channel, of images scaled to 0..1
    augment: Augmentation = "none"
    columns: Mapping[str, NDArray[Any]] = field(default_factory=dict, repr=False)
    """Further columns ``(N,)`` of the training rows, integers or strings: a domain, a writer."""
    converted: Mapping[str, int] = field(default_factory=dict)
    """How many images were converted to RGB, by the mode in which they were stored (``grey``, ``CMYK``, ...)."""
    notes: tuple[str, ...] = ()
    """Lines about what was left out or guessed."""

    @property
    def num_classes(self) -> int:
        """C, classes without images included."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(D, H, W)``."""
        depth, height, width = self.train_images.shape[1:]
        return depth, height, width

    @classmethod
    def from_tensors(
        cls,
        train_images: Tensor | NDArray[np.uint8],
        train_labels: Tensor | NDArray[np.integer],
        test_images: Tensor | NDArray[np.uint8],
        test_labels: Tensor | NDArray[np.integer],
        *,
        class_names: Sequence[str] | None = None,
        mean: Channels | None = None,
        std: Channels | None = None,
        augment: Augmentation = "none",
        columns: Mapping[str, NDArray[Any]] | None = None,
    ) -> ImageDataset:
        """Returns a data set of your own tensors or arrays, for ``fedftg.run(..., dataset=...)``.

        Args:
            train_images: ``(N, D, H, W)`` or ``(N, H, W)`` unsigned bytes, D 1 or 3; a CPU tensor is not copied.
            train_labels: ``(N,)`` integers 0, 1, 2, ...; without ``class_names`` every class must occur.
            test_images: as ``train_images``, at least one.
            test_labels: as ``train_labels``.
            class_names: None names the classes by number.
            mean: per channel, of images scaled to 0..1; None measures it over all training pixels.
            std: likewise.
            augment: what training batches go through (`fedftg.augment`).
            columns: further columns ``(N,)`` of the training rows, for the partition laws "domain" and "natural".
        """
        images = [part[:, None] if part.ndim == 3 else part for part in (_tensor(train_images), _tensor(test_images))]
        labels = _labels("train", images[0], train_labels), _labels("test", images[1], test_labels)
        if images[0].shape[1:] != images[1].shape[1:]:
            raise InputError(f"training and test images must have one shape, got {[(*x.shape[1:],) for x in images]}")
        check_names(class_names or (), "class_names")
        names, own_train, own_test = resolve(*labels, None if class_names is None else tuple(map(str, class_names)))
        if augment not in get_args(Augmentation):
            raise InputError(f"augment must be one of {', '.join(get_args(Augmentation))}, got {augment!r}")
        extra = {name: np.asarray(values) for name, values in (columns or {}).items()}
        for name, values in extra.items():
            if values.shape != own_train.shape:
                raise InputError(f"column {name!r} must have {len(own_train)} values, got shape {values.shape}")
        if mean is None or std is None:
            measured = measured_normalisation(images[0].numpy())
            mean, std = measured[0] if mean is None else mean, measured[1] if std is None else std
        return cls(
            train_images=images[0],
            train_labels=torch.from_numpy(own_train),
            test_images=images[1],
            test_labels=torch.from_numpy(own_test),
            class_names=names,
            mean=_channels("mean", mean, images[0].shape[1], 0.0),
            std=_channels("std", std, images[0].shape[1], 1 / 256),
            augment=augment,
            columns=extra,
        )


def measured_normalisation(images: NDArray[np.uint8]) -> tuple[Channels, Channels]:
    """Returns mean and deviation (at least 1/255) per channel of images ``(N, D, H, W)`` scaled to 0..1."""
    channels = images.shape[1]
    counts = np.zeros((channels, 256), dtype=np.int64)
    step = max(1, (1 << 20) // (images.shape[2] * images.shape[3]))  # counting takes 8 bytes a pixel
    for start in range(0, len(images), step):
        for channel in range(channels):
            counts[channel] += np.bincount(images[start : start + step, channel].ravel(), minlength=256)
    levels = np.arange(256) / 255
    shares = counts / counts.sum(axis=1, keepdims=True)
    means = shares @ levels
    variances = [share @ (levels - mean) ** 2 for share, mean in zip(shares, means, strict=True)]
    return tuple(map(float, means)), tuple(max(float(np.sqrt(variance)), 1 / 255) for variance in variances)


def _tensor(values: Any) -> Tensor:
    return values.detach().cpu() if isinstance(values, Tensor) else torch.from_numpy(np.ascontiguousarray(values))


def _labels(split: str, images: Tensor, labels: Any) -> RawLabels:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or len(images) == 0:
        raise InputError(
            f"{split} images must be uint8 (N > 0, D, H, W), D 1 or 3, got {images.dtype} {[*images.shape]}"
        )
    values = _tensor(labels).numpy()
    values = values[:, 0] if values.shape[1:] == (1,) else values
    if values.shape != (len(images),) or values.dtype.kind not in "iu":
        raise InputError(f"{split} labels must be {len(images)} integers, got {values.dtype} {values.shape}")
    return RawLabels(values.astype(np.int64), lambda row: f"{split} row {row}")


def _channels(name: str, values: Sequence[float], channels: int, least: float) -> Channels:
    if np.ndim(values) != 1 or len(values) != channels or not all(least <= value <= 1 for value in values):
        raise InputError(f"{name} must be {channels} numbers from {least:.3g} to 1, one a channel, got {values}")
    return tuple(map(float, values))
