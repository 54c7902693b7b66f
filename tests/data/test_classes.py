import numpy as np
import pytest

from fedftg.data.classes import RawLabels, check_names, in_order, resolve
from fedftg.errors import InputError


def raw(*values, split="train"):
    return RawLabels(np.array(values), lambda row: f"{split} row {row}")


def resolved(train, test, names=None, **options):
    names, *labels = resolve(raw(*train), raw(*test, split="test"), names, **options)
    assert all(part.dtype == np.int64 for part in labels)
    return names, labels[0].tolist(), labels[1].tolist()


def test_words_become_their_place_in_sorted_order_and_numbers_are_sorted_as_numbers():
    assert resolved(["cat", "ape", "dog", "ape"], ["dog", "ape"]) == (("ape", "cat", "dog"), [1, 0, 2, 0], [2, 0])
    assert resolved(["10", "9", "1"], ["9"]) == (("1", "9", "10"), [2, 1, 0], [1])
    assert in_order(["b", "10", "9"]) == ["10", "9", "b"]


def test_named_classes_may_lack_rows():
    names = ("y", "never", "x")
    assert resolved([0, 2], [1], names) == (names, [0, 2], [1])
    assert resolved(["x", "y"], ["x"], names) == (names, [2, 0], [2])


def test_renumbered_labels_keep_their_order_and_their_numbers_as_names():
    found = resolved([40, 7, 10**9, 7], [10**9, 40], renumber=True)
    assert found == (("7", "40", "1000000000"), [1, 0, 2, 0], [2, 1])


@pytest.mark.parametrize(
    ("train", "test", "names", "expected"),
    [
        (["cat", "dog"], ["cat", "elephant"], None, "test row 1: label 'elephant' is none of the 2 classes"),
        ([0, 1], [0, 1, 2], None, "test row 2: label 2 is none of the 2 classes"),
        ([0], [4], ("a", "b"), "test row 0: label 4 is none of the 2 classes"),
        (["a", "c"], ["a"], ("a", "b"), "train row 1: label 'c' is none of the 2 classes"),
        ([0, -1], [0], None, "train row 1: label -1 is negative; remove it, or take a labelled split .*test_split"),
        (["cat"], [0], None, "one split has words as labels, the other integers"),
        ([0, 1, 5, 3, 3], [0], None, "train row 3: label 3 comes after a gap: no training row has label 2"),
        ([4, 2, 1], [1], None, "train row 2: label 1 comes after a gap: .* data.renumber_labels=true"),
        (
            ["cat ", "dog", "cat"],
            ["dog"],
            None,
            "labels: classes 'cat' and 'cat ' have one name, or differ",
        ),
    ],
)
def test_labels_that_are_refused(train, test, names, expected):
    with pytest.raises(InputError, match=expected):
        resolved(train, test, names)


def test_class_names_that_are_alike():
    check_names(["A", "a"], "file")
    for names, fold in ((["A", "a"], str.casefold), (["a", "b", "a"], str)):
        with pytest.raises(InputError, match=r"file: classes '[Aa]' and 'a' have one name"):
            check_names(names, "file", fold)
