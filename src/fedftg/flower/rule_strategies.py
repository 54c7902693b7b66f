"""FedDyn, SCAFFOLD and MOON as Flower strategies: sampling and evaluation are Flower's, the server rule is ours.

Clients answer with `fedftg.flower.local_training.local_train`. Each composes with FedFTG: ``FedFTG(Scaffold(...))``.
"""

from __future__ import annotations

import logging
import math
import secrets
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from pydantic import ValidationError
from torch import nn

from fedftg.algorithms.base import AlgorithmConfig, ClientResult, LocalTask, ServerState
from fedftg.algorithms.fedavg import Weighting
from fedftg.algorithms.feddyn import FedDynConfig
from fedftg.algorithms.moon import MoonConfig
from fedftg.algorithms.scaffold import ScaffoldConfig
from fedftg.engine.local_train import LocalConfig
from fedftg.errors import InputError, explain
from fedftg.flower import records
from fedftg.flower.local_training import INITIAL, TASK, TrainOrder, client_of
from fedftg.flower.model_layout import ModelLayout
from fedftg.flower.records import EXTRA, LARGEST_COUNT, LOSS, MESSAGE, PARTITION_ID, RecordError
from fedftg.params import Params, first_non_finite, prefixed, unprefixed

_log = logging.getLogger("flwr")


class RuleStrategy(FedAvg):
    """Flower's FedAvg, with one of our server rules in the place of its average.

    Args:
        model: the classifier whose values the arrays are; its structure tells parameters from buffers.
        algorithm: settings of the rules.
        num_clients: of the whole federation, those that are never asked included.
        local: how clients train; the defaults are those of the FedFTG paper's CIFAR experiments.
        seed: of all that clients draw; the numbers are those of ``fedftg run`` with this seed and the same cohorts.
        mean_examples: training samples of a client, mean over all: FedDyn's alpha is per sample. None counts every
            client as of mean size.
        options: those of ``flwr.serverapp.strategy.FedAvg``, such as ``fraction_train``.

    Raises:
        InputError: a setting out of range.
    """

    sends_initial = False
    """Whether clients that have not taken part yet get the very first model too."""

    def __init__(
        self,
        model: nn.Module,
        algorithm: AlgorithmConfig,
        num_clients: int,
        local: LocalConfig | None,
        seed: int,
        mean_examples: float | None,
        options: dict[str, Any],
    ) -> None:
        if num_clients < 1:
            raise InputError(f"num_clients must be >= 1, got {num_clients}; it is the size of the whole federation")
        if mean_examples is not None and not 0 < mean_examples < math.inf:
            raise InputError(f"mean_examples must be > 0, got {mean_examples}; None counts all clients as equal")
        super().__init__(**{"train_metrics_aggr_fn": mean_metrics, **options})
        self._module, self._algorithm_config = model, algorithm
        self._rules = algorithm.build(num_clients)
        self._order = TrainOrder(
            run=secrets.token_hex(8),
            round=1,
            seed=seed,
            num_clients=num_clients,
            mean_examples=mean_examples,
            counted={},
            algorithm=algorithm.model_dump(mode="json"),
            local=local or LocalConfig(),
        )
        self._layout: ModelLayout | None = None
        self._state: ServerState | None = None
        self._memory: Params | None = None
        self._initial: Params = {}
        """The very first model, where clients that never took part need it."""
        self._counted: dict[int, int] = {}
        """Per client, its last round that counted."""
        self._clients: dict[int, int] = {}
        """The client of each node whose reply could be used."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Flower's messages, with what the rule sends besides the model, and the order to train.

        Raises:
            InputError: the arrays are not those of the model.
        """
        if self._layout is None:
            self._layout = ModelLayout(self._module, arrays)
        params, buffers = self._layout.split(self._layout.accept(arrays))
        if self._memory is None:
            self._memory = self._rules.server.init(params)
            self._initial = self._layout.join(params, buffers) if self.sends_initial else {}
        self._state = ServerState(server_round - 1, params, buffers, self._memory, {})
        sent = self._rules.server.message(self._state)
        extra = {MESSAGE: records.encode(sent)} if sent else {}
        messages = list(super().configure_train(server_round, arrays, config, grid))
        order = self._order.model_copy(update={"round": server_round, "counted": dict(self._counted)})
        ask = ConfigRecord({**dict(config.items()), TASK: order.model_dump_json()})
        initial = {INITIAL: records.encode(self._initial)} if self._initial else {}
        for message in messages:
            new = self._clients.get(message.metadata.dst_node_id) not in self._counted
            content = RecordDict({**dict(message.content.items()), **extra, **(initial if new else {})})
            content[self.configrecord_key] = ask
            message.content = content
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The next global model by the server rule; a reply that does not fit is left out and logged.

        Clients whose reply was left out, and all of them where the result is not finite, forget the round.
        """
        if self._state is None or self._layout is None:
            raise InputError("aggregate_train came before configure_train; call configure_train with the model first")
        valid, _ = self._check_and_log_replies(list(replies), is_train=True, validate=False)
        read: list[tuple[ClientResult, Message]] = []
        for message in valid:
            try:
                read.append((self._result(message), message))
            except RecordError as error:
                self._leave_out(server_round, message, str(error))
        nodes = Counter(result.client for result, _ in read)
        used: list[tuple[ClientResult, Message]] = []
        for result, message in sorted(read, key=lambda pair: pair[0].client):
            if nodes[result.client] > 1:
                reason = f"{nodes[result.client]} nodes are client {result.client}; give each its own partition-id"
                self._leave_out(server_round, message, reason)
                continue
            used.append((result, message))
            self._clients[message.metadata.src_node_id] = result.client
        if not any(result.num_samples > 0 for result, _ in used):
            return None, None
        ordered = [result for result, _ in used]
        state, measured = self._rules.server.step(self._state, ordered)
        bad = first_non_finite({**state.params, **state.buffers}) or first_non_finite(state.server)
        if bad is not None:
            _log.error(
                "%s, round %d: the aggregate is not finite (%s); the global model stays as it was",
                type(self).__name__,
                server_round,
                bad,
            )
            return None, None
        self._memory = state.server
        self._counted |= {result.client: server_round for result in ordered}
        contents = [message.content for _, message in used]
        metrics = MetricRecord(dict(self.train_metrics_aggr_fn(contents, self.weighted_by_key).items()))
        for name, value in measured.items():
            metrics[name.replace("_", "-")] = value
        return self._layout.encode(self._layout.join(state.params, state.buffers)), metrics

    def _leave_out(self, number: int, message: Message, reason: str) -> None:
        node = message.metadata.src_node_id
        _log.warning("%s, round %d: node %d is left out: %s", type(self).__name__, number, node, reason)

    def state_tensors(self) -> Params:
        """What a resumed run needs: the server's memory, and which round of each client counted last."""
        counted = torch.tensor([[client, self._counted[client]] for client in sorted(self._counted)], dtype=torch.int64)
        run = torch.tensor(list(self._order.run.encode()), dtype=torch.uint8)
        kept = prefixed(self._memory or {}, "memory/") | prefixed(self._initial, "initial/")
        return {"counted": counted, "run": run, **kept}

    def resume_settings(self) -> dict[str, Any]:
        """What a resumed run must have the same: rules, local training, seed, size of the federation."""
        keys = {"weighted_by_key": self.weighted_by_key, "arrayrecord_key": self.arrayrecord_key}
        return self._order.model_dump(mode="json", exclude={"run", "round", "counted"}) | keys

    def load_state_tensors(self, tensors: Params) -> None:
        """Goes on where `state_tensors` was taken."""
        self._counted = {int(client): int(number) for client, number in tensors["counted"].reshape(-1, 2).tolist()}
        self._order = self._order.model_copy(update={"run": bytes(tensors["run"].tolist()).decode()})
        self._memory, self._initial = unprefixed(tensors, "memory/"), unprefixed(tensors, "initial/")

    def _result(self, message: Message) -> ClientResult:
        """A reply's model and further upload.

        Raises:
            RecordError: something is missing, of another shape or type, or not finite.
        """
        assert self._state is not None
        assert self._layout is not None
        arrays, metrics = dict(message.content.array_records), MetricRecord()
        for record in message.content.metric_records.values():
            for key, value in record.items():
                metrics[key] = value
        if self.arrayrecord_key not in arrays:
            raise RecordError(
                f"the reply has no ArrayRecord {self.arrayrecord_key!r}; reply with what local_train gives"
            )
        params, buffers = self._layout.split(self._layout.decode(arrays[self.arrayrecord_key]))
        size, loss = metrics.get(self.weighted_by_key), metrics.get(LOSS)
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= LARGEST_COUNT:
            raise RecordError(f"metric {self.weighted_by_key!r} must be a whole number from 0 to 2**53, got {size}")
        partition = records.partition_of(metrics)
        client = client_of(message.metadata.src_node_id) if partition is None else partition
        template = self._extra_template()
        if template and EXTRA not in arrays:
            raise RecordError(f"the reply has no ArrayRecord {EXTRA!r}; reply with what local_train gives")
        extra = records.decode(arrays[EXTRA], template, finite=True) if template else {}
        mean_loss = float(loss) if isinstance(loss, int | float) else math.nan
        no_counts = torch.zeros(0, dtype=torch.int64)
        return ClientResult(client, size, no_counts, params, buffers, extra, {}, mean_loss)

    def _extra_template(self) -> Params:
        """What the local rule uploads besides the model, by a client that makes no step."""
        assert self._state is not None
        params, buffers = self._state.params, self._state.buffers
        memory = self._rules.local.init_memory(params, buffers)
        sent = self._rules.server.message(self._state)
        task = LocalTask(1, 0, params, buffers, memory, sent, 1, 1.0, 1.0, 0)
        return self._rules.local.finish(params, buffers, task, 0)[0]


class FedDyn(RuleStrategy):
    """FedDyn (Acar and others, ICLR 2021): see `fedftg.algorithms.feddyn`, and `RuleStrategy` for what is not here.

    Args:
        model: see `RuleStrategy`.
        num_clients: see `RuleStrategy`.
        alpha: 0 gives FedAvg with uniform weights; 0.1 regularises strongly (paper: 0.01).
        weighting: ``uniform`` (the paper) or ``samples``.
        local: see `RuleStrategy`.
        seed: see `RuleStrategy`.
        mean_examples: see `RuleStrategy`.
        options: see `RuleStrategy`.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        num_clients: int,
        alpha: float = 0.01,
        weighting: Weighting = "uniform",
        local: LocalConfig | None = None,
        seed: int = 0,
        mean_examples: float | None = None,
        **options: Any,
    ) -> None:
        algorithm = _config(FedDynConfig, alpha=alpha, weighting=weighting)
        super().__init__(model, algorithm, num_clients, local, seed, mean_examples, options)


class Scaffold(RuleStrategy):
    """SCAFFOLD (Karimireddy and others, ICML 2020): see `fedftg.algorithms.scaffold`, and `RuleStrategy`.

    Messages and replies hold twice the model: its control variate, or the change of it, goes along.

    Args:
        model: see `RuleStrategy`.
        num_clients: see `RuleStrategy`.
        server_lr: 1 takes the mean of the clients' models (paper: 1).
        weighting: ``uniform`` (the paper) or ``samples``.
        local: see `RuleStrategy`.
        seed: see `RuleStrategy`.
        options: see `RuleStrategy`.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        num_clients: int,
        server_lr: float = 1.0,
        weighting: Weighting = "uniform",
        local: LocalConfig | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        algorithm = _config(ScaffoldConfig, server_lr=server_lr, weighting=weighting)
        super().__init__(model, algorithm, num_clients, local, seed, None, options)


class Moon(RuleStrategy):
    """MOON (Li, He, Song, CVPR 2021): see `fedftg.algorithms.moon`, and `RuleStrategy` for what is not here.

    A client that has not taken part yet is sent the initial model too, which stands for its previous one.

    Args:
        model: see `RuleStrategy`; it must end with a linear layer.
        num_clients: see `RuleStrategy`.
        mu: 0 gives FedAvg (FedFTG paper: 0.5).
        temperature: low values sharpen the contrast (FedFTG paper: 5).
        weighting: ``samples`` (the paper) or ``uniform``.
        local: see `RuleStrategy`.
        seed: see `RuleStrategy`.
        options: see `RuleStrategy`.
    """

    sends_initial = True

    def __init__(
        self,
        *,
        model: nn.Module,
        num_clients: int,
        mu: float = 0.5,
        temperature: float = 5.0,
        weighting: Weighting = "samples",
        local: LocalConfig | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        algorithm = _config(MoonConfig, mu=mu, temperature=temperature, weighting=weighting)
        super().__init__(model, algorithm, num_clients, local, seed, None, options)


def mean_metrics(contents: list[RecordDict], weighted_by_key: str) -> MetricRecord:
    """The weighted mean of each metric over the clients that have a finite number for it, without ids and lists."""
    sums: dict[str, tuple[float, float]] = {}
    for content in contents:
        told = [record[weighted_by_key] for record in content.metric_records.values() if weighted_by_key in record]
        weight = told[-1] if told and isinstance(told[-1], int | float) else 0
        for record in content.metric_records.values():
            for key, value in record.items():
                if isinstance(value, list) or key in (weighted_by_key, PARTITION_ID) or not math.isfinite(value):
                    continue
                total, weights = sums.get(key, (0.0, 0.0))
                sums[key] = total + weight * value, weights + weight
    return MetricRecord({key: total / weights for key, (total, weights) in sums.items() if weights > 0})


def _config(kind: type[AlgorithmConfig], **settings: Any) -> AlgorithmConfig:
    try:
        return kind(**settings)
    except ValidationError as error:
        raise explain(error, kind) from None
