"""FedACG.

Kim, Kim, Han, "Communication-Efficient Federated Learning with Accelerated Client Gradient", CVPR 2024,
https://arxiv.org/abs/2201.03172.

    client:  SGD on L_k(w) + beta/2 ||w - a||^2, a the model it received
    server:  m <- lambda m + (mean_k w_k - a);  theta <- mean_k w_k;  clients receive a = theta + lambda m

theta is deployed. The paper writes theta <- theta + m, which is the same: theta + lambda m is the old ``a``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import Field

from fedftg import params as tree
from fedftg.algorithms.base import Algorithm, AlgorithmConfig, ClientResult, Memory, Metrics, ServerState
from fedftg.algorithms.fedavg import AverageServer, Weighting, aggregate, update_norm
from fedftg.algorithms.fedprox import ProximalLocal
from fedftg.params import Params


@dataclass(frozen=True)
class LookaheadServer(AverageServer):
    """The mean is deployed; clients start where the momentum will take it. Buffers are averaged."""

    momentum: float = 0.85

    def init(self, params: Params) -> Memory:
        """Returns ``m = 0``."""
        return tree.zeros_like(params)

    def step(self, state: ServerState, results: Sequence[ClientResult]) -> tuple[ServerState, Metrics]:
        """Returns the state that deploys the mean and sends ``mean + lambda m``; ``lambda = 0`` gives FedAvg."""
        mean, buffers = aggregate(results, self.weighting)
        momentum = tree.add(tree.sub(mean, state.params), state.server, scale=self.momentum)
        params = tree.add(mean, momentum, scale=self.momentum)
        metrics = {**update_norm(state, params), "momentum_norm": tree.norm(momentum)}
        deployed = {**mean, **buffers}
        return replace(state, params=params, buffers=buffers, server=momentum, deployed=deployed), metrics


class FedACGConfig(AlgorithmConfig):
    """``algorithm.name = "fedacg"``: sends clients the model that the server's momentum leads to (CVPR 2024)."""

    name: Literal["fedacg"] = "fedacg"
    momentum: float = Field(
        default=0.85, ge=0, lt=1, description="lambda, of the server; 0 gives FedProx (authors' code: 0.85)"
    )
    beta: float = Field(
        default=1e-3, ge=0, description="pull towards the received model, 0 is off (authors' code: 1e-3)"
    )
    weighting: Weighting = "samples"

    def build(self, num_clients: int) -> Algorithm:  # noqa: ARG002
        """Returns the rules, which do not depend on the number of clients."""
        return Algorithm(ProximalLocal(self.beta), LookaheadServer(self.weighting, self.momentum))
