"""The server rules of `fedftg.algorithms` as Flower strategies; sampling and evaluation are those of Flower's FedAvg.

Clients reply with `fedftg.flower.local_train`. A refiner goes around them: ``FedFTG(Scaffold(...), model=...)``.
"""

from __future__ import annotations

import logging
import math
import secrets
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from torch import nn

from fedftg.algorithms.base import ClientResult, Memory, ServerState, broadcast
from fedftg.algorithms.registry import ALGORITHMS
from fedftg.config import parse
from fedftg.engine.local_train import LocalConfig
from fedftg.errors import InputError, unknown
from fedftg.flower import wire
from fedftg.flower.wire import Layout, Order
from fedftg.params import Params, first_non_finite, prefixed, unprefixed

_LAST = ("params", "buffers", "deployed")
_log = logging.getLogger("flwr")


class RuleStrategy(FedAvg):
    """Flower's FedAvg with the server rule of a registered algorithm in place of the average.

    A reply that does not fit is left out and logged, and its client forgets the round. Where the result is not finite,
    the global model stays and all clients forget the round.

    Args:
        model: the classifier to which the arrays belong; its structure separates parameters from buffers.
        num_clients: of the whole federation, including clients that never take part.
        algorithm: the name of a registered one; ClientApps must register it too.
        local: how clients train; the defaults are those of the FedFTG paper's CIFAR experiments.
        seed: of everything that clients draw; the numbers are those of ``fedftg run`` with this seed and cohorts.
        mean_examples: mean number of training samples of all clients: FedDyn divides alpha by a client's relative size.
            None gives every client the relative size 1.
        options: settings of the algorithm, and of ``flwr.serverapp.strategy.FedAvg``, such as ``fraction_train``.
    """

    name: ClassVar[str] = ""

    def __init__(
        self,
        *,
        model: nn.Module,
        num_clients: int,
        algorithm: str = "",
        local: LocalConfig | None = None,
        seed: int = 0,
        mean_examples: float | None = None,
        **options: Any,
    ) -> None:
        if num_clients < 1:
            raise InputError(f"num_clients must be >= 1, got {num_clients}")
        name = algorithm or self.name
        if name not in ALGORITHMS:
            raise unknown("algorithm", name, ALGORITHMS)
        kind = ALGORITHMS[name]
        given = {key: options.pop(key) for key in kind.model_fields if key in options}
        settings = parse(kind, {"name": name, **given})
        super().__init__(**{"train_metrics_aggr_fn": mean_metrics, **options})
        self.algorithm, self._module = name, model
        self._rules = settings.build(num_clients)
        self._order = Order(
            run=secrets.token_hex(8),
            round=0,
            seed=seed,
            num_clients=num_clients,
            mean_examples=mean_examples,
            counted={},
            algorithm=settings.model_dump(mode="json"),
            local=local or LocalConfig(),
        )
        self._layout: Layout | None = None
        self._state: ServerState | None = None
        self._last: ServerState | None = None  # as the rule returned it, where it deploys another model than it sends
        self._memory: Memory | None = None
        self._initial: Params = {}  # the model, where clients that have not taken part yet need it
        self._aggregated: set[int] = set()  # nodes

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Returns Flower's messages, with the `Order` to train and what the rule sends besides the model."""
        self._layout = self._layout or Layout(self._module, arrays)
        params, buffers = self._layout.split(self._layout.accept(arrays))
        if self._memory is None:
            self._memory = self._rules.server.init(params)
            if any(bool(value.any()) for value in self._rules.local.init_memory(params, buffers).values()):
                self._initial = self._layout.join(params, buffers)  # a client's first memory is made of it
        self._state = ServerState(server_round - 1, params, buffers, self._memory, {})
        if self._last is not None:  # what clients receive is moved as the deployed model was since (`Refined`)
            self._state = replace(broadcast(self._last, self._state, 1.0), deployed={})
            arrays = wire.encode(self._layout.join(self._state.params, self._state.buffers))
        self._order = self._order.model_copy(update={"round": server_round})
        records: dict[str, Any] = {self.configrecord_key: ConfigRecord({**config, **self._order.config()})}
        if sent := self._rules.server.message(self._state):
            records[wire.MESSAGE] = wire.encode(sent)
        initial = {wire.INITIAL: wire.encode(self._initial)} if self._initial else {}
        messages = list(super().configure_train(server_round, arrays, config, grid))
        for message in messages:
            new = message.metadata.dst_node_id not in self._aggregated
            message.content = RecordDict({**message.content, **records, **(initial if new else {})})
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Returns the next global model, and the mean of the clients' metrics with the rule's."""
        assert self._state is not None, "configure_train comes first"
        assert self._layout is not None
        key = self.weighted_by_key
        read = wire.read_replies(
            replies,
            self._layout.template,
            extra=self._rules.local.upload_like(self._state.params),
            arrays_key=self.arrayrecord_key,
            weight_keys=[key],
        )
        results: list[ClientResult] = []
        messages: list[Message] = []
        for reply in read:
            size = reply.metrics.get(key)
            if reply.problem is None and type(size) is int:
                params, buffers = self._layout.split(reply.arrays)
                counts = torch.tensor(reply.metrics.get(wire.CLASS_COUNTS, []), dtype=torch.int64)
                results.append(ClientResult(reply.client, size, counts, params, buffers, reply.extra, {}, math.nan))
                messages.append(reply.message)
            else:
                node, problem = reply.message.metadata.src_node_id, f"metric {key!r} must be a whole number, got {size}"
                _log.warning("round %d: node %d is left out: %s", server_round, node, reply.problem or problem)
        if not any(result.num_samples > 0 for result in results):
            return None, None
        state, measured = self._rules.server.step(self._state, results)
        parts = {**state.params, **state.buffers}, state.server, state.deployed
        bad = next((name for part in parts if (name := first_non_finite(part)) is not None), None)
        if bad is not None:
            _log.error("round %d: the aggregate is not finite (%s); the global model stays", server_round, bad)
            return None, None
        self._memory, self._last = state.server, state if state.deployed else None
        self._aggregated |= {message.metadata.src_node_id for message in messages}
        counted = self._order.counted | {result.client: server_round for result in results}
        self._order = self._order.model_copy(update={"counted": counted})
        metrics = self.train_metrics_aggr_fn([message.content for message in messages], key)
        metrics.update({name.replace("_", "-"): value for name, value in measured.items()})
        return wire.encode(self._layout.join(*state.model)), metrics

    def state_tensors(self) -> Params:
        """Returns what a resumed run needs: the server's memory and the order, with the rounds that counted."""
        order = torch.tensor(list(self._order.model_dump_json().encode()), dtype=torch.uint8)
        kept = {"order": order, **prefixed(self._memory or {}, "memory/"), **prefixed(self._initial, "initial/")}
        for part in _LAST if self._last is not None else ():
            kept |= prefixed(getattr(self._last, part), f"last/{part}/")
        return kept

    def load_state_tensors(self, tensors: Params) -> None:
        """Restores what `state_tensors` returned; `InputError` for other settings than this run's."""
        before = Order.model_validate_json(bytes(tensors["order"].tolist()))
        for name in ("algorithm", "local", "seed", "num_clients", "mean_examples"):
            if getattr(before, name) != getattr(self._order, name):
                raise InputError(f"the checkpoint is of a run with {name} = {getattr(before, name)}; use the same")
        self._order = before
        self._memory, self._initial = unprefixed(tensors, "memory/"), unprefixed(tensors, "initial/")
        params, buffers, deployed = (unprefixed(tensors, f"last/{part}/") for part in _LAST)
        self._last = ServerState(0, params, buffers, {}, {}, deployed) if deployed else None


class FedDyn(RuleStrategy):
    """FedDyn (Acar and others, ICLR 2021), with the settings of `fedftg.algorithms.feddyn.FedDynConfig`."""

    name = "feddyn"


class Scaffold(RuleStrategy):
    """SCAFFOLD (Karimireddy and others, ICML 2020), with `ScaffoldConfig`'s settings; messages are twice the model."""

    name = "scaffold"


class Moon(RuleStrategy):
    """MOON (Li, He, Song, CVPR 2021), with `MoonConfig`'s settings; the model must end with a linear layer."""

    name = "moon"


def mean_metrics(contents: list[RecordDict], weighted_by_key: str) -> MetricRecord:
    """Returns the weighted mean of each metric over the clients with a finite number for it, without ids and lists."""
    sums: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    for metrics in map(wire.all_metrics, contents):
        size, _ = metrics.pop(weighted_by_key), metrics.pop(wire.PARTITION_ID, None)
        for name, value in metrics.items():
            if isinstance(value, int | float) and math.isfinite(value):
                sums[name] += size * value
                weights[name] += size
    return MetricRecord({name: sums[name] / weights[name] for name in sums if weights[name]})
