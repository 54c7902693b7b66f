"""Images that are decoded already: NumPy and safetensors files, and the IDX files of MNIST and its like."""

from __future__ import annotations

import gzip
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedftg.data.assemble import Arrays, Request, Traits, from_arrays
from fedftg.data.classes import check_names
from fedftg.data.dataset import ImageDataset
from fedftg.data.decode import Array, one_line
from fedftg.data.shards import TEST_SPLITS
from fedftg.errors import InputError

_KEYS = "train_images, train_labels, test_images and test_labels"


def arrays(request: Request) -> ImageDataset:
    """Arrays in an .npz or .safetensors file that data.root names: train_images, train_labels, test_images, ...

    Images are unsigned bytes ``(N, H, W)``, ``(N, H, W, D)`` or ``(N, D, H, W)``, labels integers, or words (.npz).
    ``class_names`` may be an array of words (.npz) or a JSON list in the metadata (.safetensors). Other arrays with one
    value a training row are columns. Without test arrays ``data.test_share`` holds out a share.
    """
    config = request.config
    if config.root is None:
        raise InputError(f"data set 'arrays' needs data.root: an .npz or .safetensors file with {_KEYS}")
    path = Path(config.root).expanduser()
    content, names = _read(path)
    check_names(names or (), str(path))
    there = f"the arrays are {', '.join(sorted(content)) or 'none'}"
    train_name = config.train_split or "train"
    test_names = [config.test_split] if config.test_split else list(TEST_SPLITS)
    test_name = next((name for name in test_names if f"{name}_images" in content), None)
    if config.test_split and test_name is None:
        raise InputError(f"{path} has no array '{config.test_split}_images'; {there}")
    train = _split(path, content, train_name, there)
    used = {f"{name}_{part}" for name in (train_name, *test_names) for part in ("images", "labels")}
    columns = {
        name: values
        for name, values in content.items()
        if name not in used and values.shape == train.labels.shape and values.dtype.kind in "iuU"
    }
    train = Arrays(train.images, train.labels, train.where, columns)
    test = None if test_name is None else _split(path, content, test_name, there)
    no_test = f"{path} has no array {' or '.join(f'{name}_images' for name in test_names)}; {there}"
    return from_arrays(request, train, test, Traits(class_names=names), no_test)


def _read(path: Path) -> tuple[dict[str, NDArray[Any]], tuple[str, ...] | None]:
    """All arrays of a file by name, and the class names where it has them."""
    if not path.is_file() or path.suffix not in (".npz", ".safetensors"):
        raise InputError(f"data.root {str(path)!r} must be an .npz or .safetensors file with {_KEYS}")
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
        raise InputError(f"{path} cannot be read ({one_line(error)}); it must hold {_KEYS}") from error


def _split(path: Path, content: dict[str, NDArray[Any]], name: str, there: str) -> Arrays:
    for part in ("images", "labels"):
        if f"{name}_{part}" not in content:
            raise InputError(f"{path} has no array '{name}_{part}'; {there}")
    images, labels = content[f"{name}_images"], content[f"{name}_labels"]
    if labels.ndim != 1 or len(labels) != len(images) or labels.dtype.kind not in "iuU":
        raise InputError(
            f"{path}: '{name}_labels' is {labels.dtype} of shape {labels.shape}; it needs {len(images)} integers or "
            "words, one an image"
        )
    if labels.dtype.kind in "iu":
        labels = labels.astype(np.int64)
    return Arrays(
        _channels_first(path, f"{name}_images", images), labels, lambda row: f"{path}, {name}_labels row {row}"
    )


def _channels_first(path: Path, name: str, images: NDArray[Any]) -> Array:
    """``(N, D, H, W)``, D 1 or 3."""
    wanted = "unsigned bytes (N, H, W), (N, H, W, D) or (N, D, H, W) with D 1 or 3"
    got = f"{path}: {name!r} is {images.dtype} of shape {images.shape}"
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or 0 in images.shape[1:]:
        raise InputError(f"{got}; it must be {wanted}")
    if images.ndim == 3:
        return images[:, None]
    first, last = images.shape[1] in (1, 3), images.shape[3] in (1, 3)
    if first == last:
        raise InputError(f"{got}: where the channels stand is not clear; it must be {wanted}")
    return images if first else images.transpose(0, 3, 1, 2)


_IDX = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def has_idx(root: Path) -> bool:
    """Whether a folder holds IDX files under the names of MNIST's authors, packed with gzip or not."""
    return _idx_file(root, _IDX["train"][0]) is not None


def idx(request: Request, root: Path, traits: Traits) -> ImageDataset:
    """The data set in four IDX files (format: yann.lecun.com/exdb/mnist, and fashion-mnist by Zalando Research)."""
    train, test = (_idx_split(root, *_IDX[split]) for split in ("train", "test"))
    return from_arrays(request, train, test, traits, "")


def _idx_split(root: Path, images_name: str, labels_name: str) -> Arrays:
    parts = []
    for name, dimensions in ((images_name, 3), (labels_name, 1)):
        path = _idx_file(root, name)
        if path is None:
            raise InputError(f"{root / name} (or {name}.gz) is missing; complete the four files")
        parts.append((path, _read_idx(path, dimensions)))
    (images_path, images), (labels_path, labels) = parts
    if len(images) != len(labels):
        raise InputError(
            f"{images_path} has {len(images)} images, {labels_path} {len(labels)} labels; download both again"
        )
    return Arrays(images[:, None], labels.astype(np.int64), lambda row: f"{labels_path}, row {row}")


def _idx_file(root: Path, name: str) -> Path | None:
    return next((path for path in (root / name, root / f"{name}.gz") if path.is_file()), None)


def _read_idx(path: Path, dimensions: int) -> Array:
    """Two zero bytes, 8 for unsigned bytes, the number of dimensions, each as 4 bytes, and the values."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        magic = struct.unpack(">HBB", content[:4])
        shape = struct.unpack(f">{dimensions}I", content[4 : 4 + 4 * dimensions])
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise InputError(f"{path} is not a readable IDX file ({one_line(error)}); download it again") from error
    values = np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * dimensions)
    if magic != (0, 8, dimensions) or len(values) != int(np.prod(shape)):
        raise InputError(
            f"{path} is not a whole IDX file of unsigned bytes with {dimensions} dimension(s): {len(values)} values, "
            f"shape {shape}; download it again"
        )
    return values.reshape(shape)
