"""A round of training on data of each kind: small files in the layout of the real ones, and real ones."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import fedftg

SMALL = [
    "rounds=1", "threads=1", "partition.num_clients=2", "cohort={size=2}", "model.name=convnet", "model.args={width=8}",
    "local.epochs=1", "local.batch_size=8", "refiner.iterations=1", "refiner.batch_size=4", "refiner.generator_width=8",
    "refiner.generator_steps=1",
]  # fmt: skip


def cifar10(hub: ModuleType, root: Path) -> list[str]:
    for split in ("train", "test"):
        content, labels = [hub.encode(image) for image in hub.colour(30)], {"label": [row % 10 for row in range(30)]}
        hub.write(root / "plain_text" / f"{split}-00000-of-00001.parquet", content, labels)
    return ["data.name=cifar10", f"data.root={root}"]


def image_folder(hub: ModuleType, root: Path) -> list[str]:
    for split in ("train", "val"):
        for number, name in enumerate(("ant", "bee", "wasp")):
            (root / split / name).mkdir(parents=True)
            for row, image in enumerate(hub.colour(8, size=20 + number, seed=number)):
                (root / split / name / f"{row}.jpg").write_bytes(hub.encode(image, "JPEG"))
    return ["data.name=folder", f"data.root={root}", "data.image_size=16"]


def npz(hub: ModuleType, root: Path) -> list[str]:
    images, labels = hub.colour(24, size=12), np.array(["no", "yes"] * 12)
    writer = np.arange(24) % 3
    np.savez(
        root / "own.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels,
        writer=writer,
    )  # fmt: skip
    natural = ["partition.law=natural", "partition.column=writer"]
    return ["data.name=arrays", f"data.root={root / 'own.npz'}", *natural]


@pytest.mark.parametrize("layout", [cifar10, image_folder, npz])
def test_a_round_on_small_files(layout: Callable[..., list[str]], hub: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    run = fedftg.run("default", overrides=[*SMALL, *layout(hub, tmp_path / "data")], out=tmp_path / "run")
    assert set(run.summary["accuracy"]) == {"selected", "all", "refined"}
    counts = json.loads((tmp_path / "run" / "partition.json").read_text())["class_counts"]
    assert len(counts) == (3 if layout is npz else 2)
    assert sum(map(sum, counts)) >= 10


@pytest.mark.parametrize(
    ("folder", "name"),
    [("cifar10", "cifar10"), ("cifar100-part", "cifar100_coarse"), ("tiny-imagenet-20", "tiny_imagenet")],
)
def test_a_round_on_real_images(folder: str, name: str, shared_data: Path, tmp_path: Path) -> None:
    subset = ["data.max_train=200", "data.max_test=100", f"data.root={shared_data / folder}"]
    run = fedftg.run("default", overrides=[*SMALL, f"data.name={name}", *subset], out=tmp_path / "run")
    assert run.summary["rounds"] == 1
    partition = json.loads((tmp_path / "run" / "partition.json").read_text())
    assert sum(map(sum, partition["class_counts"])) == 200
