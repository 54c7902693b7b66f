"""docs/config.md lists every key of a recipe; `python tests/test_config_page.py` writes it anew."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fedftg.algorithms.registry import ALGORITHMS
from fedftg.config import RunConfig

PAGE = Path(__file__).parents[1] / "docs" / "config.md"
HEADER = """# Every key of a recipe

A recipe is TOML; `--set key=value` lays over it. `extends = "other.toml"` starts from that recipe in the same folder.
Choosing another `algorithm.name` or `refiner.name` drops the recipe's other settings of that section; another
`refiner.preset` keeps only what differs from the old one. What a run used stands in its `config.toml`.

The defaults below are those without a recipe; `fedftg run` takes the recipe `default`. The keys of `refiner` are in
[refine](refine.md), the names of data sets and models in [data](data.md) and [models](models.md).

| key | default | meaning |
|---|---|---|
"""


def row(key: str, field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    shown = "" if default is None else f"`{list(default) if isinstance(default, tuple) else default}`"
    return f"| `{key}` | {shown} | {field.description or ''} |\n"


def rendered() -> str:
    lines = []
    for name, field in RunConfig.model_fields.items():
        section: Any = field.annotation
        if name == "algorithm":
            lines.append(f"| `algorithm.name` | `fedavg` | {', '.join(ALGORITHMS)} |\n")
            for algorithm, config in ALGORITHMS.items():
                for key, item in config.model_fields.items():
                    if key != "name":
                        lines.append(row(f"algorithm.{key}", item).replace("` |", f"` ({algorithm}) |", 1))
        elif name == "refiner":
            lines.append("| `refiner.name` | `fedftg` | none or fedftg |\n")
            lines.append("| `refiner.preset` | `fedftg` | paper, official, fedftg; `refiner.FIELD` changes a field |\n")
        elif isinstance(section, type) and issubclass(section, BaseModel):
            lines += [row(f"{name}.{key}", item) for key, item in section.model_fields.items()]
        else:
            lines.append(row(name, field))
    return HEADER + "".join(lines)


def test_page_is_what_the_config_says() -> None:
    assert PAGE.read_text() == rendered()


if __name__ == "__main__":
    PAGE.write_text(rendered())
