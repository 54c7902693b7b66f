"""One tiny federation is refined by two methods, resumed with a third, and gives the numbers of runs of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from methods import PROTOCOL

import fedftg

SCRIPT = Path(__file__).parent / "oneshot.py"


def test_methods_on_one_federation_are_resumed_and_equal_runs_of_their_own(tmp_path: Path) -> None:
    def call(methods: str, *more: str) -> tuple[list[dict[str, Any]], str]:
        options = ["--dry", "--data=digits", "--alphas=0.3", "--seeds=1", f"--methods={methods}", *more]
        done = subprocess.run(
            [sys.executable, str(SCRIPT), *options], cwd=tmp_path, check=True, capture_output=True, text=True
        )
        lines = (tmp_path / "runs/oneshot/dry.jsonl").read_text().splitlines()
        return list(map(json.loads, lines)), done.stdout

    lines, out = call("average,FedDF")
    assert [line["method"] for line in lines] == ["best client", "ensemble", "ensemble + prior", "average", "FedDF"]
    assert "| ensemble + prior |" in out
    again, _ = call("average,FedDF,DENSE", "--one")
    assert again[:5] == lines
    assert [line["method"] for line in again[5:]] == ["DENSE"]
    for line in (again[3], again[4], again[5]):
        run = fedftg.run(PROTOCOL, overrides=line["settings"], out=tmp_path / line["method"])
        assert run.summary["accuracy"]["refined"]["final"] == pytest.approx(line["accuracy"], abs=1e-12)
