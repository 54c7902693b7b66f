"""Every data set is trained on for a round, from small files in the layout of the real one, and from real ones."""

import gzip
import json
import struct
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import fedftg
from fedftg.data.sources import DEBIAN_FASHION_MNIST, SOURCES

SMALL = [
    "rounds=1", "threads=1", "partition.num_clients=2", "cohort={size=2}", "model.name=convnet", "model.args={width=8}",
    "local.epochs=1", "local.batch_size=8", "refiner.iterations=1", "refiner.batch_size=4", "refiner.generator_width=8",
    "refiner.generator_steps=1",
]  # fmt: skip
MIO_TCD = [
    "articulated_truck", "background", "bicycle", "bus", "car", "motorcycle", "non-motorized_vehicle", "pedestrian",
    "pickup_truck", "single_unit_truck", "work_van",
]  # fmt: skip

Layout = Callable[[ModuleType, Path], list[str]]


def hub_files(name: str, *, sizes: tuple[int, ...] = ()) -> Layout:
    """Parquet files as the hub has them: folder, splits, columns and class names of the data set's card."""
    entry = SOURCES[name]
    test = {"tiny_imagenet": "valid", "food101": "validation"}.get(name, "test")

    def write(hub: ModuleType, root: Path) -> list[str]:
        grey = entry.shape is not None and entry.shape[0] == 1
        count = 30
        used = sizes or (entry.shape or (3, 32, 32))[1:2]
        made = [(hub.grey if grey else hub.colour)(1, size=used[row % len(used)], seed=row)[0] for row in range(count)]
        images = [hub.encode(pixels) for pixels in made]
        labels = {entry.label: [row % min(entry.num_classes, 15) for row in range(count)]}
        names = {entry.label: [f"class {number}" for number in range(entry.num_classes)]}
        if name.startswith("cifar100"):
            other = "coarse_label" if entry.label == "fine_label" else "fine_label"
            labels[other] = [0] * count
            names[other] = [f"other {number}" for number in range({"coarse_label": 20, "fine_label": 100}[other])]
        for split in ("train", test):
            path = root / (entry.subset or "data") / f"{split}-00000-of-00001.parquet"
            hub.write(path, images, labels, image_name=entry.image, names=names)
        return [f"data.name={name}", f"data.root={root}"]

    return write


def image_folder(hub: ModuleType, root: Path) -> list[str]:
    for split in ("train", "val"):
        for number, name in enumerate(("ant", "bee", "wasp")):
            (root / split / name).mkdir(parents=True)
            for row, image in enumerate(hub.colour(8, size=20 + number, seed=number)):
                (root / split / name / f"{row}.jpg").write_bytes(hub.encode(image, "JPEG"))
    return ["data.name=folder", f"data.root={root}", "data.image_size=16"]


def compcars(hub: ModuleType, root: Path) -> list[str]:
    lines = []
    for number in range(1, 6):
        (root / "image" / str(number)).mkdir(parents=True)
        for row, image in enumerate(hub.colour(6, size=40, seed=number)):
            (root / "image" / str(number) / f"{row}.jpg").write_bytes(hub.encode(image, "JPEG"))
            lines.append(f"{number}/{row}.jpg\n")
    (root / "train_surveillance.txt").write_text("".join(lines[::2]))
    (root / "test_surveillance.txt").write_text("".join(lines[1::2]))
    return ["data.name=compcars", f"data.root={root}", "data.image_size=32"]


def mio_tcd(hub: ModuleType, root: Path) -> list[str]:
    for number, name in enumerate(MIO_TCD):
        (root / "train" / name).mkdir(parents=True)
        for row, image in enumerate(hub.colour(5, size=30, seed=number)):
            (root / "train" / name / f"{row:08d}.jpg").write_bytes(hub.encode(image, "JPEG"))
    (root / "test").mkdir()
    return ["data.name=mio_tcd", f"data.root={root}", "data.image_size=32"]


def idx_files(hub: ModuleType, root: Path) -> list[str]:
    images, labels = hub.grey(20, size=28), (np.arange(20) % 10).astype(np.uint8)
    for split in ("train", "t10k"):
        for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
            head = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
            (root / f"{split}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + values.tobytes()))
    return ["data.name=mnist", f"data.root={root}"]


def npz(hub: ModuleType, root: Path) -> list[str]:
    images, labels = hub.colour(24, size=12), np.array(["no", "yes"] * 12)
    writer = np.arange(24) % 3
    np.savez(
        root / "own.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels,
        writer=writer,
    )  # fmt: skip
    natural = ["partition.law=natural", "partition.column=writer"]
    return ["data.name=arrays", f"data.root={root / 'own.npz'}", *natural]


def saved_to_disk(hub: ModuleType, root: Path) -> list[str]:
    import datasets

    files = [{"bytes": hub.encode(image), "path": None} for image in hub.colour(20, size=16)]
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.Value("string")})
    table = datasets.Dataset.from_dict({"picture": files, "kind": ["tea", "coffee"] * 10}, features=features)
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(root / "saved")
    return ["data.name=parquet", f"data.root={root / 'saved'}", "data.label_column=kind"]


LAYOUTS: dict[str, Layout] = {
    **{name: hub_files(name, sizes=(70, 90) if name == "food101" else ()) for name in SOURCES if SOURCES[name].hub_id},
    "folder": image_folder,
    "compcars": compcars,
    "mio_tcd": mio_tcd,
    "idx": idx_files,
    "arrays": npz,
    "parquet": saved_to_disk,
}


def test_every_source_has_a_layout_here() -> None:
    """digits is in most other tests, mnist5k and hub are in tests/data, tensors in test_own_data.py."""
    assert set(SOURCES) - {"digits", "mnist5k", "tensors", "hub"} == set(LAYOUTS) - {"idx"}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_round_on_small_files_in_the_layout(name: str, hub: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    settings = LAYOUTS[name](hub, tmp_path / "data")
    run = fedftg.run("default", overrides=[*SMALL, *settings], out=tmp_path / "run")
    assert set(run.summary["accuracy"]) == {"selected", "all", "refined"}
    counts = json.loads((tmp_path / "run" / "partition.json").read_text())["class_counts"]
    assert len(counts) == (3 if name == "arrays" else 2)
    assert sum(map(sum, counts)) >= 10


@pytest.mark.parametrize(
    ("folder", "settings"),
    [
        ("cifar10", ["data.name=cifar10"]),
        ("cifar100-part", ["data.name=cifar100"]),
        ("cifar100-part", ["data.name=cifar100_coarse"]),
        ("tiny-imagenet-20", ["data.name=tiny_imagenet"]),
        ("food101-64-10", ["data.name=food101"]),
    ],
)
def test_a_round_on_real_images(folder: str, settings: list[str], shared_data: Path, tmp_path: Path) -> None:
    subset = ["data.max_train=200", "data.max_test=100", f"data.root={shared_data / folder}"]
    run = fedftg.run("default", overrides=[*SMALL, *settings, *subset], out=tmp_path / "run")
    assert run.summary["rounds"] == 1
    partition = json.loads((tmp_path / "run" / "partition.json").read_text())
    assert sum(map(sum, partition["class_counts"])) == 200


@pytest.mark.skipif(not DEBIAN_FASHION_MNIST.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_a_round_on_fashion_mnist_of_debian(fedftg: Any, tmp_path: Path) -> None:
    settings = [*SMALL, "data.name=fashion_mnist", "data.max_train=200", "data.max_test=100"]
    done = fedftg("run", *[part for setting in settings for part in ("--set", setting)], "--out", "run")
    assert done.returncode == 0, done.stderr
    assert "Ankle boot" in json.loads((tmp_path / "run" / "partition.json").read_text())["class_names"]
