"""Layouts of local folders beyond plain hub files (those are in test_parquet.py)."""

import pytest
import torch

from fedftg.data.config import DataConfig
from fedftg.data.sources import load
from fedftg.errors import InputError

datasets = pytest.importorskip("datasets")


def read(root, **options):
    return load(DataConfig(name="parquet", root=root, **options))


def error_of(root, **options):
    with pytest.raises(InputError) as caught:
        read(root, **options)
    return str(caught.value)


def made(hub, count, seed=0):
    """A Dataset of the library, with class names, and its images."""
    images = hub.colour(count, size=8, seed=seed)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"image": [{"bytes": hub.encode(image), "path": None} for image in images], "label": [0, 1] * (count // 2)}
    return datasets.Dataset.from_dict(rows, features=features), torch.from_numpy(images).permute(0, 3, 1, 2)


def test_saved_dataset_dict(tmp_path, hub):
    (train, train_images), (held, held_images) = made(hub, 10), made(hub, 4, seed=1)
    datasets.DatasetDict({"train": train, "validation": held, "more": held}).save_to_disk(
        tmp_path / "set", num_shards={"train": 3, "validation": 1, "more": 1}
    )
    data = read(tmp_path / "set")
    assert torch.equal(data.train_images, train_images)
    assert torch.equal(data.test_images, held_images)
    assert data.class_names == ("a", "b")
    assert data.train_labels.tolist() == [0, 1] * 5
    assert torch.equal(read(tmp_path / "set", train_split="more").train_images, held_images)
    assert "has no split exam; the splits there are: more, train, validation" in error_of(
        tmp_path / "set", test_split="exam"
    )
    (tmp_path / "set" / "train" / "data-00001-of-00003.arrow").unlink()
    assert "data-00001-of-00003.arrow is missing, though" in error_of(tmp_path / "set")


def test_saved_dataset_is_training_data(tmp_path, hub):
    train, images = made(hub, 10)
    train.save_to_disk(tmp_path / "set")
    assert "the splits there are: train; set data.test_split" in error_of(tmp_path / "set")
    data = read(tmp_path / "set", test_share=0.2)
    assert data.test_labels.tolist() == [0, 1]
    assert len(data.train_labels) == 8
    assert all((images == image).flatten(1).all(dim=1).any() for image in data.test_images)


def test_arrow_files_by_split_name_and_those_of_the_librarys_cache(tmp_path, hub):
    """Both of arrow's file formats: the library writes streams; a file with a table of contents is read as well."""
    import pyarrow as pa

    table = made(hub, 6)[0].data.table
    for root, name, opened in (
        (tmp_path / "a", "{}.arrow", pa.ipc.new_file),
        (tmp_path / "b", "svhn-{}-00000-of-00001.arrow", pa.ipc.new_stream),
    ):
        root.mkdir()
        for split in ("train", "test"):
            with opened(str(root / name.format(split)), table.schema) as writer:
                writer.write_table(table, max_chunksize=4)
        assert torch.equal(read(root).train_images, made(hub, 6)[1])
    (tmp_path / "a" / "train.arrow").write_bytes(b"no arrow at all")
    assert "train.arrow is not a readable arrow file" in error_of(tmp_path / "a")


def test_folders_of_the_hubs_converted_branch(tmp_path, hub):
    """refs/convert/parquet has <configuration>/<split>/0000.parquet."""
    content = [hub.encode(image) for image in hub.colour(2, size=8)]
    for split in ("train", "test"):
        for part in (0, 1):
            hub.write(tmp_path / "default" / split / f"000{part}.parquet", content, {"label": [0, 1]})
    assert read(tmp_path).train_labels.tolist() == [0, 1, 0, 1]


def test_subset_picks_a_folder(tmp_path, hub):
    for name, count in (("one", 2), ("two", 4)):
        hub.write_set(tmp_path / name, hub.grey(count), [0, 1] * (count // 2))
    assert len(read(tmp_path, subset="two").train_labels) == 4
    assert "set data.root to one of them, or data.subset to its name" in error_of(tmp_path)


def test_folder_of_hf_download(tmp_path, hub):
    """The client's own files lie in .cache beside the data."""
    hub.write_set(tmp_path / "data", hub.grey(4), [0, 1, 2, 0])
    (tmp_path / ".cache" / "huggingface" / "download").mkdir(parents=True)
    (tmp_path / ".cache" / "train-00000-of-00001.parquet").write_bytes(b"half")
    (tmp_path / "README.md").write_text("x")
    assert len(read(tmp_path).train_labels) == 4


def test_share_with_a_test_split_is_refused(tmp_path, hub):
    hub.write_set(tmp_path, hub.grey(4), [0, 1, 2, 0])
    assert "data.test_share is for sets without a test split, and this one has 4 test images" in error_of(
        tmp_path, test_share=0.1
    )


def test_share_of_everything(tmp_path, hub):
    hub.write(tmp_path / "train.parquet", [hub.encode(hub.grey(1)[0])], {"label": [0]})
    assert "data.test_share 0.5 holds out none of 1 images" in error_of(tmp_path, test_share=0.5)
