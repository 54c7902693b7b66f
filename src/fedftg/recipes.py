"""The recipes that come with the package, by name."""

from __future__ import annotations

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
        InputError: neither a file nor a name.
    """
    path, name = Path(given), given.removesuffix(".toml")
    if path.is_file():
        return path
    named = folder() / f"{name}.toml"
    if named.is_file():
        return named
    if path.is_dir():
        raise InputError(f"{given} is a folder, not a recipe; give a .toml file or a name from 'fedftg list'")
    if len(path.parts) > 1:
        raise InputError(f"recipe {given} does not exist; give a path to a .toml file or a name from 'fedftg list'")
    raise unknown("recipe or file" if path.suffix else "recipe", name, names())
