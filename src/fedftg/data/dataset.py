"""A data set as one value: images as unsigned bytes, labels, names, and what was done to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedftg.data.classes import RawLabels, check_names, resolve
from fedftg.errors import InputError

Augmentation = Literal["none", "flip", "crop", "flip_crop"]
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
    std: Channels
    """Mean and deviation per channel, of images scaled to 0..1."""
    augment: Augmentation = "none"
    """What training batches go through."""
    columns: Mapping[str, NDArray[Any]] = field(default_factory=dict, repr=False)
    """Further columns ``(N,)`` of the training rows, integers or strings: a domain, a writer."""
    converted: Mapping[str, int] = field(default_factory=dict)
    """How many images were not RGB as stored, by mode (``grey``, ``CMYK``, ...); all are RGB now, or all are grey."""

    @property
    def num_classes(self) -> int:
        """C: all classes that have a name, even one without images."""
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
            train_images: ``(N, D, H, W)`` unsigned bytes, 1 or 3 channels, or ``(N, H, W)``; not copied where they are
                a CPU tensor.
            train_labels: ``(N,)`` integers 0, 1, 2, ...; without ``class_names`` every class must occur.
            test_images: as ``train_images``, of the same shape but for N, at least one.
            test_labels: as ``train_labels``.
            class_names: one a class; None names them by number, up to the largest training label.
            mean: per channel, of images scaled to 0..1; None measures it over all training pixels.
            std: likewise.
            augment: "none" (default), "flip", "crop" or "flip_crop" (`fedftg.data.augment`).
            columns: further columns ``(N,)`` of the training rows, for the partition laws "domain" and "natural".

        Raises:
            InputError: types, shapes, labels, names or statistics that do not fit; names the first row that is wrong.
        """
        images = [part[:, None] if part.ndim == 3 else part for part in (_tensor(train_images), _tensor(test_images))]
        labels = [
            _labels(split, part, own)
            for split, part, own in zip(("train", "test"), images, (train_labels, test_labels), strict=True)
        ]
        if images[0].shape[1:] != images[1].shape[1:]:
            shapes = [tuple(part.shape[1:]) for part in images]
            raise InputError(f"test images have shape {shapes[1]}, training images {shapes[0]}; give both the same")
        check_names(class_names or (), "class_names")
        given = None if class_names is None else tuple(map(str, class_names))
        names, own_train, own_test = resolve(labels[0], labels[1], given)
        if augment not in get_args(Augmentation):
            raise InputError(f"augment must be one of {', '.join(get_args(Augmentation))}, got {augment!r}")
        extra = {name: np.asarray(values) for name, values in (columns or {}).items()}
        for name, values in extra.items():
            if values.shape != own_train.shape:
                raise InputError(
                    f"column {name!r} has shape {values.shape}; it needs {len(own_train)} values, one a row"
                )
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
    """Returns mean and standard deviation per channel of images ``(N, D, H, W)``, scaled to 0..1, over all pixels.

    The deviation is at least one grey level (1/255), so that a constant channel can be divided by it.
    """
    channels = images.shape[1]
    counts = np.zeros((channels, 256), dtype=np.int64)
    step = max(1, (1 << 20) // (images.shape[2] * images.shape[3]))  # counting takes 8 bytes a pixel
    for start in range(0, len(images), step):
        for channel in range(channels):
            counts[channel] += np.bincount(images[start : start + step, channel].ravel(), minlength=256)
    levels = np.arange(256) / 255
    shares = counts / counts.sum(axis=1, keepdims=True)
    means = shares @ levels
    deviations = [
        max(float(np.sqrt(share @ (levels - mean) ** 2)), 1 / 255) for share, mean in zip(shares, means, strict=True)
    ]
    return tuple(map(float, means)), tuple(deviations)


def _tensor(values: Any) -> Tensor:
    return values.detach().cpu() if isinstance(values, Tensor) else torch.from_numpy(np.ascontiguousarray(values))


def _labels(split: str, images: Tensor, labels: Any) -> RawLabels:
    """Returns a split's labels; raises InputError where they or the images have another type or shape."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or len(images) == 0:
        raise InputError(
            f"{split} images must be unsigned bytes (N, D, H, W), N at least 1, D 1 or 3, got {images.dtype} of shape "
            f"{tuple(images.shape)}; scale to 0..255 and put the channels before height and width"
        )
    values = _tensor(labels).numpy()
    if values.shape != (len(images),) or values.dtype.kind not in "iu":
        raise InputError(
            f"{split} labels must be {len(images)} integers, one an image, got {values.dtype} of shape {values.shape}"
        )
    return RawLabels(values.astype(np.int64), lambda row: f"{split} row {row}")


def _channels(name: str, values: Sequence[float], channels: int, least: float) -> Channels:
    if np.ndim(values) != 1 or len(values) != channels or not all(least <= value <= 1 for value in values):
        raise InputError(
            f"{name} must be {channels} numbers from {least:.3g} to 1, one a channel of images scaled to 0..1, got "
            f"{values}; None measures it"
        )
    return tuple(map(float, values))
