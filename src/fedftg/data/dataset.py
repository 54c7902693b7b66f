"""A data set as one value: images as unsigned bytes, labels, names, and what was done to them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedftg.data.classes import check_names
from fedftg.errors import InputError

Augmentation = Literal["none", "flip", "crop", "flip_crop"]
Channels = tuple[float, ...]

_LEAST_STD = 1 / 256
"""About one grey level: less would blow rounding up."""

_NORMALISED_AT_ONCE = 1 << 20
"""Pixels of a channel that are counted at once; counting takes 8 bytes for each."""


@dataclass(frozen=True, eq=False, repr=False)
class ImageDataset:
    """Images ``(N, D, H, W)`` as unsigned bytes and labels ``(N,)`` int64, all on the CPU.

    The images may be a memory-mapped file: index them by rows, and do not copy them as a whole.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    class_names: tuple[str, ...]
    mean: Channels
    """Per channel, of images scaled to 0..1."""
    std: Channels
    """Per channel, of images scaled to 0..1."""
    augment: Augmentation = "none"
    """What training batches go through."""
    columns: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    """Further columns ``(N,)`` of the training rows, integers or strings: a domain, a writer."""
    converted: Mapping[str, int] = field(default_factory=dict)
    """How many images were not RGB as stored, by mode (``grey``, ``CMYK``, ...); all are RGB now, or all are grey."""

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.image_shape))
        return (
            f"ImageDataset({len(self.train_labels)} training and {len(self.test_labels)} test images of {shape}, "
            f"{self.num_classes} classes, augment={self.augment!r})"
        )

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
        labels = [_tensor(train_labels), _tensor(test_labels)]
        for split, part, own in zip(("train", "test"), images, labels, strict=True):
            _check_split(split, part, own)
        if images[0].shape[1:] != images[1].shape[1:]:
            raise InputError(
                f"test images have shape {tuple(images[1].shape[1:])}, training images {tuple(images[0].shape[1:])}; "
                "give both the same"
            )
        labels = [part.to(torch.int64) for part in labels]
        count = int(labels[0].max()) + 1 if class_names is None else len(class_names)
        _check_labels(labels, count, named=class_names is not None)
        names = tuple(map(str, class_names if class_names is not None else range(count)))
        check_names(names, "class_names")
        _check_channels("mean", mean, images[0].shape[1], 0.0)
        _check_channels("std", std, images[0].shape[1], _LEAST_STD)
        if augment not in get_args(Augmentation):
            raise InputError(f"augment must be one of {', '.join(get_args(Augmentation))}, got {augment!r}")
        extra = {name: np.asarray(values) for name, values in (columns or {}).items()}
        for name, values in extra.items():
            if values.shape != tuple(labels[0].shape):
                raise InputError(
                    f"column {name!r} has shape {values.shape}; it needs one value a training row, {len(labels[0])}"
                )
        if mean is None or std is None:
            measured = measured_normalisation(images[0].numpy())
            mean, std = measured[0] if mean is None else mean, measured[1] if std is None else std
        return cls(
            train_images=images[0],
            train_labels=labels[0],
            test_images=images[1],
            test_labels=labels[1],
            class_names=names,
            mean=tuple(map(float, mean)),
            std=tuple(map(float, std)),
            augment=augment,
            columns=extra,
        )


def measured_normalisation(images: NDArray[np.uint8]) -> tuple[Channels, Channels]:
    """Returns mean and standard deviation per channel of images ``(N, D, H, W)``, scaled to 0..1, over all pixels.

    Reads a few images at a time, so that a memory-mapped file does not fill memory. The deviation is at least one grey
    level (1/255), so that a constant channel can be divided by it.
    """
    channels = images.shape[1]
    counts = np.zeros((channels, 256), dtype=np.int64)
    step = max(1, _NORMALISED_AT_ONCE // (images.shape[2] * images.shape[3]))
    for start in range(0, len(images), step):
        part = images[start : start + step]
        for channel in range(channels):
            counts[channel] += np.bincount(part[:, channel].ravel(), minlength=256)
    levels = np.arange(256) / 255
    shares = counts / counts.sum(axis=1, keepdims=True)
    means = shares @ levels
    deviations = [
        max(float(np.sqrt(share @ (levels - mean) ** 2)), 1 / 255) for share, mean in zip(shares, means, strict=True)
    ]
    return tuple(map(float, means)), tuple(deviations)


def _tensor(values: Any) -> Tensor:
    return values.detach().cpu() if isinstance(values, Tensor) else torch.from_numpy(np.ascontiguousarray(values))


def _check_split(split: str, images: Tensor, labels: Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise InputError(
            f"{split} images must be unsigned bytes of shape (N, D, H, W) with 1 or 3 channels, got {images.dtype} of "
            f"shape {tuple(images.shape)}; scale to 0..255 and put the channels before height and width"
        )
    if len(images) == 0:
        raise InputError(f"there are no {split} images; a split needs at least one")
    if labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool or len(labels) != len(images):
        raise InputError(
            f"{split} labels must be {len(images)} integers, one an image, got {labels.dtype} of shape "
            f"{tuple(labels.shape)}"
        )


def _check_channels(name: str, values: Sequence[float] | None, channels: int, least: float) -> None:
    if values is None:
        return
    one_each = np.ndim(values) == 1 and len(values) == channels
    if not one_each or not all(math.isfinite(value) and least <= value <= 1 for value in values):
        raise InputError(
            f"{name} must be {channels} numbers from {least:.3g} to 1, one a channel, got {values}; it is of "
            "images scaled to 0..1, and None measures it"
        )


def _check_labels(labels: Sequence[Tensor], num_classes: int, *, named: bool) -> None:
    for split, part in zip(("train", "test"), labels, strict=True):
        wrong = ((part < 0) | (part >= num_classes)).nonzero()
        if len(wrong):
            row = int(wrong[0])
            raise InputError(
                f"{split} row {row}: label {int(part[row])} is outside 0..{num_classes - 1}; number the classes from "
                "0, or give class_names for all of them"
            )
    missing = (torch.bincount(labels[0], minlength=num_classes) == 0).nonzero()
    if len(missing) and not named:
        raise InputError(
            f"no training row has label {int(missing[0])}, though labels go up to {num_classes - 1}; number the "
            "classes without a gap, or give class_names for all of them"
        )
