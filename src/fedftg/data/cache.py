"""Decoded images on disk, so that a data set is decoded once.

An entry is ``<key>.npy``, the images, and ``<key>.json``, what was found out while decoding. The key is a digest of the
source files' paths, sizes and times of change, and of all settings that decide the pixels. Both files are written aside
and renamed, the images last: an interrupted start leaves no entry. Deleting the folder is safe.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedftg.errors import InputError

Images = NDArray[np.uint8]
Entry = tuple[Images, dict[str, Any]]

FORMAT = 2
"""Part of every key: raise it when the same files and settings give other pixels."""

_ABANDONED = 24 * 3600.0
"""Seconds after which a folder written aside belongs to a process that was killed."""


def folder(setting: str) -> Path | None:
    """Returns the folder that ``data.cache`` means; None: nothing is cached."""
    if setting == "auto":
        setting = os.environ.get("FEDFTG_CACHE") or "auto"
    if setting == "auto":
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fedftg"
    return None if setting == "none" else Path(setting).expanduser()


def key_of(files: Iterable[Path], settings: object) -> str:
    """Returns the key of files, in their order, and settings that JSON can hold.

    Raises:
        InputError: a file is missing.
    """
    try:
        states = [(os.path.abspath(path), (stat := path.stat()).st_size, stat.st_mtime_ns) for path in files]
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read ({error.strerror}); restore it") from error
    return hashlib.sha256(json.dumps([FORMAT, states, settings]).encode()).hexdigest()


def open_or_make(root: Path, key: str, make: Callable[[Path], tuple[Path, dict[str, Any]]]) -> Entry:
    """Returns the images of an entry, memory-mapped so that changes stay in memory, and what is known of them.

    Args:
        root: the cache's folder.
        key: from `key_of`.
        make: called where there is no whole entry; writes the images to an ``.npy`` file in the folder it is given and
            returns its path, and what JSON can hold of them.

    Raises:
        InputError: the folder cannot be written, or the disk is full.
    """
    if (entry := _read(root, key)) is None:
        try:
            root.mkdir(parents=True, exist_ok=True)
            for part in root.glob("part-*"):
                if time.time() - part.stat().st_mtime > _ABANDONED:
                    shutil.rmtree(part, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix="part-", dir=root) as aside:
                path, about = make(Path(aside))
                (Path(aside) / "about.json").write_text(json.dumps(about))
                os.replace(Path(aside) / "about.json", root / f"{key}.json")
                os.replace(path, root / f"{key}.npy")
        except OSError as error:
            raise InputError(
                f"decoded images cannot be kept in {root} ({first_line(error)}); free space or make it writable, or "
                "set data.cache to another folder, or to none"
            ) from error
        entry = _read(root, key)
        assert entry is not None
    return entry


def _read(root: Path, key: str) -> Entry | None:
    try:
        about = json.loads((root / f"{key}.json").read_text())
        return np.lib.format.open_memmap(root / f"{key}.npy", mode="c"), about
    except (OSError, ValueError):  # missing, or damaged: made again
        return None


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's text without addresses in memory, or its kind where it has no text."""
    lines = str(error).strip().splitlines()
    return re.sub(r" object at 0x[0-9a-f]+", "", lines[0]) if lines else type(error).__name__
