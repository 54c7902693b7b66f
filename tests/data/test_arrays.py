import gzip
import json
import struct

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from fedftg.data.config import DataConfig
from fedftg.data.dataset import ImageDataset
from fedftg.data.sources import load
from fedftg.errors import InputError


def read(root, **options):
    return load(DataConfig(name="arrays", root=root, **options))


def error_of(root, name="arrays", **options):
    with pytest.raises(InputError) as caught:
        load(DataConfig(name=name, root=root, **options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def content(hub, **changes):
    made = {
        "train_images": hub.colour(4, size=9),
        "train_labels": np.array([0, 1, 1, 0]),
        "test_images": hub.colour(2, size=9, seed=1),
        "test_labels": np.array([1, 0], dtype=np.uint8),
    }
    made.update(changes)
    return {name: values for name, values in made.items() if values is not None}


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
@pytest.mark.parametrize("layout", ["NHWD", "NDHW", "NHW"])
def test_layouts(tmp_path, hub, kind, layout):
    made = content(hub)
    expected = torch.from_numpy(made["train_images"]).permute(0, 3, 1, 2)
    if layout == "NDHW":
        made = content(
            hub, **{f"{s}_images": made[f"{s}_images"].transpose(0, 3, 1, 2).copy() for s in ("train", "test")}
        )
    elif layout == "NHW":
        made = content(hub, train_images=hub.grey(4, size=9), test_images=hub.grey(2, size=9))
        expected = torch.from_numpy(made["train_images"])[:, None]
    path = tmp_path / f"set.{kind}"
    np.savez(path, **made) if kind == "npz" else save_file(made, path)
    data = read(path)
    assert torch.equal(data.train_images, expected)
    assert data.train_labels.tolist() == [0, 1, 1, 0]
    assert data.test_labels.tolist() == [1, 0]
    assert data.class_names == ("0", "1")
    assert data.mean == pytest.approx((expected.double() / 255).mean(dim=(0, 2, 3)).tolist())


def test_class_names_words_and_columns(tmp_path, hub):
    names = np.array(["ape", "bee", "cat"])
    writers = np.array(["w", "v", "w", "u"])
    np.savez(tmp_path / "a.npz", **content(hub), class_names=names, writer=writers, other=np.zeros(3))
    data = load(DataConfig(name="arrays", root=tmp_path / "a.npz", max_train=2), columns=["writer"])
    assert data.class_names == ("ape", "bee", "cat")
    whole = load(DataConfig(name="arrays", root=tmp_path / "a.npz"), columns=["writer"])
    assert whole.columns["writer"].tolist() == writers.tolist()
    rows = [int((whole.train_images == image).flatten(1).all(dim=1).nonzero()) for image in data.train_images]
    assert data.columns["writer"].tolist() == [writers[row] for row in rows]
    with pytest.raises(InputError, match="no column 'other' of integers or words, one a row of 'train_labels'"):
        load(DataConfig(name="arrays", root=tmp_path / "a.npz"), columns=["other"])
    save_file(content(hub), tmp_path / "b.safetensors", metadata={"class_names": json.dumps(["ape", "bee"])})
    assert read(tmp_path / "b.safetensors").class_names == ("ape", "bee")
    words = content(hub, train_labels=np.array(["x", "y", "y", "x"]), test_labels=np.array(["y", "x"]))
    np.savez(tmp_path / "c.npz", **words)
    assert read(tmp_path / "c.npz").test_labels.tolist() == [1, 0]
    np.savez(tmp_path / "m.npz", **content(hub, train_labels=np.array([[0], [1], [1], [0]])))  # as MedMNIST has them
    assert read(tmp_path / "m.npz").train_labels.tolist() == [0, 1, 1, 0]
    np.savez(tmp_path / "e.npz", **words, class_names=np.array(["y", "z"]))
    assert "train_labels row 0: label 'x' is none of the 2 classes" in error_of(tmp_path / "e.npz")


@pytest.mark.parametrize(
    "labels",
    [np.array([0, 1, 1, 0], ">i4"), np.array([False, True, True, False]), np.array([[0], [1], [1], [0]], np.uint8)],
)
def test_labels_as_files_have_them(tmp_path, hub, labels):
    np.savez(tmp_path / "a.npz", **content(hub, train_labels=labels), class_names=np.array([b"no", b"yes"]))
    data = read(tmp_path / "a.npz")
    assert (data.train_labels.tolist(), data.class_names) == ([0, 1, 1, 0], ("no", "yes"))


def test_medmnist_in_memory_and_its_validation_split(tmp_path, hub):
    made = content(hub, train_images=hub.grey(4), test_images=hub.grey(2))
    made |= {f"{split}_labels": made[f"{split}_labels"][:, None] for split in ("train", "test")}
    assert ImageDataset.from_tensors(*made.values()).train_labels.tolist() == [0, 1, 1, 0]
    np.savez(tmp_path / "a.npz", **made, val_images=made["test_images"], val_labels=made["test_labels"])
    assert read(tmp_path / "a.npz").notes == ("not used: val",)


def test_without_test_arrays_a_share_is_held_out(tmp_path, hub):
    path = tmp_path / "a.npz"
    np.savez(path, **content(hub, test_images=None, test_labels=None))
    message = error_of(path)
    assert message.startswith("no split 'test' or 'valid' or 'validation' or 'val' in ")
    assert message.endswith("(found: train); set data.test_split=NAME, or data.test_share to split")
    assert len(read(path, test_share=0.5).test_labels) == 2
    np.savez(path, **content(hub))
    assert "data.test_share is for sets without a test split, and this one has 2 test images" in error_of(
        path, test_share=0.5
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"train_images": np.zeros((4, 9, 9))},
            "'train_labels' N integers or words, got float64 (4, 9, 9) and int64 (4,)",
        ),
        ({"train_labels": np.array([0, 1])}, "and int64 (2,)"),
        (
            {"train_images": None},
            "(arrays test_images, test_labels, train_labels) (found: test); set data.train_split=NAME",
        ),
        ({"train_labels": np.zeros(4, int)}, "train_labels row 0: all labels are '0', nothing to classify"),
        ({"train_labels": np.zeros((4, 14), int)}, "and int64 (4, 14)"),
        ({"train_labels": np.array([0, 2, 2, 0])}, "train_labels row 1: label 2 comes after a gap"),
        (
            {"train_images": np.zeros((0, 9, 9), np.uint8), "train_labels": np.zeros(0, int)},
            "the training split has no images; add some",
        ),
        ({"test_images": np.zeros((0, 9, 9, 3), np.uint8), "test_labels": np.zeros(0, int)}, "and 0 test images"),
        (
            {"test_images": np.zeros((2, 8, 8, 3), np.uint8)},
            "test_labels row 0: the image is 8x8 (H x W), the first one 9x9; set data.image_size",
        ),
        ({"train_labels": np.array([{}] * 4)}, "cannot be read (ValueError: Object arrays cannot be loaded"),
    ],
)
def test_arrays_that_cannot_be_used(tmp_path, hub, changes, expected):
    np.savez(tmp_path / "a.npz", **content(hub, **changes))
    assert expected in error_of(tmp_path / "a.npz")


def test_file_that_cannot_be_used(tmp_path):
    assert "must be an .npz or .safetensors file" in error_of(tmp_path)
    (tmp_path / "a.npz").write_bytes(b"nothing")
    assert "a.npz cannot be read" in error_of(tmp_path / "a.npz")


def idx(values):
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes()


def write_idx(hub, root, packed, point="-", seed=0):
    images, labels = hub.grey(10, size=28, seed=seed), np.arange(10, dtype=np.uint8)
    root.mkdir(parents=True, exist_ok=True)
    for name, values in ((f"images{point}idx3", images), (f"labels{point}idx1", labels)):
        for split in ("train", "t10k"):
            content = idx(values)
            path = root / f"{split}-{name}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(content) if packed else content)
    return images


@pytest.mark.parametrize(
    ("name", "inside", "packed"),
    [("mnist", "", False), ("mnist", "MNIST/raw", True), ("fashion_mnist", "raw", True), ("fashion_mnist", "", True)],
)
def test_authors_files_and_where_torchvision_puts_them(tmp_path, hub, name, inside, packed):
    images = write_idx(hub, tmp_path / inside, packed)
    data = load(DataConfig(name=name, root=tmp_path))
    assert torch.equal(data.train_images[:, 0], torch.from_numpy(images))
    assert data.test_labels.tolist() == list(range(10))
    assert data.class_names[9] == {"mnist": "9", "fashion_mnist": "Ankle boot"}[name]


def test_files_as_on_kaggle_and_both_sets_in_one_root(tmp_path, hub):
    """Kaggle has a point in the names, and folders called like the files; torchvision puts all sets into one root."""
    expected = write_idx(hub, tmp_path / "kaggle", packed=False, point=".")
    (tmp_path / "kaggle" / "train-images-idx3-ubyte").mkdir()
    data = load(DataConfig(name="mnist", root=tmp_path / "kaggle"))
    assert torch.equal(data.train_images[:, 0], torch.from_numpy(expected))
    write_idx(hub, tmp_path / "MNIST" / "raw", packed=False)
    clothes = write_idx(hub, tmp_path / "FashionMNIST" / "raw", packed=False, seed=1)
    data = load(DataConfig(name="fashion_mnist", root=tmp_path))
    assert torch.equal(data.train_images[:, 0], torch.from_numpy(clothes))


def test_authors_files_that_do_not_belong_together(tmp_path, hub):
    write_idx(hub, tmp_path, packed=False)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(np.arange(9, dtype=np.uint8)))
    assert f"{tmp_path} has 10 t10k images and 9 labels; download them again" in error_of(tmp_path, "mnist")


def test_authors_files_that_are_not_whole(tmp_path, hub):
    write_idx(hub, tmp_path, packed=False)
    path = tmp_path / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    assert f"{path} is not a whole IDX file" in error_of(tmp_path, "mnist")
    path.unlink()
    assert "is not a whole IDX file (FileNotFoundError: [Errno 2] No such file" in error_of(tmp_path, "mnist")
    (tmp_path / f"{path.name}.gz").write_bytes(b"x")
    assert f"{path}.gz is not a whole IDX file" in error_of(tmp_path, "mnist")
