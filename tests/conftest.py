"""Fixtures that several test folders share."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest
from jaxtyping import install_import_hook

# A test that forgets its folder fails at once. The hub's client reads this when it is imported, so it stands here.
os.environ["HF_HUB_OFFLINE"] = "1"

# Shapes in signatures are checked here and nowhere else: a checked function fails inside torch.compile.
install_import_hook(
    [f"fedftg.distill.{name}" for name in ("losses", "teachers", "generator", "images")], "beartype.beartype"
)


@pytest.fixture(scope="session", autouse=True)
def decoded_images(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keeps decoded images out of the user's cache, in this process and in those that tests start."""
    os.environ["FEDFTG_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data sets beside the repository; a test that needs them is skipped where they are not."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not (folder / "cifar10").is_dir():
        pytest.skip(f"no real data in {folder}")
    return folder


@pytest.fixture(scope="session")
def hub() -> ModuleType:
    """The helper module beside this file; importlib mode puts no test folder on the path."""
    spec = importlib.util.spec_from_file_location("hub", Path(__file__).with_name("hub.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
