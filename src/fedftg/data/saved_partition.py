"""A division on disk: partition.json, which the law "file" reads back."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedftg.errors import InputError

Indices = NDArray[np.int64]

_ADVICE = "give a partition.json of 'fedftg partition', or a JSON list with one list of training rows a client"


def labels_digest(labels: NDArray[np.integer]) -> str:
    """SHA-256 of labels ``(N,)`` as little-endian int64, in hexadecimal: which data a division is of."""
    return hashlib.sha256(np.asarray(labels).astype("<i8").tobytes()).hexdigest()


def write(
    path: Path,
    parts: Sequence[NDArray[np.integer]],
    labels: NDArray[np.integer],
    *,
    law: str,
    class_names: Sequence[str],
    class_counts: Sequence[Sequence[int]],
    skew: Mapping[str, float],
    about: Mapping[str, Any] = MappingProxyType({}),
) -> Path:
    """Writes a division as one JSON object, as a whole or not at all; returns ``path``.

    Args:
        path: the file; one that is there is replaced.
        parts: one list of training rows per client.
        labels: of all training rows, ``(N,)``; their digest is kept.
        law: the law's name.
        class_names: one a class.
        class_counts: clients x classes.
        skew: what `partition.skew` measured.
        about: what else is worth knowing of it, such as its settings; `read` does not ask for it.

    Raises:
        InputError: the file cannot be written.
    """
    lines = [
        f'"law": {json.dumps(law)}',
        f'"num_samples": {len(labels)}',
        f'"labels_sha256": "{labels_digest(labels)}"',
        f'"class_names": {json.dumps(list(class_names))}',
        # A client a line: one number a line, as json's indent gives it, is not read by anyone.
        f'"class_counts": {_one_client_a_line(class_counts)}',
        f'"skew": {json.dumps(dict(skew), allow_nan=False)}',
        *(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in about.items()),
        f'"indices": {_one_client_a_line([np.asarray(part).tolist() for part in parts])}',
    ]
    content = "{\n  " + ",\n  ".join(lines) + "\n}\n"
    aside = path.with_name(path.name + ".part")
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise InputError(f"cannot write {path}: {error.strerror}; choose another folder by --out") from None
    return path


def _one_client_a_line(rows: Sequence[Sequence[int]]) -> str:
    return "[\n    " + ",\n    ".join(json.dumps(list(row), separators=(",", ":")) for row in rows) + "\n  ]"


def holds(
    path: Path, parts: Sequence[NDArray[np.integer]], labels: NDArray[np.integer], about: Mapping[str, Any]
) -> bool:
    """Whether a file that `write` wrote is of these data, with the same rows for each client and the same ``about``."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return bool(
            content["indices"] == [np.asarray(part).tolist() for part in parts]
            and content["labels_sha256"] == labels_digest(labels)
            and all(content[name] == value for name, value in json.loads(json.dumps(dict(about))).items())
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def read(path: Path, labels: NDArray[np.integer]) -> list[Indices]:
    """The division in a JSON file, each client's rows ascending.

    Args:
        path: holds a list of lists of row numbers, or an object with such a list as ``indices``.
        labels: of all training rows, ``(N,)``.

    Raises:
        InputError: no such file, no JSON, no division of these data, or a row that is wrong or given twice.
    """
    name = f"partition.file {str(path)!r}"
    clients = _clients(_content(path, name), labels, name)
    for client, rows in enumerate(clients):
        if not isinstance(rows, list):
            raise InputError(f"{name}: client {client} is {_shown(rows)}, not a list of training rows; {_ADVICE}")
        for row in rows:
            # 'is': true and 1.0 would pass as numbers.
            if type(row) is not int or not 0 <= row < len(labels):
                raise InputError(
                    f"{name}: client {client} has row {_shown(row)}; rows are whole numbers from 0 to "
                    f"{len(labels) - 1}; correct the file, or use the data that it was made for"
                )
    sizes = [len(rows) for rows in clients]
    together = np.array([row for rows in clients for row in rows], dtype=np.int64)
    if not len(together):
        raise InputError(f"{name} gives no client any sample; {_ADVICE}")
    owner = np.repeat(np.arange(len(clients)), sizes)
    order = np.argsort(together, kind="stable")
    twice = np.flatnonzero(np.diff(together[order]) == 0)
    if len(twice):
        first, second = order[twice[0]], order[twice[0] + 1]
        whose = f"client {owner[first]}" + (f" and by client {owner[second]}" if owner[first] != owner[second] else "")
        raise InputError(
            f"{name}: row {together[first]} is held twice, by {whose}; each row may be held once, so take one out"
        )
    return [np.sort(part) for part in np.split(together, np.cumsum(sizes)[:-1])]


def check_there(path: Path) -> None:
    """Raises InputError where the file cannot be opened or holds no JSON; whether it fits the data, `read` tells."""
    _content(path, f"partition.file {str(path)!r}")


def _content(path: Path, name: str) -> Any:
    try:
        return json.loads(path.expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror}; {_ADVICE}") from None
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or brackets without end
        raise InputError(f"{name} is not valid JSON: {error}; {_ADVICE}") from None


def _clients(content: Any, labels: NDArray[np.integer], name: str) -> list[Any]:
    if isinstance(content, dict):
        digest, count = content.get("labels_sha256"), content.get("num_samples")
        if count is not None and count != len(labels):
            raise InputError(
                f"{name} was made for other data: for {_shown(count)} training samples, here are {len(labels)}; set "
                "data.* as it was then, or make a new file with 'fedftg partition'"
            )
        if digest is not None and digest != labels_digest(labels):
            raise InputError(
                f"{name} was made for other data: the training labels differ; set data.* as it was then, or make a "
                "new file with 'fedftg partition'"
            )
        if "indices" not in content and "digest" in content:
            raise InputError(
                f"{name} is the record of a run, which counts samples and names no rows; make a file with rows by "
                "'fedftg partition' with the settings of that run"
            )
        if "indices" not in content:
            raise InputError(f"{name} has no 'indices'; {_ADVICE}")
        content = content["indices"]
    if not isinstance(content, list) or not content:
        raise InputError(f"{name} holds {_shown(content)}, not one list of training rows a client; {_ADVICE}")
    return content


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
