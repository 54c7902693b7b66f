"""docs/flower.md names every key that a run and a node may set, and its sizes are those of the records."""

from pathlib import Path

import pytest

from fedftg.flower.settings import AppSettings, NodeSettings

PAGE = (Path(__file__).parents[2] / "docs" / "flower.md").read_text()


@pytest.mark.parametrize("settings", [AppSettings, NodeSettings])
def test_every_key_is_there(settings: type[AppSettings] | type[NodeSettings]) -> None:
    for field in settings.model_fields.values():
        assert f"`{field.alias}`" in PAGE, field.alias
