"""Decoded images on disk, so that a data set is decoded once.

An entry is ``<key>.npy``, the images, and ``<key>.json``, what was found out while decoding. Both are written aside and
renamed, the images last: an interrupted start leaves no entry.
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
Allocate = Callable[[tuple[int, ...]], Images]
"""From a shape to an array to fill; a second call replaces the first array."""

FORMAT = 2
"""Part of every key: raise it when the same files and settings give other pixels."""


def folder(setting: str) -> Path | None:
    """Returns the folder that ``data.cache`` means; None: nothing is cached."""
    if setting == "auto":
        users = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        setting = os.environ.get("FEDFTG_CACHE") or f"{users}/fedftg"
    return None if setting == "none" else Path(setting).expanduser()


def key_of(files: Iterable[Path], settings: object) -> str:
    """Returns a digest of the files' paths, sizes and times of change, in their order, and of settings."""
    try:
        states = [(os.path.abspath(path), (stat := path.stat()).st_size, stat.st_mtime_ns) for path in files]
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read ({error.strerror}); restore it") from error
    return hashlib.sha256(json.dumps([FORMAT, states, settings]).encode()).hexdigest()


def open_or_make(root: Path, key: str, make: Callable[[Allocate], Entry]) -> Entry:
    """Returns the images of an entry, memory-mapped so that changes stay in memory, and what is known of them.

    Where there is no whole entry, ``make`` fills an array that it allocates, and returns what is known as JSON values.
    """
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
                f"decoded images cannot be kept in {root} ({first_line(error)}); free space or make it writable, or "
                "set data.cache to another folder, or to none"
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
