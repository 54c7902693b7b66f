import os

import numpy as np
import pytest
import torch

from fedftg.data.config import DataConfig
from fedftg.data.sources import load
from fedftg.errors import InputError


def write(hub, folder, names, *, count=2, size=8, seed=0):
    """Class folders with as many images each; returns the images by class."""
    made = {}
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        made[name] = hub.colour(count, size=size, seed=seed + number)
        for row, image in enumerate(made[name]):
            (folder / name / f"{row}.png").write_bytes(hub.encode(image))
    return made


def read(root, name="folder", **options):
    return load(DataConfig(name=name, root=root, **options))


def error_of(root, name="folder", **options):
    with pytest.raises(InputError) as caught:
        read(root, name, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same(images, expected):
    return torch.equal(images, torch.from_numpy(np.concatenate(expected)).permute(0, 3, 1, 2))


@pytest.mark.parametrize("test", ["test", "valid", "validation", "val"])
def test_train_and_test_with_numeric_names_in_their_order(tmp_path, hub, test):
    train = write(hub, tmp_path / "train", ["10", "9", "1"])
    held = write(hub, tmp_path / test, ["9"], seed=50)
    data = read(tmp_path)
    assert data.class_names == ("1", "9", "10")
    assert data.train_labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert same(data.train_images, [train["1"], train["9"], train["10"]])
    assert data.test_labels.tolist() == [1, 1]
    assert same(data.test_images, [held["9"]])
    assert data.augment == "none"


def test_classes_at_the_top_with_a_share_held_out(tmp_path, hub):
    """10 images a class, a share of 0.2: 2 of each are held out, 8 stay."""
    made = write(hub, tmp_path, ["ant", "bee"], count=10)
    assert error_of(tmp_path) == (
        f"no folder 'train' in {tmp_path} (found: ant, bee); set data.train_split=NAME, or data.test_share to split"
    )
    data = read(tmp_path, test_share=0.2)
    assert data.train_labels.bincount().tolist() == [8, 8]
    assert data.test_labels.bincount().tolist() == [2, 2]
    all_images = torch.cat([data.train_images, data.test_images]).permute(0, 2, 3, 1)
    found = sorted(image.contiguous().numpy().tobytes() for image in all_images)
    assert found == sorted(image.tobytes() for image in np.concatenate(list(made.values())))


def test_named_splits_deeper_folders_and_other_files(tmp_path, hub):
    """Hidden and other files are no images, and neither are a NAS's thumbnails; links are followed."""
    write(hub, tmp_path / "fit" / "n1", ["images"])
    write(hub, tmp_path / "fit" / "n2", ["images"])
    (tmp_path / "fit" / "n1" / "boxes.txt").write_text("x")
    (tmp_path / "fit" / "n1" / "images" / "._0.png").write_bytes(b"x")
    write(hub, tmp_path / "fit" / "n1" / "@eaDir", ["0.png"])
    write(hub, tmp_path / "store", ["more"], count=1)
    (tmp_path / "fit" / "n2" / "more").symlink_to(tmp_path / "store" / "more")
    write(hub, tmp_path / "eval", ["n1", "n2"])
    data = read(tmp_path, train_split="fit", test_split="eval")
    assert (data.class_names, data.train_labels.tolist()) == (("n1", "n2"), [0, 0, 1, 1, 1])
    where = f"in {tmp_path} (found: eval, fit, store); set"
    wrong = error_of(tmp_path, train_split="fit", test_split="exam")
    assert wrong == f"no folder 'exam' {where} data.test_split=NAME"
    assert f"no folder 'train' {where} data.train_split=NAME, or" in error_of(tmp_path, test_split="eval")
    assert len(read(tmp_path, train_split="fit", test_split="fit").test_labels) == 5


def test_folders_that_cannot_be_used(tmp_path, hub):
    with pytest.raises(InputError, match=r"data set 'folder' needs data\.root"):
        load(DataConfig(name="folder"))
    assert f"got {tmp_path / 'nowhere'}" in error_of(tmp_path / "nowhere")
    write(hub, tmp_path / "pets", ["cat", "dog"])
    assert f"{tmp_path} has 1 class folder(s) ['pets']; data.root must" in error_of(tmp_path, test_share=0.5)
    (tmp_path / "pets").rename(tmp_path / "train")
    (tmp_path / "test").mkdir()
    assert f"{tmp_path / 'test'} has 0 class folder(s) []" in error_of(tmp_path)
    (tmp_path / "test" / "cat").mkdir()
    assert f"{tmp_path / 'test' / 'cat'} has no images that can be read; convert them" in error_of(tmp_path)
    write(hub, tmp_path / "test", ["emu"])
    (tmp_path / "test" / "cat").rmdir()
    assert "label 'emu' is none of the 2 classes" in error_of(tmp_path)


@pytest.mark.parametrize("twin", ["BIG CAF\u00c9", "big caf\u00e9 ", "big  caf\u00e9", "big cafe\u0301"])
def test_folders_that_look_alike(tmp_path, hub, twin):
    write(hub, tmp_path / "train", ["big caf\u00e9", twin])
    message = "have one name, or differ only in case, spaces or Unicode form; merge or rename them"
    assert message in error_of(tmp_path, test_share=0.5)


def test_a_folder_of_the_other_split_may_be_unpacked_on_another_system(tmp_path, hub):
    """macOS stores e and the accent apart (NFD), Linux and Windows together (NFC)."""
    write(hub, tmp_path / "train", ["caf\u00e9", "tea"])
    write(hub, tmp_path / "test", ["cafe\u0301", "tea"])
    assert read(tmp_path).test_labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("name", ["#recycle", "@Recycle", "$RECYCLE.BIN", "__MACOSX", ".ipynb_checkpoints"])
@pytest.mark.parametrize("place", [".", "ant"])
def test_what_a_nas_a_bin_or_a_zip_leaves_is_no_data(tmp_path, hub, name, place):
    write(hub, tmp_path, ["ant", "bee"])
    write(hub, tmp_path / place, [name])
    data = read(tmp_path, test_share=0.5)
    assert (data.class_names, len(data.train_labels) + len(data.test_labels)) == (("ant", "bee"), 4)


@pytest.mark.parametrize(("link", "to"), [("ant/loop", "ant"), ("ant/loop", "."), ("ant/more", "bee"), ("wasp", "bee")])
def test_links_that_would_count_images_twice(tmp_path, hub, link, to):
    write(hub, tmp_path, ["ant", "bee"])
    (tmp_path / link).symlink_to(tmp_path / to)
    assert "are the same folder; remove the link" in error_of(tmp_path, test_share=0.5)


def test_both_names_of_a_folder_that_is_read_twice(tmp_path, hub):
    """The link may come first; a test split that links to the training split has its images."""
    write(hub, tmp_path / "train", ["b", "c"])
    (tmp_path / "train" / "a").symlink_to("b")
    train = tmp_path / "train"
    message = f"{train / 'a'} and {train / 'b'} are the same folder; remove the link"
    assert error_of(tmp_path / "train", test_share=0.5) == message
    (train / "a").unlink()
    (tmp_path / "test").symlink_to("train")
    assert f"{train / 'b'} and {tmp_path / 'test' / 'b'} are the same folder" in error_of(tmp_path)


@pytest.mark.parametrize("name", ["train", "Testing", "Val"])
def test_a_class_may_have_the_name_of_a_split(tmp_path, hub, name):
    write(hub, tmp_path, ["boxing", name])
    assert set(read(tmp_path, test_share=0.5).class_names) == {"boxing", name}
    write(hub, tmp_path / "splits", ["train", "test"])
    assert "has 0 class folder(s) []" in error_of(tmp_path / "splits", test_share=0.5)


def test_what_is_left_out_is_counted(tmp_path, hub):
    """Files that are no images, images beside the class folders, and folders that are no split in use."""
    write(hub, tmp_path / "train", ["ant", "bee"])
    write(hub, tmp_path / "test", ["ant", "bee"])
    write(hub, tmp_path / "extra", ["ant", "bee"])
    for name in ("a.HEIC", "b.heic", "notes", ".DS_Store", "Thumbs.db"):
        (tmp_path / "train" / "ant" / name).write_bytes(b"x")
    (tmp_path / "test" / "lost.png").write_bytes(b"x")
    assert read(tmp_path).notes == (
        "not used: extra",
        "files left out: 1 .db, 2 .heic, 1 beside the class folders, 1 without a suffix",
    )
    (tmp_path / "test" / "ant" / "0.png").write_bytes(hub.encode(hub.grey(1)[0]))
    assert read(tmp_path).notes[2:] == ("images converted: 1 grey",)


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [(".jpe", "JPEG"), (".jp2", "JPEG2000"), (".mpo", "MPO"), (".apng", "PNG"), (".tga", "TGA"), (".pnm", "PPM")],
)
def test_suffixes_of_images(tmp_path, hub, suffix, kind):
    write(hub, tmp_path, ["ant", "bee"])
    (tmp_path / "ant" / f"more{suffix}").write_bytes(hub.encode(hub.colour(1, size=8)[0], kind))
    data = read(tmp_path, test_share=0.5)
    assert (len(data.train_labels) + len(data.test_labels), data.notes) == (5, ())


def test_a_root_that_is_too_high(tmp_path, hub):
    """Splits under other names are not taken for classes; folders alike in all classes are reported."""
    for name in ("Training", "Testing"):
        write(hub, tmp_path / "mri" / name, ["glioma", "none"])
    message = error_of(tmp_path / "mri", test_share=0.5)
    assert message.endswith("(found: Testing, Training); set data.train_split=NAME")
    for name in ("Art", "Product"):
        write(hub, tmp_path / "home" / name, ["clock", "mug"])
    data = read(tmp_path / "home", test_share=0.5)
    assert data.class_names == ("Art", "Product")
    assert data.notes == ("every class has the folders clock, mug; is data.root too high?",)


def test_a_folder_that_cannot_be_read(tmp_path, hub, monkeypatch):
    """Tests may run as root, who may read all."""
    write(hub, tmp_path, ["ant", "bee"])
    (tmp_path / "ant" / "inner").mkdir()
    scandir = os.scandir

    def refused(path):
        if str(path).endswith("inner"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    assert "inner cannot be read (Permission denied); restore it" in error_of(tmp_path, test_share=0.5)


def test_folder_name_of_an_old_zip_file(tmp_path, hub):
    write(hub, tmp_path, ["a", "b"])
    os.rename(os.fsencode(tmp_path / "a"), os.fsencode(tmp_path) + b"/caf\xe9")
    assert r"the folder name 'caf\udce9' cannot be printed; rename it" in error_of(tmp_path, test_share=0.5)


def test_errors_name_the_file(tmp_path, hub):
    write(hub, tmp_path / "train", ["cat", "dog"])
    write(hub, tmp_path / "test", ["cat"])
    path = tmp_path / "train" / "dog" / "1.png"
    path.write_bytes(hub.encode(hub.colour(1, size=9)[0]))
    message = error_of(tmp_path)
    assert f"{path}: the image is 9x9 (H x W), the first one 8x8; set data.image_size" in message
    assert read(tmp_path, image_size=8).image_shape == (3, 8, 8)
    path.write_bytes(path.read_bytes()[:60])
    assert f"{path}: the image cannot be decoded" in error_of(tmp_path)
    with pytest.raises(InputError, match="only tables and files of arrays have columns"):
        load(DataConfig(name="folder", root=tmp_path), columns=["writer"])


MIO_TCD = [
    "articulated_truck", "background", "bicycle", "bus", "car", "motorcycle", "non-motorized_vehicle", "pedestrian",
    "pickup_truck", "single_unit_truck", "work_van",
]  # fmt: skip


@pytest.mark.parametrize("inside", [".", "MIO-TCD-Classification"])
def test_mio_tcd_holds_out_a_fifth_for_its_test_images_have_no_labels(tmp_path, hub, inside):
    root = tmp_path / inside
    write(hub, root / "train", MIO_TCD, count=5, size=20)
    (root / "test").mkdir()
    (root / "test" / "00000001.jpg").write_bytes(b"never read")
    data = read(tmp_path, "mio_tcd")
    assert data.class_names == tuple(MIO_TCD)
    assert data.train_labels.bincount().tolist() == [4] * 11
    assert data.test_labels.bincount().tolist() == [1] * 11
    assert data.image_shape == (3, 64, 64)
    assert data.augment == "flip_crop"
    more = read(tmp_path, "mio_tcd", test_share=0.4, image_size=16)
    assert (len(more.train_labels), len(more.test_labels), more.image_shape) == (33, 22, (3, 16, 16))


def write_compcars(hub, root):
    write(hub, root / "image", ["1", "2", "10"], count=3, size=20)
    (root / "train_surveillance.txt").write_text("10/0.png\n1/0.png\r\n2/1.png\n\n1/1.png\n")
    (root / "test_surveillance.txt").write_text("10/2.png\n2/2.png\n")


@pytest.mark.parametrize("inside", [".", "sv_data"])
def test_compcars_takes_the_authors_lists(tmp_path, hub, inside):
    write_compcars(hub, tmp_path / inside)
    data = read(tmp_path, "compcars")
    assert data.class_names == ("1", "2", "10")
    assert data.train_labels.tolist() == [2, 0, 1, 0]
    assert data.test_labels.tolist() == [2, 1]
    assert data.image_shape == (3, 64, 64)


def test_compcars_that_is_not_whole(tmp_path, hub):
    write_compcars(hub, tmp_path)
    lists = tmp_path / "test_surveillance.txt"
    lists.write_text("2/2.png\n10/9.png\n")
    assert f"{tmp_path / 'image' / '10' / '9.png'} cannot be read" in error_of(tmp_path, "compcars")
    lists.unlink()
    assert f"{lists} cannot be read; data.root must be" in error_of(tmp_path, "compcars")
