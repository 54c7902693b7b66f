"""Which files of a local folder make up a split: parquet in the hub's layout, or arrow files of the datasets library.

A split is the files ``train-00000-of-00002.parquet``, ... in one folder, or all files of a folder that has the split's
name (``train/0000.parquet``, as the hub converts data sets; ``train/data-00000-of-00001.arrow``, as
``DatasetDict.save_to_disk`` writes them). A folder of arrow files without a split's name is all training data.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from fedftg.errors import InputError

LAYOUT = "train-*.parquet and test-*.parquet (or valid-*, validation-*, val-*)"
TEST_SPLITS = ("test", "valid", "validation", "val")

_SHARD = re.compile(r"-(\d+)-of-(\d+)")
_SUFFIXES = ("parquet", "arrow")


def split_files(
    root: Path, names: Sequence[str], *, subset: str | None = None, avoid: Collection[str] = ()
) -> list[Path] | None:
    """The files of a split in shard order; None where the folder has no split of these names.

    They are looked for in ``root/subset``, ``root``, ``root/data``, and in the only other folder that has any.

    Args:
        root: the data set's folder.
        names: names of the split; the first one that has files is used.
        subset: folder of the hub's configuration that is wanted, where the data set has several.
        avoid: folders that hold another configuration and are never looked into.

    Raises:
        InputError: no such folder, more than one folder with files, or a shard is missing.
    """
    if not root.is_dir():
        raise InputError(f"data.root {str(root)!r} is not a folder; give the folder with {LAYOUT}")
    for name in names:
        for folders in _places(root, subset, avoid):
            found = {folder: files for folder in folders if (files := _files_of(folder, name))}
            if len(found) > 1:
                there = ", ".join(sorted(folder.name for folder in found))
                raise InputError(
                    f"several folders in {root} have {name} files ({there}); set data.root to one of them, or "
                    "data.subset to its name"
                )
            for files in found.values():
                _check_shards(files)
                return files
    return None


def splits_in(root: Path, *, subset: str | None = None, avoid: Collection[str] = ()) -> list[str]:
    """The names of the splits that `split_files` can find, sorted."""
    found: set[str] = set()
    for folders in _places(root, subset, avoid):
        for folder in folders:
            if not folder.is_dir():
                continue
            files = [path for suffix in _SUFFIXES for path in folder.glob(f"*.{suffix}")]
            found |= {_SHARD.split(path.stem)[0] for path in files}
            inside = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
            found |= {path.name for path in inside if path.name not in {"data", *avoid} and _all_files(path)}
    if "data" in found and _files_of(root, "train"):
        found = (found - {"data"}) | {"train"}
    return sorted(found)


def _places(root: Path, subset: str | None, avoid: Collection[str]) -> Iterator[list[Path]]:
    if subset is not None and (root / subset).is_dir():
        yield [root / subset]
        return
    yield [root]
    yield [root / "data"]
    yield sorted(
        path
        for path in root.iterdir()
        if path.is_dir() and path.name not in {"data", *avoid} and not path.name.startswith(".")
    )


def _files_of(folder: Path, name: str) -> list[Path]:
    if not folder.is_dir():
        return []
    for suffix in _SUFFIXES:
        files = sorted(
            path for path in folder.glob(f"{name}*.{suffix}") if path.stem == name or path.stem[len(name)] == "-"
        )
        # The datasets library's own cache puts the builder's name first: parquet-train.arrow.
        files = files or sorted(
            path for path in folder.glob(f"*-{name}*.{suffix}") if _SHARD.split(path.stem)[0].endswith(f"-{name}")
        )
        if files:
            return files
    if files := _all_files(folder / name):
        return files
    if name == "train" and (unnamed := sorted(folder.glob("data*.arrow"))):
        return _all_files(folder) if (folder / "state.json").is_file() else unnamed
    return []


def _all_files(folder: Path) -> list[Path]:
    """All shards in a folder that is a split: as ``state.json`` of the datasets library lists them, else by name."""
    if (folder / "state.json").is_file():
        try:
            listed = [
                folder / entry["filename"] for entry in json.loads((folder / "state.json").read_text())["_data_files"]
            ]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{folder / 'state.json'} is damaged; save the data set again") from error
        missing = [path for path in listed if not path.is_file()]
        if missing:
            raise InputError(
                f"{missing[0]} is missing, though {folder / 'state.json'} names it; save the data set again"
            )
        return listed
    for suffix in _SUFFIXES:
        if files := sorted(folder.glob(f"*.{suffix}")):
            return files
    return []


def _check_shards(files: list[Path]) -> None:
    """A download that stopped half-way must not pass as a smaller data set."""
    numbered = [match for path in files if (match := _SHARD.search(path.stem))]
    totals = {int(match[2]) for match in numbered}
    owner: dict[int, Path] = {}
    for path in files:
        match = _SHARD.search(path.stem)
        if match is None and numbered:
            raise InputError(
                f"{path} has no shard number though {numbered[0].string} beside it has one; remove the one that does "
                "not belong, or its rows count twice"
            )
        if match is not None and len(totals) == 1 and owner.setdefault(int(match[1]), path) != path:
            raise InputError(f"{owner[int(match[1])]} and {path.name} are the same shard; remove one of them")
    if len(numbered) == len(files) and len(totals) == 1:
        missing = sorted(set(range(totals.pop())) - {int(match[1]) for match in numbered})
        if missing:
            raise InputError(
                f"shard {missing[0]} beside {files[0]} is missing ({len(files)} of {len(files) + len(missing)} are "
                "there); complete the download"
            )
    elif len(totals) > 1:
        raise InputError(f"shards beside {files[0]} belong to different sets; keep those of one '-of-' number")
