"""Reads splits, labels and images, from folders of image files, arrays and IDX files; tables.py reads tables."""

from __future__ import annotations

import gzip
import json
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedftg.data.cache import first_line
from fedftg.data.classes import Labels, RawLabels, check_alike, check_names, in_order
from fedftg.data.config import DataConfig
from fedftg.errors import InputError

Stored = bytes | Path | NDArray[np.uint8] | None
"""An image as it is stored: an image file's bytes, an image file, decoded pixels ``(H, W)`` or ``(H, W, 3)``."""

TEST_SPLITS = ("test", "valid", "validation", "val")
_IMAGES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".avif"}
_NO_IMAGES = "@eaDir"
"""Where a Synology NAS keeps thumbnails."""
T = TypeVar("T")


def _no_column(name: str) -> NDArray[Any]:
    raise InputError(f"no column {name!r}: only tables and files of arrays have columns")


@dataclass(frozen=True)
class Split:
    """The rows of a split; images are read when they are asked for."""

    labels: RawLabels
    images: Callable[[Labels], Iterable[Stored]]
    """From ascending rows to their images."""
    column: Callable[[str], NDArray[Any]] = _no_column
    """From the name of a further column to its values ``(N,)``, int64 or strings."""


@dataclass(frozen=True)
class Splits:
    """What a source holds."""

    train: Split
    test: Split | None
    class_names: tuple[str, ...] | None = None
    no_test: str = ""
    """What there is where there is no test split, for an error."""
    files: Sequence[Path] = ()
    """The files that decide the images; none: they are decoded already, so caching them gains nothing."""
    image_column: str = ""


def choose(config: DataConfig, there: Mapping[str, T], source: object, kind: str) -> tuple[T, T | None, str]:
    """Returns the training and test entry of what a source has by split name, and what to say if that is no test."""
    train = config.train_split or "train"
    tests = [config.test_split] if config.test_split else list(TEST_SPLITS)
    listed = f"{source} has no {kind} {{}}; the {kind}s are: {', '.join(sorted(there)[:20]) or 'none'}"
    if train not in there:
        raise InputError(f"{listed.format(train)}; set data.train_split to one of them")
    test = next((there[name] for name in tests if name in there), None)
    if config.test_split and test is None:
        raise InputError(f"{listed.format(config.test_split)}; set data.test_split to one of them")
    return there[train], test, listed.format(", ".join(tests))


def root_of(config: DataConfig, layout: str) -> Path:
    """Returns the folder ``data.root``; raises InputError with the layout that is expected where it is missing."""
    if config.root is None:
        raise InputError(f"data set {config.name!r} needs data.root: the folder with {layout}")
    root = Path(config.root).expanduser()
    if not root.is_dir():
        raise InputError(f"data.root {str(root)!r} is not a folder; give the folder with {layout}")
    return root


def visible(root: Path, path: Path) -> bool:
    """Returns whether a path below a folder is neither hidden nor a NAS's thumbnail."""
    return not any(part.startswith(".") or part == _NO_IMAGES for part in path.relative_to(root).parts)


# Image files in folders. Labels are the folders' names.

Labelled = list[tuple[Path, str]]


def class_folders(config: DataConfig) -> Splits:
    """Reads ``root/train/<class>/...`` and ``root/test/<class>/...``, or ``root/<class>/...``."""
    root = root_of(config, "one folder of images a class, in train and test or with data.test_share")
    there = {path.name: path for path in _folders(root)}
    if not config.train_split and not there.keys() & {"train", *TEST_SPLITS, config.test_split}:
        listed = ", ".join(list(there)[:20]) or "none"
        no_test = f"{root} has no folder {', '.join(TEST_SPLITS)}; the folders are: {listed}"
        return _of_files(_class_folders(root), None, no_test)
    train, test, no_test = choose(config, there, root, "folder")
    return _of_files(_class_folders(train), _class_folders(test, in_test=True) if test else None, no_test)


def mio_tcd(config: DataConfig) -> Splits:
    """Reads the authors' folder MIO-TCD-Classification: ``train/<class>/*.jpg``; the test images have no labels."""
    root = root_of(config, "train/<class>/*.jpg, the authors' MIO-TCD-Classification")
    inside = root / "MIO-TCD-Classification"
    root = inside if inside.is_dir() else root
    if not (root / "train").is_dir():
        raise InputError(f"{root} has no folder 'train'; give the authors' MIO-TCD-Classification")
    return _of_files(_class_folders(root / "train"), None)


def compcars(config: DataConfig) -> Splits:
    """Reads the authors' folder sv_data: ``image/<1..281>/*.jpg``, and two lists with lines like ``1/abc.jpg``.

    The names of the classes in ``sv_make_model_name.mat`` are not read.
    """
    root = root_of(config, "image/<number>/*.jpg, train_surveillance.txt and test_surveillance.txt")
    root = root if (root / "image").is_dir() else root / "sv_data"
    splits: list[Labelled] = []
    for name in ("train_surveillance.txt", "test_surveillance.txt"):
        try:
            lines = (root / name).read_text().split()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{root / name} cannot be read; data.root must be the authors' folder sv_data") from error
        for number, line in enumerate(lines, start=1):
            if not re.fullmatch(r"\d+/[^/]+", line) or not (root / "image" / line).is_file():
                raise InputError(
                    f"{root / name}, image {number}: {line!r} is not a file in {root / 'image'} like '1/abc.jpg'; "
                    "complete the authors' folder"
                )
        splits.append([(root / "image" / line, line.split("/")[0]) for line in lines])
    if twice := {path for path, _ in splits[0]} & {path for path, _ in splits[1]}:
        raise InputError(f"{min(twice)} is in both lists; restore the authors' lists")
    return _of_files(splits[0], splits[1])


def _of_files(train: Labelled, test: Labelled | None, no_test: str = "") -> Splits:
    files = [path for path, _ in [*train, *(test or ())]]
    return Splits(_file_split(train), None if test is None else _file_split(test), None, no_test, files)


def _file_split(images: Labelled) -> Split:
    labels = RawLabels(np.array([label for _, label in images], np.str_), lambda row: str(images[row][0]))
    return Split(labels, lambda rows: (images[row][0] for row in rows))


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and visible(root, path))


def _class_folders(root: Path, *, in_test: bool = False) -> Labelled:
    """Returns the images of a folder with one folder a class, and their classes."""
    folders = {path.name: path for path in _folders(root)}
    if not folders:
        raise InputError(f"{root} has no class folders; put the images of each class into a folder of its own")
    if len(folders) == 1 and not in_test:
        raise InputError(f"{root} has one class folder, {min(folders)!r}; set data.root to the folder of all classes")
    if odd := [name for name in folders if not name.isprintable()]:  # not UTF-8, such as from an old zip file
        raise InputError(f"{root}: the folder name {odd[0]!a} cannot be printed; rename it")
    check_alike(folders, str(root), str.casefold)
    found: Labelled = []
    for name in in_order(folders):
        images = _images_below(folders[name])
        if not images:
            raise InputError(f"{folders[name]} has no images; remove the folder, or put images of its class into it")
        found += [(path, name) for path in images]
    return found


def _images_below(root: Path) -> list[Path]:
    """Returns the image files in a folder and those in it, links followed, in the order of their names."""
    found: list[Path] = []
    seen: set[str] = set()
    for parent, folders, files in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".") and name != _NO_IMAGES]
        if os.path.realpath(parent) in seen:  # a link to a folder above it
            folders.clear()
            continue
        seen.add(os.path.realpath(parent))
        found += [Path(parent, name) for name in files if not name.startswith(".")]
    images = (path for path in found if path.suffix.lower() in _IMAGES)
    return sorted(images, key=lambda path: path.relative_to(root).parts)


# Images that are decoded already.

_KEYS = "train_images, train_labels, test_images and test_labels"


def arrays(config: DataConfig) -> Splits:
    """Reads train_images, train_labels, test_images, ... of an .npz or .safetensors file.

    Images are unsigned bytes ``(N, H, W)``, ``(N, H, W, D)`` or ``(N, D, H, W)``, labels integers, or words (.npz).
    ``class_names`` may be an array of words (.npz) or a JSON list in the metadata (.safetensors). Other arrays with one
    value a training row are columns.
    """
    path = Path(config.root or "").expanduser()
    if not path.is_file() or path.suffix not in (".npz", ".safetensors"):
        raise InputError(f"data.root must be an .npz or .safetensors file with {_KEYS}, got {str(path)!r}")
    content, names = _read_arrays(path)
    check_names(names or (), str(path))
    there = {name.removesuffix("_images"): name for name in content if name.endswith("_images")}
    try:
        train_name, test_name, no_test = choose(config, there, path, "split")
    except InputError as error:
        raise InputError(f"{error}; the arrays are {', '.join(sorted(content)) or 'none'}") from None
    train = _array_split(path, content, train_name)
    return Splits(train, _array_split(path, content, test_name) if test_name else None, names, no_test)


def _read_arrays(path: Path) -> tuple[dict[str, NDArray[Any]], tuple[str, ...] | None]:
    """Returns all arrays of a file by name, and the class names where it has them."""
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                content = {name: file[name] for name in file.files}
            found = content.pop("class_names", None)
            return content, None if found is None else tuple(map(str, found.tolist()))
        from safetensors import safe_open

        with safe_open(path, framework="numpy") as file:
            content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            text = (file.metadata() or {}).get("class_names")
        return content, None if text is None else tuple(map(str, json.loads(text)))
    # safetensors has an error of its own; a pickled array is a ValueError, and is not read.
    except Exception as error:
        raise InputError(f"{path} cannot be read ({first_line(error)}); it must hold {_KEYS}") from error


def _array_split(path: Path, content: Mapping[str, NDArray[Any]], name: str) -> Split:
    images, key = content[name], f"{name.removesuffix('_images')}_labels"
    labels = content.get(key, np.empty(0))
    if labels.ndim == 2 and labels.shape[1] == 1:  # MedMNIST
        labels = labels[:, 0]
    if labels.ndim != 1 or len(labels) != len(images) or labels.dtype.kind not in "iuU":
        raise InputError(
            f"{path}: {key!r} is {labels.dtype} of shape {labels.shape}; it needs {len(images)} integers or words, one "
            f"an image; the arrays are {', '.join(sorted(content))}"
        )
    if labels.dtype.kind in "iu":
        labels = labels.astype(np.int64)
    wanted = "unsigned bytes (N, H, W), (N, H, W, D) or (N, D, H, W) with D 1 or 3"
    got = f"{path}: {name!r} is {images.dtype} of shape {images.shape}"
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or 0 in images.shape[1:]:
        raise InputError(f"{got}; it must be {wanted}")
    if images.ndim == 4:
        if (images.shape[1] in (1, 3)) == (images.shape[3] in (1, 3)):
            raise InputError(f"{got}, in which the channels may stand first or last; it must be {wanted}")
        images = images.transpose(0, 2, 3, 1) if images.shape[1] in (1, 3) else images
    columns = {
        other: values
        for other, values in content.items()
        if not other.endswith(("_images", "_labels")) and values.shape == labels.shape and values.dtype.kind in "iuU"
    }

    def column(other: str) -> NDArray[Any]:
        if other not in columns:
            raise InputError(f"{path} has no column {other!r}; the columns are: {', '.join(sorted(columns)) or 'none'}")
        return columns[other]

    return of_arrays(images, RawLabels(labels, lambda row: f"{path}, {key} row {row}"), column)


def of_arrays(
    images: NDArray[np.uint8], labels: RawLabels, column: Callable[[str], NDArray[Any]] = _no_column
) -> Split:
    """Returns a split of decoded images ``(N, H, W)`` or ``(N, H, W, D)``, D 1 or 3."""
    if images.shape[3:] == (1,):
        images = images[..., 0]
    return Split(labels, lambda rows: (images[row] for row in rows), column)


_IDX = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def has_idx(root: Path) -> bool:
    """Returns whether a folder holds IDX files under the names of MNIST's authors, compressed with gzip or not."""
    return _idx_file(root / _IDX["train"][0]).is_file()


def idx(root: Path, names: tuple[str, ...]) -> Splits:
    """Reads four IDX files (format: yann.lecun.com/exdb/mnist, and fashion-mnist by Zalando Research)."""
    return Splits(_idx_split(root, *_IDX["train"]), _idx_split(root, *_IDX["test"]), names)


def _idx_split(root: Path, images_name: str, labels_name: str) -> Split:
    path = _idx_file(root / labels_name)
    images, labels = _read_idx(_idx_file(root / images_name), 3), _read_idx(path, 1)
    if len(images) != len(labels):
        raise InputError(f"{path} has {len(labels)} labels for {len(images)} images; download both files again")
    return of_arrays(images, RawLabels(labels.astype(np.int64), lambda row: f"{path}, row {row}"))


def _idx_file(path: Path) -> Path:
    packed = path.with_name(f"{path.name}.gz")
    return packed if packed.is_file() and not path.is_file() else path


def _read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """Reads two zero bytes, 8 for unsigned bytes, the number of dimensions, each as 4 bytes, and the values."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        magic = struct.unpack(">HBB", content[:4])
        shape = struct.unpack(f">{dimensions}I", content[4 : 4 + 4 * dimensions])
        if magic != (0, 8, dimensions):
            raise ValueError(f"it does not start as one of unsigned bytes with {dimensions} dimension(s)")
        return np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (OSError, EOFError, ValueError, zlib.error, struct.error) as error:
        raise InputError(f"{path} is not a whole IDX file ({first_line(error)}); download it again") from error
