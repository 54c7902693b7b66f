"""What users and scripts may rely on: a change here is a change of the contract."""

import inspect
import tomllib
from pathlib import Path

import click

import fedftg
import fedftg.data
import fedftg.models
from fedftg import cli

ROOT = Path(__file__).parents[1]


def test_public_names() -> None:
    assert set(fedftg.__all__) == {
        "ClientError", "DistillConfig", "ImageDataset", "InputError", "RefineResult", "Run", "RunConfig", "__version__",
        "load", "load_run", "preset", "refine", "register_algorithm", "register_refiner", "run",
    }  # fmt: skip
    assert all(hasattr(fedftg, name) for name in fedftg.__all__)


def test_names_of_data_and_models() -> None:
    for name in ("DataConfig", "FederatedData", "ImageDataset", "PartitionConfig", "SOURCES", "load", "skew"):
        assert hasattr(fedftg.data, name)
    for name in ("MODELS", "FunctionalModel", "ModelConfig", "build"):
        assert hasattr(fedftg.models, name)


def test_version_is_that_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert fedftg.__version__ == project["version"]


def test_refine_signature() -> None:
    parameters = inspect.signature(fedftg.refine).parameters
    assert list(parameters) == [
        "student", "teachers", "class_counts", "method", "generator", "image_shape", "seed", "progress",
    ]  # fmt: skip
    assert [parameters[name].default for name in ("method", "generator", "image_shape", "seed", "progress")] == [
        "leaves", None, None, 0, None,
    ]  # fmt: skip
    assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in list(parameters)[3:])


def test_run_signature() -> None:
    assert list(inspect.signature(fedftg.run).parameters) == [
        "recipe", "overrides", "out", "resume", "progress", "dataset",
    ]  # fmt: skip


def flat(group: click.Group, prefix: str = "") -> dict[str, click.Command]:
    """Every command by its full name, those of groups included."""
    found: dict[str, click.Command] = {}
    for name, command in group.commands.items():
        found |= flat(command, f"{prefix}{name} ") if isinstance(command, click.Group) else {prefix + name: command}
    return found


def test_frozen_cli() -> None:
    frozen = {
        "run": ["--out", "--resume", "--set", "recipe"],
        "compare": ["--columns", "--format", "--jobs", "--missing", "--out", "--seeds", "--set", "items"],
        "report": ["--columns", "--format", "folder"],
        "track": ["--to", "folder"],
        "watch": ["folder"],
        "partition": ["--out", "--set", "recipe"],
        "list": ["kind"],
        "doctor": [],
        "export": ["--hub-folder", "--to", "folder"],
        "flower new": ["--recipe", "--set", "folder"],
    }
    found = {}
    for name, command in flat(cli.cli).items():
        found[name] = sorted(
            parameter.opts[0] if isinstance(parameter, click.Option) else str(parameter.name)
            for parameter in command.params
        )
    assert found == frozen
