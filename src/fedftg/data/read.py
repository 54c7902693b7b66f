"""Reads splits, labels and images, from folders of image files, arrays and IDX files; tables.py reads tables."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedftg.data.classes import Labels, RawLabels, check_names, in_order
from fedftg.data.config import DataConfig
from fedftg.errors import InputError, first_line

# An image as it is stored: an image file's bytes, an image file, decoded pixels (H, W) or (H, W, 3).
Stored = bytes | Path | NDArray[np.uint8] | None

TEST_SPLITS = ("test", "valid", "validation", "val")
_IMAGES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".avif"}
T = TypeVar("T")


def _no_column(name: str) -> NDArray[Any]:
    raise InputError(f"no column {name!r}: only tables and files of arrays have columns")


@dataclass(frozen=True)
class Split:
    """The labels of a split, and what gives the images of ascending rows, and a further column's values ``(N,)``."""

    labels: RawLabels
    images: Callable[[Labels], Iterable[Stored]]
    column: Callable[[str], NDArray[Any]] = _no_column


@dataclass(frozen=True)
class Splits:
    """What a source holds; ``files`` decide the images: none means that these are decoded, so not worth caching."""

    train: Split
    test: Split | None
    class_names: tuple[str, ...] | None = None
    files: Sequence[Path] = ()
    image_column: str = ""


def choose(config: DataConfig, found: Mapping[str, T], source: object, kind: str) -> tuple[T, T | None]:
    """Returns the training and the test entry of what a source has by split name; no test where a share is taken."""
    chosen: list[T | None] = []
    for role, given, names in (("train", config.train_split, ("train",)), ("test", config.test_split, TEST_SPLITS)):
        names = names if given is None else (given,)
        chosen.append(next((found[name] for name in names if name in found), None))
        if chosen[-1] is None and (role == "train" or given or config.test_share == 0):
            listed = ", ".join(sorted(found)[:20]) or "none"
            raise InputError(
                f"{source} has no {kind} {', '.join(names)}, but {listed}; set data.{role}_split, or data.test_share"
            )
    assert chosen[0] is not None
    return chosen[0], chosen[1]


def root_of(config: DataConfig, layout: str) -> Path:
    """Returns the folder ``data.root``."""
    root = None if config.root is None else config.root.expanduser()
    if root is None or not root.is_dir():
        raise InputError(f"data set {config.name!r} needs data.root: the folder with {layout}; got {root}")
    return root


def visible(root: Path, path: Path) -> bool:
    """Returns whether a path below a folder is neither hidden nor a thumbnail of a NAS (``@eaDir``)."""
    return not any(part.startswith(".") or part == "@eaDir" for part in path.relative_to(root).parts)


Labelled = list[tuple[Path, str]]  # image files and the names of their class folders


def class_folders(config: DataConfig) -> Splits:
    """Reads ``root/train/<class>/...`` and ``root/test/<class>/...``, or ``root/<class>/...``."""
    root = root_of(config, "one folder of images a class, in train and test or with data.test_share")
    found = _folders(root)
    if config.test_share > 0 and not config.train_split and not found.keys() & {"train", *TEST_SPLITS}:
        return _of_files(_class_folders(root), None)
    train, test = choose(config, found, root, "folder")
    return _of_files(_class_folders(train), _class_folders(test, least=1) if test else None)


def mio_tcd(config: DataConfig) -> Splits:
    """Reads the authors' folder MIO-TCD-Classification: ``train/<class>/*.jpg``; the test images have no labels."""
    root = root_of(config, "train/<class>/*.jpg, the authors' MIO-TCD-Classification")
    inside = root / "MIO-TCD-Classification"
    return _of_files(_class_folders((inside if inside.is_dir() else root) / "train"), None)


def compcars(config: DataConfig) -> Splits:
    """Reads the authors' folder sv_data: ``image/<1..281>/*.jpg``, and two lists with lines like ``1/abc.jpg``."""
    root = root_of(config, "image/<number>/*.jpg, train_surveillance.txt and test_surveillance.txt")
    root = root if (root / "image").is_dir() else root / "sv_data"
    try:
        lists = [(root / f"{split}_surveillance.txt").read_text().split() for split in ("train", "test")]
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read; data.root must be the authors' folder sv_data") from error
    train, test = ([(root / "image" / line, line.split("/")[0]) for line in lines] for lines in lists)
    return _of_files(train, test)


def _of_files(train: Labelled, test: Labelled | None) -> Splits:
    files = [path for path, _ in [*train, *(test or ())]]
    return Splits(_file_split(train), None if test is None else _file_split(test), files=files)


def _file_split(images: Labelled) -> Split:
    labels = RawLabels(np.array([label for _, label in images], np.str_), lambda row: str(images[row][0]))
    return Split(labels, lambda rows: (images[row][0] for row in rows))


def _folders(root: Path) -> dict[str, Path]:
    return {path.name: path for path in sorted(root.glob("*")) if path.is_dir() and visible(root, path)}


def _class_folders(root: Path, least: int = 2) -> Labelled:
    folders = _folders(root)
    if len(folders) < least:
        raise InputError(f"{root} has {len(folders)} class folder(s) {list(folders)}; data.root must have one a class")
    if odd := [name for name in folders if not name.isprintable()]:  # not UTF-8, such as from an old zip file
        raise InputError(f"{root}: the folder name {odd[0]!a} cannot be printed; rename it")
    check_names(folders, str(root), lambda name: name.strip().casefold())
    found: Labelled = []
    for name in in_order(folders):
        if not (images := _images_below(folders[name])):
            raise InputError(f"{folders[name]} has no images; remove the folder")
        found += [(path, name) for path in images]
    return found


def _images_below(root: Path) -> list[Path]:
    files = (Path(parent, name) for parent, _, names in os.walk(root, followlinks=True) for name in names)
    return sorted(path for path in files if path.suffix.lower() in _IMAGES and visible(root, path))


def arrays(config: DataConfig) -> Splits:
    """Reads train_images, train_labels, test_images, ... of an .npz or .safetensors file.

    ``class_names`` may be an array of words (.npz) or a JSON list in the metadata (.safetensors).
    """
    path = Path(config.root or "").expanduser()
    if not path.is_file() or path.suffix not in (".npz", ".safetensors"):
        raise InputError(f"data.root must be an .npz or .safetensors file, got {str(path)!r}")
    content, names = _read_arrays(path)
    check_names(names or (), str(path))
    found = {name.removesuffix("_images"): name for name in content if name.endswith("_images")}
    train, test = choose(config, found, f"{path} (arrays {', '.join(sorted(content))})", "split")
    return Splits(_array_split(path, content, train), _array_split(path, content, test) if test else None, names)


def _read_arrays(path: Path) -> tuple[dict[str, NDArray[Any]], tuple[str, ...] | None]:
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
        raise InputError(f"{path} cannot be read ({first_line(error)}); write it again") from error


def _array_split(path: Path, content: Mapping[str, NDArray[Any]], name: str) -> Split:
    images, key = content[name], f"{name.removesuffix('_images')}_labels"
    labels = content.get(key, np.empty(0))
    if labels.ndim == 2 and labels.shape[1] == 1:  # MedMNIST
        labels = labels[:, 0]
    if images.ndim == 4 and images.shape[1] in (1, 3):
        images = images.transpose(0, 2, 3, 1)
    pixels = images.dtype == np.uint8 and images.ndim in (3, 4) and images.shape[3:] in ((), (1,), (3,))
    if not pixels or labels.shape != images.shape[:1] or labels.dtype.kind not in "iuU":
        raise InputError(
            f"{path}: {name!r} must be uint8 (N, H, W), (N, H, W, D) or (N, D, H, W), D 1 or 3, and {key!r} N integers "
            f"or words, got {images.dtype} {content[name].shape} and {labels.dtype} {labels.shape}"
        )

    def column(other: str) -> NDArray[Any]:
        values = content.get(other, np.empty(0))
        if values.shape != labels.shape or values.dtype.kind not in "iuU":
            raise InputError(f"{path} has no column {other!r} of integers or words, one a row of {key!r}")
        return values

    return of_arrays(images, labels, lambda row: f"{path}, {key} row {row}", column)


def of_arrays(
    images: NDArray[np.uint8],
    labels: NDArray[Any],
    where: Callable[[int], str],
    column: Callable[[str], NDArray[Any]] = _no_column,
) -> Split:
    """Returns a split of decoded images ``(N, H, W)`` or ``(N, H, W, D)``, D 1 or 3."""
    if images.shape[3:] == (1,):
        images = images[..., 0]
    values = labels if labels.dtype.kind == "U" else labels.astype(np.int64)
    return Split(RawLabels(values, where), lambda rows: (images[row] for row in rows), column)


def idx(root: Path, names: tuple[str, ...]) -> Splits | None:
    """Reads the four IDX files of MNIST's authors (yann.lecun.com/exdb/mnist); None where a folder has none."""
    for inside in ("", "raw", "MNIST/raw", "FashionMNIST/raw"):  # the others are torchvision's
        if any((root / inside).glob("train-images-idx3-ubyte*")):
            return Splits(_idx_split(root / inside, "train"), _idx_split(root / inside, "t10k"), names)
    return None


def _idx_split(root: Path, split: str) -> Split:
    images, labels = (_read_idx(root / f"{split}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
    return of_arrays(images, labels, lambda row: f"{root}, {split} row {row}")


def _read_idx(path: Path) -> NDArray[np.uint8]:
    """Reads two zero bytes, 8 for unsigned bytes, the number of dimensions, each as 4 bytes, and the values."""
    if not path.is_file():
        path = path.with_name(f"{path.name}.gz")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        shape = np.frombuffer(content, ">u4", content[3], 4).tolist()
        return np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)
    except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:
        raise InputError(f"{path} is not a whole IDX file ({first_line(error)}); download it again") from error
