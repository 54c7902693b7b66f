"""Images as files in folders: any folder with one folder a class, and the layouts of CompCars and MIO-TCD."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedftg.data.assemble import Request, Traits, from_splits
from fedftg.data.classes import in_order
from fedftg.data.dataset import ImageDataset
from fedftg.data.decode import Encoded
from fedftg.data.shards import TEST_SPLITS
from fedftg.errors import InputError

_IMAGES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"}
_CAMERA_SIZE = 64
"""Side in pixels of images cut from camera pictures, which all differ, where the user gives none."""


class FileSplit:
    """One image a file; labels are places in the class names."""

    image_column = ""

    def __init__(self, paths: Sequence[Path], labels: Sequence[int]) -> None:
        self.labels: NDArray[Any] = np.array(labels, dtype=np.int64)
        self._paths = paths

    def files(self, rows: NDArray[np.int64]) -> list[Path]:
        """The images' files."""
        return [self._paths[row] for row in rows]

    def where(self, row: int) -> str:
        """The image's file."""
        return str(self._paths[row])

    def column(self, name: str) -> NDArray[Any]:
        """There are none: raises InputError."""
        raise InputError(f"{self._paths[0].parent} has no column {name!r}; image files in folders have no columns")

    def images(self, rows: NDArray[np.int64]) -> Iterator[Encoded]:
        """Each row's file."""
        for row in rows:
            yield str(self._paths[row]), self._paths[row]


def folder(request: Request) -> ImageDataset:
    """Image files sorted into one folder a class; data.root holds train/ and test/, or the classes themselves.

    ``root/train/<class>/...`` and ``root/test/<class>/...`` (or ``valid``, ``validation``, ``val``); or
    ``root/<class>/...`` with ``data.test_share``. Class names are the folders' names, sorted; numeric ones as numbers.
    """
    root = _root(request, "one folder of images a class, in train and test or with data.test_share")
    config = request.config
    test_names = [config.test_split] if config.test_split else list(TEST_SPLITS)
    train_folder = root / (config.train_split or "train")
    test_folder = next((root / name for name in test_names if (root / name).is_dir()), None)
    if config.test_split and test_folder is None:
        raise InputError(f"{root} has no folder {config.test_split!r}; the folders are {_names(root)}")
    if not train_folder.is_dir():
        if config.train_split or test_folder is not None:
            raise InputError(f"{root} has no folder {train_folder.name!r}; the folders are {_names(root)}")
        train_folder = root
    names, train = _class_folders(train_folder)
    test = None if test_folder is None else _class_folders(test_folder, names)[1]
    no_test = f"{root} has no folder {', '.join(test_names)}; the folders are {_names(root)}"
    # Photographs or scans of digits: what images may go through is not known.
    return from_splits(request, train, test, Traits(class_names=names), no_test)


def mio_tcd(request: Request) -> ImageDataset:
    """MIO-TCD classification: vehicles and others seen by traffic cameras, 11 classes, from the authors' folder.

    The folder is that of MIO-TCD-Classification (Luo et al. 2018, "MIO-TCD: A new benchmark dataset for vehicle
    classification and localization"): ``train/<class>/*.jpg`` and ``test/*.jpg``. The labels of the test images stay
    with the authors' server, so a fifth of each class of the training images is held out for testing, or
    ``data.test_share``. Images have many sizes: they are resized to 64x64, or ``data.image_size``.
    """
    root = _root(request, "train/<class>/*.jpg, the authors' MIO-TCD-Classification")
    if not (root / "train").is_dir() and (root / "MIO-TCD-Classification").is_dir():
        root = root / "MIO-TCD-Classification"
    if not (root / "train").is_dir():
        raise InputError(f"{root} has no folder 'train'; the folders are {_names(root)}; give MIO-TCD-Classification")
    names, train = _class_folders(root / "train")
    if len(names) != 11:
        raise InputError(
            f"{root / 'train'} has {len(names)} class folders, not the 11 of mio_tcd; complete it, or set data.name to "
            "'folder'"
        )
    traits = Traits(class_names=names, augment="flip_crop", image_size=_CAMERA_SIZE, test_share=0.2)
    return from_splits(request, train, None, traits, "")


def compcars(request: Request) -> ImageDataset:
    """CompCars surveillance: cars seen by traffic cameras, 281 models, from the authors' folder sv_data.

    The folder is that of Yang et al. 2015 ("A large-scale car dataset for fine-grained categorization and
    verification", surveillance-nature part): ``image/<1..281>/*.jpg``, and ``train_surveillance.txt`` and
    ``test_surveillance.txt`` with lines like ``1/abc.jpg``. Classes are called by their number; the names in
    ``sv_make_model_name.mat`` are not read. Images have many sizes: they are resized to 64x64, or ``data.image_size``.
    """
    root = _root(request, "image/<number>/*.jpg, train_surveillance.txt and test_surveillance.txt")
    if not (root / "image").is_dir() and (root / "sv_data").is_dir():
        root = root / "sv_data"
    train = _listed(root, "train_surveillance.txt")
    test = _listed(root, "test_surveillance.txt")
    trained = {image for _, image, _ in train}
    if leaks := [where for _, image, where in test if image in trained]:
        raise InputError(f"{leaks[0]}: the image is in train_surveillance.txt too; restore the authors' lists")
    names = tuple(in_order(name for name, _, _ in train))
    number = {name: label for label, name in enumerate(names)}
    for name, _, where in test:
        if name not in number:
            raise InputError(f"{where}: class {name} occurs in no line of train_surveillance.txt; complete the lists")
    splits = [
        FileSplit([path for _, path, _ in lines], [number[name] for name, _, _ in lines]) for lines in (train, test)
    ]
    traits = Traits(class_names=names, augment="flip_crop", image_size=_CAMERA_SIZE)
    return from_splits(request, splits[0], splits[1], traits, "")


def _root(request: Request, layout: str) -> Path:
    config = request.config
    if config.root is None:
        raise InputError(f"data set {config.name!r} needs data.root: the folder with {layout}")
    root = Path(config.root).expanduser()
    if not root.is_dir():
        raise InputError(f"data.root {str(root)!r} is not a folder; give the folder with {layout}")
    return root


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _names(root: Path) -> str:
    return ", ".join(path.name for path in _folders(root)[:20]) or "none"


def _class_folders(root: Path, known: tuple[str, ...] | None = None) -> tuple[tuple[str, ...], FileSplit]:
    """Class names and images of a folder with one folder a class; ``known`` are the classes there may be."""
    found = {path.name: path for path in _folders(root)}
    if not found:
        raise InputError(f"{root} has no class folders; put the images of each class into a folder of its own")
    alike: dict[str, str] = {}
    for name in sorted(found):
        plain = name.strip().casefold()
        if plain in alike:
            raise InputError(
                f"{root}: the class folders {alike[plain]!r} and {name!r} differ only in case or spaces; merge or "
                "rename them"
            )
        alike[plain] = name
    names = known if known is not None else tuple(in_order(found))
    paths: list[Path] = []
    labels: list[int] = []
    for name in in_order(found):
        if name not in names:
            raise InputError(f"{found[name]}: class {name!r} is not among the training classes; remove or rename it")
        images = _images_below(found[name])
        if not images:
            raise InputError(f"{found[name]} has no images; remove the folder, or put images of its class into it")
        paths += images
        labels += [names.index(name)] * len(images)
    return names, FileSplit(paths, labels)


def _images_below(root: Path) -> list[Path]:
    """Image files in a folder and those in it, in the order of their names on every machine."""
    found = []
    for parent, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(parent, name)
            for name in files
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in _IMAGES
        ]
    return sorted(found, key=lambda path: path.relative_to(root).parts)


def _listed(root: Path, name: str) -> list[tuple[str, Path, str]]:
    """Class, image file and place of each line of one of CompCars' lists."""
    path = root / name
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read; data.root must be the authors' folder sv_data") from error
    found = []
    first: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        if first.setdefault(line.strip(), number) != number:
            raise InputError(f"{where}: the image is listed in line {first[line.strip()]} already; restore the list")
        folder, slash, file = line.strip().partition("/")
        if not slash or not file or ".." in Path(line.strip()).parts:
            raise InputError(f"{where}: {line.strip()!r} is not like '1/abc.jpg'; restore the authors' list")
        image = root / "image" / folder / file
        if not image.is_file():
            raise InputError(f"{where}: {image} is missing; complete the images")
        found.append((folder, image, where))
    if not found:
        raise InputError(f"{path} has no lines; a split needs at least one image")
    return found
