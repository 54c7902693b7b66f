"""FedProx.

Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith, "Federated Optimization in Heterogeneous Networks", MLSys 2020,
https://arxiv.org/abs/1812.06127.

    client:  SGD on L_k(w) + mu/2 ||w - a||^2, a the global model it received
    server:  as FedAvg

The public FedFTG code pulls to zero instead; docs/algorithms/fedprox.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from fedftg.algorithms.base import Algorithm, AlgorithmConfig, LocalTask
from fedftg.algorithms.fedavg import AverageServer, PlainLocal, Weighting
from fedftg.params import Params


@dataclass(frozen=True)
class ProximalLocal(PlainLocal):
    """A pull towards the received model."""

    mu: float

    def correct(self, grads: Params, params: Params, task: LocalTask) -> Params:
        """Returns ``g + mu (w - a)``; ``mu = 0`` gives FedAvg, bit for bit."""
        return {name: grad + self.mu * (params[name] - task.params[name]) for name, grad in grads.items()}


class FedProxConfig(AlgorithmConfig):
    """``algorithm.name = "fedprox"``: pulls clients towards the model that they received (MLSys 2020)."""

    name: Literal["fedprox"] = "fedprox"
    mu: float = Field(
        default=1e-4, ge=0, description="0 gives FedAvg; 1 keeps clients close to the global model (FedFTG paper: 1e-4)"
    )
    weighting: Weighting = "samples"

    def build(self, num_clients: int) -> Algorithm:  # noqa: ARG002
        """Returns the rules, which do not depend on the number of clients."""
        return Algorithm(ProximalLocal(self.mu), AverageServer(self.weighting))
