"""The recipes that come with the package, by name."""

from __future__ import annotations

import re
from pathlib import Path

from fedftg.errors import InputError, unknown

DEFAULT = "default"


def folder() -> Path:
    """Returns the folder of the recipes: inside the installed package, or at the top of a source checkout."""
    inside = Path(__file__).parent / "recipes"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "recipes"


def names() -> list[str]:
    """Returns the names of all recipes, such as ``default`` or ``paper_base``."""
    return sorted(path.stem for path in folder().glob("*.toml"))


def about(name: str) -> str:
    """Returns a recipe's first two lines: what it is, and what was measured."""
    return "\n".join(line.strip("# .") for line in find(name).read_text("utf-8").splitlines()[:2])


def find(given: str) -> Path:
    """Returns the file of a recipe that is given as a path or as a name.

    Raises:
        InputError: neither a file nor a name; for the name of an earlier version, with what it is now.
    """
    path, name = Path(given), given.removesuffix(".toml")
    if path.is_file():
        return path
    named = folder() / f"{name}.toml"
    if named.is_file():
        return named
    if path.is_dir():
        raise InputError(f"{given} is a folder, not a recipe; give a .toml file or a name from 'fedftg list'")
    if now := _renamed(name.removeprefix("recipes/")):
        raise InputError(f"recipe {given} is now: {now}")
    if len(path.parts) > 1:
        raise InputError(f"recipe {given} does not exist; give a path to a .toml file or a name from 'fedftg list'")
    raise unknown("recipe or file" if path.suffix else "recipe", name, names())


_OLD = re.compile(r"(datasets/)?(?:paper/)?(\w+?)(_cnn)?_(iid|dir0\d)(?:_(100?))?_([a-z]+?)(_fedftg)?")
"""Recipes up to version 0.1 were one file a combination: ``paper/cifar100_iid_moon_fedftg``."""


def _renamed(name: str) -> str | None:
    """Returns what follows ``fedftg run`` for a recipe of version 0.1; None for other names."""
    match = _OLD.fullmatch(name)
    if match is None:
        return None
    datasets, data, small, law, clients, algorithm, refined = match.groups()
    recipe = "ten_clients" if clients == "10" else "cifar10_cnn" if small else "paper"
    changes = {
        "data.name": data if data != ("tiny_imagenet" if clients == "10" else "cifar10") else None,
        "data.image_size": "128" if data == "compcars" else None,
        "model.name": "lenet_gn" if data == "fashion_mnist" else None,
        "partition.law": "iid" if law == "iid" else None,
        "partition.alpha": f"0.{law[-1]}" if law not in ("iid", "dir03") else None,
        "algorithm.name": algorithm if algorithm != "fedavg" else None,
        "refiner.preset": "fedftg" if datasets and refined and clients == "100" else None,
    }
    settings = [f"--set {key}={value}" for key, value in changes.items() if value is not None]
    return " ".join([recipe if refined else f"{recipe}_base", *settings])
