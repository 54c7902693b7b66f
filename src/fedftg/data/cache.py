"""Decoded images on disk, found again by the content of the files they came from.

A folder holds for each data set as decoded ``<key>/`` with ``train.npy``, ``test.npy`` and ``meta.json``. The key is
the SHA-256 of the source files' bytes and of all settings that decide the pixels: a data set that is moved or copied is
found, and one that changed is not. Hashing gigabytes at each start would be slow, so ``stamps/`` remembers the digest
of files by their paths, sizes and times of change; a second start only asks for these. Deleting the folder is safe.

An entry is written aside as ``<key>.part`` under a lock on ``<key>.lock`` and renamed when it is whole. A second
process waits for the lock; the lock of a killed one is free, and what it left is swept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from fedftg.data.decode import one_line
from fedftg.errors import InputError

try:
    import fcntl
except ImportError:  # Windows: two processes may then decode the same set; the first to finish is kept
    fcntl = None  # type: ignore[assignment]

FORMAT = 1
"""Part of every key: raise it when the same files and settings give other pixels."""

_RECENT = 2.0
"""Seconds: a file changed so shortly ago may change again within the clock's grain, so its stamp proves nothing."""

State = tuple[str, int, int, int]

_ABANDONED = 3600.0
"""Seconds after which nobody is still writing a stamp."""


def folder(setting: str) -> Path | None:
    """The folder for decoded images that ``data.cache`` means; None keeps them in memory."""
    if setting == "none":
        return None
    if setting != "auto":
        return Path(setting).expanduser()
    if (named := os.environ.get("FEDFTG_CACHE")) and named != "auto":
        return folder(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fedftg"


def digest(content: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def key_of(root: Path, files: Sequence[Sequence[Path]], settings: object) -> tuple[str, list[State]]:
    """The key of an entry: what is in the files of each split, in order, and what is done with it.

    Args:
        root: the cache's folder, where digests are remembered.
        files: per split; their order is that of the images, their names do not count.
        settings: anything JSON can hold that decides the pixels.

    Returns:
        The key, and `states_of` the files before they were read.

    Raises:
        InputError: a file or the cache's folder cannot be used.
    """
    now = time.time()  # before any file is looked at: a later change of one has a later time
    states = states_of(files)
    content = _content_digest(root, files, states, now)
    text = json.dumps([FORMAT, content, settings], sort_keys=True)
    return digest(text.encode()), states


def unchanged(files: Sequence[Sequence[Path]], states: list[State], root: Path, key: str, settings: object) -> bool:
    """Whether the files are those that the key was made of; new times alone (a chmod, a link) are no change."""
    return states_of(files) == states or key_of(root, files, settings)[0] == key


def states_of(files: Sequence[Sequence[Path]]) -> list[State]:
    """Path, size, and times of the last change of content and of the file, in ns, of every file.

    Raises:
        InputError: a file is not there.
    """
    found = []
    for path in [path for split in files for path in split]:
        try:
            status = path.stat()
        except OSError as error:
            raise InputError(f"{path} cannot be read ({one_line(error)}); restore it") from error
        found.append((os.path.abspath(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    return found


def _content_digest(root: Path, files: Sequence[Sequence[Path]], states: list[State], now: float) -> str:
    newest = max((max(changed, touched) for _, _, changed, touched in states), default=0) / 1e9
    # Sorted, and beside that the order: the digest depends on which file belongs to which split.
    names = iter([name for name, _, _, _ in states])
    order = [[next(names) for _ in split] for split in files]
    stamp = digest(json.dumps([FORMAT, sorted(states), order]).encode())
    with _told(root):
        memory = root / "stamps" / f"{stamp}.json"
        if memory.is_file():
            try:
                return str(json.loads(memory.read_text())["content"])
            except (ValueError, KeyError, TypeError):
                pass  # damaged: the files are hashed again
    total = hashlib.sha256()
    for split in files:
        total.update(f"{len(split)};".encode())
        for path in split:
            total.update(_file_digest(path))
    if now - newest > _RECENT:
        # Without the stamp the next start hashes again, which is no reason to fail: a shared cache may be read only.
        with contextlib.suppress(OSError):
            memory.parent.mkdir(parents=True, exist_ok=True)
            aside = memory.with_suffix(f".{os.getpid()}")
            try:
                aside.write_text(json.dumps({"content": total.hexdigest()}))
                aside.replace(memory)
            finally:
                aside.unlink(missing_ok=True)
    return total.hexdigest()


def _file_digest(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({one_line(error)}); restore it") from error


def open_or_make(
    root: Path, key: str, make: Callable[[Path], dict[str, Any]], still: Callable[[], bool] = lambda: True
) -> Path:
    """The folder of the entry, made first where it is not there or not whole.

    Args:
        root: the cache's folder.
        key: from `key_of`.
        make: writes the entry's files into the folder it is given and returns what goes into ``meta.json``. Whatever it
            raises leaves nothing behind.
        still: asked when all is made: whether the files are those that the key was made of.

    Raises:
        InputError: the folder cannot be written, the disk is full, or a file changed meanwhile.
    """
    with _told(root):
        entry, part = root / key, root / f"{key}.part"
        if meta_of(entry) is not None:  # first of all, so that a cache that may only be read serves
            return entry
        root.mkdir(parents=True, exist_ok=True)
        _sweep(root)
        with _locked(root / f"{key}.lock"):
            if meta_of(entry) is not None:  # made by the process that was waited for
                return entry
            shutil.rmtree(entry, ignore_errors=True)
            shutil.rmtree(part, ignore_errors=True)
            try:
                part.mkdir()
                meta = make(part)
                if not still():
                    raise InputError("the data changed while they were read; start again once they are complete")
                with (part / "meta.json").open("w") as file:
                    json.dump({"format": FORMAT, **meta}, file)
                    file.flush()
                    os.fsync(file.fileno())
                part.rename(entry)
                _make_durable(root)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    return entry


def identity(entry: Path) -> tuple[int, int] | None:
    """Tells an entry from one that was made later under the same key; None where there is none."""
    try:
        status = (entry / "meta.json").stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def discard(root: Path, key: str, seen: tuple[int, int] | None) -> bool:
    """Remove an entry, unless another process made it anew since it was ``seen``; whether that one is gone."""
    with _told(root), _locked(root / f"{key}.lock"):
        if identity(root / key) == seen:
            shutil.rmtree(root / key, ignore_errors=True)
        return seen is None or identity(root / key) != seen


def meta_of(entry: Path) -> dict[str, Any] | None:
    """What ``meta.json`` says; None where the entry is not there or not whole."""
    try:
        meta = json.loads((entry / "meta.json").read_text())
        sizes = meta["bytes"]
        whole = meta["format"] == FORMAT and all((entry / name).stat().st_size == sizes[name] for name in sizes)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return meta if whole else None


@contextmanager
def _told(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"decoded images cannot be kept in {root} ({one_line(error)}); make room there or make it writable, or set "
            "data.cache to another folder, or to none to keep them in memory"
        ) from error


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sweep(root: Path) -> None:
    """Remove what killed processes left: a part whose lock is free, a stamp that was never put in place."""
    for aside in (root / "stamps").glob("*.[0-9]*"):
        with contextlib.suppress(OSError):
            if time.time() - aside.stat().st_mtime > _ABANDONED:
                aside.unlink()
    for part in root.glob("*.part"):
        # What belongs to another user is theirs to sweep.
        with contextlib.suppress(PermissionError), part.with_suffix(".lock").open("w") as file:
            if _lock_is_free(file):
                shutil.rmtree(part, ignore_errors=True)


def _lock_is_free(file: IO[str]) -> bool:
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _make_durable(root: Path) -> None:
    if os.name == "posix":
        descriptor = os.open(root, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
