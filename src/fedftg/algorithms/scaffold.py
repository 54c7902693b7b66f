"""SCAFFOLD.

Karimireddy, Kale, Mohri, Reddi, Stich, Suresh, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning",
ICML 2020, https://arxiv.org/abs/1910.06378.

    client:  g <- g + c - c_k;  option II: c_k+ = c_k - c + (a - w_k) / (steps * lr)
    server:  w <- a + server_lr * mean_{k in S} (w_k - a);  c <- c + (1/N) sum_{k in S} (c_k+ - c_k)

Here ``a`` is the model that the client received and ``lr`` the rate that it used; docs/algorithms/scaffold.md.
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
class ControlledLocal(PlainLocal):
    """Every step is corrected by the difference of the global and the client's own control variate."""

    def upload_like(self, params: Params) -> Params:
        """Returns zeros for the change of ``c_k``, which has the form of the parameters."""
        return tree.zeros_like(params)

    def init_memory(self, params: Params, buffers: Params) -> Memory:  # noqa: ARG002
        """Returns ``c_k = 0``, so round 1 is FedAvg."""
        return tree.zeros_like(params)

    def correct(self, grads: Params, params: Params, task: LocalTask) -> Params:  # noqa: ARG002
        """Returns ``g + c - c_k``."""
        return {name: grad + (task.message[name] - task.memory[name]) for name, grad in grads.items()}

    def finish(self, params: Params, buffers: Params, task: LocalTask, num_steps: int) -> tuple[Params, Memory]:  # noqa: ARG002
        """Uploads ``c_k+ - c_k`` and remembers ``c_k+``; without a step nothing changes."""
        if num_steps == 0:
            return tree.zeros_like(task.memory), task.memory
        scale = 1.0 / (num_steps * task.lr)
        change = {name: scale * (task.params[name] - params[name]) - control for name, control in task.message.items()}
        return change, tree.add(task.memory, change)


@dataclass(frozen=True)
class ControlledServer:
    """A step along the mean update, and the running mean of the control variates."""

    num_clients: int
    server_lr: float = 1.0
    weighting: Weighting = "uniform"

    def init(self, params: Params) -> Memory:
        """Returns ``c = 0``."""
        return tree.zeros_like(params)

    def message(self, state: ServerState) -> Params:
        """Returns the global control variate ``c``."""
        return state.server

    def step(self, state: ServerState, results: Sequence[ClientResult]) -> tuple[ServerState, Metrics]:
        """Sets ``w <- a + server_lr (mean w_k - a)``, written so that rate 1 gives the mean bit for bit."""
        mean, buffers = aggregate(results, self.weighting)
        params = tree.add(mean, tree.sub(mean, state.params), scale=self.server_lr - 1.0)
        active = sorted((r for r in results if r.num_samples > 0), key=lambda result: result.client)
        change = tree.weighted_mean([result.extra for result in active], [1.0] * len(active))
        control = tree.add(state.server, change, scale=len(active) / self.num_clients)
        metrics = {**update_norm(state, params), "control_norm": tree.norm(control)}
        return replace(state, params=params, buffers=buffers, server=control), metrics


class ScaffoldConfig(AlgorithmConfig):
    """``algorithm.name = "scaffold"``: takes clients' drift out of their gradients by control variates (ICML 2020)."""

    name: Literal["scaffold"] = "scaffold"
    server_lr: float = Field(default=1.0, gt=0, description="1 takes the mean of the clients' models (paper: 1)")
    weighting: Weighting = "uniform"

    def build(self, num_clients: int) -> Algorithm:
        """Returns the rules; the control variate is averaged over all ``num_clients``."""
        return Algorithm(ControlledLocal(), ControlledServer(num_clients, self.server_lr, self.weighting))
