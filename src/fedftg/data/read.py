"""Reads splits, labels and images, from folders of image files, arrays and IDX files; tables.py reads tables."""

from __future__ import annotations

import gzip
import json
import os
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedftg.data.classes import Labels, RawLabels, check_names, folded, in_order
from fedftg.data.config import DataConfig
from fedftg.errors import InputError, first_line

# An image as it is stored: an image file's bytes, an image file, decoded pixels (H, W) or (H, W, 3).
Stored = bytes | Path | NDArray[np.uint8] | None

TEST_SPLITS = ("test", "valid", "validation", "val")
_IMAGES = {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".mpo", ".png", ".apng", ".webp", ".avif", ".bmp", ".gif", ".tif",
    ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".tga",
}  # fmt: skip
_NO_DATA = {"@eaDir", "@Recycle", "@__thumb", "#recycle", "#snapshot", "$RECYCLE.BIN", "lost+found", "__MACOSX"}
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
    notes: Sequence[str] = ()


def choose(config: DataConfig, found: Mapping[str, T], source: object, kind: str) -> tuple[T, T | None]:
    """Returns the training and the test entry of what a source has by split name; no test where a share is taken."""
    chosen: list[T | None] = []
    for role, given, names in (("train", config.train_split, ("train",)), ("test", config.test_split, TEST_SPLITS)):
        names = names if given is None else (given,)
        chosen.append(next((found[name] for name in names if name in found), None))
        if chosen[-1] is None and (role == "train" or given or config.test_share == 0):
            listed = ", ".join(sorted(found)[:20]) or "nothing"
            share = "" if given or config.test_share > 0 else ", or data.test_share to split"
            wanted = " or ".join(map(repr, names))
            raise InputError(f"no {kind} {wanted} in {source} (found: {listed}); set data.{role}_split=NAME{share}")
    assert chosen[0] is not None
    return chosen[0], chosen[1]


def unused(found: Mapping[str, T], *chosen: T | None) -> list[str]:
    """Returns a line about the splits that were found and not chosen, if any."""
    names = ", ".join(sorted(name for name, value in found.items() if value not in chosen))
    return [f"not used: {names}"] if names else []


def root_of(config: DataConfig, layout: str) -> Path:
    """Returns the folder ``data.root``."""
    root = None if config.root is None else config.root.expanduser()
    if root is None or not root.is_dir():
        raise InputError(f"data set {config.name!r} needs data.root: the folder with {layout}; got {root}")
    return root


def visible(root: Path, path: Path) -> bool:
    """Returns whether a path below a folder is neither hidden nor what a NAS, a bin or an unpacked zip leaves there."""
    return not any(part.startswith(".") or part in _NO_DATA for part in path.relative_to(root).parts)


Labelled = list[tuple[Path, str]]  # image files and the names of their class folders


def class_folders(config: DataConfig) -> Splits:
    """Reads ``root/train/<class>/...`` and ``root/test/<class>/...``, or ``root/<class>/...``."""
    root = root_of(config, "one folder of images a class, in train and test or with data.test_share")
    found, left_out, seen = _folders(root), Counter[str](), dict[str, str]()
    named = [found[name] for name in found if name.lower() in ("train", "training", "testing", *TEST_SPLITS)]
    # A class may have the name of a split; a split has class folders, or only splits beside it.
    if config.test_share > 0 and not config.train_split and len(named) < len(found) and not any(map(_folders, named)):
        inside = set.intersection(*(set(_folders(path)) for path in found.values()))
        notes = [f"every class has the folders {', '.join(sorted(inside))}; is data.root too high?"]
        return _of_files(_class_folders(root, left_out, seen), None, left_out, notes if len(inside) > 1 else [])
    train, test = choose(config, found, root, "folder")
    labelled = _class_folders(train, left_out, seen)
    held = _class_folders(test, left_out, {} if test == train else seen, least=1) if test else None
    return _of_files(labelled, held, left_out, unused(found, train, test))


def mio_tcd(config: DataConfig) -> Splits:
    """Reads the authors' folder MIO-TCD-Classification: ``train/<class>/*.jpg``; the test images have no labels."""
    root = root_of(config, "train/<class>/*.jpg, the authors' MIO-TCD-Classification")
    inside, left_out = root / "MIO-TCD-Classification", Counter[str]()
    return _of_files(_class_folders((inside if inside.is_dir() else root) / "train", left_out, {}), None, left_out)


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


def _of_files(
    train: Labelled, test: Labelled | None, left_out: Mapping[str, int] | None = None, notes: Sequence[str] = ()
) -> Splits:
    files = [path for path, _ in [*train, *(test or ())]]
    if left_out:
        notes = [*notes, f"files left out: {', '.join(f'{left_out[kind]} {kind}' for kind in sorted(left_out))}"]
    return Splits(_file_split(train), None if test is None else _file_split(test), files=files, notes=notes)


def _file_split(images: Labelled) -> Split:
    labels = RawLabels(np.array([label for _, label in images], np.str_), lambda row: str(images[row][0]))
    return Split(labels, lambda rows: (images[row][0] for row in rows))


def _folders(root: Path) -> dict[str, Path]:
    return {path.name: path for path in sorted(root.glob("*")) if path.is_dir() and visible(root, path)}


def _class_folders(root: Path, left_out: Counter[str], seen: dict[str, str], least: int = 2) -> Labelled:
    folders = _folders(root)
    if len(folders) < least:
        raise InputError(
            f"{root} has {len(folders)} class folder(s) {list(folders)}; data.root must contain one folder per class"
        )
    if odd := [name for name in folders if not name.isprintable()]:  # not UTF-8, such as from an old zip file
        raise InputError(f"{root}: the folder name {odd[0]!a} cannot be printed; rename it")
    check_names(folders, str(root), lambda name: folded(name).casefold())
    found: Labelled = []
    for name in in_order(folders):
        if not (images := _images_below(folders[name], seen, left_out)):
            raise InputError(
                f"{folders[name]} has no images that can be read; convert them to PNG or JPEG, or move the folder away"
            )
        found += [(path, unicodedata.normalize("NFC", name)) for path in images]
    if beside := sum(path.suffix.lower() in _IMAGES and visible(root, path) for path in root.iterdir()):
        left_out["beside the class folders"] += beside
    return found


def _images_below(root: Path, seen: dict[str, str], left_out: Counter[str]) -> list[Path]:
    found = []
    for parent, folders, names in os.walk(root, onerror=_unreadable, followlinks=True):
        if (first := seen.setdefault(os.path.realpath(parent), parent)) != parent:
            raise InputError(f"{first} and {parent} are the same folder; remove the link")
        folders[:] = [name for name in folders if visible(root, Path(parent, name))]
        for path in (Path(parent, name) for name in names if visible(root, Path(parent, name))):
            if path.suffix.lower() in _IMAGES:
                found.append(path)
            else:
                left_out[path.suffix.lower() or "without a suffix"] += 1
    return sorted(found)


def _unreadable(error: OSError) -> None:
    raise InputError(f"{error.filename} cannot be read ({error.strerror}); restore it") from error


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
    splits = _array_split(path, content, train), _array_split(path, content, test) if test else None
    return Splits(*splits, names, notes=unused(found, train, test))


def _read_arrays(path: Path) -> tuple[dict[str, NDArray[Any]], tuple[str, ...] | None]:
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                content = {name: file[name] for name in file.files}
            found = content.pop("class_names", None)
            return content, None if found is None else tuple(np.ravel(found).astype(str).tolist())
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
    if not pixels or labels.shape != images.shape[:1] or labels.dtype.kind not in "biuU":
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


def idx(root: Path, names: tuple[str, ...], folder: str) -> Splits | None:
    """Reads the four IDX files of MNIST's authors (yann.lecun.com/exdb/mnist); None where a folder has none."""
    for inside in ("", "raw", f"{folder}/raw"):  # the others are torchvision's
        if any((root / inside).glob("train-images?idx3-ubyte*")):
            return Splits(_idx_split(root / inside, "train"), _idx_split(root / inside, "t10k"), names)
    return None


def _idx_split(root: Path, split: str) -> Split:
    images, labels = (_read_idx(root, f"{split}-{kind}-ubyte") for kind in ("images?idx3", "labels?idx1"))
    if len(images) != len(labels):
        raise InputError(f"{root} has {len(images)} {split} images and {len(labels)} labels; download them again")
    return of_arrays(images, labels, lambda row: f"{root}, {split} row {row}")


def _read_idx(root: Path, pattern: str) -> NDArray[np.uint8]:
    """Reads two zero bytes, 8 for unsigned bytes, the number of dimensions, each as 4 bytes, and the values."""
    found = (path for path in sorted(root.glob(f"{pattern}*")) if path.is_file())  # with a point on Kaggle
    path = next(found, root / pattern.replace("?", "-"))
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        shape = np.frombuffer(content, ">u4", content[3], 4).tolist()
        return np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)
    except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:
        raise InputError(f"{path} is not a whole IDX file ({first_line(error)}); download it again") from error
