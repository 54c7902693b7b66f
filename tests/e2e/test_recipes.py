"""Every recipe states its result, every composition of its parts builds, and three of them run for a round."""

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedftg
from fedftg import config as configs
from fedftg import recipes
from fedftg.data import sources
from fedftg.data.config import DataConfig
from fedftg.data.dataset import ImageDataset
from fedftg.errors import InputError
from fedftg.rundir import checkpoint

SHAPES = {
    "cifar10": (10, (3, 32, 32)), "cifar100": (100, (3, 32, 32)), "svhn": (10, (3, 32, 32)),
    "tiny_imagenet": (200, (3, 64, 64)), "food101": (101, (3, 64, 64)), "compcars": (281, (3, 64, 64)),
    "mio_tcd": (11, (3, 64, 64)), "fashion_mnist": (10, (1, 28, 28)),
}  # fmt: skip
ALGORITHMS = {
    "fedavg": {}, "fedprox": {"mu": 1e-4}, "feddyn": {"alpha": 0.01}, "scaffold": {},
    "moon": {"mu": 0.5, "temperature": 5.0},
}  # fmt: skip
"""With the settings of the FedFTG paper."""


def test_every_recipe_says_what_it_shows_and_has_a_base() -> None:
    with_base = [f"{name}{end}" for name in ("cifar10_cnn", "default", "paper", "ten_clients") for end in ("", "_base")]
    one_shot = ["one_shot", "one_shot_paper"]  # their base is --set refiner.name=none
    assert recipes.names() == sorted([*with_base, *one_shot])
    for name in recipes.names():
        path = recipes.find(name)
        header = [line for line in path.read_text().splitlines() if line.startswith("# ")]
        assert header[0].endswith("."), name
        assert header[1].startswith("# measured: "), name
        assert "commit" in "".join(header) or header[1] == "# measured: not yet.", name
        config = configs.load(path)
        assert config.refiner.name == ("none" if name.endswith("_base") else "leaves" if name in one_shot else "fedftg")
        if name.endswith("_base"):
            refined = configs.load(recipes.find(name.removesuffix("_base")))
            assert config.model_copy(update={"refiner": refined.refiner, "name": refined.name}) == refined


def test_every_composition_is_in_the_papers_setting() -> None:
    laws = (("iid", 0.3), ("dirichlet", 0.3), ("dirichlet", 0.6))
    for recipe, data, (law, alpha), algorithm in product(("paper", "ten_clients"), SHAPES, laws, ALGORITHMS):
        given = [f"data.name={data}", f"partition.law={law}", f"partition.alpha={alpha}", f"algorithm.name={algorithm}"]
        config = configs.load(recipes.find(recipe), given)
        assert (config.data.name, config.partition.law, config.partition.alpha) == (data, law, alpha)
        assert ALGORITHMS[algorithm].items() <= config.algorithm.model_dump().items()
        local, refiner = config.local, config.refiner.model_dump()
        assert (local.lr, local.lr_decay, local.epochs, local.batch_size, local.steps) == (0.1, 0.998, 5, 50, None)
        assert (local.weight_decay, local.max_grad_norm, local.momentum) == (1e-3, 10, 0)
        assert refiner["noise_dim"] == (256 if SHAPES[data][0] >= 100 else 100)
        if recipe == "paper":
            assert (config.rounds, config.partition.num_clients, config.cohort.probability) == (1000, 100, 0.1)
            assert (config.model.name, refiner["preset"]) == ("resnet18", "paper")
        else:
            assert (config.rounds, config.partition.num_clients, config.cohort.size) == (200, 10, 5)
            assert refiner["preset"] == "fedftg"


def test_noise_follows_the_number_of_classes_unless_it_is_given() -> None:
    def noise(given: dict[str, Any]) -> int:
        return int(configs.from_mapping(given).refiner.model_dump()["noise_dim"])

    assert noise({}) == 100
    assert noise({"data": {"name": "cifar100"}}) == 256
    assert noise({"data": {"name": "cifar100"}, "refiner": {"noise_dim": 64}}) == 64
    kept = configs.load(recipes.find("paper"), ["data.name=cifar100"])
    assert "noise_dim = 256" in kept.to_toml()
    assert configs.from_mapping(kept.model_dump(mode="json", exclude_none=True)) == kept


def test_what_is_no_recipe_is_one_line(tmp_path: Path) -> None:
    for given, message in (
        (str(tmp_path), "is a folder, not a recipe"),
        ("mine/none.toml", "does not exist; give a path"),
        ("nosuchthing.toml", "unknown recipe or file 'nosuchthing'; allowed"),
        ("papr.toml", "did you mean 'paper'"),
    ):
        with pytest.raises(InputError, match=message):
            recipes.find(given)


def test_scaffolds_minibatches_are_those_of_its_epochs(tmp_path: Path) -> None:
    """Clients of 71 or 72 digits: 2 epochs of 2 batches are 4 steps, the same ones; as 5 of 10 are the paper's 50."""
    settings = ["rounds=1", "algorithm.name=scaffold", "refiner.name=none", "cohort.size=2"]
    by_epochs, by_steps = (
        fedftg.run("default", overrides=[*settings, given], out=tmp_path / given)
        for given in ("local.epochs=2", "local.steps=4")
    )
    for name, value in by_epochs.state.params.items():
        assert torch.equal(value, by_steps.state.params[name])


@pytest.mark.parametrize(
    ("recipe", "given"),
    [
        ("cifar10_cnn", ["algorithm.name=feddyn"]),
        ("paper", ["data.name=cifar100", "algorithm.name=moon"]),
        ("ten_clients", ["data.name=compcars"]),
    ],
)
def test_runs_for_a_round(recipe: str, given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On 24 random images in the shape of the data set; every part of the recipe but its sizes is used."""

    def made_up(config: DataConfig, **_: object) -> ImageDataset:
        classes, shape = SHAPES[config.name]
        rng = np.random.default_rng(0)
        images, labels = rng.integers(0, 256, (24, *shape), dtype=np.uint8), rng.integers(0, classes, 24)
        names = list(map(str, range(classes)))
        return ImageDataset.from_tensors(images, labels, images[:8], labels[:8], class_names=names, augment="flip_crop")

    monkeypatch.setattr(sources, "load", made_up)
    monkeypatch.setattr(checkpoint, "write", lambda *_: None)  # tested elsewhere, and slow for ResNet-18
    small = [
        "rounds=1", "threads=1", "partition.num_clients=2", "cohort={size=2}", "local.epochs=1", "local.batch_size=6",
        "refiner.iterations=1", "refiner.batch_size=4", "refiner.generator_steps=1", "refiner.student_steps=1",
    ]  # fmt: skip
    run = fedftg.run(recipes.find(recipe), overrides=[*given, *small], out=tmp_path / "run")
    assert set(run.summary["accuracy"]) == {"selected", "all", "refined"}
    assert all(torch.isfinite(tensor).all() for tensor in run.state.params.values())
