"""Reads splits from tables: parquet in the hub's layout, and arrow files as the datasets library writes them."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from fedftg.data.classes import UNLABELLED, Labels, RawLabels, check_names
from fedftg.data.config import DataConfig
from fedftg.data.read import Split, Splits, Stored, choose, root_of, unused, visible
from fedftg.errors import InputError, first_line

_LAYOUT = "train-*.parquet and test-*.parquet (or valid-*, validation-*, val-*)"
_ROWS = 128  # encoded images in memory at a time


def tables(
    config: DataConfig, hub_id: str | None, subset: str | None, image: str | None = None, label: str | None = None
) -> Splits:
    """Reads parquet or arrow files in ``data.root``, or those that the hub has under an id.

    ``subset``, ``image`` and ``label`` are used where ``config`` names none.
    """
    subset = config.subset or subset
    if config.root is None and hub_id is not None:
        source, found = hub_id, _downloaded(config, hub_id, subset)
    else:
        root = root_of(config, _LAYOUT)
        source, found = str(root), _files_by_split(root / subset if subset and (root / subset).is_dir() else root)
        if not found:
            wanted = f"the parquet files of {hub_id}; the authors' own files are not read" if hub_id else _LAYOUT
            raise InputError(f"no train-*.parquet in {root}; data.root must be a folder with {wanted}")
    train_files, test_files = choose(config, found, source, "split")
    if config.root is not None:
        for files in filter(None, (train_files, test_files)):
            _check_shards(files)
    image, label, names = _columns(train_files[0], config.image_column or image, config.label_column or label)
    train = _table(train_files, image, label, names)
    values, unnamed = train.labels.values, config.label_column is None and names is None
    if unnamed and len(values) > 2 and len(np.unique(values)) == len(values):
        raise InputError(f"{source}: {label!r} has another value in every row: no label; set data.label_column")
    test = _table(test_files, image, label, names) if test_files else None
    guessed = [f"labels are those of column {label!r}"] * (unnamed and label not in ("label", "labels"))
    notes = unused(found, train_files, test_files) + guessed
    return Splits(train, test, names, [*train_files, *(test_files or ())], image, notes)


def _files_by_split(root: Path) -> dict[str, list[Path]]:
    """Returns the parquet files in a folder, else the arrow files, by the split that a file's name or folder names."""
    found: dict[str, list[Path]] = {}
    files = [path for path in sorted(root.rglob("*")) if path.is_file() and visible(root, path)]
    suffix = ".parquet" if any(path.suffix == ".parquet" for path in files) else ".arrow"
    for path in files:
        if path.suffix == suffix:
            name = re.split(r"-\d+-of-\d+", path.stem)[0]
            if re.fullmatch(r"data|\d+|part-.*", name):
                name = "train" if path.parent in (root, root / "data") else path.parent.stem
            found.setdefault(name if suffix == ".parquet" else name.rpartition("-")[2], []).append(path)
    return found


def _check_shards(files: Sequence[Path]) -> None:
    if len(folders := sorted({str(path.parent) for path in files})) > 1:
        raise InputError(f"several folders have files of one split: {', '.join(folders)}; set data.root or data.subset")
    totals = {int(match[1]) if (match := re.search(r"-\d+-of-(\d+)", path.stem)) else 0 for path in files}
    if totals not in ({0}, {len(files)}):
        raise InputError(
            f"{len(files)} shard(s) beside {files[0]}, their names say {sorted(totals)}; complete the download"
        )


def _downloaded(config: DataConfig, hub_id: str, subset: str | None) -> dict[str, list[Path]]:
    """Returns the arrow files of each split; the datasets library downloads them once."""
    try:
        import datasets  # takes two seconds, and is no dependency of the package
    except ImportError as error:
        raise InputError(f"to download {hub_id}, pip install 'fedftg[data]', or set data.root") from error
    try:
        loaded = datasets.load_dataset(hub_id, subset, revision=config.revision)
    # Whatever the network, the library or the files do wrong; there is no common class.
    except Exception as error:
        only = f' --include "{subset}/*"' * bool(subset) + f" --revision {config.revision}" * bool(config.revision)
        raise InputError(
            f"{hub_id} cannot be loaded from the hub ({textwrap.shorten(str(error), 300)}); check data.hub_id and "
            "data.subset, log in with 'hf auth login', or set data.root to DIR after "
            f"'hf download {hub_id} --repo-type dataset --local-dir DIR{only}'"
        ) from error
    return {str(name): [Path(part["filename"]) for part in split.cache_files] for name, split in loaded.items()}


def _batches(path: Path, columns: Sequence[str] | None) -> Iterator[Any]:
    """Yields pyarrow batches of some columns of a file; None yields its schema only."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if path.suffix == ".parquet":
            file = pq.ParquetFile(path)
            yield from [file.schema_arrow] if columns is None else file.iter_batches(_ROWS, columns=columns)
        else:
            source = pa.memory_map(str(path))
            try:  # what the datasets library writes
                table = pa.ipc.open_stream(source).read_all()
            except pa.ArrowInvalid:
                table = pa.ipc.open_file(source).read_all()
            yield from [table.schema] if columns is None else table.select(columns).to_batches(_ROWS)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({first_line(error)}); download it again") from error


def _kinds(schema: Any) -> dict[str, str]:
    """Returns what each column of a schema can hold: ``images``, ``integers``, ``words``, or else its type."""
    import pyarrow.types as types

    known, kinds = {"binary": "images", "int": "integers", "bool": "integers", "string": "words"}, {}
    for field in schema:
        kind = field.type.value_type if types.is_dictionary(field.type) else field.type
        if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            kind = kind.field("bytes").type
        name = "int" if types.is_integer(kind) else str(kind).removeprefix("large_").removesuffix("_view")
        kinds[field.name] = known.get(name, name)
    return kinds


def _no_column(path: Path, wanted: str, kinds: dict[str, str]) -> InputError:
    listed = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
    return InputError(f"{path} has no {wanted}; the columns are {listed}; set data.image_column or data.label_column")


def _columns(path: Path, image: str | None, label: str | None) -> tuple[str, str, tuple[str, ...] | None]:
    """Returns the image and the label column of a file, and the class names where its schema has them."""
    schema = next(_batches(path, None))
    kinds = _kinds(schema)
    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})

    def pick(role: str, named: str | None, hub_type: str, *allowed: str) -> str:
        called = ("label", "labels") if role == "label" else ()
        typed = [name for name in kinds if features.get(name, {}).get("_type") == hub_type]
        found = typed or [name for name, kind in kinds.items() if kind in allowed and name in called]
        found = found or [name for name, kind in kinds.items() if kind == allowed[0]]
        found = found if named is None else [named]
        if len(found) > 1:
            raise InputError(f"{path}: several columns could hold {role}s ({', '.join(found)}); set data.{role}_column")
        if not found or kinds.get(found[0]) not in allowed:
            wanted = f"column {found[0]!r}" if found else "column"
            raise _no_column(path, f"{wanted} of {' or '.join(allowed)} for {role}s", kinds)
        return found[0]

    image = pick("image", image, "Image", "images")
    label = pick("label", label, "ClassLabel", "integers", "words")
    names = features.get(label, {}).get("names")
    check_names(names or (), str(path))
    return image, label, tuple(map(str, names)) if names else None


def _table(files: Sequence[Path], image: str, label: str, names: tuple[str, ...] | None) -> Split:
    parts = []
    for path in files:
        if _columns(path, image, label)[2] not in (None, names):
            raise InputError(f"{path}: the class names differ from those of the first training file; use one data set")
        parts.append(_values(path, label))
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

    labels = RawLabels(np.concatenate([part for part in parts if len(part)] or parts), where)
    return Split(labels, images, lambda name: np.concatenate([_values(path, name) for path in files]))


def _stored(value: Any) -> Stored:
    """Returns an image's bytes, or its file where the library only noted that (as for folders of images on the hub)."""
    if not isinstance(value, dict):
        return cast(Stored, value)
    path = Path(value.get("path") or "")
    return value["bytes"] or (path if path.is_absolute() else None)


def _values(path: Path, name: str) -> NDArray[Any]:
    import pyarrow as pa

    kinds = _kinds(next(_batches(path, None)))
    if kinds.get(name) not in ("integers", "words"):
        raise _no_column(path, f"column {name!r} of integers or words", kinds)
    wanted = pa.string() if kinds[name] == "words" else pa.int64()
    column = pa.chunked_array([batch.column(0).cast(wanted) for batch in _batches(path, [name])], wanted)
    if column.null_count:
        row = column.is_null().index(True).as_py()
        raise InputError(f"{path}, row {row}: {name!r} has no value; {UNLABELLED}")
    return np.array(column.to_pylist(), np.str_ if kinds[name] == "words" else np.int64)  # to_numpy imports pandas
