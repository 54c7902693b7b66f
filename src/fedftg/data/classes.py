"""Turns labels as they are stored, integers or words, into class names and labels from 0."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedftg.errors import InputError

Labels = NDArray[np.int64]

UNLABELLED = "remove it, or take a labelled split (data.train_split, data.test_split)"


@dataclass(frozen=True)
class RawLabels:
    """Labels ``(N,)`` of a split as stored, int64 or strings, and a function that names the place of a row."""

    values: NDArray[Any]
    where: Callable[[int], str]


def in_order(names: Iterable[str]) -> list[str]:
    """Returns the different names sorted; as numbers where all are integers, so that 10 comes after 9."""
    unique = set(names)
    if all(name.isascii() and name.isdigit() for name in unique):
        return sorted(unique, key=lambda name: (int(name), name))
    return sorted(unique)


def folded(name: str) -> str:
    """Normalises whitespace, invisible characters and Unicode (NFC)."""
    return unicodedata.normalize("NFC", "".join(filter(str.isprintable, " ".join(name.split()))))


def check_names(names: Iterable[str], where: str, fold: Callable[[str], str] = str) -> None:
    """Raises InputError where two class names are the same once folded."""
    seen: dict[str, str] = {}
    for name in names:
        if (folded := fold(name)) in seen:
            raise InputError(
                f"{where}: classes {seen[folded]!r} and {name!r} have one name, or differ only in case, spaces or "
                "Unicode form; merge or rename them"
            )
        seen[folded] = name


def resolve(
    train: RawLabels, test: RawLabels, names: tuple[str, ...] | None, *, renumber: bool = False
) -> tuple[tuple[str, ...], Labels, Labels]:
    """Returns the class names, and the labels of both splits as integers from 0.

    Words become their index in ``names`` or, without these, in the sorted words of the training rows. Integers are
    indices into ``names`` or, without these, must be 0, 1, 2, ... without a gap, unless they are renumbered.
    """
    if len(train.values) == 0:
        raise InputError("the training split has no images; add some, or take another data.train_split")
    kind = train.values.dtype.kind
    if test.values.dtype.kind != kind:
        raise InputError(f"{train.where(0)}: one split has words as labels, the other integers; store both alike")
    known = np.unique(train.values)
    if kind == "i":
        for split in (train, test):
            _refuse(split, split.values < 0, f"is negative; {UNLABELLED}")
        if names is not None:
            known = np.arange(len(names))
        elif not renumber:
            for gap in np.flatnonzero(known != np.arange(len(known)))[:1]:
                why = f"comes after a gap: no training row has label {gap}; name the classes, or set "
                _refuse(train, train.values == known[gap], f"{why}data.renumber_labels=true")
        names = names or tuple(map(str, known))
    else:
        if names is None:
            for split in (train, test):
                _refuse(split, np.char.strip(split.values) == "", f"is empty; {UNLABELLED}")
            check_names(known.tolist(), "labels", folded)
        names = names or tuple(in_order(known.tolist()))
        known = np.array(names)
    if len(names) < 2:
        raise InputError(f"{train.where(0)}: all labels are {names[0]!r}, nothing to classify; take other labels")
    for split in (train, test):
        why = f"is none of the {len(known)} classes; correct it, or take another data.label_column or split"
        _refuse(split, ~np.isin(split.values, known), why)
    order = np.argsort(known, kind="stable")
    labels = [order[np.searchsorted(known, split.values, sorter=order)].astype(np.int64) for split in (train, test)]
    return names, labels[0], labels[1]


def _refuse(labels: RawLabels, wrong: NDArray[np.bool_], why: str) -> None:
    for row in np.flatnonzero(wrong)[:1].tolist():
        raise InputError(f"{labels.where(row)}: label {labels.values[row].item()!r} {why}")
