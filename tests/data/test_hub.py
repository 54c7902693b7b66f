"""Sets of the hub: what is asked of the datasets library, of which only the network is replaced."""

import sys

import pytest
import torch

from fedftg.data.config import DataConfig
from fedftg.data.sources import load
from fedftg.errors import InputError


def test_download(tmp_path, hub, monkeypatch):
    datasets = pytest.importorskip("datasets")
    images, whole, asked = hub.colour(20), datasets.load_dataset, []
    for split in ("train", "test"):
        content = [hub.encode(image) for image in images]
        labels = {"label": [row % 10 for row in range(20)]}
        names = {"label": [str(digit) for digit in range(10)]}
        hub.write(tmp_path / f"{split}.parquet", content, labels, image_name="image", names=names)

    def local(*given, **more):
        asked.append((*given, *more.values()))
        files = {split: str(tmp_path / f"{split}.parquet") for split in ("train", "test")}
        return whole("parquet", data_files=files, cache_dir=str(tmp_path / "hf"))

    monkeypatch.setattr(datasets, "load_dataset", local)
    svhn = load(DataConfig(name="svhn"))
    own = load(DataConfig(name="hub", hub_id="me/pets", subset="all", revision="v1", max_train=10))
    assert asked == [("ufldl-stanford/svhn", "cropped_digits", None), ("me/pets", "all", "v1")]
    assert torch.equal(svhn.train_images, torch.from_numpy(images).permute(0, 3, 1, 2))
    assert sorted(own.train_labels.tolist()) == list(range(10))


def test_download_that_fails_is_one_line(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def fail(*_, **__):
        raise ConnectionError("peer closed\nthe connection")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(InputError) as caught:
        load(DataConfig(name="svhn", revision="v1"))
    assert str(caught.value).startswith("ufldl-stanford/svhn cannot be loaded from the hub (peer closed the connection")
    command = 'hf download ufldl-stanford/svhn --repo-type dataset --local-dir DIR --include "cropped_digits/*"'
    assert f"log in with 'hf auth login', or set data.root to DIR after '{command} --revision v1'" in str(caught.value)


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'fedftg\[data\]', or set data\.root"):
        load(DataConfig(name="cifar10"))
