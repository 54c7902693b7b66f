"""Every recipe states its result, means what its name says, and runs for a round."""

from pathlib import Path

import numpy as np
import pytest
import torch

import fedftg
from fedftg import config as configs
from fedftg import recipes
from fedftg.data import sources
from fedftg.data.config import DataConfig
from fedftg.data.dataset import ImageDataset
from fedftg.rundir import checkpoint

NAMES = recipes.names()
DATA_SETS = {
    "svhn": (10, (3, 32, 32)),
    "tiny_imagenet": (200, (3, 64, 64)),
    "food101": (101, (3, 64, 64)),
    "compcars": (281, (3, 128, 128)),
    "mio_tcd": (11, (3, 64, 64)),
    "fashion_mnist": (10, (1, 28, 28)),
}
"""Classes and image shape of the sets in recipes/datasets."""
ALGORITHMS = ("fedavg", "fedprox", "feddyn", "scaffold", "moon")


def test_all_recipes_of_the_plan_are_there() -> None:
    expected = {"default", "default_base"}
    settings = ["cifar10_cnn_dir03"]
    settings += [f"paper/{data}_{law}" for data in ("cifar10", "cifar100") for law in ("iid", "dir06", "dir03")]
    expected |= {
        f"datasets/{data}_dir03_{clients}_fedavg{end}"
        for data in DATA_SETS
        for clients in (10, 100)
        for end in ("", "_fedftg")
    }
    expected |= {f"{setting}_{name}{end}" for setting in settings for name in ALGORITHMS for end in ("", "_fedftg")}
    assert set(NAMES) == expected


@pytest.mark.parametrize("name", NAMES)
def test_header_and_meaning(name: str) -> None:
    path = recipes.find(name)
    first = path.read_text().splitlines()
    assert first[0].startswith("# ")
    assert first[1].startswith("# ")
    assert "RESULT_" not in path.read_text()
    config = configs.load(path)
    parts = name.rpartition("/")[2].split("_")
    if parts[0] == "default":
        assert config.refiner.name == ("none" if "base" in parts else "fedftg")
        return
    assert name.rpartition("/")[2].startswith(f"{config.data.name}_")
    assert config.algorithm.name == next(part for part in parts if part in ALGORITHMS)
    assert config.refiner.name == ("fedftg" if parts[-1] == "fedftg" else "none")
    law = next(part for part in parts if part == "iid" or part.startswith("dir"))
    assert config.partition.law == ("iid" if law == "iid" else "dirichlet")
    if law != "iid":
        assert config.partition.alpha == int(law[3:]) / 10
    if "10" in parts:
        assert (config.partition.num_clients, config.cohort.size, config.rounds) == (10, 5, 200)
    else:
        assert (config.partition.num_clients, config.cohort.probability) == (100, 0.1)
    local = config.local
    assert (local.lr, local.lr_decay, local.epochs, local.batch_size) == (0.1, 0.998, 5, 50)
    assert (local.weight_decay, local.max_grad_norm, local.momentum) == (1e-3, 10, 0)
    assert local.steps == (50 if config.algorithm.name == "scaffold" else None)
    settings = config.algorithm.model_dump()
    assert settings.get("mu") == {"fedprox": 1e-4, "moon": 0.5}.get(config.algorithm.name)
    assert settings.get("alpha") == {"feddyn": 0.01}.get(config.algorithm.name)
    assert settings.get("temperature") == {"moon": 5.0}.get(config.algorithm.name)
    if name.startswith("paper/"):
        assert (config.rounds, config.model.name) == (1000, "resnet18")
        if config.refiner.name == "fedftg":
            refiner = config.refiner.model_dump()
            assert refiner["preset"] == "paper"
            assert refiner["noise_dim"] == (256 if config.data.name == "cifar100" else 100)


@pytest.mark.parametrize("name", NAMES)
def test_runs_for_a_round(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On 24 random images in the shape of the recipe's data set; every part of the recipe but its sizes is used."""
    config = configs.load(recipes.find(name))

    def made_up(given: DataConfig, **_: object) -> ImageDataset:
        shapes = {"cifar10": (10, (3, 32, 32)), "cifar100": (100, (3, 32, 32)), **DATA_SETS}
        classes, shape = shapes[given.name]
        assert given.image_size in (None, shape[1])
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (24, *shape), dtype=np.uint8)
        labels = rng.integers(0, classes, 24)
        names = list(map(str, range(classes)))
        return ImageDataset.from_tensors(images, labels, images[:8], labels[:8], class_names=names, augment="flip_crop")

    if config.data.name != "digits":
        monkeypatch.setattr(sources, "load", made_up)
        # Writing ResNet-18 to disk sixty times is what other tests are for.
        monkeypatch.setattr(checkpoint, "write", lambda *_: None)
    small = [
        "rounds=1", "threads=1", "partition.num_clients=2", "cohort={size=2}", "local.epochs=1", "local.batch_size=6",
        "checkpoint.every=1",
    ]  # fmt: skip
    if config.local.steps is not None:
        small.append("local.steps=1")
    if config.refiner.name == "fedftg":
        small += [f"refiner.{key}" for key in ("iterations=1", "batch_size=4", "generator_steps=1", "student_steps=1")]
    run = fedftg.run(recipes.find(name), overrides=small, out=tmp_path / "run")
    assert set(run.summary["accuracy"]) == {"selected", "all", "refined"}
    assert all(torch.isfinite(tensor).all() for tensor in run.state.params.values())
