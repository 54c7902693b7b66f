"""A refiner of ten lines works everywhere without being named anywhere in the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PLUGIN = """
from dataclasses import replace
from typing import Literal

import fedftg
from fedftg import params as tree
from fedftg.algorithms.base import NoRefiner, RefinerConfig

class Halfway(NoRefiner):
    def init(self, params, rng):
        return params

    def refine(self, state, results, rng):
        params = tree.weighted_mean([state.refiner, state.params], [1.0, 1.0])
        return replace(state, params=params, refiner=params), {"moved": tree.norm(tree.sub(params, state.params))}

class HalfwayConfig(RefinerConfig):
    name: Literal["halfway"] = "halfway"

    def build(self, context):
        return Halfway()

fedftg.register_refiner("halfway", HalfwayConfig)
"""


def test_in_recipes_and_comparisons(fedftg: Any, tiny: list[str], tmp_path: Path) -> None:
    (tmp_path / "halfway.py").write_text(PLUGIN)
    pairs = zip(tiny[::2], tiny[1::2], strict=True)
    short = [part for pair in pairs if not pair[1].startswith("refiner.") for part in pair]
    short += ["--set", "rounds=2", "--set", 'plugins=["halfway"]', "--set", "refiner.name=halfway"]
    done = fedftg("compare", "default_base", "default", *short)
    assert done.returncode == 0, done.stderr
    assert "fedavg + halfway" in done.stdout
    assert "vs base" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "runs" / "default" / "rounds.jsonl").read_text().splitlines()]
    assert all(row["refine"]["moved"] > 0 for row in rows)
    assert rows[1]["loss"]["refined"] != rows[1]["loss"]["selected"]
