"""docs/flower.md names every key that a run and a node may set, and its sizes are those of the records."""

from pathlib import Path

import pytest

from fedftg.flower.settings import AppSettings, NodeSettings
from fedftg.flower.wire import encode
from fedftg.models import registry
from fedftg.models.functional import FunctionalModel

PAGE = (Path(__file__).parents[2] / "docs" / "flower.md").read_text()


@pytest.mark.parametrize("settings", [AppSettings, NodeSettings])
def test_every_key_is_there(settings: type[AppSettings] | type[NodeSettings]) -> None:
    for field in settings.model_fields.values():
        assert f"`{field.alias}`" in PAGE, field.alias


@pytest.mark.parametrize(("name", "shape", "shown"), [
    ("lenet_gn", (1, 8, 8), "87,512 bytes"), ("cnn", (3, 32, 32), "3.19 MB"), ("resnet18_gn", (3, 32, 32), "44.7 MB"),
])  # fmt: skip
def test_sizes(name: str, shape: tuple[int, int, int], shown: str) -> None:
    params, buffers = FunctionalModel(registry.build(registry.ModelConfig(name=name), 10, shape, 0)).init()
    size = sum(len(array.data) for array in encode({**params, **buffers}).values())
    assert shown in PAGE
    assert shown in (f"{size:,} bytes", f"{size / 1e6:.2f} MB", f"{size / 1e6:.1f} MB")
