"""A model in a folder for a hub: the same logits again, and nothing that a file names is imported."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

import fedftg as package
from fedftg.errors import InputError
from fedftg.models.registry import build


@pytest.fixture
def hub_folder(fedftg: Any, tiny: list[str], tmp_path: Path) -> Path:
    assert fedftg("run", "default", *tiny, "--set", "rounds=1", "--out", "run").returncode == 0
    done = fedftg("export", "run", "--hub-folder", "made/hub")
    assert (done.returncode, done.stdout) == (0, "model after round 1: made/hub\n"), done.stderr
    return tmp_path / "made" / "hub"


def test_round_trip(fedftg: Any, hub_folder: Path, tmp_path: Path) -> None:
    """By config.json alone, from the digits' bytes, a model has the accuracy that the run recorded."""
    assert sorted(path.name for path in hub_folder.iterdir()) == [
        "README.md", "config.json", "model.safetensors", "recipe.toml",
    ]  # fmt: skip
    run = package.run(resume=True, out=tmp_path / "run")
    model = package.load(hub_folder)
    assert not model.training
    about = json.loads((hub_folder / "config.json").read_text())
    assert (about["image_shape"], about["class_names"]) == ([1, 8, 8], list("0123456789"))
    data = package.data.load(package.data.DataConfig(name="digits", max_train=200, max_test=60))
    mean, std = (torch.tensor(about[key]).view(-1, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        logits = model((data.test_images / 255 - mean) / std)
        assert torch.equal(logits, run.model((data.test_images / 255 - mean) / std))
    accuracy = (logits.argmax(1) == data.test_labels).double().mean().item()
    assert accuracy == pytest.approx(run.summary["accuracy"]["refined"]["final"])
    assert "made/hub: it holds files already" in fedftg("export", "run", "--hub-folder", "made/hub").stderr
    assert fedftg("run", "made/hub/recipe.toml", "--out", "again").returncode == 0


def test_card_and_recipe(hub_folder: Path) -> None:
    card = (hub_folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: fedftg\nlicense: unknown\n")
    assert "| run | fedavg | fedftg | 1 |" in card
    assert "among 5 clients: dirichlet, alpha=0.05, num_clients=5." in card
    assert "{" not in card
    assert not {"root", "cache"} & set(tomllib.loads((hub_folder / "recipe.toml").read_text())["data"])


def test_a_class_of_someones_own_is_given_not_imported(hub_folder: Path) -> None:
    config = hub_folder / "config.json"
    about = json.loads(config.read_text())
    about["model"]["name"] = "subprocess.Popen"
    config.write_text(json.dumps(about))
    with pytest.raises(InputError, match=r"subprocess.Popen is a class of someone's own; pass one as model="):
        package.load(hub_folder)
    given = build(package.models.ModelConfig(name="lenet_bn"), 10, (1, 8, 8), seed=5)
    assert package.load(hub_folder, given) is given
    with pytest.raises(InputError, match=r"cannot load a model of fedftg export from .*: RuntimeError"):
        package.load(hub_folder, torch.nn.Linear(2, 2))


def test_what_is_no_such_folder_is_one_line(tmp_path: Path, fedftg: Any) -> None:
    with pytest.raises(InputError, match=r"cannot load .*: FileNotFoundError"):
        package.load(tmp_path)
    for given in ([], ["--to", "a.safetensors", "--hub-folder", "b"]):
        done = fedftg("export", "run", *given)
        assert done.returncode == 2
        assert "either --to FILE.safetensors or --hub-folder DIR" in done.stderr
