"""The server rules of `fedftg.algorithms` as Flower strategies; sampling and evaluation are those of Flower's FedAvg.

Clients reply with `fedftg.flower.local_train`. A refiner goes around them: ``FedFTG(Scaffold(...), model=...)``.
"""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from pydantic import ValidationError
from torch import nn

from fedftg.algorithms.base import AlgorithmConfig, ClientResult, LocalRule, Memory, ServerState
from fedftg.algorithms.registry import ALGORITHMS
from fedftg.engine.local_train import LocalConfig
from fedftg.errors import InputError, explain, unknown
from fedftg.flower import wire
from fedftg.flower.wire import Layout, Order, Reply
from fedftg.params import Params, first_non_finite, prefixed, unprefixed

_log = logging.getLogger("flwr")


class RuleStrategy(FedAvg):
    """Flower's FedAvg with the server rule of a registered algorithm in place of the average.

    A reply that does not fit is left out and logged, and its client forgets the round; where the result is not finite,
    the global model stays and all clients forget the round.

    Args:
        model: the classifier to which the arrays belong; its structure separates parameters from buffers.
        num_clients: of the whole federation, including clients that never take part.
        algorithm: its settings, or the name of a registered one; ClientApps must register it too.
        local: how clients train; the defaults are those of the FedFTG paper's CIFAR experiments.
        seed: of everything that clients draw; the numbers are those of ``fedftg run`` with this seed and cohorts.
        mean_examples: training samples of a client, mean over all: FedDyn divides alpha by a client's relative size.
            None gives every client the relative size 1.
        options: settings of the algorithm, where it is given by name, and those of
            ``flwr.serverapp.strategy.FedAvg``, such as ``fraction_train``.

    Raises:
        InputError: an unknown algorithm or a setting out of range.
    """

    name: ClassVar[str] = ""
    """The algorithm of a subclass."""

    def __init__(
        self,
        *,
        model: nn.Module,
        num_clients: int,
        algorithm: AlgorithmConfig | str = "",
        local: LocalConfig | None = None,
        seed: int = 0,
        mean_examples: float | None = None,
        **options: Any,
    ) -> None:
        if num_clients < 1:
            raise InputError(f"num_clients must be >= 1, got {num_clients}; it is the size of the whole federation")
        if mean_examples is not None and not 0 < mean_examples < math.inf:
            raise InputError(f"mean_examples must be > 0, got {mean_examples}; None counts all clients as equal")
        settings = _settings(algorithm or self.name, options)
        super().__init__(**{"train_metrics_aggr_fn": mean_metrics, **options})
        self._module = model
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
        self._memory: Memory | None = None
        self._initial: Params = {}
        """The initial model, where clients that have not taken part yet need it."""
        self._clients: dict[int, int] = {}
        """The client of each node that sent a usable reply."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Returns Flower's messages, with the `Order` to train and what the rule sends besides the model.

        Raises:
            InputError: the arrays are not those of the model.
        """
        if self._layout is None:
            self._layout = Layout(self._module, arrays)
        params, buffers = self._layout.split(self._layout.accept(arrays))
        if self._memory is None:
            self._memory = self._rules.server.init(params)
            if _starts_from_model(self._rules.local, params, buffers):
                self._initial = self._layout.join(params, buffers)
        self._state = ServerState(server_round - 1, params, buffers, self._memory, {})
        self._order = self._order.model_copy(update={"round": server_round})
        records: dict[str, Any] = {self.configrecord_key: ConfigRecord({**config, **self._order.config()})}
        if sent := self._rules.server.message(self._state):
            records[wire.MESSAGE] = wire.encode(sent)
        initial = {wire.INITIAL: wire.encode(self._initial)} if self._initial else {}
        messages = list(super().configure_train(server_round, arrays, config, grid))
        for message in messages:
            new = self._clients.get(message.metadata.dst_node_id) not in self._order.counted
            message.content = RecordDict({**message.content, **records, **(initial if new else {})})
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Returns the next global model by the server rule, and the mean of the clients' metrics with the rule's."""
        if self._state is None or self._layout is None:
            raise InputError("aggregate_train came before configure_train; call configure_train with the model first")
        messages, _ = self._check_and_log_replies(list(replies), is_train=True, validate=False)
        template = self._rules.local.upload_like(self._state.params)
        key, options = self.weighted_by_key, {"extra": template, "arrays_key": self.arrayrecord_key}
        results: list[ClientResult] = []
        contents: list[RecordDict] = []
        for reply in wire.read_replies(messages, self._layout.template, weight_keys=[key], **options):
            node, problem = reply.message.metadata.src_node_id, reply.problem
            if problem is None and type(reply.metrics.get(key)) is not int:
                problem = f"metric {key!r} must be a whole number from 0 to 2**53, got {reply.metrics.get(key)}"
            if problem is not None:
                _log.warning("%s, round %d: node %d is left out: %s", type(self).__name__, server_round, node, problem)
                continue
            results.append(self._result(reply))
            contents.append(reply.message.content)
            self._clients[node] = reply.client
        if not any(result.num_samples > 0 for result in results):
            return None, None
        state, measured = self._rules.server.step(self._state, results)
        bad = first_non_finite({**state.params, **state.buffers}) or first_non_finite(state.server)
        if bad is not None:
            text = "%s, round %d: the aggregate is not finite (%s); the global model stays as it was"
            _log.error(text, type(self).__name__, server_round, bad)
            return None, None
        self._memory = state.server
        counted = self._order.counted | {result.client: server_round for result in results}
        self._order = self._order.model_copy(update={"counted": counted})
        metrics = MetricRecord(dict(self.train_metrics_aggr_fn(contents, self.weighted_by_key)))
        for name, value in measured.items():
            metrics[name.replace("_", "-")] = value
        return wire.encode(self._layout.join(state.params, state.buffers)), metrics

    def state_tensors(self) -> Params:
        """Returns what a resumed run needs: the server's memory, and the last round of each client that counted."""
        counted = torch.tensor(sorted(self._order.counted.items()), dtype=torch.int64)
        run = torch.tensor(list(self._order.run.encode()), dtype=torch.uint8)
        kept = prefixed(self._memory or {}, "memory/") | prefixed(self._initial, "initial/")
        return {"counted": counted, "run": run, **kept}

    def load_state_tensors(self, tensors: Params) -> None:
        """Restores what `state_tensors` returned."""
        counted = {int(client): int(number) for client, number in tensors["counted"].reshape(-1, 2).tolist()}
        run = bytes(tensors["run"].tolist()).decode()
        self._order = self._order.model_copy(update={"run": run, "counted": counted})
        self._memory, self._initial = unprefixed(tensors, "memory/"), unprefixed(tensors, "initial/")

    def resume_settings(self) -> dict[str, Any]:
        """Returns what a resumed run must have the same: algorithm, local training, seed, size of the federation."""
        order = self._order.model_dump(mode="json", include={"seed", "num_clients", "mean_examples"})
        for part, settings in (("algorithm", self._order.algorithm), ("local", self._order.local.model_dump())):
            order |= {f"{part}.{key}": value for key, value in settings.items()}
        return {**order, "weighted_by_key": self.weighted_by_key, "arrayrecord_key": self.arrayrecord_key}

    def _result(self, reply: Reply) -> ClientResult:
        """Returns a reply as server rules take it."""
        assert self._layout is not None
        loss, counts = reply.metrics.get(wire.LOSS), reply.metrics.get(wire.CLASS_COUNTS)
        params, buffers = self._layout.split(reply.arrays)
        return ClientResult(
            client=reply.client,
            num_samples=reply.metrics[self.weighted_by_key],
            class_counts=torch.tensor(counts if isinstance(counts, list) else [], dtype=torch.int64),
            params=params,
            buffers=buffers,
            extra=reply.extra,
            memory={},
            loss=float(loss) if isinstance(loss, int | float) else math.nan,
        )


class FedDyn(RuleStrategy):
    """FedDyn (Acar and others, ICLR 2021), with the settings of `fedftg.algorithms.feddyn.FedDynConfig`."""

    name = "feddyn"


class Scaffold(RuleStrategy):
    """SCAFFOLD (Karimireddy and others, ICML 2020), with the settings of `fedftg.algorithms.scaffold.ScaffoldConfig`.

    Messages and replies hold twice the model.
    """

    name = "scaffold"


class Moon(RuleStrategy):
    """MOON (Li, He, Song, CVPR 2021), with the settings of `fedftg.algorithms.moon.MoonConfig`.

    The model must end with a linear layer. A client that has not taken part yet is sent the initial model too.
    """

    name = "moon"


def mean_metrics(contents: list[RecordDict], weighted_by_key: str) -> MetricRecord:
    """Returns the weighted mean of each metric over the clients with a finite number for it, without ids and lists."""
    replies = [wire.all_metrics(content) for content in contents]
    means: dict[str, float] = {}
    for name in dict.fromkeys(name for reply in replies for name in reply):
        held = [reply for reply in replies if isinstance(reply.get(name), int | float) and math.isfinite(reply[name])]
        total = sum(reply[weighted_by_key] for reply in held)
        if total > 0 and name not in (weighted_by_key, wire.PARTITION_ID):
            means[name] = sum(reply[weighted_by_key] * reply[name] for reply in held) / total
    return MetricRecord(dict(means))


def _settings(algorithm: AlgorithmConfig | str, options: dict[str, Any]) -> AlgorithmConfig:
    """Returns the algorithm's settings; those in ``options`` are taken out of it."""
    name = algorithm if isinstance(algorithm, str) else algorithm.name
    if name not in ALGORITHMS:
        raise unknown("algorithm", name, ALGORITHMS)
    if not isinstance(algorithm, str):
        return algorithm
    kind = ALGORITHMS[name]
    given = {key: options.pop(key) for key in kind.model_fields if key in options}
    try:
        return kind(**{**given, "name": name})
    except ValidationError as error:
        raise explain(error, kind) from None


def _starts_from_model(rule: LocalRule, params: Params, buffers: Params) -> bool:
    """Returns whether a client's first memory depends on the values of the initial model."""

    def memory(fill: float) -> Memory:
        parts = ({name: torch.full_like(value, fill) for name, value in part.items()} for part in (params, buffers))
        return rule.init_memory(*parts)

    zeros, ones = memory(0.0), memory(1.0)
    return any(not torch.equal(zeros[name], ones[name]) for name in zeros)
