"""FedVARP.

Jhunjhunwala, Sharma, Nagarkatti, Joshi, "FedVARP: Tackling the Variance Due to Partial Client Participation in
Federated Learning", UAI 2022, https://arxiv.org/abs/2207.14130.

    client:  as FedAvg; d_k = w_k - a, a the model it received
    server:  w <- a + mean_{k in S} (d_k - h_k) + h;  h <- h + (1/N) sum_{k in S} (d_k - h_k);  h_k <- d_k

h_k is client k's last update and h the mean over all N, zero at first. Each client keeps its own h_k and uploads it;
docs/algorithms/fedvarp.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fedftg import params as tree
from fedftg.algorithms.base import Algorithm, AlgorithmConfig, ClientResult, LocalTask, Memory, Metrics, ServerState
from fedftg.algorithms.fedavg import AverageServer, PlainLocal, aggregate, update_norm
from fedftg.params import Params


class RememberedLocal(PlainLocal):
    """Plain SGD that remembers the client's last update."""

    def upload_like(self, params: Params) -> Params:
        """Returns zeros for ``h_k``, which has the form of the parameters."""
        return tree.zeros_like(params)

    def init_memory(self, params: Params, buffers: Params) -> Memory:  # noqa: ARG002
        """Returns ``h_k = 0``, so round 1 is FedAvg."""
        return tree.zeros_like(params)

    def finish(self, params: Params, buffers: Params, task: LocalTask, num_steps: int) -> tuple[Params, Memory]:  # noqa: ARG002
        """Uploads the last update and remembers this one."""
        return task.memory, tree.sub(params, task.params)


@dataclass(frozen=True)
class VarianceReducedServer(AverageServer):
    """The mean of the cohort, moved by what the last updates of all clients have more than those of the cohort."""

    num_clients: int = 1

    def init(self, params: Params) -> Memory:
        """Returns ``h = 0``."""
        return tree.zeros_like(params)

    def step(self, state: ServerState, results: Sequence[ClientResult]) -> tuple[ServerState, Metrics]:
        """Sets ``w <- mean w_k + (h - mean h_k)``, which is the step above."""
        mean, buffers = aggregate(results, self.weighting)
        active = sorted((r for r in results if r.num_samples > 0), key=lambda result: result.client)
        last = tree.weighted_mean([result.extra for result in active], [1.0] * len(active))
        params = tree.add(mean, tree.sub(state.server, last))
        change = tree.sub(tree.sub(mean, state.params), last)
        mean_update = tree.add(state.server, change, scale=len(active) / self.num_clients)
        metrics = {**update_norm(state, params), "mean_update_norm": tree.norm(mean_update)}
        return replace(state, params=params, buffers=buffers, server=mean_update), metrics


class FedVARPConfig(AlgorithmConfig):
    """``algorithm.name = "fedvarp"``: counts absent clients by their last updates (UAI 2022)."""

    name: Literal["fedvarp"] = "fedvarp"

    def build(self, num_clients: int) -> Algorithm:
        """Returns the rules; the last updates are averaged over all ``num_clients``."""
        return Algorithm(RememberedLocal(), VarianceReducedServer("uniform", num_clients))
