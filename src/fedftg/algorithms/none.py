"""No refiner: what is deployed is the aggregate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from fedftg.algorithms.base import ClientResult, Memory, Metrics, Refiner, RefinerConfig, RefinerContext, ServerState
from fedftg.params import Params


class NoRefiner:
    """Returns the state as it is."""

    needs_client_models = False

    def init(self, params: Params, rng: torch.Generator) -> Memory:  # noqa: ARG002
        """Nothing is remembered."""
        return {}

    def refine(
        self,
        state: ServerState,
        results: Sequence[ClientResult],  # noqa: ARG002
        rng: torch.Generator,  # noqa: ARG002
    ) -> tuple[ServerState, Metrics]:
        """The same state, no metrics."""
        return state, {}


class NoRefinerConfig(RefinerConfig):
    """``refiner.name = "none"``."""

    name: Literal["none"] = "none"

    def build(self, context: RefinerContext) -> Refiner:  # noqa: ARG002
        """Needs nothing."""
        return NoRefiner()
