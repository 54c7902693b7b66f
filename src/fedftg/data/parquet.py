"""Images from folders of parquet files in the layout of the HuggingFace hub, read with pyarrow and Pillow.

A split is the files ``train-00000-of-00002.parquet``, ... in one folder. The image column holds ``{bytes, path}`` or
plain bytes of an image file; the label column holds integers; class names stand in the schema's ``huggingface``
metadata. Only the rows asked for are decoded: about 0.1 ms for a 32x32 image. Threads were tried and made it slower.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from fedftg.errors import InputError

LAYOUT = "train-*.parquet and test-*.parquet (or valid-*, validation-*)"
MAX_CLASSES_WITHOUT_NAMES = 65_536

_GREY = {"1", "L", "LA", "La"}
_COLOUR = {"RGB", "RGBA", "RGBX", "RGBa", "P", "PA", "CMYK", "YCbCr", "LAB", "HSV"}
_ROWS_AT_A_TIME = 2048


@dataclass(frozen=True)
class Columns:
    """The two columns that are read, and the class names where the schema has them."""

    image: str
    label: str
    class_names: tuple[str, ...] | None


def split_files(root: Path, prefixes: Sequence[str]) -> list[Path]:
    """The files of a split in shard order: in ``root``, in ``root/data`` or in the only folder that has any.

    Args:
        root: the data set's folder.
        prefixes: names of the split; the first one that has files is used.

    Raises:
        InputError: no such folder, no file of the split, more than one folder with files, or a shard is missing.
    """
    if not root.is_dir():
        raise InputError(f"data.root {str(root)!r} is not a folder; give the folder with {LAYOUT}")
    below = sorted(folder for folder in root.iterdir() if folder.is_dir() and folder.name != "data")
    for prefix in prefixes:
        for folders in ([root], [root / "data"], below):
            found = {folder: files for folder in folders if (files := _files_of(folder, prefix))}
            if len(found) > 1:
                names = ", ".join(sorted(folder.name for folder in found))
                raise InputError(
                    f"several folders in {root} have {prefix} files ({names}); set data.root to one of them"
                )
            for files in found.values():
                _check_shards(files)
                return files
    wanted = " or ".join(f"{prefix}-*.parquet" for prefix in prefixes)
    raise InputError(f"no {wanted} in {root} or {root / 'data'}; data.root must be a folder with {LAYOUT}")


def _files_of(folder: Path, prefix: str) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(
        path for path in folder.glob(f"{prefix}*.parquet") if path.stem == prefix or path.stem[len(prefix)] == "-"
    )


def _check_shards(files: list[Path]) -> None:
    """A download that stopped half-way must not pass as a smaller data set."""
    numbered = [match for path in files if (match := re.search(r"-(\d+)-of-(\d+)", path.stem))]
    totals = {int(match[2]) for match in numbered}
    if len(numbered) == len(files) and len(totals) == 1:
        missing = sorted(set(range(totals.pop())) - {int(match[1]) for match in numbered})
        if missing:
            raise InputError(
                f"shard {missing[0]} beside {files[0]} is missing ({len(files)} of {len(files) + len(missing)} are "
                "there); complete the download"
            )
    elif len(totals) > 1:
        raise InputError(f"shards beside {files[0]} belong to different sets; keep those of one '-of-' number")


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path} is not a readable parquet file ({_one_line(error)}); download it again") from error


def find_columns(path: Path, image: str | None = None, label: str | None = None) -> Columns:
    """The columns to read, from a file's schema: those named, else the only one that can be meant.

    An image column is one with the hub's type Image, else one of bytes or of ``{bytes, path}``. A label column is one
    with the hub's type ClassLabel, else one of integers.

    Raises:
        InputError: a column that is named is not there, none can be meant, or several can.
    """
    with _open(path) as file:
        schema = file.schema_arrow
    features = _features(path, schema)
    image = _pick(path, "image", image, schema, _typed(features, "Image") or _like(schema, _is_image))
    label = _pick(path, "label", label, schema, _typed(features, "ClassLabel") or _like(schema, pa.types.is_integer))
    if not _is_image(schema.field(image).type):
        raise InputError(
            f"{path}: column {image!r} is {schema.field(image).type}, not {{bytes, path}} or bytes of images"
        )
    if not pa.types.is_integer(schema.field(label).type):
        raise InputError(f"{path}: column {label!r} is {schema.field(label).type}; labels must be integers from 0")
    names = features.get(label, {}).get("names")
    return Columns(image, label, tuple(map(str, names)) if isinstance(names, list) and names else None)


def _features(path: Path, schema: Any) -> dict[str, dict[str, Any]]:
    raw = (schema.metadata or {}).get(b"huggingface")
    if raw is None:
        return {}
    try:
        features = json.loads(raw)["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: the 'huggingface' schema metadata is not understood ({_one_line(error)})") from error


def _typed(features: dict[str, dict[str, Any]], kind: str) -> list[str]:
    return [name for name, feature in features.items() if feature.get("_type") == kind]


def _like(schema: Any, test: Any) -> list[str]:
    return [field.name for field in schema if test(field.type)]


def _is_image(kind: Any) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _is_bytes(field.type) for field in kind)
    return _is_bytes(kind)


def _is_bytes(kind: Any) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _pick(path: Path, role: str, named: str | None, schema: Any, candidates: list[str]) -> str:
    there = f"the columns are {', '.join(schema.names) or 'none'}"
    if named is not None:
        if named not in schema.names:
            raise InputError(f"{path} has no column {named!r} for {role}s; {there}; set data.{role}_column")
        return named
    if len(candidates) == 1 and candidates[0] in schema.names:
        return candidates[0]
    if candidates:
        raise InputError(
            f"{path}: several columns could hold {role}s ({', '.join(candidates)}); set data.{role}_column"
        )
    raise InputError(f"{path} has no {role} column; {there}; set data.{role}_column")


def read_labels(files: Sequence[Path], columns: Columns) -> NDArray[np.int64]:
    """The labels ``(N,)`` of all rows of a split.

    Raises:
        InputError: no rows; a label that is null, negative, or has no class name; files with other columns or classes.
    """
    parts: list[NDArray[np.int64]] = []
    for path in files:
        own = find_columns(path, columns.image, columns.label)
        if own.class_names not in (None, columns.class_names):
            raise InputError(f"{path}: the class names differ from those of the first training file; use one data set")
        with _open(path) as file:
            column = _read_labels(path, file, columns.label)
        if column.null_count:
            row = int(pc.index(column.is_null(), pa.scalar(True)).as_py())
            raise InputError(f"{path}, row {row}: the label is missing; remove the row or give it a label")
        labels = column.to_numpy()
        limit = len(columns.class_names) if columns.class_names else MAX_CLASSES_WITHOUT_NAMES
        wrong = np.flatnonzero((labels < 0) | (labels >= limit))
        if len(wrong):
            why = "an unlabelled split?" if labels[wrong[0]] < 0 else f"column {columns.label!r} may not hold classes"
            raise InputError(
                f"{path}, row {wrong[0]}: label {labels[wrong[0]]} is outside 0..{limit - 1}; {why}; correct it, or "
                "set data.label_column"
            )
        parts.append(labels)
    labels = np.concatenate(parts)
    if len(labels) == 0:
        raise InputError(f"{files[0]} has no rows; a split needs at least one image")
    return labels


def _read_labels(path: Path, file: pq.ParquetFile, name: str) -> Any:
    try:
        return file.read(columns=[name]).column(name).cast(pa.int64())
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{path}: column {name!r} cannot be read ({_one_line(error)}); download the file again"
        ) from error


def read_images(
    files: Sequence[Path], column: str, rows: NDArray[np.int64], size: tuple[int, int] | None = None
) -> tuple[NDArray[np.uint8], bool]:
    """The images of some rows as RGB ``(len(rows), H, W, 3)``, and whether all of them are grey.

    Grey, palette, CMYK and other 8-bit images are converted; transparency is dropped.

    Args:
        files: the shards of the split in order.
        column: the image column.
        rows: ascending row numbers, counted over all files.
        size: ``(H, W)`` that all must have; None takes the first image's.

    Raises:
        InputError: an image is missing, corrupt, of more than 8 bits, or of another size; names file and row.
    """
    images: NDArray[np.uint8] | None = None
    all_grey = True
    for number, (path, row, content) in enumerate(_contents(files, column, rows)):
        pixels, grey = _decode(path, row, content)
        size = size or pixels.shape[:2]
        if pixels.shape[:2] != size:
            raise InputError(
                f"{path}, row {row}: the image is {pixels.shape[1]}x{pixels.shape[0]} (width x height), the first one "
                f"is {size[1]}x{size[0]}; resize all images to one size"
            )
        if images is None:
            images = np.empty((len(rows), *size, 3), dtype=np.uint8)
        images[number] = pixels
        all_grey = all_grey and grey
    if images is None:
        raise InputError(f"{files[0]} has no rows; a split needs at least one image")
    return images, all_grey


def _contents(files: Sequence[Path], column: str, rows: NDArray[np.int64]) -> Iterator[tuple[Path, int, bytes | None]]:
    """File, row in that file and encoded image of each wanted row; a few thousand rows are in memory at a time."""
    offset = 0
    for path in files:
        start_of_file = offset
        with _open(path) as file:
            batches = file.iter_batches(batch_size=_ROWS_AT_A_TIME, columns=[column])
            while (batch := _next(path, batches)) is not None:
                first, last = np.searchsorted(rows, [offset, offset + batch.num_rows])
                here = rows[first:last] - offset
                values = batch.column(0).take(pa.array(here))
                if pa.types.is_struct(values.type):
                    values = pc.struct_field(values, "bytes")
                for row, content in zip(here + (offset - start_of_file), values.to_pylist(), strict=True):
                    yield path, int(row), content
                offset += batch.num_rows


def _next(path: Path, batches: Iterator[Any]) -> Any:
    try:
        return next(batches, None)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: the images cannot be read ({_one_line(error)}); download the file again") from error


def _decode(path: Path, row: int, content: bytes | None) -> tuple[NDArray[np.uint8], bool]:
    if not content:
        raise InputError(f"{path}, row {row}: the image has no bytes; images must be stored in the file, not as paths")
    try:
        with Image.open(io.BytesIO(content)) as image:
            mode = image.mode
            if mode in _GREY | _COLOUR:
                # Palettes with transparency have no direct way to RGB.
                opened = image.convert("RGBA") if mode in ("P", "PA") else image
                return np.asarray(opened.convert("RGB")), mode in _GREY
    except (
        Exception
    ) as error:  # Pillow's decoders raise many kinds: OSError, SyntaxError, ValueError, struct.error, ...
        raise InputError(
            f"{path}, row {row}: the image is corrupt ({_one_line(error)}); replace or remove it"
        ) from error
    raise InputError(f"{path}, row {row}: images of mode {mode!r} are not supported; convert them to 8-bit grey or RGB")


def _one_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return re.sub(r" object at 0x[0-9a-f]+", "", lines[0]) if lines else type(error).__name__
