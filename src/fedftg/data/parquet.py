"""A split in parquet or arrow files, as the HuggingFace hub and the datasets library store it, read with pyarrow.

The image column holds ``{bytes, path}`` or plain bytes of an image file; the label column holds integers or words;
class names stand in the schema's ``huggingface`` metadata. Only the rows asked for are handed on to be decoded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fedftg.data.classes import check_names
from fedftg.data.decode import Encoded, one_line
from fedftg.errors import InputError

_ROWS_AT_A_TIME = 128
"""Encoded images in memory at a time: of 512x512 pixels about 10 MB."""


@dataclass(frozen=True)
class Columns:
    """The two columns that are read, and the class names where the schema has them."""

    image: str
    label: str
    class_names: tuple[str, ...] | None


class _Parquet:
    """An open parquet file."""

    def __init__(self, path: Path) -> None:
        self._file = pq.ParquetFile(path)
        self.schema = self._file.schema_arrow

    def column(self, name: str) -> Any:
        return self._file.read(columns=[name]).column(name)

    def batches(self, name: str, rows: NDArray[np.int64]) -> Iterator[tuple[int, Any]]:
        """Parts of a column and the row each starts at; row groups without any of ``rows`` are not read."""
        start = 0
        for group in range(self._file.num_row_groups):
            end = start + self._file.metadata.row_group(group).num_rows
            if _any_between(rows, start, end):
                for batch in self._file.iter_batches(_ROWS_AT_A_TIME, row_groups=[group], columns=[name]):
                    yield start, batch.column(0)
                    start += len(batch)
            start = end


class _Arrow:
    """An open arrow file, as a stream (what the datasets library writes) or with a table of contents."""

    def __init__(self, path: Path) -> None:
        self._source = pa.memory_map(str(path))
        magic = self._source.read(6)
        self._source.seek(0)
        self._indexed = magic == b"ARROW1"
        self._reader = pa.ipc.open_file(self._source) if self._indexed else pa.ipc.open_stream(self._source)
        self.schema = self._reader.schema

    def column(self, name: str) -> Any:
        return self._reader.read_all().column(name)

    def batches(self, name: str, rows: NDArray[np.int64]) -> Iterator[tuple[int, Any]]:
        """As `_Parquet.batches`; what is not used is mapped and never read from the disk."""
        index, first = self.schema.get_field_index(name), 0
        if self._indexed:
            whole = (self._reader.get_batch(number) for number in range(self._reader.num_record_batches))
        else:
            whole = iter(self._reader)
        for batch in whole:
            for start in range(0, batch.num_rows, _ROWS_AT_A_TIME):
                part = batch.column(index).slice(start, _ROWS_AT_A_TIME)
                if _any_between(rows, first + start, first + start + len(part)):
                    yield first + start, part
            first += batch.num_rows


def _any_between(rows: NDArray[np.int64], start: int, end: int) -> bool:
    first, last = np.searchsorted(rows, [start, end])
    return bool(first < last)


@contextmanager
def _open(path: Path) -> Iterator[_Parquet | _Arrow]:
    kind = "arrow" if path.suffix == ".arrow" else "parquet"
    try:
        file = _Arrow(path) if kind == "arrow" else _Parquet(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path} is not a readable {kind} file ({one_line(error)}); download it again") from error
    yield file


def find_columns(path: Path, image: str | None = None, label: str | None = None) -> Columns:
    """The columns to read, from a file's schema: those named, else the only one that can be meant.

    An image column is one with the hub's type Image, else one of bytes or of ``{bytes, path}``. A label column is one
    with the hub's type ClassLabel, else one of integers, else one of words that is called label.

    Raises:
        InputError: a column that is named is not there, none can be meant, several can, or two classes have one name.
    """
    with _open(path) as file:
        schema = file.schema
    features = _features(path, schema)
    image = _pick(path, "image", image, schema, _typed(features, "Image") or _like(schema, _is_image))
    label = _pick(path, "label", label, schema, _label_candidates(features, schema))
    if not _is_image(schema.field(image).type):
        raise InputError(
            f"{path}: column {image!r} is {schema.field(image).type}, not {{bytes, path}} or bytes of images"
        )
    if not pa.types.is_integer(schema.field(label).type) and not _is_words(schema.field(label).type):
        raise InputError(
            f"{path}: column {label!r} is {schema.field(label).type}; labels must be integers from 0, or words"
        )
    found = features.get(label, {}).get("names")
    names = tuple(map(str, found)) if isinstance(found, list) and found else None
    check_names(names or (), str(path))
    return Columns(image, label, names)


def _label_candidates(features: dict[str, dict[str, Any]], schema: Any) -> list[str]:
    """Words are only guessed to be labels where the column says so: a data set may have file names or captions too."""
    words = [name for name in _like(schema, _is_words) if name in ("label", "labels")]
    return _typed(features, "ClassLabel") or _like(schema, pa.types.is_integer) or words


def _is_words(kind: Any) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _features(path: Path, schema: Any) -> dict[str, dict[str, Any]]:
    raw = (schema.metadata or {}).get(b"huggingface")
    if raw is None:
        return {}
    try:
        features = json.loads(raw)["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: the 'huggingface' schema metadata is not understood ({one_line(error)})") from error


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


class TableSplit:
    """The rows of a split's files; images are read when they are asked for."""

    def __init__(self, files: Sequence[Path], columns: Columns) -> None:
        """Read the labels of all rows.

        Args:
            files: the shards in order.
            columns: those of the training split's first file; all files must have them.

        Raises:
            InputError: no rows; a label that is missing; files with other columns or classes.
        """
        self.columns = columns
        self._files = list(files)
        parts = []
        for path in self._files:
            own = find_columns(path, columns.image, columns.label)
            if own.class_names not in (None, columns.class_names):
                raise InputError(
                    f"{path}: the class names differ from those of the first training file; use one data set"
                )
            parts.append(_values(path, columns.label, "label"))
        self._starts = np.cumsum([0, *map(len, parts)])
        if self._starts[-1] == 0:
            raise InputError(f"{self._files[0]} has no rows; a split needs at least one image")
        parts = [part for part in parts if len(part)]
        if len({part.dtype.kind for part in parts}) > 1:
            raise InputError(
                f"column {columns.label!r} beside {self._files[0]} holds words and numbers; store one kind"
            )
        self.labels: NDArray[Any] = np.concatenate(parts)

    @property
    def image_column(self) -> str:
        """The column that holds the images."""
        return self.columns.image

    def files(self, rows: NDArray[np.int64]) -> list[Path]:
        """The files on which the images of some rows depend: all, for rows are counted over them.

        With them the image files that arrow files only name, as the datasets library does for folders of images.
        """
        if all(path.suffix != ".arrow" for path in self._files):
            return self._files
        named = (content for _, content in self._images(rows, only_named=True) if isinstance(content, Path))
        return [*self._files, *named]

    def where(self, row: int) -> str:
        """``file, row 3``: the row is counted from 0 in that file."""
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return f"{self._files[number]}, row {row - self._starts[number]}"

    def column(self, name: str) -> NDArray[Any]:
        """A further column ``(N,)``: int64 or strings.

        Raises:
            InputError: there is no such column, it holds something else, or a value is missing.
        """
        for path in self._files:
            with _open(path) as file:
                schema = file.schema
            if name not in schema.names:
                raise InputError(f"{path} has no column {name!r}; the columns are {', '.join(schema.names)}")
            kind = schema.field(name).type
            if not pa.types.is_integer(kind) and not _is_words(kind):
                raise InputError(f"{path}: column {name!r} is {kind}; only integers and words can be used")
        return np.concatenate([_values(path, name, "value") for path in self._files])

    def images(self, rows: NDArray[np.int64]) -> Iterator[Encoded]:
        """Where each wanted row stands and its encoded image; about a hundred rows are in memory at a time.

        Args:
            rows: ascending, counted over all files.

        Raises:
            InputError: a file that cannot be read.
        """
        return self._images(rows)

    def _images(self, rows: NDArray[np.int64], *, only_named: bool = False) -> Iterator[Encoded]:
        """``only_named``: leave out parts in which every image has its bytes, without reading these."""
        for path, start_of_file, end_of_file in zip(self._files, self._starts, self._starts[1:], strict=False):
            first, last = np.searchsorted(rows, [start_of_file, end_of_file])
            wanted = rows[first:last] - start_of_file
            if not len(wanted):
                continue
            with _open(path) as file:
                batches = file.batches(self.columns.image, wanted)
                while (part := _next(path, batches)) is not None:
                    start, values = part
                    if only_named and _all_have_bytes(values):
                        continue
                    first, last = np.searchsorted(wanted, [start, start + len(values)])
                    here = wanted[first:last]
                    contents = _encoded(path, values.take(pa.array(here - start)))
                    for row, content in zip(here, contents, strict=True):
                        yield f"{path}, row {row}", content


def _all_have_bytes(values: Any) -> bool:
    if not pa.types.is_struct(values.type):
        return True
    return bool(values.null_count == 0 and pc.struct_field(values, "bytes").null_count == 0)


def _encoded(path: Path, values: Any) -> list[bytes | Path | None]:
    """The bytes of each image; in arrow files also the file that one is in, where its whole path is given."""
    if not pa.types.is_struct(values.type):
        return list(values.to_pylist())
    found: list[bytes | Path | None] = pc.struct_field(values, "bytes").to_pylist()
    if path.suffix == ".arrow" and None in found and values.type.get_field_index("path") >= 0:
        names = pc.struct_field(values, "path").to_pylist()
        found = [
            Path(name) if content is None and name and Path(name).is_absolute() else content
            for content, name in zip(found, names, strict=True)
        ]
    return found


def _values(path: Path, name: str, what: str) -> NDArray[Any]:
    """A column as int64 or strings."""
    with _open(path) as file:
        try:
            column = file.column(name)
            words = _is_words(column.type)
            column = column.cast(pa.string() if words else pa.int64())
        except (pa.ArrowException, OSError) as error:
            raise InputError(
                f"{path}: column {name!r} cannot be read ({one_line(error)}); download the file again"
            ) from error
    if column.null_count:
        row = int(pc.index(column.is_null(), pa.scalar(True)).as_py())
        raise InputError(f"{path}, row {row}: the {what} is missing; remove the row or give it a {what}")
    if words:
        return np.array(column.to_pylist(), dtype=np.str_)
    values: NDArray[Any] = column.to_numpy()
    return values


def _next(path: Path, batches: Iterator[Any]) -> Any:
    try:
        return next(batches, None)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: the images cannot be read ({one_line(error)}); download the file again") from error
