"""From splits of encoded images, or arrays of decoded ones, to a data set: classes, rows in use, pixels, normalisation.

Everything that sources have in common is here, so that all of them know the same settings.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from fedftg.data import cache, classes
from fedftg.data.config import DataConfig
from fedftg.data.dataset import Augmentation, Channels, ImageDataset, measured_normalisation
from fedftg.data.decode import DECODER, Array, Encoded, Sizing, decoded, is_grey, one_line, resized
from fedftg.data.store import FileStore, MemoryStore, Store, mapped
from fedftg.errors import InputError

Labels = NDArray[np.int64]
Normalisation = tuple[Channels, Channels]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Request:
    """What a source is asked for."""

    config: DataConfig
    seed: int = 0
    columns: Sequence[str] = ()
    progress: Progress | None = None


class Split(Protocol):
    """The rows of a split with their images still encoded."""

    labels: NDArray[Any]

    @property
    def image_column(self) -> str:
        """The column that holds the images; empty where there are no columns."""

    def files(self, rows: Labels) -> list[Path]:
        """The files whose content decides the images of some rows."""

    def where(self, row: int) -> str:
        """The file, and the row in it where it has rows."""

    def column(self, name: str) -> NDArray[Any]:
        """A further column ``(N,)``."""

    def images(self, rows: Labels) -> Iterator[Encoded]:
        """The encoded images of ascending rows."""


@dataclass(frozen=True)
class Traits:
    """What a source knows of its data beforehand."""

    class_names: tuple[str, ...] | None = None
    num_classes: int | None = None
    """For labels that are numbers without names."""
    label_column: str = "label"
    normalisation: Normalisation | None = None
    augment: Augmentation = "none"
    image_size: int | None = None
    """Used where the user gives none."""
    test_share: float = 0.0
    """Used where there is no test split and the user gives no share; 0 asks for one."""


@dataclass(frozen=True)
class Arrays:
    """A split of decoded images ``(N, D, H, W)``."""

    images: Array
    labels: NDArray[Any]
    where: Callable[[int], str]
    columns: Mapping[str, NDArray[Any]] = field(default_factory=dict)


def from_splits(request: Request, train: Split, test: Split | None, traits: Traits, no_test: str) -> ImageDataset:
    """The data set of a training and a test split.

    Args:
        request: settings, seed, columns to keep, and whom to tell how decoding goes on.
        train: the training split.
        test: None where there is none: a share of each class of the training split is then held out.
        traits: what the source knows.
        no_test: what there is instead of a test split, for the error where no share is given either.

    Raises:
        InputError: data or settings that cannot be used.
    """
    raw = classes.RawLabels(train.labels, train.where, traits.label_column)
    raw_test = None if test is None else classes.RawLabels(test.labels, test.where, traits.label_column)
    names, train_labels, test_labels, train_rows, test_rows = _rows(request, raw, raw_test, traits, no_test)
    extra = {name: train.column(name)[train_rows] for name in request.columns}
    config = request.config
    sizing = Sizing(config.image_size or traits.image_size, config.resize)
    images = _images(request, [(train, train_rows), (test or train, test_rows)], sizing)
    return ImageDataset(
        train_images=torch.from_numpy(images.train),
        train_labels=torch.from_numpy(train_labels[train_rows]),
        test_images=torch.from_numpy(images.test),
        test_labels=torch.from_numpy(test_labels[test_rows]),
        class_names=names,
        mean=(traits.normalisation or images.normalisation)[0],
        std=(traits.normalisation or images.normalisation)[1],
        augment=traits.augment if config.augment == "default" else config.augment,
        columns=extra,
        converted=images.converted,
    )


def from_arrays(request: Request, train: Arrays, test: Arrays | None, traits: Traits, no_test: str) -> ImageDataset:
    """As `from_splits`, of images that are decoded already; nothing is cached."""
    raw = classes.RawLabels(train.labels, train.where, traits.label_column)
    raw_test = None if test is None else classes.RawLabels(test.labels, test.where, traits.label_column)
    names, train_labels, test_labels, train_rows, test_rows = _rows(request, raw, raw_test, traits, no_test)
    config = request.config
    for name in request.columns:
        if name not in train.columns:
            there = ", ".join(sorted(train.columns)) or "none"
            raise InputError(f"data set {config.name!r} has no column {name!r}; the columns are: {there}")
    sizing = Sizing(config.image_size or traits.image_size, config.resize)
    # A copy even where all rows are used: the array may not be ours to write to.
    train_images = resized(np.ascontiguousarray(train.images[train_rows]), sizing)
    test_images = resized(np.ascontiguousarray((test or train).images[test_rows]), sizing)
    if train_images.shape[1:] != test_images.shape[1:]:
        raise InputError(
            f"test images have shape {test_images.shape[1:]}, training images {train_images.shape[1:]}; store both "
            "alike, or set data.image_size"
        )
    mean, std = traits.normalisation or measured_normalisation(train_images)
    return ImageDataset(
        train_images=torch.from_numpy(train_images),
        train_labels=torch.from_numpy(train_labels[train_rows]),
        test_images=torch.from_numpy(test_images),
        test_labels=torch.from_numpy(test_labels[test_rows]),
        class_names=names,
        mean=mean,
        std=std,
        augment=traits.augment if config.augment == "default" else config.augment,
        columns={name: train.columns[name][train_rows] for name in request.columns},
    )


def _rows(
    request: Request, train: classes.RawLabels, test: classes.RawLabels | None, traits: Traits, no_test: str
) -> tuple[tuple[str, ...], Labels, Labels, Labels, Labels]:
    """Class names, all labels of both splits, and the rows of both that are used."""
    config, seed = request.config, request.seed
    for split, labels in (("training", train), ("test", test)):
        if labels is not None and len(labels.values) == 0:
            raise InputError(f"data set {config.name!r} has no {split} rows; a split needs at least one image")
    names, train_labels, test_labels = classes.resolve(
        train, test, traits.class_names, num_classes=traits.num_classes, renumber=config.renumber_labels
    )
    if test_labels is not None:
        if config.test_share > 0:
            raise InputError(
                f"data.test_share is for sets without a test split, and this one has {len(test_labels)} test images; "
                "set it to 0"
            )
        train_rows: Labels = np.arange(len(train_labels))
        test_rows: Labels = np.arange(len(test_labels))
    else:
        share = config.test_share or traits.test_share
        if share == 0:
            raise InputError(
                f"{no_test}; set data.test_split to one of them, or data.test_share (such as 0.2) to hold out a share "
                "of the training images"
            )
        held_out = np.zeros(len(train_labels), dtype=bool)
        chosen = stratified_subset(train_labels, max(1, round(len(train_labels) * share)), seed)
        held_out[_one_left_of_each_class(train_labels, chosen)] = True
        train_rows, test_rows, test_labels = np.flatnonzero(~held_out), np.flatnonzero(held_out), train_labels
        if len(test_rows) == 0:
            raise InputError(
                f"data.test_share {share} holds out none of {len(held_out)} images, for each class keeps one for "
                "training; raise it, or add images"
            )
    train_rows = train_rows[stratified_subset(train_labels[train_rows], config.max_train, seed)]
    test_rows = test_rows[stratified_subset(test_labels[test_rows], config.max_test, seed)]
    return names, train_labels, test_labels, train_rows, test_rows


def _one_left_of_each_class(labels: Labels, chosen: Labels) -> Labels:
    """``chosen`` without the first row of each class that it would take whole: rounding may do that to rare classes."""
    whole = np.flatnonzero(np.bincount(labels[chosen], minlength=labels.max() + 1) == np.bincount(labels))
    firsts = [chosen[labels[chosen] == label][:1] for label in whole]
    return np.setdiff1d(chosen, np.concatenate(firsts)) if firsts else chosen


def stratified_subset(labels: Labels, count: int | None, seed: int) -> Labels:
    """``count`` ascending indices into ``labels`` ``(N,)``, each class in its proportion; None takes all.

    So does a count above N. Shares are rounded down, and what is then left goes to the classes with the largest
    remainders, so the sum is exact.
    """
    if count is None or count >= len(labels):
        return np.arange(len(labels))
    sizes = np.bincount(labels)
    exact = sizes * (count / len(labels))
    taken = np.floor(exact).astype(np.int64)
    taken[np.argsort(-(exact - taken), kind="stable")[: count - taken.sum()]] += 1
    rng = np.random.default_rng(seed)
    chosen = [rng.permutation(np.flatnonzero(labels == label))[:size] for label, size in enumerate(taken)]
    return np.sort(np.concatenate(chosen))


@dataclass(frozen=True)
class _Images:
    train: Array
    test: Array
    normalisation: Normalisation
    converted: dict[str, int]


def _images(request: Request, wanted: Sequence[tuple[Split, Labels]], sizing: Sizing) -> _Images:
    """The pixels of both splits, from the cache where they are there."""
    root = cache.folder(request.config.cache)
    if root is None:
        return _decode(request, wanted, sizing, [MemoryStore(len(rows)) for _, rows in wanted])
    settings = {
        "sizing": [sizing.side, sizing.resize if sizing.side else None],
        "rows": [_digest_of_rows(rows) for _, rows in wanted],
        "columns": [split.image_column for split, _ in wanted],
        "decoder": DECODER,
    }
    files = [split.files(rows) for split, rows in wanted]
    key, states = cache.key_of(root, files, settings)

    def make(folder: Path) -> dict[str, Any]:
        stores = [FileStore(folder / f"{name}.npy", len(rows)) for name, (_, rows) in _named(wanted)]
        try:
            made = _decode(request, wanted, sizing, stores)
        finally:
            for store in stores:
                store.abandon()
        sizes = {f"{name}.npy": (folder / f"{name}.npy").stat().st_size for name, _ in _named(wanted)}
        mean, std = made.normalisation
        shape = list(made.train.shape[1:])
        return {"bytes": sizes, "shape": shape, "mean": mean, "std": std, "converted": made.converted}

    counts = [len(rows) for _, rows in wanted]
    for attempt in range(2):
        entry = cache.open_or_make(root, key, make, still=lambda: cache.unchanged(files, states, root, key, settings))
        seen = cache.identity(entry)
        try:
            return _opened(entry, counts)
        except Exception as error:  # NumPy's header reader raises many kinds, for damage is not what it expects
            if attempt or not cache.discard(root, key, seen):
                raise InputError(
                    f"{entry} is damaged ({one_line(error)}) and cannot be made anew; remove it"
                ) from error
    raise AssertionError("unreachable")


def _opened(entry: Path, counts: Sequence[int]) -> _Images:
    """What an entry of the cache holds; raises where it is not what was written."""
    meta = cache.meta_of(entry)
    if meta is None:
        raise ValueError("it was removed while it was read")
    train, test = (mapped(entry / f"{name}.npy") for name in ("train", "test"))
    mean, std = (tuple(map(float, meta[name])) for name in ("mean", "std"))
    shape = tuple(meta["shape"])
    if [part.shape for part in (train, test)] != [(count, *shape) for count in counts]:
        raise ValueError(f"its arrays have shapes {train.shape} and {test.shape}")
    if len(mean) != shape[0] or len(std) != shape[0]:
        raise ValueError(f"it has {len(mean)} means and {len(std)} deviations for {shape[0]} channels")
    converted = {str(mode): int(count) for mode, count in dict(meta["converted"]).items()}
    return _Images(train, test, (mean, std), converted)


def _named(wanted: Sequence[tuple[Split, Labels]]) -> Iterator[tuple[str, tuple[Split, Labels]]]:
    return zip(("train", "test"), wanted, strict=True)


def _digest_of_rows(rows: Labels) -> str:
    return cache.digest(np.ascontiguousarray(rows, dtype="<i8").tobytes())


def _decode(
    request: Request, wanted: Sequence[tuple[Split, Labels]], sizing: Sizing, stores: Sequence[Store]
) -> _Images:
    """Decode into the stores. All images are RGB, unless every one is grey; a single colour image makes all colour."""
    modes: Counter[str] = Counter()
    done, total = 0, sum(len(rows) for _, rows in wanted)
    size: tuple[int, int] | None = None
    colour = False
    for (split, rows), store in zip(wanted, stores, strict=True):
        for block in decoded(split.images(rows), sizing):
            for where, pixels, mode in block:
                height, width = pixels.shape[:2]
                size = size or (height, width)
                if (height, width) != size:
                    raise InputError(
                        f"{where}: the image is {width}x{height} (width x height), the first one is "
                        f"{size[1]}x{size[0]}; set data.image_size, to which all are resized once"
                    )
                modes[mode] += 1
            colour = colour or any(pixels.ndim == 3 for _, pixels, _ in block)
            store.append(_stacked([pixels for _, pixels, _ in block], colour))
            done += len(block)
            if request.progress is not None:
                request.progress(done, total)
    if colour:
        for store in stores:
            store.to_colour()
    train, test = (store.close() for store in stores)
    converted: Counter[str] = Counter()
    for mode, count in modes.items():
        if not is_grey(mode) and mode != "RGB":
            converted[mode] += count
        elif is_grey(mode) and colour:
            converted["grey"] += count
    return _Images(train, test, measured_normalisation(train), dict(sorted(converted.items())))


def _stacked(images: Sequence[Array], colour: bool) -> Array:
    """``(n, D, H, W)`` of images ``(H, W)`` or ``(H, W, 3)``."""
    if not colour:
        return np.stack(images)[:, None]
    shape = images[0].shape[:2]
    stack = np.stack([np.broadcast_to(image.reshape(*shape, -1), (*shape, 3)) for image in images])
    return np.ascontiguousarray(stack.transpose(0, 3, 1, 2))
