"""The deployed model of a run as files for others, and the module that they give."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import tomli_w
from torch import nn

from fedftg import __version__
from fedftg.data.config import PartitionConfig
from fedftg.data.partition import describe
from fedftg.errors import InputError, first_line
from fedftg.models import registry
from fedftg.models.functional import FunctionalModel
from fedftg.report.load import load_run
from fedftg.report.table import markdown_table
from fedftg.rundir import checkpoint, records
from fedftg.rundir.folder import RunFolder
from fedftg.rundir.tensors import read_tensors, write_tensors


def write_model(folder: Path, to: Path) -> int:
    """Writes the deployed (refined) global model of a run's last checkpoint; returns the round it is from.

    The file is the model's ``state_dict``: ``module.load_state_dict(safetensors.torch.load_file(to))`` loads it.

    Raises:
        InputError: no run, no checkpoint yet, or a wrong file name.
    """
    config = RunFolder(folder).read_config()
    if to.suffix != ".safetensors":
        raise InputError(f"--to must end in .safetensors, got {to.name!r}")
    if not to.parent.is_dir():
        raise InputError(f"--to: folder {to.parent} does not exist; make it first")
    state = checkpoint.load_state(RunFolder(folder).checkpoint)
    if state is None:
        raise InputError(f"{folder} has no checkpoint yet; let the run finish a round first")
    metadata = {"model": json.dumps(config["model"]), "round": str(state.round)}
    data = RunFolder(folder).read_partition()
    params, buffers = state.model
    model = registry.ModelConfig(**config["model"])
    module = registry.build(model, len(data["class_names"]), tuple(data["image_shape"]), seed=0)
    values = FunctionalModel(module).module(params, buffers).state_dict()
    if odd := [name for name, value in values.items() if not hasattr(value, "dtype")]:
        raise InputError(f"{odd[0]} is no tensor, so the file cannot hold it; leave it out of the model's state_dict")
    try:
        write_tensors(to, values, metadata)
    except OSError as error:
        raise InputError(f"cannot write {to}: {error.strerror}; choose another file by --to") from None
    return state.round


def write_hub_folder(folder: Path, to: Path) -> int:
    """Writes what a model hub shows and `load` reads to a new folder; returns the round that the model is from.

    ``model.safetensors``, ``config.json`` (model, classes, image shape, normalisation), ``recipe.toml`` (the settings
    without paths) and ``README.md``, a model card with the front matter of the HuggingFace hub.

    Raises:
        InputError: no run, no checkpoint yet, or ``to`` is not empty.
    """
    run, data = load_run(folder), RunFolder(folder).read_partition()
    session = records.read_json(RunFolder(folder).environment_file)["sessions"][-1]
    try:
        to.mkdir(parents=True, exist_ok=True)
        if any(to.iterdir()):
            raise FileExistsError(0, "it holds files already")
    except OSError as error:
        raise InputError(f"cannot write to {to}: {error.strerror}; choose another by --hub-folder") from None
    number = write_model(folder, to / "model.safetensors")
    recipe = copy.deepcopy(run.config)
    for section in (recipe["data"], recipe["partition"], recipe["refiner"].get("proxy", {})):
        for key in ("root", "cache", "file"):
            section.pop(key, None)
    about = {"fedftg": __version__, "model": run.config["model"]}
    about |= {key: data.get(key, session.get(key)) for key in ("class_names", "image_shape", "mean", "std")}
    law, table = describe(PartitionConfig(**run.config["partition"])), markdown_table([run])
    card = Path(__file__).with_name("card.md").read_text("utf-8")
    card = card.format(**about, run=run, round=number, clients=len(data["class_counts"]), partition=law, table=table)
    records.write_json(to / "config.json", about)
    records.write_atomically(to / "recipe.toml", tomli_w.dumps(recipe).encode())
    records.write_atomically(to / "README.md", card.encode())
    return number


def load(folder: Path | str, model: nn.Module | None = None) -> nn.Module:
    """Returns the model of a folder of ``fedftg export RUN --hub-folder``, in evaluation mode and on the CPU.

    ``model`` takes the weights where its class is not of this package: no code that a file names is imported. Images
    are ``(B, D, H, W)`` in 0..1, minus ``mean`` and over ``std`` of ``config.json``.

    Raises:
        InputError: the folder holds no such model, or ``model`` is needed or does not fit.
    """
    if (Path(folder) / "config.toml").exists():
        raise InputError(f"{folder} is a run; fedftg export {folder} --hub-folder DIR, and load DIR")
    try:
        about = records.read_json(Path(folder) / "config.json")
        settings = registry.ModelConfig(**about["model"])
        if model is None and settings.name in registry.MODELS:
            model = registry.build(settings, len(about["class_names"]), tuple(about["image_shape"]), seed=0)
        if model is None:
            raise ValueError(f"{settings.name} is a class of someone's own; pass one as model=")
        model.load_state_dict(read_tensors(Path(folder) / "model.safetensors"))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"cannot load a model of fedftg export from {folder}: {first_line(error)}") from None
    return model.eval()
