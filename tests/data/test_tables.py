"""Parquet and arrow files: which files, columns, classes and rows are read. Pixels are in test_decode.py."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from fedftg.data.config import DataConfig
from fedftg.data.sources import load
from fedftg.errors import InputError


def read(root, **options):
    return load(DataConfig(name="parquet", root=root, **options))


def error_of(root, **options):
    with pytest.raises(InputError) as caught:
        read(root, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def tensor(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def write_both(hub, root, images, labels, **options):
    """The same rows as train.parquet and test.parquet; labels are a list or columns."""
    content = [hub.encode(pixels) if isinstance(pixels, np.ndarray) else pixels for pixels in images]
    for split in ("train", "test"):
        columns = labels if isinstance(labels, dict) else {"label": labels}
        hub.write(root / f"{split}.parquet", content, columns, **options)


@pytest.mark.parametrize("inside", [".", "data", "plain_text"])
@pytest.mark.parametrize("test", ["test", "valid", "validation", "val"])
def test_reads_the_hub_layout(tmp_path, hub, inside, test):
    images = hub.colour(10, size=9)
    labels = [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    hub.write_set(tmp_path / inside, images, labels, test=test, row_group_size=2)
    (tmp_path / ".cache").mkdir()  # of 'hf download'
    (tmp_path / ".cache" / "train-00000-of-00001.parquet").write_bytes(b"half")
    (tmp_path / "README.md").write_text("x")
    data = read(tmp_path)
    assert data.class_names == ("x", "y", "z")
    assert data.train_images.dtype == torch.uint8
    assert data.train_labels.dtype == torch.int64
    assert torch.equal(data.train_images, tensor(images))
    assert torch.equal(data.test_images, tensor(images))
    assert data.train_labels.tolist() == labels
    assert data.augment == "none"
    assert data.mean == pytest.approx((images / 255).mean(axis=(0, 1, 2)))
    assert data.std == pytest.approx((images / 255).std(axis=(0, 1, 2)))


def test_raw_bytes_without_metadata_and_test_before_valid(tmp_path, hub):
    images = hub.colour(4, size=8)
    write_both(hub, tmp_path, images, {"y": [0, 2, 1, 1]}, raw=True, metadata=False)
    hub.write(tmp_path / "valid.parquet", [b"never read"], {"y": [0]})
    data = read(tmp_path)
    assert data.class_names == ("0", "1", "2")
    assert torch.equal(data.train_images, tensor(images))
    assert len(data.test_labels) == 4


@pytest.mark.parametrize(
    "name",
    [
        "default/{}/0000.parquet",
        "{}.parquet/part-00000-abc.snappy.parquet",
        "{}-00000-of-00001-70d52db3c749a935.parquet",
    ],
)
def test_names_of_the_hubs_converted_branch_of_spark_and_with_a_hash(tmp_path, hub, name):
    for split in ("train", "test"):
        hub.write(tmp_path / name.format(split), [hub.encode(hub.grey(1)[0])] * 2, {"label": [0, 1]})
    assert read(tmp_path).train_labels.tolist() == [0, 1]


def test_saved_dataset_dict_and_saved_dataset(tmp_path, hub):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})

    def made(images):
        rows = {"image": [{"bytes": hub.encode(image), "path": None} for image in images], "label": [0, 1] * 5}
        return datasets.Dataset.from_dict(rows, features=features)

    train, held = hub.colour(10, size=8), hub.colour(10, size=8, seed=1)
    splits = datasets.DatasetDict({"train": made(train), "validation": made(held), "more": made(held)})
    splits.save_to_disk(tmp_path / "set", num_shards={"train": 3, "validation": 1, "more": 1})
    data = read(tmp_path / "set")
    assert torch.equal(data.train_images, tensor(train))
    assert torch.equal(data.test_images, tensor(held))
    assert (data.class_names, data.train_labels.tolist()) == (("a", "b"), [0, 1] * 5)
    assert torch.equal(read(tmp_path / "set", train_split="more").train_images, tensor(held))
    message = "(found: more, train, validation); set data.test_split=NAME"
    assert message in error_of(tmp_path / "set", test_split="exam")
    (tmp_path / "set" / "train" / "data-00001-of-00003.arrow").unlink()
    assert "2 shard(s) beside" in error_of(tmp_path / "set")
    made(train).save_to_disk(tmp_path / "one")
    assert "'val' in " in error_of(tmp_path / "one")
    assert len(read(tmp_path / "one", test_share=0.2).train_labels) == 8


@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize(("name", "opened"), [("{}.arrow", pa.ipc.new_file), ("svhn-{}.arrow", pa.ipc.new_stream)])
def test_arrow_files_of_both_formats_and_with_views(tmp_path, hub, name, opened, views):
    images = hub.colour(6, size=8)
    binary, string = (pa.binary_view(), pa.string_view()) if views else (pa.binary(), pa.string())
    rows = pa.array([{"bytes": hub.encode(image)} for image in images], pa.struct([("bytes", binary)]))
    table = pa.table({"image": rows, "label": pa.array(["a", "b"] * 3, string)})
    for split in ("train", "test"):
        with opened(str(tmp_path / name.format(split)), table.schema) as writer:
            writer.write_table(table, max_chunksize=4)
    data = read(tmp_path)
    assert torch.equal(data.train_images, tensor(images))
    assert (data.class_names, data.train_labels.tolist()) == (("a", "b"), [0, 1] * 3)


def test_columns_are_chosen_by_type_or_by_name(tmp_path, hub):
    write_both(
        hub, tmp_path, hub.grey(2), {"fine": [0, 1], "coarse": [1, 1]}, names={"fine": ["a", "b"], "coarse": ["c", "d"]}
    )
    assert read(tmp_path, label_column="coarse").class_names == ("c", "d")
    assert "several columns could hold labels (fine, coarse); set data.label_column" in error_of(tmp_path)
    message = error_of(tmp_path, image_column="picture")
    listed = "the columns are img (images), fine (integers), coarse (integers)"
    assert f"no column 'picture' of images for images; {listed}" in message
    assert "no column 'fine' of images" in error_of(tmp_path, image_column="fine", label_column="fine")
    # A column of class labels goes before other integers.
    write_both(hub, tmp_path, hub.grey(2), {"id": [7, 8], "label": [0, 1]}, names={"label": ["a", "b"]})
    assert read(tmp_path).class_names == ("a", "b")


def test_columns_that_hold_no_labels(tmp_path, hub):
    write_both(hub, tmp_path, [b""], {"text": pa.array(["cat"]), "score": pa.array([0.5])}, metadata=False)
    listed = "the columns are img (images), text (words), score (double); set data.image_column or data.label_column"
    assert f"no column of integers or words for labels; {listed}" in error_of(tmp_path)
    assert f"no column 'score' of integers or words for labels; {listed}" in error_of(tmp_path, label_column="score")
    for name, values in (("image_id", [0, 1, 2, 3]), ("label", pa.array(["a.png", "b.png", "c.png", "d.png"]))):
        write_both(hub, tmp_path, hub.grey(4), {name: values}, metadata=False)
        assert f"{name!r} has another value in every row: no label" in error_of(tmp_path)
        assert read(tmp_path, label_column=name).num_classes == 4
    for split in ("train", "test"):
        pq.write_table(pa.table({"a": ["x"], "label": [0]}), tmp_path / f"{split}.parquet")
    assert "train.parquet has no column of images for images; the columns are a (words), label" in error_of(tmp_path)


def test_booleans_and_words_are_labels(tmp_path, hub):
    write_both(hub, tmp_path, hub.grey(3), {"label": pa.array([True, False, True])}, metadata=False)
    assert read(tmp_path).train_labels.tolist() == [1, 0, 1]
    content = [hub.encode(image) for image in hub.colour(3, size=8)]
    hub.write(tmp_path / "train.parquet", content, {"label": pa.array(["dog", "ape", "dog"])}, metadata=False)
    for words, expected in (
        (["ape", "cow"], "test.parquet, row 1: label 'cow' is none of the 2 classes"),
        (["ape", None], "test.parquet, row 1: 'label' has no value"),
    ):
        hub.write(tmp_path / "test.parquet", content[:2], {"label": pa.array(words)}, metadata=False)
        assert expected in error_of(tmp_path)
    hub.write(tmp_path / "test.parquet", content[:2], {"label": pa.array(["ape", "dog"])}, metadata=False)
    data = read(tmp_path)
    assert (data.class_names, data.train_labels.tolist()) == (("ape", "dog"), [1, 0, 1])


@pytest.mark.parametrize(
    "kind",
    [
        pa.large_string(),
        pa.string_view(),
        pa.dictionary(pa.int8(), pa.large_string()),
        pa.dictionary(pa.int8(), pa.string()),
    ],
)
def test_words_of_every_type(tmp_path, hub, kind):
    words = pa.array(["dog", "ape", "dog"]).cast(kind) if not pa.types.is_dictionary(kind) else None
    words = pa.array(["dog", "ape", "dog"], kind.value_type).dictionary_encode() if words is None else words
    write_both(hub, tmp_path, hub.grey(3), {"label": words}, metadata=False)
    assert (read(tmp_path).class_names, read(tmp_path).train_labels.tolist()) == (("ape", "dog"), [1, 0, 1])


@pytest.mark.parametrize("kind", [pa.uint8(), pa.int16(), pa.uint64(), pa.dictionary(pa.int32(), pa.int64())])
def test_integers_of_every_type(tmp_path, hub, kind):
    values = pa.array([0, 2, 1, 0], pa.int64() if pa.types.is_dictionary(kind) else kind)
    values = values.dictionary_encode() if pa.types.is_dictionary(kind) else values
    write_both(hub, tmp_path, hub.grey(4), {"label": values}, metadata=False)
    assert read(tmp_path).train_labels.tolist() == [0, 2, 1, 0]


def test_a_mask_called_label_is_no_image(tmp_path, hub):
    masks = pa.array([hub.encode(image) for image in hub.grey(2)])
    write_both(hub, tmp_path, hub.colour(2, size=8), {"label": masks, "category": [0, 1]}, raw=True, metadata=False)
    assert "several columns could hold images (img, label); set data.image_column" in error_of(tmp_path)
    assert read(tmp_path, image_column="img").notes == ("labels are those of column 'category'",)


def test_a_guessed_column_is_told_and_one_called_label_goes_first(tmp_path, hub):
    """Several crops share a photo's number; pandas stores its index as a column."""
    photos, words = [0, 0, 1, 1], pa.array(["a", "b", "a", "b"])
    write_both(hub, tmp_path, hub.grey(4), {"photo": photos, "category": words}, metadata=False)
    assert read(tmp_path).notes == ("labels are those of column 'photo'",)
    assert read(tmp_path, label_column="category").notes == ()
    for index in ("__index_level_0__", "id"):
        write_both(hub, tmp_path, hub.grey(4), {index: [3, 5, 6, 9], "label": words}, metadata=False)
        assert (read(tmp_path).class_names, read(tmp_path).notes) == (("a", "b"), ())


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (pa.array([1, 2, 3, 1]), "label 1 comes after a gap: no training row has label 0; name the classes, or set"),
        (pa.array(["a", "a", "a", "a"]), "all labels are 'a', nothing to classify"),
        (pa.array([0, 0, 0, 0]), "all labels are '0', nothing to classify"),
        (pa.array(["a", "b", "", "a"]), "row 2: label '' is empty; remove it, or take a labelled split"),
        (pa.array(["a b", "a  b", "c", "c"]), "classes 'a  b' and 'a b' have one name"),
        (pa.array(["caf\u00e9", "cafe\u0301", "c", "c"]), "have one name, or differ only in case, spaces or Unicode"),
        (pa.array(["\ufeffcat", "cat", "c", "c"]), "classes 'cat' and '\\ufeffcat' have one name"),
        (
            pa.array([0.0, 1.0, 0.0, 1.0]),
            "has no column of integers or words for labels; the columns are img (images), ",
        ),
        (pa.array([[0], [1], [0], [1]]), "label (list<element: int64>); set data.image_column or data.label_column"),
    ],
)
def test_labels_that_can_only_be_a_mistake(tmp_path, hub, labels, expected):
    write_both(hub, tmp_path, hub.grey(4), {"label": labels}, metadata=False)
    assert expected in error_of(tmp_path)


@pytest.mark.parametrize("labels", [pa.array([None, None], pa.int64()), pa.array(["", " "])])
def test_unlabelled_test_split_beside_a_labelled_one(tmp_path, hub, labels):
    known = [0, 1] if pa.types.is_integer(labels.type) else pa.array(["a", "b"])
    for split in ("train", "validation"):
        hub.write(tmp_path / f"{split}.parquet", [hub.encode(image) for image in hub.grey(2)], {"label": known})
    hub.write(tmp_path / "test.parquet", [hub.encode(image) for image in hub.grey(2)], {"label": labels})
    assert "take a labelled split (data.train_split, data.test_split)" in error_of(tmp_path)
    data = read(tmp_path, test_split="validation")
    assert (data.test_labels.tolist(), data.notes) == ([0, 1], ("not used: test",))


@pytest.mark.parametrize("name", ["__MACOSX/train.parquet", "#recycle/train.parquet", ".cache/train.parquet"])
def test_files_that_are_no_shards(tmp_path, hub, name):
    write_both(hub, tmp_path, hub.grey(2), [0, 1])
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_bytes(b"x")
    assert len(read(tmp_path).train_labels) == 2


def test_missing_folder_files_and_splits(tmp_path, hub):
    with pytest.raises(InputError, match=r"needs data\.root: the folder with train-"):
        load(DataConfig(name="parquet"))
    assert f"got {tmp_path / 'nowhere'}" in error_of(tmp_path / "nowhere")
    assert "no train-*.parquet in" in error_of(tmp_path)
    with pytest.raises(InputError, match="parquet files of zh-plus/tiny-imagenet; the authors' own files are not read"):
        load(DataConfig(name="tiny_imagenet", root=tmp_path))
    hub.write(tmp_path / "train.parquet", [hub.encode(hub.grey(1)[0])] * 2, {"label": [0, 1]})
    message = error_of(tmp_path)
    assert f"in {tmp_path} (found: train); set data.test_split=NAME, or data.test_share to split" in message
    assert "has 0 training and 2 test images; add some" in error_of(tmp_path, test_share=0.9)
    assert "no split 'fit' in" in error_of(tmp_path, train_split="fit")
    hub.write_set(tmp_path / "set", hub.grey(4), [0, 1, 2, 0])
    message = "data.test_share is for sets without a test split, and this one has 4 test images"
    assert message in error_of(tmp_path / "set", test_share=0.1)


def test_several_folders_with_files(tmp_path, hub):
    for name, count in (("one", 2), ("two", 4)):
        hub.write_set(tmp_path / name, hub.grey(count), [0, 1] * (count // 2))
    assert "several folders have files of one split" in error_of(tmp_path)
    assert len(read(tmp_path, subset="two").train_labels) == 4


@pytest.mark.parametrize("more", ["train-00000-of-00001", "train-00001-of-00002-0123456789abcdef", "train"])
def test_a_split_that_is_not_one_whole_set_of_shards(tmp_path, hub, more):
    """A missing shard, and files that would count rows twice: of another set, with and without a hash, whole."""
    hub.write_set(tmp_path, hub.grey(4), [0, 1, 2, 0])
    shard = tmp_path / "train-00000-of-00002.parquet"
    content = shard.read_bytes()
    shard.unlink()
    assert "1 shard(s) beside" in error_of(tmp_path)
    shard.write_bytes(content)
    (tmp_path / f"{more}.parquet").write_bytes(content)
    assert f"3 shard(s) beside {tmp_path}" in error_of(tmp_path)
    assert "complete the download" in error_of(tmp_path)


@pytest.mark.parametrize("damage", ["pointer", "pages"])
def test_files_that_cannot_be_read(tmp_path, hub, damage):
    hub.write_set(tmp_path, hub.colour(20), [0] * 20)
    path = tmp_path / "train-00001-of-00002.parquet"
    content = path.read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1"
    path.write_bytes(pointer if damage == "pointer" else content[:4] + b"\xff" * 1996 + content[2000:])
    message = error_of(tmp_path)
    assert "train-00001-of-00002.parquet" in message
    assert "cannot be read" in message or "corrupt" in message


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "null"])
def test_bad_image_names_file_and_row(tmp_path, hub, damage):
    content = [hub.encode(image) for image in hub.colour(5)]
    content[3] = {"cut": content[3][:200], "text": b"not an image", "empty": b"", "null": None}[damage]
    good = [hub.encode(image) for image in hub.colour(2)]
    hub.write(tmp_path / "train-00000-of-00002.parquet", good, {"label": [0, 1]})
    hub.write(tmp_path / "train-00001-of-00002.parquet", content, {"label": [0] * 5}, row_group_size=2)
    hub.write(tmp_path / "test-00000-of-00001.parquet", good, {"label": [0, 0]})
    message = error_of(tmp_path)
    assert "train-00001-of-00002.parquet, row 3: the image" in message
    assert ("has no bytes" if damage in ("empty", "null") else "cannot be decoded") in message


def test_labels_that_are_missing_or_have_a_gap(tmp_path, hub):
    hub.write_set(tmp_path, hub.grey(4), [0, 1, None, 2])
    assert "train-00001-of-00002.parquet, row 0: 'label' has no value" in error_of(tmp_path)
    hub.write_set(tmp_path, hub.grey(6), [0, 1, 1, 0, 7, 3], names=None)
    assert "train-00001-of-00002.parquet, row 2: label 3 comes after a gap: no training row has label 2" in error_of(
        tmp_path
    )
    data = read(tmp_path, renumber_labels=True)
    assert (data.class_names, data.train_labels.tolist()) == (("0", "1", "3", "7"), [0, 1, 1, 0, 3, 2])


def test_splits_and_shards_without_rows(tmp_path, hub):
    names = {"label": ["x", "y", "z"]}
    hub.write_set(tmp_path, hub.grey(2), [0, 1])
    hub.write(tmp_path / "train-00000-of-00002.parquet", [], {"label": []}, names=names)
    assert len(read(tmp_path).train_labels) == 1
    hub.write(tmp_path / "test-00000-of-00001.parquet", [], {"label": []}, names=names)
    assert "has 1 training and 0 test images; add some" in error_of(tmp_path)


def test_class_names(tmp_path, hub):
    hub.write_set(tmp_path, hub.grey(2), [0, 2])
    assert read(tmp_path).class_names == ("x", "y", "z")  # y has no images
    content = [hub.encode(image) for image in hub.grey(2)]
    hub.write(tmp_path / "test-00000-of-00001.parquet", content, {"label": [0, 1]}, names={"label": ["y", "x", "z"]})
    assert "the class names differ" in error_of(tmp_path)
    hub.write_set(tmp_path, hub.grey(2), [0, 1], names=("x", "y", "x"))
    assert "classes 'x' and 'x' have one name" in error_of(tmp_path)


def test_further_columns_follow_the_rows_in_use(tmp_path, hub):
    images = hub.colour(20, size=8)
    columns = {
        "label": [0, 1] * 10,
        "writer": pa.array([f"w{row}" for row in range(20)]).dictionary_encode(),
        "day": list(range(20)),
        "score": pa.array([0.5] * 20),
    }
    write_both(hub, tmp_path, images, columns, names={"label": ["a", "b"]})
    config = DataConfig(name="parquet", root=tmp_path, max_train=6)
    data = load(config, columns=["writer", "day"])
    assert len(data.train_labels) == len(data.columns["day"]) == 6
    assert data.columns["day"].dtype == np.int64
    for image, writer, day in zip(data.train_images, data.columns["writer"], data.columns["day"], strict=True):
        assert writer == f"w{day}"
        assert torch.equal(image, torch.from_numpy(images[day]).permute(2, 0, 1))
    with pytest.raises(InputError, match="has no column 'hand' of integers or words; the columns are img"):
        load(config, columns=["hand"])
    with pytest.raises(InputError, match="has no column 'score' of integers or words; the columns"):
        load(config, columns=["score"])
