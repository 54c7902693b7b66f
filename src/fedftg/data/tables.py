"""Reads splits from tables: parquet in the hub's layout, and arrow files as the datasets library writes them.

The image column holds ``{bytes, path}`` or bytes of image files; class names stand in the schema's ``huggingface``
metadata.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedftg.data.cache import first_line
from fedftg.data.classes import Labels, RawLabels, check_names
from fedftg.data.config import DataConfig
from fedftg.data.read import Split, Splits, Stored, choose, root_of, visible
from fedftg.errors import InputError

LAYOUT = "train-*.parquet and test-*.parquet (or valid-*, validation-*, val-*)"
_ROWS = 128
"""Encoded images in memory at a time: of 512x512 pixels about 10 MB."""


def tables(
    config: DataConfig, hub_id: str | None, subset: str | None, image: str | None = None, label: str | None = None
) -> Splits:
    """Reads parquet or arrow files in ``data.root``, or those that the hub has under an id.

    Args:
        config: names of folder, splits and columns.
        hub_id: owner/name on the hub, used where there is no ``data.root``.
        subset: the hub's configuration, which is also a folder where a data set has several.
        image: the image column where ``config`` names none; None: the only one that could be it.
        label: likewise.

    Raises:
        InputError: no files, no such split or column, a missing shard, or files that do not fit together.
    """
    subset = config.subset or subset
    if config.root is None and hub_id is not None:
        source, there = hub_id, _downloaded(config, hub_id, subset)
    else:
        root = root_of(config, LAYOUT)
        source, there = str(root), _files_by_split(root / subset if subset and (root / subset).is_dir() else root)
        if not there:
            wanted = f"the parquet files of {hub_id}; the authors' own files are not read" if hub_id else LAYOUT
            raise InputError(f"no train-*.parquet in {root}; data.root must be a folder with {wanted}")
    train_files, test_files, no_test = choose(config, there, source, "split")
    for files in filter(None, (train_files, test_files if config.root else None)):
        _check_shards(files)
    image, label, names = _columns(train_files[0], config.image_column or image, config.label_column or label)
    train = _table(train_files, image, label, names)
    values = train.labels.values
    guessed = config.label_column is None and names is None and label not in ("label", "labels")
    if guessed and len(values) > 2 and len(np.unique(values)) == len(values):
        raise InputError(f"{source}: {label!r} has another value in every row: no label; set data.label_column")
    test = _table(test_files, image, label, names) if test_files else None
    return Splits(train, test, names, no_test, [*train_files, *(test_files or ())], image)


def _files_by_split(root: Path) -> dict[str, list[Path]]:
    """Returns the parquet files in a folder, else the arrow files, by the split that a file's name or folder names.

    ``train-00000-of-00002.parquet``, ``train.parquet``, ``train/0000.parquet``, ``train.parquet/part-0.parquet`` of
    Spark, ``train/data-00000-of-00001.arrow`` of save_to_disk, ``name-train.arrow`` of the datasets library's cache.
    """
    found: dict[str, list[Path]] = {}
    for suffix in (".parquet", ".arrow"):
        for path in sorted(root.rglob(f"*{suffix}")):
            if not path.is_file() or not visible(root, path):
                continue
            name = re.split(r"-\d+-of-\d+", path.stem)[0]
            if re.fullmatch(r"data|\d+|part-.*", name):
                name = "train" if path.parent in (root, root / "data") else path.parent.stem
            found.setdefault(name if suffix == ".parquet" else name.rpartition("-")[2], []).append(path)
        if found:
            break
    return found


def _check_shards(files: Sequence[Path]) -> None:
    """Raises InputError where files are not one whole split, such as a download that stopped half-way."""
    if len(folders := sorted({str(path.parent) for path in files})) > 1:
        raise InputError(
            f"several folders have files of one split ({', '.join(folders)}); set data.root to one of them, or "
            "data.subset to its name"
        )
    totals = {int(match[1]) if (match := re.search(r"-\d+-of-(\d+)", path.stem)) else 0 for path in files}
    if totals not in ({0}, {len(files)}):
        raise InputError(
            f"{len(files)} shard(s) beside {files[0]}, but their names count {' and '.join(map(str, sorted(totals)))}; "
            "complete the download, or remove files that do not belong"
        )


def _downloaded(config: DataConfig, hub_id: str, subset: str | None) -> dict[str, list[Path]]:
    """Returns the arrow files of each split of a data set on the hub; the datasets library downloads them once."""
    try:
        import datasets  # takes two seconds, and is no dependency of the package
    except ImportError as error:
        raise InputError(
            f"downloading {hub_id} needs the datasets library, which is not installed; pip install 'fedftg[data]', or "
            "set data.root to a folder with its parquet files"
        ) from error
    try:
        loaded = datasets.load_dataset(hub_id, subset, revision=config.revision)
    # Whatever the network, the library or the files do wrong; there is no common class.
    except Exception as error:
        text = first_line(error)
        only = f' --include "{subset}/*"' if subset else ""
        only += f" --revision {config.revision}" if config.revision else ""
        command = f"hf download {hub_id} --repo-type dataset --local-dir DIR{only}"
        advice = f"try again, or where there is network run '{command}', and set data.root to DIR"
        if isinstance(error, ValueError) and "config" in str(error).lower():
            text = " ".join(str(error).partition("Example of usage")[0].split())
            advice = "set data.subset to one of them"
        elif type(error).__name__ == "DatasetNotFoundError":
            advice = "correct data.hub_id, or log in with 'hf auth login'"
        raise InputError(f"{hub_id} cannot be loaded from the hub ({text}); {advice}") from error
    return {str(name): [Path(part["filename"]) for part in split.cache_files] for name, split in loaded.items()}


def _batches(path: Path, columns: Sequence[str] | None) -> Iterator[Any]:
    """Yields pyarrow batches of some columns of a file; None yields its schema only."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if path.suffix == ".parquet":
            file = pq.ParquetFile(path)
            schema, batches = file.schema_arrow, file.iter_batches(_ROWS, columns=columns)
        else:
            source = pa.memory_map(str(path))
            try:  # what the datasets library writes
                reader = pa.ipc.open_stream(source)
                whole: Iterable[Any] = reader
            except pa.ArrowInvalid:
                reader = pa.ipc.open_file(source)
                whole = map(reader.get_batch, range(reader.num_record_batches))
            schema = reader.schema
            batches = (
                batch.select(columns).slice(start, _ROWS) for batch in whole for start in range(0, len(batch), _ROWS)
            )
        yield from [schema] if columns is None else batches
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({first_line(error)}); download it again") from error


def _kind(kind: Any) -> str:
    """Returns what a column of a pyarrow type can hold: ``images``, ``integers``, ``words``, or else the type."""
    import pyarrow.types as types

    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_struct(kind) and "bytes" in {field.name for field in kind}:
        kind = kind.field("bytes").type
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind):
        return "images"
    if types.is_integer(kind) or types.is_boolean(kind):
        return "integers"
    return "words" if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind) else str(kind)


def _columns(path: Path, image: str | None, label: str | None) -> tuple[str, str, tuple[str, ...] | None]:
    """Returns the image and the label column of a file, and the class names where its schema has them.

    The columns are those named, else the only one that can be meant: for images one of the hub's type Image, else one
    that can hold them; for labels one of the hub's type ClassLabel, else of integers, else one of words that is called
    label.
    """
    schema = next(_batches(path, None))
    kinds = {field.name: _kind(field.type) for field in schema}
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        typed = {name: feature.get("_type") for name, feature in features.items() if name in kinds}
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path}: the 'huggingface' schema metadata cannot be read ({first_line(error)})") from error

    def pick(role: str, named: str | None, *candidates: list[str], allowed: tuple[str, ...]) -> str:
        found = next(filter(None, candidates), []) if named is None else [named]
        if len(found) > 1:
            raise InputError(f"{path}: several columns could hold {role}s ({', '.join(found)}); set data.{role}_column")
        if not found or found[0] not in kinds:
            missing = f"column {named!r} for {role}s" if named else f"{role} column"
            raise InputError(f"{path} has no {missing}; the columns are {', '.join(kinds)}; set data.{role}_column")
        if kinds[found[0]] not in allowed:
            wanted = "{bytes, path} or bytes of images" if role == "image" else "integers from 0, or words"
            raise InputError(f"{path}: column {found[0]!r} holds {kinds[found[0]]}; {role}s must be {wanted}")
        return found[0]

    def of(wanted: str, within: Mapping[str, str]) -> list[str]:
        return [name for name, kind in within.items() if kind == wanted]

    words = [name for name in of("words", kinds) if name in ("label", "labels")]
    image = pick("image", image, of("Image", typed), of("images", kinds), allowed=("images",))
    label = pick("label", label, of("ClassLabel", typed), of("integers", kinds), words, allowed=("integers", "words"))
    names = features.get(label, {}).get("names")
    check_names(names or (), str(path))
    return image, label, tuple(map(str, names)) if names else None


def _table(files: Sequence[Path], image: str, label: str, names: tuple[str, ...] | None) -> Split:
    parts = []
    for path in files:
        own = _columns(path, image, label)[2]
        if own not in (None, names):
            raise InputError(f"{path}: the class names differ from those of the first training file; use one data set")
        parts.append(_values(path, label, "label"))
    starts = np.cumsum([0, *map(len, parts)])

    def where(row: int) -> str:
        number = int(np.searchsorted(starts, row, side="right")) - 1
        return f"{files[number]}, row {row - starts[number]}"

    def images(rows: Labels) -> Iterator[Stored]:
        start = 0
        for path in files:
            for batch in _batches(path, [image]):
                first, last = np.searchsorted(rows, [start, start + len(batch)])
                values = batch.column(0).to_pylist() if first < last else []
                yield from (_stored(values[row - start]) for row in rows[first:last])
                start += len(batch)

    values = [part for part in parts if len(part)] or parts
    labels = RawLabels(np.concatenate(values), where, label)
    return Split(labels, images, lambda name: np.concatenate([_values(path, name, "value") for path in files]))


def _stored(value: Any) -> Stored:
    """Returns an image's bytes, or its file where the library only noted that (as for folders of images on the hub)."""
    if isinstance(value, dict):
        path = Path(value.get("path") or "")
        return value["bytes"] or (path if path.is_absolute() else None)
    content: bytes | None = value
    return content


def _values(path: Path, name: str, what: str) -> NDArray[Any]:
    """Returns a column as int64 or strings."""
    import pyarrow as pa

    schema = next(_batches(path, None))
    if name not in schema.names:
        raise InputError(f"{path} has no column {name!r}; the columns are {', '.join(schema.names)}")
    kind = _kind(schema.field(name).type)
    if kind not in ("integers", "words"):
        raise InputError(f"{path}: column {name!r} holds {kind}; only integers and words can be used")
    wanted = pa.string() if kind == "words" else pa.int64()
    column = pa.chunked_array([batch.column(0).cast(wanted) for batch in _batches(path, [name])], wanted)
    if column.null_count:
        row = column.is_null().index(True).as_py()
        raise InputError(f"{path}, row {row}: the {what} is missing; remove the row or give it a {what}")
    return np.array(column.to_pylist(), np.str_ if kind == "words" else np.int64)  # to_numpy imports pandas
