import numpy as np
import pytest
import torch

from fedftg.data.dataset import ImageDataset, measured_normalisation
from fedftg.errors import InputError


def arrays(count=6, shape=(3, 8, 8)):
    images = np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)
    return {
        "train_images": images,
        "train_labels": np.arange(count) % 3,
        "test_images": images[:2],
        "test_labels": np.array([0, 1]),
    }


def test_from_tensors():
    given = arrays()
    data = ImageDataset.from_tensors(**given, augment="crop", columns={"writer": ["a", "b"] * 3})
    assert data.class_names == ("0", "1", "2")
    assert data.image_shape == (3, 8, 8)
    assert data.train_labels.dtype == torch.int64
    assert data.columns["writer"].tolist() == ["a", "b"] * 3
    floats = given["train_images"] / 255
    assert data.mean == pytest.approx(floats.mean(axis=(0, 2, 3)))
    assert data.std == pytest.approx(floats.std(axis=(0, 2, 3)))


def test_a_tensor_is_not_copied():
    given = {name: torch.from_numpy(values) for name, values in arrays().items()}
    data = ImageDataset.from_tensors(**given, mean=(0.5,) * 3, std=(0.25,) * 3, class_names=["x", "y", "z", "never"])
    assert data.train_images.data_ptr() == given["train_images"].data_ptr()
    assert (data.mean, data.std) == ((0.5,) * 3, (0.25,) * 3)
    assert data.num_classes == 4


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"train_images": np.zeros((6, 3, 8, 8))}, "train images must be uint8 .*torch.float64"),
        ({"train_images": np.zeros((6, 8, 8, 3), np.uint8)}, r"train images must be .*\[6, 8, 8, 3\]"),
        ({"test_images": np.zeros((0, 3, 8, 8), np.uint8)}, r"test images must be uint8 \(N > 0, "),
        ({"test_images": np.zeros((2, 3, 9, 9), np.uint8)}, r"one shape, got \[\(3, 8, 8\), \(3, 9, 9\)\]"),
        ({"train_labels": np.array([0, 1, 3, 0, 1, 3])}, "train row 2: label 3 comes after a gap"),
        ({"train_labels": np.arange(5)}, r"train labels must be 6 integers, got int64 \(5,\)"),
        ({"class_names": ["a", "b", "a"]}, "class_names: classes 'a' and 'a' have one name"),
        ({"mean": (0.5,)}, r"mean must be 3 numbers from 0 to 1, one a channel, got \(0.5,\)"),
        ({"mean": (120.0, 120.0, 120.0)}, "mean must be 3 numbers from 0 to 1"),
        ({"std": (0.5, 0.0, 0.5)}, "std must be 3 numbers from 0.00391 to 1"),
        ({"augment": "rotate"}, "augment must be one of none, flip, crop, flip_crop, got 'rotate'"),
        ({"columns": {"writer": [1]}}, r"column 'writer' must have 6 values, got shape \(1,\)"),
    ],
)
def test_what_does_not_fit_is_refused(change, expected):
    with pytest.raises(InputError, match=expected):
        ImageDataset.from_tensors(**(arrays() | change))


def test_normalisation_by_hand():
    """Channel 0: half 0, half 255, so mean and deviation 1/2. Channel 1: always 51, so 1/5 and the least, 1/255."""
    images = np.zeros((2, 2, 4, 4), dtype=np.uint8)
    images[0, 0], images[:, 1] = 255, 51
    mean, std = measured_normalisation(images)
    assert mean == pytest.approx((0.5, 0.2))
    assert std == pytest.approx((0.5, 1 / 255))


def test_grey_without_a_channel_and_small_unsigned_labels():
    given = arrays(shape=(8, 8)) | {"train_labels": torch.tensor([0, 1, 2, 0, 1, 2], dtype=torch.uint16)}
    data = ImageDataset.from_tensors(**given)
    assert data.image_shape == (1, 8, 8)
    assert data.train_labels.dtype == torch.int64
