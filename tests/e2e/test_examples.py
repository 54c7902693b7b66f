"""The examples do what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits

EXAMPLES = Path(__file__).parents[2] / "examples"


def accuracies(name: str, seed: int) -> dict[str, float]:
    """The table that the example prints, started as a user starts it."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), "--seed", str(seed)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(r"^ *(.*?)  +([01]\.\d{3})$", done.stdout, re.MULTILINE)
    return {label: float(value) for label, value in rows}


def test_refine_only_beats_the_average() -> None:
    """Seed 1; the gain was 0.226, and at least 0.131 in 19 seeds."""
    rows = accuracies("refine_only.py", 1)
    assert len(rows) == 6
    teachers = [value for label, value in rows.items() if label.startswith("teacher")]
    assert rows["refined, with no data"] > rows["average of the weights"] + 0.1
    assert rows["refined, with no data"] > max(teachers) + 0.1


def test_a_round_from_scratch_ends_better_than_its_average() -> None:
    """Seed 5; the gain was 0.066."""
    rows = accuracies("fedavg_from_scratch.py", 5)
    assert len(rows) == 7
    clients = [value for label, value in rows.items() if label.startswith("client")]
    assert rows["refined by FedFTG"] > rows["average of the weights"] + 0.02
    assert rows["average of the weights"] > max(clients) + 0.1


def test_images_in_class_folders_become_one_model(tmp_path: Path) -> None:
    digits = load_digits()
    for place, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        folder = tmp_path / ("test" if place % 4 == 0 else "train") / f"digit{label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15).astype(np.uint8)).save(folder / f"{place}.png")
    options = ["--size", "8", "--epochs", "3", "--iterations", "2"]
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "refine_folders.py"), str(tmp_path), *options],
        capture_output=True, text=True, check=False, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = dict(re.findall(r"^(site \d|start|refined|all sites).*?([\d.]+)$", done.stdout, re.MULTILINE))
    assert len(rows) == 8
    assert all(0 <= float(value) <= 100 for value in rows.values())
    assert len(load_file(tmp_path / "better.safetensors")) == 14
    with Image.open(tmp_path / "synthetic.png") as grid:
        assert grid.size == (64, 80)


def test_lesson_runs_and_is_saved_with_its_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cell that fails ends the test. What is saved is small, and shows plots to readers of GitHub."""
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    pytest.importorskip("pandas")
    client = pytest.importorskip("nbclient")
    file = EXAMPLES / "lesson.ipynb"
    assert file.stat().st_size < 300_000
    notebook = nbformat.read(file, as_version=4)
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in shown) == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    client.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    text = str(notebook.cells)
    assert "round 12/12" in text
    assert "accuracy.ensemble_prior" in text
