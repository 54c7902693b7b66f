"""One base trajectory is measured with every variant, on the built-in data and by the script for a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "deployed.py"


def test_variants_of_one_trajectory(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--cells", "digits", "--seeds", "0", "--rounds", "3", "--jobs", "1"]
    subprocess.run(command, cwd=tmp_path, check=True)
    rows = (tmp_path / "runs/deployed/trial-3/digits/seed0/rounds.jsonl").read_text().splitlines()
    last = json.loads(rows[-1])
    assert last["refine"]["aggregate"] == last["accuracy"]["selected"]
    assert last["refine"]["all"] != last["refine"]["all + prior"]
    assert 0 < last["refine"]["ensemble, imbalanced"] < 1


DATA = Path(__file__).parents[3] / "shared" / "data"


@pytest.mark.skipif(not (DATA / "cifar10").is_dir(), reason="needs CIFAR-10 in ../shared/data")
def test_the_script_for_a_gpu_runs_dry(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--paper", "--dry", "--cells", "paper-iid", "--data-root", str(DATA)]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert list(tmp_path.glob("runs/deployed/trial-*/paper-iid/seed0/summary.json"))
