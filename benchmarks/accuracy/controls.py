"""The control of table C: the same place in a round, without any distillation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field

import fedftg
from fedftg.algorithms.base import ClientResult, Memory, Metrics, Refiner, RefinerConfig, RefinerContext, ServerState
from fedftg.params import Params, clone, prefixed, unprefixed


@dataclass(frozen=True)
class Interpolation:
    """``(1 - weight) aggregate + weight (what it gave in the round before)``: smoothing over rounds, nothing else."""

    weight: float

    def init(self, params: Params, rng: torch.Generator) -> Memory:
        return {}

    def refine(
        self, state: ServerState, results: Sequence[ClientResult], rng: torch.Generator
    ) -> tuple[ServerState, Metrics]:
        before = unprefixed(state.refiner, "before.")
        mixed = {
            name: torch.lerp(value, before[name], self.weight) if before and value.is_floating_point() else value
            for name, value in {**state.params, **state.buffers}.items()
        }
        params = {name: mixed[name] for name in state.params}
        buffers = {name: mixed[name] for name in state.buffers}
        return replace(state, params=params, buffers=buffers, refiner=prefixed(clone(mixed), "before.")), {}


class InterpolationConfig(RefinerConfig):
    name: Literal["interpolation"] = "interpolation"
    weight: float = Field(default=0.5, ge=0, lt=1, description="of the model before; 0 is the base")

    def build(self, context: RefinerContext) -> Refiner:
        return Interpolation(self.weight)


fedftg.register_refiner("interpolation", InterpolationConfig)
