"""docs/refine.md: its code runs, and its table says what the presets are.

After a change of a preset or a field: ``python tests/distill/test_refine_page.py`` rewrites the table.
"""

import re
from pathlib import Path
from typing import Any

from fedftg.distill.config import PRESETS, DistillConfig
from fedftg.oneshot import RefineResult

PAGE = Path(__file__).parents[2] / "docs" / "refine.md"
FIELDS = re.compile(r"(<!-- fields: .*? -->\n)(.*)(<!-- end of fields -->)", re.DOTALL)
NAMES = ("paper", "official", "fedftg")


def table():
    """A row per field; bold is what differs from the paper."""
    lines = [f"| field | {' | '.join(f'`{name}`' for name in NAMES)} | what |", "|---|---|---|---|---|"]
    for name, field in DistillConfig.model_fields.items():
        values = [getattr(PRESETS[preset], name) for preset in NAMES]
        cells = [shown(value) if value == values[0] else f"**{shown(value)}**" for value in values]
        lines.append(f"| `{name}` | {' | '.join(cells)} | {(field.description or '').replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


def shown(value):
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def test_the_table_is_what_the_presets_say():
    found = FIELDS.search(PAGE.read_text())
    assert found is not None
    assert found[2] == table(), "run: python tests/distill/test_refine_page.py"


def test_the_code_runs(capsys, monkeypatch):
    small = PRESETS["fedftg"].model_copy(update={"generator_width": 4, "iterations": 2})
    monkeypatch.setitem(PRESETS, "fedftg", small)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    assert isinstance(names["again"], RefineResult)
    assert names["result"].rolled_back is None
    assert names["images"].shape == (16, 1, 8, 8)
    assert "teacher_agreement" in capsys.readouterr().out


def test_the_page_names_what_a_result_has():
    text = PAGE.read_text()
    public = [name for name in RefineResult.__dataclass_fields__ if not name.startswith("_")]
    for name in [*public, "sample("]:
        assert f"| `{name}" in text, name


if __name__ == "__main__":
    PAGE.write_text(FIELDS.sub(lambda found: found[1] + table() + found[3], PAGE.read_text()))
