"""Data sets that are known by name: where the hub has them, which columns count, and what they must look like.

Ids, configurations, columns and splits are those of the data set cards at ``https://huggingface.co/datasets/<hub_id>``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedftg.data import arrays, hub, shards
from fedftg.data.assemble import Normalisation, Request, Traits, from_splits
from fedftg.data.dataset import Augmentation, ImageDataset
from fedftg.data.parquet import TableSplit, find_columns
from fedftg.errors import InputError

CIFAR10_MEAN, CIFAR10_STD = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)
CIFAR100_MEAN, CIFAR100_STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
"""Per channel, of images scaled to 0..1; the constants of the paper's experiments."""
_CIFAR10, _CIFAR100 = (CIFAR10_MEAN, CIFAR10_STD), (CIFAR100_MEAN, CIFAR100_STD)

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts the authors' files."""

_FASHION = (
    "T - shirt / top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
"""As on the hub, and in the order of the authors' labels."""


@dataclass(frozen=True)
class Known:
    """What is known of a data set beforehand."""

    hub_id: str
    subset: str | None
    """The hub's configuration, which is also the folder of its files where the data set has several."""
    image: str
    label: str
    num_classes: int
    shape: tuple[int, int, int] | None
    """``(D, H, W)`` of all images; None where they have many sizes."""
    normalisation: Normalisation | None = None
    """None measures it."""
    augment: Augmentation = "none"
    image_size: int | None = None
    """Used where the user gives none."""
    in_part: bool = False
    """Whether a folder with some of the classes passes for the data set."""
    avoid: tuple[str, ...] = ()
    """Folders of the hub's other configurations."""
    idx_names: tuple[str, ...] | None = None
    """Class names for the authors' IDX files; None where there are none."""


# Objects in photographs and clothes keep their class when mirrored or shifted by a few pixels. A mirrored digit is no
# digit (a 2 becomes an S), so house numbers are shifted only; handwritten digits are left alone: MNIST's are
# centred by their mass, and a shift would make other images of them than the test images are.
KNOWN = {
    "cifar10": Known(
        "uoft-cs/cifar10", "plain_text", "img", "label", 10, (3, 32, 32), _CIFAR10, "flip_crop"
    ),
    "cifar100": Known(
        "uoft-cs/cifar100", "cifar100", "img", "fine_label", 100, (3, 32, 32), _CIFAR100, "flip_crop"
    ),
    "cifar100_coarse": Known(
        "uoft-cs/cifar100", "cifar100", "img", "coarse_label", 20, (3, 32, 32), _CIFAR100, "flip_crop"
    ),
    # full_numbers holds whole house numbers with boxes: never to be taken for cropped digits.
    "svhn": Known(
        "ufldl-stanford/svhn", "cropped_digits", "image", "label", 10, (3, 32, 32), None, "crop",
        avoid=("full_numbers",),
    ),
    "tiny_imagenet": Known(
        "zh-plus/tiny-imagenet", None, "image", "label", 200, (3, 64, 64), augment="flip_crop", in_part=True
    ),
    "food101": Known("ethz/food101", None, "image", "label", 101, None, None, "flip_crop", 64, in_part=True),
    "fashion_mnist": Known(
        "zalando-datasets/fashion_mnist", "fashion_mnist", "image", "label", 10, (1, 28, 28), None, "flip_crop",
        idx_names=_FASHION,
    ),
    "mnist": Known(
        "ylecun/mnist", "mnist", "image", "label", 10, (1, 28, 28), idx_names=tuple(map(str, range(10)))
    ),
}  # fmt: skip


def known(request: Request) -> ImageDataset:
    """The data set of `KNOWN` that the settings name, from ``data.root`` or from the hub.

    Raises:
        InputError: it is not there, or what is there is another data set.
    """
    config, entry = request.config, KNOWN[request.config.name]
    root = None if config.root is None else Path(config.root).expanduser()
    if entry.idx_names is not None:
        debian = DEBIAN_FASHION_MNIST if root is None and config.name == "fashion_mnist" else None
        for folder in (root, root and root / "raw", debian):
            if folder is not None and arrays.has_idx(folder):
                traits = Traits(class_names=entry.idx_names, num_classes=entry.num_classes, augment=entry.augment)
                return _checked(request, arrays.idx(request, folder, traits), entry, str(folder))
    subset = config.subset or entry.subset
    made = from_tables(request, entry.hub_id, subset, entry)
    return _checked(request, made, entry, entry.hub_id if root is None else f"data.root {str(root)!r}")


def _checked(request: Request, made: ImageDataset, entry: Known, source: str) -> ImageDataset:
    if request.config.image_size is None and entry.shape is not None and made.image_shape != entry.shape:
        raise InputError(
            f"{source} holds images of shape {made.image_shape}, not the {entry.shape} of {request.config.name}; set "
            "data.name to 'parquet' for other data"
        )
    return made


def from_tables(request: Request, hub_id: str | None, subset: str | None, entry: Known | None = None) -> ImageDataset:
    """The data set in parquet or arrow files of ``data.root``, or in those that the hub has under an id."""
    config = request.config
    if config.root is not None:
        root = Path(config.root).expanduser()
        avoid = entry.avoid if entry is not None else ()

        def find(names: list[str]) -> list[Path] | None:
            return shards.split_files(root, names, subset=subset, avoid=avoid)

        def there() -> list[str]:
            return shards.splits_in(root, subset=subset, avoid=avoid)

        return _from_files(request, find, there, str(root), entry)
    if hub_id is None:
        raise InputError(f"data set {config.name!r} needs data.root: the folder with {shards.LAYOUT}")
    files = hub.download(hub_id, subset, config.revision, folder=entry.subset if entry is not None else None)

    def pick(names: list[str]) -> list[Path] | None:
        return next((files[name] for name in names if name in files), None)

    return _from_files(request, pick, lambda: sorted(files), hub_id, entry)


def _from_files(
    request: Request,
    find: Callable[[list[str]], list[Path] | None],
    there: Callable[[], list[str]],
    source: str,
    entry: Known | None,
) -> ImageDataset:
    """The data set whose splits ``find`` knows by name; ``there`` are the names it knows."""
    config = request.config
    train_name = config.train_split or "train"
    test_names = [config.test_split] if config.test_split else list(shards.TEST_SPLITS)
    train_files, test_files = find([train_name]), find(test_names)
    if train_files is None:
        found = there()
        if not found:
            raise InputError(f"no {train_name}-*.parquet in {source}; data.root must be a folder with {shards.LAYOUT}")
        raise InputError(
            f"{source} has no split {train_name}; the splits there are: {', '.join(found)}; set data.train_split to "
            "one of them"
        )
    no_test = f"{source} has no split {', '.join(test_names)}; the splits there are: {', '.join(there())}"
    if config.test_split and test_files is None:
        raise InputError(f"{no_test}; set data.test_split to one of them")
    image = config.image_column or (entry.image if entry is not None else None)
    label = config.label_column or (entry.label if entry is not None else None)
    columns = find_columns(train_files[0], image, label)
    traits = Traits(class_names=columns.class_names, label_column=columns.label)
    if entry is not None:
        _check_classes(config.name, source, columns.class_names, columns.label, entry)
        traits = Traits(
            class_names=columns.class_names,
            num_classes=None if entry.in_part else entry.num_classes,
            label_column=columns.label,
            normalisation=entry.normalisation,
            augment=entry.augment,
            image_size=entry.image_size,
        )
    train = TableSplit(train_files, columns)
    test = None if test_files is None else TableSplit(test_files, columns)
    return from_splits(request, train, test, traits, no_test)


def _check_classes(name: str, source: str, names: tuple[str, ...] | None, column: str, entry: Known) -> None:
    if names is None:
        return
    if len(names) > entry.num_classes or (len(names) < entry.num_classes and not entry.in_part):
        raise InputError(
            f"{source} has {len(names)} classes in column {column!r}, not the {entry.num_classes} of {name}; give its "
            "folder, or set data.name to 'parquet'"
        )
