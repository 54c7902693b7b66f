"""Fixtures that several test folders share."""

from __future__ import annotations

from pathlib import Path

import pytest
from jaxtyping import install_import_hook

# Shapes in signatures are checked here and nowhere else: a checked function fails inside torch.compile.
install_import_hook(
    [f"fedftg.distill.{name}" for name in ("losses", "teachers", "generator", "steps")], "beartype.beartype"
)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data sets beside the repository; a test that needs them is skipped where they are not."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not (folder / "cifar10").is_dir():
        pytest.skip(f"no real data in {folder}")
    return folder
