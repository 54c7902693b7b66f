"""The recipes that come with the package, by name."""

from __future__ import annotations

from pathlib import Path

from fedftg.errors import InputError, unknown

DEFAULT = "default"


def folder() -> Path:
    """Where the recipes lie: inside the installed package, or at the top of a source checkout."""
    inside = Path(__file__).parent / "recipes"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "recipes"


def names() -> list[str]:
    """All recipes, such as ``default`` or ``paper/cifar10_iid_fedavg``."""
    return sorted(path.relative_to(folder()).with_suffix("").as_posix() for path in folder().rglob("*.toml"))


def find(given: str) -> Path:
    """The file of a recipe that is given as a path or as a name.

    Raises:
        InputError: neither a file nor a name.
    """
    path = Path(given)
    if path.is_file():
        return path
    named = folder() / f"{given.removesuffix('.toml')}.toml"
    if named.is_file():
        return named
    if path.is_dir():
        raise InputError(f"{given} is a folder, not a recipe; give a .toml file or a name from 'fedftg list'")
    if len(path.parts) > 1 and not (folder() / path.parts[0]).is_dir():
        raise InputError(f"recipe {given} does not exist; give a path to a .toml file or a name from 'fedftg list'")
    raise unknown("recipe", given.removesuffix(".toml"), names())
