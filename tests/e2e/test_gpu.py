"""On an NVIDIA GPU, where there is one: every algorithm and preset runs, and resumes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.mark.parametrize("preset", ["paper", "official", "fedftg"])
@pytest.mark.parametrize("algorithm", ["fedavg", "fedprox", "feddyn", "scaffold", "moon", "fedvarp"])
def test_recorded_steps_and_fine_tuning(
    python_m_fedftg: Any, tiny: list[str], tmp_path: Path, read_records: Callable[..., Any], algorithm: str, preset: str
) -> None:
    """The preset fedftg keeps Adam's count of steps on the CPU, among tensors of the GPU."""
    given = [*tiny, "--set", "device=cuda", "--set", "executor.name=auto", "--set", f"algorithm.name={algorithm}"]
    given += ["--set", f"refiner.preset={preset}"]
    for rounds, more in ((1, ()), (3, ("--resume",))):
        done = python_m_fedftg("run", *given, "--set", f"rounds={rounds}", "--out", "r", *more)
        assert done.returncode == 0, done.stderr
    rows = read_records(tmp_path / "r")
    assert [row["round"] for row in rows] == [1, 2, 3]
    assert not any("rolled_back" in row or "rejected" in row for row in rows)
    sessions = json.loads((tmp_path / "r" / "environment.json").read_text())["sessions"]
    assert sessions[-1]["executor"].startswith("cuda_graph")
    assert "NVIDIA" in sessions[-1]["device"]


@pytest.mark.parametrize(("algorithm", "loss"), [("fedavg", "balanced_softmax"), ("scaffold", "cross_entropy")])
def test_recorded_steps_compute_what_sequential_does(
    python_m_fedftg: Any, no_refiner: list[str], tmp_path: Path, read_records: Callable[..., Any], algorithm: str,
    loss: str,
) -> None:  # fmt: skip
    """Also in later rounds, which replay at half the rate. Last batches have many sizes; three clients step together.

    Convolutions in TF32 round by about a thousandth, and the rounds add it up.
    """
    found = {}
    for name in ("sequential", "cuda_graph"):
        given = [*no_refiner, "--set", "device=cuda", "--set", f"executor.name={name}", "--set", "rounds=4"]
        given += ["--set", "partition.sizes=lognormal", "--set", "partition.sigma=0.5", "--set", "local.momentum=0.5"]
        given += ["--set", f"algorithm.name={algorithm}", "--set", "local.lr_decay=0.5", "--set", f"local.loss={loss}"]
        given += ["--set", "executor.group=3"] if name == "cuda_graph" else []
        done = python_m_fedftg("run", *given, "--out", name)
        assert done.returncode == 0, done.stderr
        found[name] = read_records(tmp_path / name)
    for ours, theirs in zip(found["cuda_graph"], found["sequential"], strict=True):
        assert ours["server"] == pytest.approx(theirs["server"], rel=0.05)
