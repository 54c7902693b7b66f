"""FedDyn.

Acar, Zhao, Matas Navarro, Mattina, Whatmough, Saligrama, "Federated Learning Based on Dynamic Regularization",
ICLR 2021, https://arxiv.org/abs/2111.04263.

    client:  SGD on L_k(w) - <h_k, w> + alpha_k/2 ||w - a||^2;  h_k <- h_k - alpha_k (w_k - a)
    server:  h <- h - (alpha/N) sum_{k in S} (w_k - a);  w <- mean_{k in S} w_k - h / alpha

State is kept as accumulated drift ``d_k = -h_k / alpha_k`` (the sum of all ``w_k - a``), so that ``alpha`` cancels on
the server: ``w <- mean w_k + (1/N) sum_k d_k``. Differences from the paper: docs/algorithms/feddyn.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import Field

from fedftg import params as tree
from fedftg.algorithms.base import Algorithm, AlgorithmConfig, ClientResult, LocalTask, Memory, Metrics, ServerState
from fedftg.algorithms.fedavg import PlainLocal, Weighting, aggregate, update_norm
from fedftg.params import Params


@dataclass(frozen=True)
class DynamicLocal(PlainLocal):
    """A linear and a quadratic term that make the client's stationary point that of the global loss."""

    alpha: float

    def init_memory(self, params: Params, buffers: Params) -> Memory:  # noqa: ARG002
        """Returns no drift."""
        return tree.zeros_like(params)

    def correct(self, grads: Params, params: Params, task: LocalTask) -> Params:
        """Returns ``g + alpha_k (w - a + d_k)``; ``alpha = 0`` gives FedAvg, bit for bit."""
        alpha = self.alpha / task.relative_size
        return {
            name: grad + alpha * (params[name] - task.params[name] + task.memory[name]) for name, grad in grads.items()
        }

    def finish(self, params: Params, buffers: Params, task: LocalTask, num_steps: int) -> tuple[Params, Memory]:  # noqa: ARG002
        """Uploads nothing besides the model; remembers ``d_k <- d_k + w_k - a``."""
        return {}, {name: drift + params[name] - task.params[name] for name, drift in task.memory.items()}


@dataclass(frozen=True)
class DynamicServer:
    """The mean of the active clients plus the mean drift of all clients."""

    alpha: float
    num_clients: int
    weighting: Weighting = "uniform"

    def init(self, params: Params) -> Memory:
        """Returns the mean drift over all clients: zero."""
        return tree.zeros_like(params)

    def message(self, state: ServerState) -> Params:  # noqa: ARG002
        """Returns nothing besides the model."""
        return {}

    def step(self, state: ServerState, results: Sequence[ClientResult]) -> tuple[ServerState, Metrics]:
        """Sets ``drift <- drift + (1/N) sum_k (w_k - a)`` and ``w <- mean w_k + drift``.

        With ``alpha = 0`` there is no regulariser whose bias the drift could cancel, so it stays zero: FedAvg.
        """
        mean, buffers = aggregate(results, self.weighting)
        drift = state.server
        if self.alpha > 0:
            share = sum(result.num_samples > 0 for result in results) / self.num_clients
            uniform_mean = mean if self.weighting == "uniform" else aggregate(results, "uniform")[0]
            drift = tree.add(drift, tree.sub(uniform_mean, state.params), scale=share)
        params = tree.add(mean, drift)
        metrics = {**update_norm(state, params), "drift_norm": tree.norm(drift)}
        return replace(state, params=params, buffers=buffers, server=drift), metrics


class FedDynConfig(AlgorithmConfig):
    """``algorithm.name = "feddyn"``: corrects each client's loss so that its optimum is the global one (ICLR 2021)."""

    name: Literal["feddyn"] = "feddyn"
    alpha: float = Field(
        default=0.01, ge=0, description="0 gives FedAvg with uniform weights; 0.1 regularises strongly (paper: 0.01)"
    )
    weighting: Weighting = "uniform"

    def build(self, num_clients: int) -> Algorithm:
        """Returns the rules; the drift is averaged over all ``num_clients``."""
        return Algorithm(DynamicLocal(self.alpha), DynamicServer(self.alpha, num_clients, self.weighting))
