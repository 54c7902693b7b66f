import numpy as np
import pytest

from fedftg.data.classes import RawLabels, check_alike, check_names, in_order, resolve
from fedftg.errors import InputError


def raw(*values, split="train"):
    return RawLabels(np.array(values), lambda row: f"{split} row {row}")


def test_words_become_their_place_in_sorted_order():
    names, train, test = resolve(raw("cat", "ape", "dog", "ape"), raw("dog", "ape"), None)
    assert names == ("ape", "cat", "dog")
    assert (train.tolist(), test.tolist()) == ([1, 0, 2, 0], [2, 0])
    assert train.dtype == test.dtype == np.int64


def test_words_that_are_numbers_are_ordered_as_numbers():
    names, train, _ = resolve(raw("10", "9", "1"), None, None)
    assert names == ("1", "9", "10")
    assert train.tolist() == [2, 1, 0]
    assert in_order(["b", "10", "9"]) == ["10", "9", "b"]


def test_test_label_that_training_lacks():
    with pytest.raises(InputError, match="test row 1: label 'elephant' occurs in no training row"):
        resolve(raw("cat", "dog"), raw("cat", "elephant", split="test"), None)
    with pytest.raises(InputError, match="test row 2: label '2' occurs in no training row"):
        resolve(raw(0, 1), raw(0, 1, 2, split="test"), None)


def test_words_and_numbers():
    with pytest.raises(InputError, match="one split has words as labels, the other integers"):
        resolve(raw("cat"), raw(0, split="test"), None)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ((0, 1, 5, 3, 3), "train row 3: label 3, but no training row has label 2"),
        ((4, 2, 1), "train row 2: label 1, but no training row has label 0"),
    ],
)
def test_gap_says_where_the_first_label_after_it_stands(labels, expected):
    with pytest.raises(InputError, match=expected) as caught:
        resolve(raw(*labels), None, None)
    assert "data.renumber_labels=true" in str(caught.value)


def test_renumbered_labels_keep_their_order_and_their_numbers_as_names():
    names, train, test = resolve(raw(40, 7, 10**9, 7), raw(10**9, 40), None, renumber=True)
    assert names == ("7", "40", "1000000000")
    assert (train.tolist(), test.tolist()) == ([1, 0, 2, 0], [2, 1])
    with pytest.raises(InputError, match="train row 1: label -1 is negative; an unlabelled split"):
        resolve(raw(0, -1), None, None, renumber=True)


def test_named_classes_may_lack_rows_but_labels_must_have_names():
    names, train, _ = resolve(raw(0, 2), raw(1), ("a", "b", "c", "d"))
    assert (names, train.tolist()) == (("a", "b", "c", "d"), [0, 2])
    with pytest.raises(InputError, match=r"test row 0: label 4 is outside 0\.\.3"):
        resolve(raw(0), raw(4, split="test"), ("a", "b", "c", "d"))
    assert resolve(raw(0, 2), None, None, num_classes=4)[0] == ("0", "1", "2", "3")


def test_class_names_that_are_alike():
    check_alike(["A", "a"], "file")  # letters, as words
    with pytest.raises(InputError, match="file: classes 'A' and 'a' differ only in case or spaces"):
        check_alike(["A", "a"], "file", str.casefold)
    with pytest.raises(InputError, match="column 'label': classes 'cat' and 'cat ' differ only in case or spaces"):
        resolve(raw("cat ", "dog", "cat"), None, None)


def test_two_classes_of_one_name():
    with pytest.raises(InputError, match="file: the class name 'a' occurs twice"):
        check_names(["a", "b", "a"], "file")
