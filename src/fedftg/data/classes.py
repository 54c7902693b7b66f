"""Turns labels as they are stored, integers or words, into class names and labels from 0."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedftg.errors import InputError

Labels = NDArray[np.int64]

MAX_CLASSES = 65_536
"""More different integers without names are taken for ids, not labels."""


@dataclass(frozen=True)
class RawLabels:
    """Labels ``(N,)`` of a split as stored, int64 or strings, and a function that names the place of a row."""

    values: NDArray[Any]
    where: Callable[[int], str]
    column: str = "label"


def in_order(names: Iterable[str]) -> list[str]:
    """Returns the different names sorted; as numbers where all are integers, so that 10 comes after 9."""
    unique = set(names)
    if all(name.isascii() and name.isdigit() for name in unique):
        return sorted(unique, key=lambda name: (int(name), name))
    return sorted(unique)


def check_names(names: Iterable[str], where: str) -> None:
    """Raises InputError where two classes have the same name."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise InputError(f"{where}: the class name {name!r} occurs twice; give each class a name of its own")
        seen.add(name)


def check_alike(names: Iterable[str], where: str, fold: Callable[[str], str] = str) -> None:
    """Raises InputError where two class names differ only in spaces around them, or are alike once folded."""
    seen: dict[str, str] = {}
    for name in sorted(set(names)):
        other = seen.setdefault(fold(name.strip()), name)
        if other != name:
            raise InputError(f"{where}: classes {other!r} and {name!r} differ only in case or spaces; merge or rename")


def resolve(
    train: RawLabels,
    test: RawLabels | None,
    names: tuple[str, ...] | None,
    *,
    num_classes: int | None = None,
    renumber: bool = False,
) -> tuple[tuple[str, ...], Labels, Labels | None]:
    """Returns the class names, and the labels of both splits as integers from 0.

    Words become their index in the class names or, without these, in the sorted words of the training rows.
    Integers without names must be 0, 1, 2, ... without a gap; their names are the numbers.

    Args:
        train: of the training rows.
        test: of the test rows; None where there is no test split.
        names: the class names, where the data has them; integer labels are then indices into it.
        num_classes: for integers without names: the number of classes, some of which may have no rows.
        renumber: number integer labels without names from 0 in ascending order, whatever gaps they have.

    Raises:
        InputError: a label outside the classes, a gap, or, without names, a test label that no training row has; names
            the row.
    """
    splits = [split for split in (train, test) if split is not None]
    kinds = {split.values.dtype.kind for split in splits}
    if kinds == {"i"} and (names is not None or num_classes is not None):
        names = names or tuple(map(str, range(num_classes or 0)))
        for split in splits:
            _check_range(split, len(names))
        return names, train.values, None if test is None else test.values
    if len(kinds) > 1:
        raise InputError(f"{train.where(0)}: one split has words as labels, the other integers; store both alike")
    if kinds == {"i"}:
        for split in splits:
            _check_range(split, None if renumber else MAX_CLASSES)
        found = np.unique(train.values)
        if not renumber:
            _check_no_gap(train, found)
        names = tuple(map(str, found))
    else:
        if names is None:
            check_alike(map(str, train.values), f"column {train.column!r}")
            names = tuple(in_order(map(str, train.values)))
        else:
            for split in splits:
                _check_among(split, np.array(names), "is not among the class names; correct it, or leave these out")
        found = np.array(names)
    if test is not None:
        _check_among(test, found, "occurs in no training row; correct it, or add such rows to the training split")
    order = np.argsort(found, kind="stable")
    labels = [order[np.searchsorted(found, split.values, sorter=order)].astype(np.int64) for split in splits]
    return names, labels[0], labels[1] if test is not None else None


def _check_no_gap(train: RawLabels, found: NDArray[Any]) -> None:
    gaps = np.flatnonzero(found != np.arange(len(found)))
    if len(gaps):
        label, missing = int(found[gaps[0]]), int(gaps[0])
        row = int(np.flatnonzero(train.values == label)[0])
        raise InputError(
            f"{train.where(row)}: label {label}, but no training row has label {missing}; labels without class names "
            "must be 0, 1, 2, ... without a gap; set data.renumber_labels=true to renumber them"
        )


def _check_among(labels: RawLabels, known: NDArray[Any], advice: str) -> None:
    wrong = np.flatnonzero(~np.isin(labels.values, known))
    if len(wrong):
        row = int(wrong[0])
        raise InputError(f"{labels.where(row)}: label {str(labels.values[row])!r} {advice}")


def _check_range(labels: RawLabels, limit: int | None) -> None:
    """Raises InputError for labels outside 0..limit-1; None allows all from 0."""
    values = labels.values
    wrong = np.flatnonzero((values < 0) | (values >= (np.iinfo(np.int64).max if limit is None else limit)))
    if len(wrong):
        row = int(wrong[0])
        allowed = "negative" if limit is None else f"outside 0..{limit - 1}"
        if values[row] < 0:
            why = "an unlabelled split? set data.test_split (such as validation) or data.train_split to a labelled one"
        else:
            why = f"column {labels.column!r} may not hold classes; correct it, or set data.label_column"
        raise InputError(f"{labels.where(row)}: label {values[row]} is {allowed}; {why}")
