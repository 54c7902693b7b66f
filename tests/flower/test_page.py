"""docs/flower.md names every key that a run and a node may set, and its grid runs."""

import re
from pathlib import Path

import pytest

from fedftg.flower import project
from fedftg.flower.settings import AppSettings, NodeSettings

PAGE = (Path(__file__).parents[2] / "docs" / "flower.md").read_text()


@pytest.mark.parametrize("settings", [AppSettings, NodeSettings])
def test_every_key_is_there(settings: type[AppSettings] | type[NodeSettings]) -> None:
    for field in settings.model_fields.values():
        assert f"`{field.alias}`" in PAGE, field.alias


def test_the_grid_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    short = ["partition.num_clients=3", "cohort.size=3", "rounds=1", "refiner.iterations=1", "data.max_train=60"]
    project.new(Path("app"), "default", short)
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(block, "docs/flower.md", "exec"), {})
    assert (tmp_path / "runs" / "grid" / "summary.json").is_file()
