import io
import struct
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from fedftg.data.config import DataConfig
from fedftg.data.parquet import TableSplit, find_columns
from fedftg.data.sources import load
from fedftg.errors import InputError


def read(root, **options):
    return load(DataConfig(name="parquet", root=root, **options))


def error_of(root, **options):
    with pytest.raises(InputError) as caught:
        read(root, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("inside", [".", "data", "plain_text"])
@pytest.mark.parametrize("test", ["test", "valid", "validation"])
def test_reads_the_hub_layout(tmp_path, hub, inside, test):
    images = hub.colour(10, size=9)
    labels = [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    hub.write_set(tmp_path / inside, images, labels, test=test, row_group_size=2)
    data = read(tmp_path)
    assert data.class_names == ("x", "y", "z")
    assert data.image_shape == (3, 9, 9)
    assert data.train_images.dtype == torch.uint8
    assert data.train_labels.dtype == torch.int64
    expected = torch.from_numpy(images).permute(0, 3, 1, 2)
    assert torch.equal(data.train_images, expected)
    assert torch.equal(data.test_images, expected)
    assert data.train_labels.tolist() == labels
    assert data.augment == "none"
    assert data.mean == pytest.approx((images / 255).mean(axis=(0, 1, 2)))
    assert data.std == pytest.approx((images / 255).std(axis=(0, 1, 2)))


def test_single_files_without_numbers_raw_bytes_and_no_metadata(tmp_path, hub):
    content = [hub.encode(image) for image in hub.colour(4, size=8)]
    for split in ("train", "test"):
        hub.write(tmp_path / f"{split}.parquet", content, {"y": [0, 2, 1, 1]}, raw=True, metadata=False)
    data = read(tmp_path)
    assert data.class_names == ("0", "1", "2")
    assert torch.equal(data.train_images, torch.from_numpy(hub.colour(4, size=8)).permute(0, 3, 1, 2))


def test_test_is_taken_before_valid(tmp_path, hub):
    hub.write_set(tmp_path, hub.colour(4), [0, 1, 2, 0])
    hub.write(tmp_path / "valid-00000-of-00001.parquet", [b"never read"], {"label": [0]})
    assert len(read(tmp_path).test_labels) == 4


def test_grey_stays_one_channel(tmp_path, hub):
    images = hub.grey(6)
    hub.write_set(tmp_path, images, [0, 1, 2, 0, 1, 2])
    data = read(tmp_path)
    assert data.image_shape == (1, 8, 8)
    assert torch.equal(data.train_images[:, 0], torch.from_numpy(images))
    assert len(data.mean) == 1


def test_mixed_modes_become_rgb(tmp_path, hub):
    rgb = Image.fromarray(hub.colour(1, size=8)[0])
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    content = [
        hub.encode(rgb),
        hub.encode(hub.grey(1)[0]),
        hub.encode(palette, transparency=b"\x00\x80"),
        hub.encode(rgb.convert("RGBA")),
        hub.encode(Image.new("CMYK", (8, 8), (0, 0, 0, 255)), "JPEG"),
        hub.encode(Image.new("1", (8, 8), 1)),
    ]
    for split in ("train", "test"):
        hub.write(tmp_path / f"{split}.parquet", content, {"label": [0] * 6})
    images = read(tmp_path).train_images
    assert images.shape == (6, 3, 8, 8)
    assert torch.equal(images[0], images[3])
    assert torch.equal(images[1], torch.from_numpy(hub.grey(1)).expand(3, 8, 8))
    assert images[2, :, 0, 0].tolist() == [10, 20, 30]
    assert images[4].max() < 10
    assert images[5].min() == 255
    # Train and test: two images each of grey (L and 1), and one of the others; RGB is not counted.
    assert read(tmp_path).converted == {"CMYK": 2, "P": 2, "RGBA": 2, "grey": 4}


def test_subsets_are_stratified_the_same_for_all_and_decode_only_what_they_take(tmp_path, hub):
    images, labels = hub.colour(40, size=8), [0] * 20 + [1] * 12 + [2] * 8
    hub.write_set(tmp_path, images, labels, row_group_size=7)
    data = read(tmp_path, max_train=10, max_test=5)
    assert data.train_labels.bincount().tolist() == [5, 3, 2]
    assert len(data.test_labels) == 5
    assert torch.equal(data.train_images, read(tmp_path, max_train=10).train_images)
    originals = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    for image, label in zip(data.train_images, data.train_labels, strict=True):
        assert originals[image.permute(1, 2, 0).contiguous().numpy().tobytes()] == label
    assert len(read(tmp_path, max_train=1000).train_labels) == 40


def test_columns_are_chosen_by_type_or_by_name(tmp_path, hub):
    content = [hub.encode(image) for image in hub.colour(2, size=8)]
    columns = {"fine": [0, 1], "coarse": [1, 1]}
    for split in ("train", "test"):
        hub.write(tmp_path / f"{split}.parquet", content, columns, names={"fine": ["a", "b"], "coarse": ["c", "d"]})
    assert read(tmp_path, label_column="coarse").class_names == ("c", "d")
    assert "several columns could hold labels (fine, coarse); set data.label_column" in error_of(tmp_path)
    message = error_of(tmp_path, image_column="picture")
    assert "no column 'picture' for images; the columns are img, fine, coarse" in message
    assert "not {bytes, path} or bytes" in error_of(tmp_path, image_column="fine", label_column="fine")


def test_a_class_label_column_goes_before_other_integers(tmp_path, hub):
    content = [hub.encode(image) for image in hub.colour(2, size=8)]
    for split in ("train", "test"):
        hub.write(tmp_path / f"{split}.parquet", content, {"id": [7, 8], "label": [0, 1]}, names={"label": ["a", "b"]})
    assert read(tmp_path).class_names == ("a", "b")


def test_label_column_must_hold_integers_or_words(tmp_path, hub):
    columns = {"text": pa.array(["cat"]), "score": pa.array([0.5])}
    for split in ("train", "test"):
        hub.write(tmp_path / f"{split}.parquet", [b""], columns, metadata=False)
    assert "no label column; the columns are img, text, score" in error_of(tmp_path)
    assert "labels must be integers from 0, or words" in error_of(tmp_path, label_column="score")


def test_no_image_column_says_which_columns_there_are(tmp_path):
    for split in ("train", "test"):
        pq.write_table(pa.table({"a": ["x"], "label": [0]}), tmp_path / f"{split}.parquet")
    assert "train.parquet has no image column; the columns are a, label" in error_of(tmp_path)


def test_missing_folder_files_and_splits(tmp_path, hub):
    assert "is not a folder" in error_of(tmp_path / "nowhere")
    assert "no train-*.parquet in" in error_of(tmp_path)
    hub.write(tmp_path / "train.parquet", [hub.encode(hub.grey(1)[0])], {"label": [0]})
    message = error_of(tmp_path)
    assert "has no split test, valid, validation, val; the splits there are: train; set data.test_split" in message
    assert "or data.test_share (such as 0.2)" in message
    with pytest.raises(InputError, match=r"needs data\.root: the folder with train-"):
        load(DataConfig(name="parquet"))


def test_several_folders_with_files(tmp_path, hub):
    for name in ("one", "two"):
        hub.write_set(tmp_path / name, hub.grey(2), [0, 1])
    assert "several folders" in error_of(tmp_path)
    assert "(one, two); set data.root to one of them" in error_of(tmp_path)


def test_missing_shard(tmp_path, hub):
    hub.write_set(tmp_path, hub.grey(4), [0, 1, 2, 0])
    (tmp_path / "train-00000-of-00002.parquet").unlink()
    assert "shard 0 beside" in error_of(tmp_path)
    assert "1 of 2 are there" in error_of(tmp_path)


def test_shards_of_two_sets(tmp_path, hub):
    hub.write_set(tmp_path, hub.grey(4), [0, 1, 2, 0])
    hub.write(tmp_path / "train-00000-of-00001.parquet", [], {"label": []})
    assert "belong to different sets" in error_of(tmp_path)


def test_a_shard_that_is_there_twice(tmp_path, hub):
    """The hub has had names with and without a hash; both together would count each row twice."""
    hub.write_set(tmp_path, hub.grey(4), [0, 1, 2, 0])
    other = tmp_path / "train-00001-of-00002-0123456789abcdef.parquet"
    other.write_bytes((tmp_path / "train-00001-of-00002.parquet").read_bytes())
    assert f"{other} and train-00001-of-00002.parquet are the same shard; remove one of them" in error_of(tmp_path)
    other.rename(tmp_path / "train-old.parquet")
    assert "train-old.parquet has no shard number though train-0000" in error_of(tmp_path)


def test_row_groups_without_wanted_rows_are_not_read(tmp_path, hub):
    images = hub.grey(12)
    for split in ("train", "test"):
        table = pa.table({"image": [hub.encode(image) for image in images], "label": [row % 3 for row in range(12)]})
        pq.write_table(table, tmp_path / f"{split}.parquet", row_group_size=2, compression="none")
    path = tmp_path / "train.parquet"
    split = TableSplit([path], find_columns(path))
    metadata = pq.ParquetFile(path).metadata
    assert metadata.num_row_groups == 6
    column = metadata.row_group(2).column(0)  # rows 4 and 5 of the images
    content = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    content[start : start + column.total_compressed_size] = b"x" * column.total_compressed_size
    path.write_bytes(content)
    found = list(split.images(np.array([1, 3, 6, 11])))
    assert found == [(f"{path}, row {row}", hub.encode(images[row])) for row in (1, 3, 6, 11)]
    with pytest.raises(InputError, match="the images cannot be read"):
        list(split.images(np.array([1, 4])))


def test_not_parquet(tmp_path, hub):
    hub.write_set(tmp_path, hub.grey(4), [0, 1, 2, 0])
    (tmp_path / "train-00001-of-00002.parquet").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    assert "train-00001-of-00002.parquet is not a readable parquet file" in error_of(tmp_path)


def test_damaged_pages(tmp_path, hub):
    hub.write_set(tmp_path, hub.colour(20), [0] * 20)
    path = tmp_path / "train-00000-of-00002.parquet"
    content = bytearray(path.read_bytes())
    content[4:2000] = b"\xff" * 1996
    path.write_bytes(content)
    assert "train-00000-of-00002.parquet" in error_of(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "null"])
def test_bad_image_names_file_and_row(tmp_path, hub, damage):
    content = [hub.encode(image) for image in hub.colour(5)]
    content[3] = {"cut": content[3][:200], "text": b"not an image", "empty": b"", "null": None}[damage]
    good = [hub.encode(image) for image in hub.colour(2)]
    hub.write(tmp_path / "train-00000-of-00002.parquet", good, {"label": [0, 0]})
    hub.write(tmp_path / "train-00001-of-00002.parquet", content, {"label": [0] * 5}, row_group_size=2)
    hub.write(tmp_path / "test-00000-of-00001.parquet", good, {"label": [0, 0]})
    message = error_of(tmp_path)
    assert "train-00001-of-00002.parquet, row 3: the image" in message
    assert ("has no bytes" if damage in ("empty", "null") else "is corrupt") in message


def test_null_struct_is_a_missing_image(tmp_path, hub):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for split in ("train", "test"):
        table = pa.table({"image": pa.array([None], kind), "label": [0]})
        pq.write_table(table, tmp_path / f"{split}.parquet")
    assert "row 0: the image has no bytes" in error_of(tmp_path)


def test_sixteen_bits_are_refused(tmp_path, hub):
    content = [hub.encode(np.full((8, 8), 40_000, dtype=np.uint16))]
    for split in ("train", "test"):
        hub.write(tmp_path / f"{split}.parquet", content, {"label": [0]})
    assert "images of mode 'I;16' are not supported" in error_of(tmp_path)


def tiff_of_16_bits(compression):
    """A colour TIFF by hand: Pillow writes none. Little-endian, one strip, tags in ascending order."""
    pixels = np.full((8, 8, 3), 40_000, dtype="<u2").tobytes()
    strip = zlib.compress(pixels) if compression == 8 else pixels
    tags = [(256, 3, 1, 8), (257, 3, 1, 8), (258, 3, 3, 8 + len(strip)), (259, 3, 1, compression), (262, 3, 1, 2),
            (273, 4, 1, 8), (277, 3, 1, 3), (278, 3, 1, 8), (279, 4, 1, len(strip))]  # fmt: skip
    table = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(strip) + 6) + strip + struct.pack("<3H", 16, 16, 16) + table


@pytest.mark.parametrize(
    "content",
    [b"P6 8 8 65535\n" + bytes(384), b"P6 8 8 1023\n" + bytes(384), tiff_of_16_bits(1), tiff_of_16_bits(8)],
    ids=["ppm", "ppm10", "tiff", "tiff_deflate"],
)
def test_sixteen_bit_colour_is_refused_where_pillow_takes_it_for_eight(tmp_path, hub, content):
    assert Image.open(io.BytesIO(content)).mode == "RGB"
    for split in ("train", "test"):
        hub.write(tmp_path / f"{split}.parquet", [content], {"label": [0]})
    assert "row 0: images of mode 'RGB;16' are not supported; convert them to 8-bit" in error_of(tmp_path)


def test_eight_bit_ppm_and_tiff_are_read(tmp_path, hub):
    image = hub.colour(1, size=8)[0]
    content = [hub.encode(image, kind) for kind in ("PPM", "TIFF", "PNG")]
    for split in ("train", "test"):
        hub.write(tmp_path / f"{split}.parquet", content, {"label": [0] * 3})
    assert (read(tmp_path).train_images == torch.from_numpy(image).permute(2, 0, 1)).all()


def test_other_size_in_train_and_in_test(tmp_path, hub):
    small, large = hub.encode(hub.colour(1, size=8)[0]), hub.encode(hub.colour(1, size=9)[0])
    hub.write(tmp_path / "train.parquet", [small, small, large], {"label": [0] * 3})
    hub.write(tmp_path / "test.parquet", [small, large], {"label": [0] * 2})
    expected = "row 2: the image is 9x9 (width x height), the first one is 8x8"
    assert f"train.parquet, {expected}; set data.image_size" in error_of(tmp_path)
    assert read(tmp_path, image_size=8).image_shape == (3, 8, 8)
    hub.write(tmp_path / "train.parquet", [small], {"label": [0]})
    assert "test.parquet, row 1: the image is 9x9" in error_of(tmp_path)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [([0, 3], "row 1: label 3 is outside 0..2"), ([-1, 0], "row 0: label -1 is outside 0..2; an unlabelled split?")],
)
def test_label_out_of_range(tmp_path, hub, labels, expected):
    hub.write_set(tmp_path, hub.grey(2), [0, 1])
    path = tmp_path / "test-00000-of-00001.parquet"
    content = [hub.encode(image) for image in hub.grey(2)]
    hub.write(path, content, {"label": labels}, names={"label": ["x", "y", "z"]})
    assert f"{path}, {expected}" in error_of(tmp_path)


def test_null_label(tmp_path, hub):
    hub.write_set(tmp_path, hub.grey(4), [0, 1, None, 2])
    assert "train-00001-of-00002.parquet, row 0: the label is missing" in error_of(tmp_path)


def test_ids_are_no_labels(tmp_path, hub):
    hub.write_set(tmp_path, hub.grey(2), [0, 10**12], names=None)
    assert "label 1000000000000 is outside 0..65535; column 'label' may not hold classes" in error_of(tmp_path)


def test_split_without_rows(tmp_path, hub):
    hub.write_set(tmp_path, hub.grey(2), [0, 1])
    hub.write(tmp_path / "test-00000-of-00001.parquet", [], {"label": []}, names={"label": ["x", "y", "z"]})
    assert "test-00000-of-00001.parquet has no rows" in error_of(tmp_path)


def test_an_empty_shard_among_others_is_fine(tmp_path, hub):
    hub.write_set(tmp_path, hub.grey(2), [0, 1])
    hub.write(tmp_path / "train-00000-of-00002.parquet", [], {"label": []}, names={"label": ["x", "y", "z"]})
    assert len(read(tmp_path).train_labels) == 1


def test_class_names_must_agree(tmp_path, hub):
    hub.write_set(tmp_path, hub.grey(2), [0, 1])
    content = [hub.encode(image) for image in hub.grey(2)]
    hub.write(tmp_path / "test-00000-of-00001.parquet", content, {"label": [0, 1]}, names={"label": ["y", "x", "z"]})
    assert "the class names differ" in error_of(tmp_path)


def test_strange_metadata(tmp_path, hub):
    table = pa.table({"img": [b"x"], "label": [0]}).replace_schema_metadata({"huggingface": "{not json"})
    pq.write_table(table, tmp_path / "train.parquet")
    pq.write_table(table, tmp_path / "test.parquet")
    assert "'huggingface' schema metadata is not understood" in error_of(tmp_path)


def test_words_as_labels(tmp_path, hub):
    content = [hub.encode(image) for image in hub.colour(3, size=8)]
    hub.write(tmp_path / "train.parquet", content, {"label": pa.array(["dog", "ape", "dog"])}, metadata=False)
    hub.write(tmp_path / "test.parquet", content[:2], {"label": pa.array(["ape", "dog"])}, metadata=False)
    data = read(tmp_path)
    assert (data.class_names, data.train_labels.tolist(), data.test_labels.tolist()) == (
        ("ape", "dog"),
        [1, 0, 1],
        [0, 1],
    )
    hub.write(tmp_path / "test.parquet", content[:2], {"label": pa.array(["ape", "cow"])}, metadata=False)
    assert "test.parquet, row 1: label 'cow' occurs in no training row" in error_of(tmp_path)
    hub.write(tmp_path / "test.parquet", content[:2], {"label": pa.array(["ape", None])}, metadata=False)
    assert "test.parquet, row 1: the label is missing" in error_of(tmp_path)


def test_labels_with_a_gap(tmp_path, hub):
    hub.write_set(tmp_path, hub.grey(6), [1, 5, 5, 1, 9, 9], names=None)
    assert "train-00000-of-00002.parquet, row 0: label 1 though no training row has label 0" in error_of(tmp_path)
    data = read(tmp_path, renumber_labels=True)
    assert (data.class_names, data.train_labels.tolist()) == (("1", "5", "9"), [0, 1, 1, 0, 2, 2])
    hub.write_set(tmp_path, hub.grey(6), [0, 1, 1, 0, 7, 3], names=None)
    assert "train-00001-of-00002.parquet, row 2: label 3 though no training row has label 2" in error_of(tmp_path)


def test_class_names_that_occur_twice(tmp_path, hub):
    hub.write_set(tmp_path, hub.grey(2), [0, 1], names=("x", "y", "x"))
    assert "the class name 'x' occurs twice" in error_of(tmp_path)


def test_named_classes_without_training_images_are_fine(tmp_path, hub):
    hub.write_set(tmp_path, hub.grey(2), [0, 2])
    assert read(tmp_path).class_names == ("x", "y", "z")


def test_further_columns_follow_the_rows_in_use(tmp_path, hub):
    images = hub.colour(20, size=8)
    content = [hub.encode(image) for image in images]
    columns = {
        "label": [0, 1] * 10,
        "writer": pa.array([f"w{row}" for row in range(20)]).dictionary_encode(),
        "day": list(range(20)),
        "score": pa.array([0.5] * 20),
    }
    hub.write(tmp_path / "train.parquet", content, columns, names={"label": ["a", "b"]})
    hub.write(tmp_path / "test.parquet", content[:1], {"label": [0]}, names={"label": ["a", "b"]})
    config = DataConfig(name="parquet", root=tmp_path, max_train=6)
    data = load(config, columns=["writer", "day"])
    assert len(data.train_labels) == len(data.columns["day"]) == 6
    for image, writer, day in zip(data.train_images, data.columns["writer"], data.columns["day"], strict=True):
        assert writer == f"w{day}"
        assert torch.equal(image, torch.from_numpy(images[day]).permute(2, 0, 1))
    with pytest.raises(InputError, match="has no column 'hand'; the columns are img, label, writer, day, score"):
        load(config, columns=["hand"])
    with pytest.raises(InputError, match="column 'score' is double; only integers and words"):
        load(config, columns=["score"])
