"""Decoded images on disk: ``<key>.npy``, and ``<key>.json`` with what was found while decoding.

Both are written aside and renamed, the images last: an interrupted start leaves no entry.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedftg.errors import InputError, first_line

Images = NDArray[np.uint8]
Entry = tuple[Images, dict[str, Any]]
Allocate = Callable[[tuple[int, ...]], Images]  # from a shape to an array to fill, which replaces the one before

FORMAT = 4  # part of every key: raise it when the same files and settings give other pixels


def folder(setting: str) -> Path | None:
    """Returns the folder that ``data.cache`` means; None: nothing is cached."""
    if setting == "auto":
        users = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        setting = os.environ.get("FEDFTG_CACHE") or f"{users}/fedftg"
    return None if setting == "none" else Path(setting).expanduser()


def key_of(files: Iterable[Path], settings: object) -> str:
    """Returns a digest of settings and of the files' paths, sizes and times of change."""
    try:
        states = [(os.path.abspath(path), (stat := path.stat()).st_size, stat.st_mtime_ns) for path in files]
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read ({error.strerror}); restore it") from error
    return hashlib.sha256(json.dumps([FORMAT, states, settings]).encode()).hexdigest()


def open_or_make(root: Path, key: str, make: Callable[[Allocate], Entry]) -> Entry:
    """Returns an entry, memory-mapped so that changes stay in memory; ``make`` fills an array where there is none."""
    if (entry := _read(root, key)) is None:
        try:
            root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix="part-", dir=root) as aside:
                path, about = Path(aside, "images.npy"), Path(aside, "about.json")
                about.write_text(json.dumps(make(lambda shape: _allocate(path, shape))[1]))
                with path.open("rb") as file:
                    os.fsync(file.fileno())
                about.replace(root / f"{key}.json")
                path.replace(root / f"{key}.npy")
        except OSError as error:
            raise InputError(
                f"cannot write to {root} ({first_line(error)}); set data.cache to another folder, or none"
            ) from error
        entry = _read(root, key)
        assert entry is not None
    return entry


def _allocate(path: Path, shape: tuple[int, ...]) -> Images:
    path.unlink(missing_ok=True)
    images: Images = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
    if sys.platform == "linux":  # a full disk is then an error here, not a signal that kills the process later
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return images


def _read(root: Path, key: str) -> Entry | None:
    try:
        about = json.loads((root / f"{key}.json").read_text())
        return np.lib.format.open_memmap(root / f"{key}.npy", mode="c"), about
    except (OSError, ValueError):  # missing, or damaged: made again
        return None
