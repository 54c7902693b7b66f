"""From labels as they are stored, whole numbers or words, to class names and numbers from 0."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedftg.errors import InputError

Labels = NDArray[np.int64]

MAX_CLASSES_WITHOUT_NAMES = 65_536


@dataclass(frozen=True)
class RawLabels:
    """Labels ``(N,)`` of a split as stored, int64 or strings, and how to say where a row stands."""

    values: NDArray[Any]
    where: Callable[[int], str]
    column: str = "label"


def in_order(names: Iterable[str]) -> list[str]:
    """Class names sorted; as numbers where all are whole numbers, so that 10 comes after 9."""
    unique = set(names)
    if all(name.isascii() and name.isdigit() for name in unique):
        return sorted(unique, key=lambda name: (int(name), name))
    return sorted(unique)


def check_names(names: Iterable[str], where: str) -> None:
    """Raise InputError where two classes have one name."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise InputError(f"{where}: the class name {name!r} occurs twice; give each class a name of its own")
        seen.add(name)


def resolve(
    train: RawLabels,
    test: RawLabels | None,
    names: tuple[str, ...] | None,
    *,
    num_classes: int | None = None,
    renumber: bool = False,
) -> tuple[tuple[str, ...], Labels, Labels | None]:
    """Class names, and the labels of both splits as numbers from 0.

    Words become their place in the class names, or, without these, in the sorted words of the training rows.
    Numbers without names must be 0, 1, 2, ... without a gap; their names are the numbers.

    Args:
        train: of the training rows.
        test: of the test rows; None where there are none yet.
        names: the class names, where the data has them; labels are then places in it.
        num_classes: for numbers without names: how many classes there are, though some may have no rows.
        renumber: number labels without names from 0 in ascending order, whatever gaps they have.

    Raises:
        InputError: a label outside the classes, a gap, or, without names, a test label that no training row has; says
            where it stands.
    """
    if train.values.dtype.kind != "i" or (test is not None and test.values.dtype.kind != "i"):
        return _by_words(train, test, names)
    if names is not None or num_classes is not None:
        count = len(names) if names is not None else num_classes or 0
        for split in (train, test):
            _check_range(split, count)
        return names or tuple(map(str, range(count))), train.values, test.values if test is not None else None
    for split in (train, test):
        _check_range(split, None if renumber else MAX_CLASSES_WITHOUT_NAMES)
    found = np.unique(train.values)
    if len(found) > MAX_CLASSES_WITHOUT_NAMES:
        raise InputError(
            f"column {train.column!r} has {len(found)} different values, more than {MAX_CLASSES_WITHOUT_NAMES}; it may "
            "not hold classes; set data.label_column"
        )
    if not renumber:
        gaps = np.flatnonzero(found != np.arange(len(found)))
        if len(gaps):
            after, missing = int(found[gaps[0]]), int(gaps[0])
            row = int(np.flatnonzero(train.values == after)[0])
            raise InputError(
                f"{train.where(row)}: label {after} though no training row has label {missing}; labels without class "
                "names must be 0, 1, 2, ... without a gap; set data.renumber_labels=true to number them anew"
            )
    return tuple(map(str, found)), *_places(train, test, found)


def _by_words(
    train: RawLabels, test: RawLabels | None, known: tuple[str, ...] | None
) -> tuple[tuple[str, ...], Labels, Labels | None]:
    for split in (train, test):
        if split is not None and split.values.dtype.kind != "U":
            raise InputError(
                f"{split.where(0)}: the labels of one split are words, those of the other are numbers; store both alike"
            )
    if known is not None:
        advice = "is not among the class names; correct it, or leave the class names out"
        for split in filter(None, (train, test)):
            _check_among(split, np.array(known), advice)
    names = list(known) if known is not None else in_order(map(str, train.values))
    order = np.argsort(np.array(names))
    train_labels, test_labels = _places(train, test, np.array(names)[order])
    return tuple(names), order[train_labels], None if test_labels is None else order[test_labels]


def _places(train: RawLabels, test: RawLabels | None, found: NDArray[Any]) -> tuple[Labels, Labels | None]:
    """The place of each label in the sorted values ``found``, which are all that training rows have."""
    train_labels = np.searchsorted(found, train.values.astype(found.dtype)).astype(np.int64)
    if test is None:
        return train_labels, None
    _check_among(test, found, "occurs in no training row; correct it, or add such rows to the training split")
    return train_labels, np.searchsorted(found, test.values.astype(found.dtype)).astype(np.int64)


def _check_among(labels: RawLabels, known: NDArray[Any], advice: str) -> None:
    wrong = np.flatnonzero(~np.isin(labels.values, known))
    if len(wrong):
        row = int(wrong[0])
        raise InputError(f"{labels.where(row)}: label {str(labels.values[row])!r} {advice}")


def _check_range(labels: RawLabels | None, limit: int | None) -> None:
    if labels is None:
        return
    values = labels.values
    wrong = np.flatnonzero((values < 0) | (values >= (limit if limit is not None else np.iinfo(np.int64).max)))
    if len(wrong):
        row = int(wrong[0])
        why = "an unlabelled split?" if values[row] < 0 else f"column {labels.column!r} may not hold classes"
        allowed = "negative" if limit is None else f"outside 0..{limit - 1}"
        raise InputError(
            f"{labels.where(row)}: label {values[row]} is {allowed}; {why}; correct it, or set data.label_column"
        )
