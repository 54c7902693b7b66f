"""docs/config.md lists every key of a recipe; `python tests/test_config_page.py` writes it anew."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fedftg.algorithms.registry import ALGORITHMS, REFINERS
from fedftg.config import RunConfig

PAGE = Path(__file__).parents[1] / "docs" / "config.md"
HEADER = """# Every key of a recipe

A recipe is TOML; `--set key=value` lays over it. `extends = "other.toml"` starts from that recipe in the same folder.
Choosing another `algorithm.name` or `refiner.name` drops the recipe's other settings of that section; another
`refiner.preset` keeps only what differs from the old one. What a run used is in its `config.toml`.

The defaults below are those without a recipe; `fedftg run` takes the recipe `default`. What each preset of `fedftg`
sets is in [refine](refine.md); the names of data sets and models are in [data](data.md) and [models](models.md).

| key | default | meaning |
|---|---|---|
"""


def row(key: str, field: FieldInfo, of: str = "", default: Any = None) -> str:
    """One key; ``of`` names the algorithms or refiners that have it."""
    hidden = default is None or isinstance(default, BaseModel)
    shown = "" if hidden else f"`{list(default) if isinstance(default, tuple) else default}`"
    meaning = (field.description or "").replace("|", "\\|")
    return f"| `{key}`{f' ({of})' if of else ''} | {shown} | {meaning} |\n"


def registered(kind: str, table: Mapping[str, type[BaseModel]], default: str) -> list[str]:
    """The names of a table, and the keys of each with the defaults of its class."""
    owners: dict[str, list[str]] = {}  # by a row without them: what several share stands here once
    for name, config in table.items():
        values = dict(config())
        for key, field in config.model_fields.items():
            if key != "name":
                owners.setdefault(row(f"{kind}.{key}", field, "OWNERS", values[key]), []).append(name)
    rows = [line.replace("OWNERS", ", ".join(names)) for line, names in owners.items()]
    return [f"| `{kind}.name` | `{default}` | {', '.join(table)} |\n", *rows]


def rendered() -> str:
    lines = []
    for name, field in RunConfig.model_fields.items():
        section: Any = field.annotation
        if name == "algorithm":
            lines += registered(name, ALGORITHMS, "fedavg")
        elif name == "refiner":
            lines += registered(name, REFINERS, "fedftg")
        elif isinstance(section, type) and issubclass(section, BaseModel):
            values = dict(section())
            lines += [row(f"{name}.{key}", item, "", values[key]) for key, item in section.model_fields.items()]
        else:
            lines.append(row(name, field, "", field.get_default(call_default_factory=True)))
    return HEADER + "".join(lines)


def test_page_is_what_the_config_says() -> None:
    assert PAGE.read_text() == rendered()


if __name__ == "__main__":
    PAGE.write_text(rendered())
