"""Any refiner around any Flower strategy: the base strategy aggregates, the refiner improves what it returns."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord
from flwr.app.message import make_message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Result, Strategy
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords
from torch import Tensor, nn

from fedftg.algorithms.base import ClientResult, Memory, RefinerConfig, RefinerContext, ServerState, broadcast
from fedftg.algorithms.fedftg import FedFTGConfig
from fedftg.algorithms.registry import REFINERS
from fedftg.config import parse
from fedftg.distill.config import DistillConfig
from fedftg.engine.machine import resolve_device
from fedftg.errors import InputError, first_line, unknown
from fedftg.flower.wire import ARRAYS, CLASS_COUNTS, PARTITION_ID, Layout, Reply, encode, read_replies
from fedftg.models.functional import FunctionalModel
from fedftg.params import Params, copied, first_non_finite, prefixed, to_device, unprefixed
from fedftg.rundir.tensors import read_metadata, read_tensors, write_tensors
from fedftg.seeds import SERVER, torch_rng

_log = logging.getLogger("flwr")


@dataclass
class RefineReport:
    """What the refiner did in one round."""

    round: int
    teachers: list[int] = field(default_factory=list)
    """The clients whose models the refiner used: partition ids, or the low 63 bits of node ids."""
    left_out: dict[int, str] = field(default_factory=dict)
    """Per client that was no teacher, the reason."""
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    rolled_back: str | None = None
    """Why the result is the base strategy's aggregate, or the model before; None: it was refined, or was not due."""


class Refined(Strategy):
    """A Flower strategy whose aggregate a refiner improves.

    Clients are sent the aggregate, moved towards the refined model by the weight ``refiner.broadcast`` (1: the refined
    model). What is evaluated, by clients and by ``evaluate_fn``, and what `start` returns is the refined model. With
    ``refiner.when = "evaluation"`` it is made in every round where ``evaluate_fn`` is given or the base asks clients to
    evaluate (``fraction_evaluate``), else in the last one.

    Sampling, messages, aggregation and evaluation are the base strategy's, and what it raises is raised. Replies with
    NaN or other arrays than the model's reach the base as errors. Results do not depend on the order of replies. Where
    the refined model is not finite, or the refiner raises ``RuntimeError`` (out of memory), the base's aggregate is
    returned; where the aggregate is not finite, the global model stays. Each is logged, and in `reports`.

    A refiner that averages every client's last upload (``average = "all"``) keeps one model per client that ever took
    part, in memory on the CPU and in the checkpoint, which is written after each round. Clients are known by
    `partition-id`; without it a restarted node is a new client.

    Args:
        base: of ``flwr.serverapp.strategy``, or one of your own for Flower's Message API.
        refiner: the settings of a refiner, or the name of a registered one with its default settings.
        model: the classifier to which the arrays belong, from images ``(B, D, H, W)`` to logits ``(B, C)``; copied.
            Parameters with ``requires_grad=False`` keep their aggregated values.
        image_shape: ``(D, H, W)`` of its images; FedFTG's generator takes 1 or 3 channels, 8 to 224 pixels a side.
        mean: per channel, by which clients normalise images scaled to 0..1; a refiner on proxy images needs it.
        std: likewise.
        seed: of everything that is drawn on the server; the numbers are those of ``fedftg run`` with this seed.
        device: where the server refines; ``auto`` is a GPU if there is one.
        checkpoint: a folder for the state after each round; `start` resumes from it.
    """

    def __init__(
        self,
        base: Strategy,
        refiner: RefinerConfig | str,
        model: nn.Module,
        image_shape: Sequence[int],
        *,
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
        seed: int = 0,
        device: str = "auto",
        checkpoint: str | Path | None = None,
    ) -> None:
        _check_base(base)
        if isinstance(refiner, str):
            if refiner not in REFINERS:
                raise unknown("refiner", refiner, REFINERS)
            refiner = REFINERS[refiner](name=refiner)
        self.base = base
        self.reports: list[RefineReport] = []
        self.deployed: ArrayRecord | None = None
        """The refined model, where clients receive another one."""
        self._config, self._module, self._seed = refiner, model, seed
        self._checkpoint = None if checkpoint is None else Path(checkpoint) / "refined.safetensors"
        self._device = torch.device(resolve_device(device))
        trainable = FunctionalModel(copied(model).float().to(self._device))
        self._num_classes = _num_classes(trainable, image_shape, self._device)
        channels, height, width = image_shape
        shape, normalisation = (channels, height, width), (tuple(mean), tuple(std))
        self._refiner = refiner.build(RefinerContext(trainable, self._num_classes, shape, self._device, *normalisation))
        self._memory: Memory = self._refiner.init(trainable.init()[0], torch_rng(seed, 0, SERVER, "refiner"))
        self._layout: Layout | None = None
        self._sent = ArrayRecord()
        self._uploads: dict[int, Params] = {}  # the last of each client, where the refiner reads it
        self._only: int | None = None  # the one round that is refined, where none but it is due
        self._offset = 0  # rounds done in earlier sessions; Flower's loop counts from 1

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Returns the base's messages; arrays that are not the model's are an `InputError`."""
        self._layout = self._layout or Layout(self._module, arrays)
        self._sent = arrays
        if isinstance(self.base, flower.FedAvgM):
            self.base.current_arrays = None  # else it steps from its own last aggregate, which no client received
        number = server_round + self._offset
        return type(self.base).configure_train(self.base, number, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Returns what clients receive next, and the base's metrics with those of the refining (``fedftg-...``)."""
        assert self._layout is not None, "configure_train comes first"
        report = RefineReport(server_round + self._offset)
        weights = [vars(self.base).get(key) for key in ("weighted_by_key", "train_loss_key")]
        read = read_replies(
            replies,
            self._layout.template,
            num_classes=self._num_classes,
            arrays_key=getattr(self.base, "arrayrecord_key", ARRAYS),
            weight_keys=[key for key in weights if key],
        )
        teachers = self._teachers(read, report)
        messages = [self._for_base(reply) for reply in read]
        arrays, metrics = type(self.base).aggregate_train(self.base, report.round, messages)
        result = self._refine(arrays, teachers, report)
        self.reports.append(report)
        if self._checkpoint is not None:
            self._save(self._checkpoint, report.round, self._layout.accept(self._sent) if result is None else result)
        return None if result is None else encode(result), self._logged(report, metrics)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Returns the base's messages, with the model that is deployed."""
        number, arrays = server_round + self._offset, self.deployed or arrays
        return type(self.base).configure_evaluate(self.base, number, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Returns the base's metrics."""
        return type(self.base).aggregate_evaluate(self.base, server_round + self._offset, replies)

    def summary(self) -> None:
        """Logs the refiner's settings that are not its defaults, then the base's."""
        changed = self._config.model_dump(exclude_defaults=True)
        _log.info("\t├──> Refiner %s %s on %s, around:", self._config.name, changed, self._device)
        self.base.summary()

    def restore(self) -> tuple[int, ArrayRecord] | None:
        """Loads the checkpoint and returns the number of rounds done and what clients receive next; None: none there.

        `start` calls it; call it before a loop of your own. `InputError` where it is of a run with other settings.
        """
        if self._checkpoint is None or not self._checkpoint.exists():
            return None
        tensors = read_tensors(self._checkpoint)
        saved = json.loads(read_metadata(self._checkpoint)["refined"])
        for key, value in self._settings().items():
            if saved.get(key) != value:
                was = f"of a run with {key} = {saved.get(key)}, this one has {value}"
                raise InputError(f"{self._checkpoint} is {was}; use the same, or another folder")
        self._memory = unprefixed(tensors, "refiner/")
        _load_state(self.base, unprefixed(tensors, "base/"))
        uploads = unprefixed(tensors, "uploads/")
        clients = {name.partition("/")[0] for name in uploads}
        self._uploads = {int(client): unprefixed(uploads, client + "/") for client in clients}
        self.deployed = encode(unprefixed(tensors, "deployed/")) or None
        arrays = encode(unprefixed(tensors, "arrays/"))
        self._layout = Layout(self._module, arrays)
        return int(saved["round"]), arrays

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Runs the rounds in Flower's loop; resumes from a checkpoint.

        ``num_rounds`` counts from the very first round: 10 after a checkpoint of round 4 runs 6 more. ``evaluate_fn``
        and the result have the true numbers of rounds, Flower's log lines count from 1.
        """
        self.deployed = None
        found = self.restore()
        done, arrays = found or (0, initial_arrays)
        self._offset = done
        if done:
            _log.warning("resumed after round %d from %s; give another folder to start anew", done, self._checkpoint)
        evaluate = evaluate_fn and (lambda number, arrays: evaluate_fn(number + done, self.deployed or arrays))
        asked = evaluate_fn is not None or getattr(self.base, "fraction_evaluate", 1) > 0
        self._only = num_rounds if self._config.when == "evaluation" and not asked else None
        if type(self.base).start is not Strategy.start:
            _log.warning("the start() of %s is not used, but Flower's", type(self.base).__name__)
        result = super().start(grid, arrays, num_rounds - done, timeout, train_config, evaluate_config, evaluate)
        result.arrays = self.deployed or result.arrays
        if not done:
            return result
        result.arrays = result.arrays or arrays
        for name in ("train_metrics_clientapp", "evaluate_metrics_clientapp", "evaluate_metrics_serverapp"):
            setattr(result, name, {number + done: value for number, value in getattr(result, name).items()})
        return result

    def _teachers(self, read: list[Reply], report: RefineReport) -> list[ClientResult]:
        assert self._layout is not None
        sent = [reply.class_counts is not None for reply in read if reply.problem is None]
        if sent and not any(sent) and not any(earlier.teachers for earlier in self.reports):
            raise InputError(
                f"no reply of round {report.round} has the metric {CLASS_COUNTS!r}; in the ClientApp, add "
                f"{CLASS_COUNTS!r}: fedftg.flower.class_counts(labels, {self._num_classes}) to the MetricRecord"
            )
        teachers = []
        for reply in read:
            counts = reply.class_counts
            if reply.problem is None and counts is not None and counts.any():
                params, buffers = self._layout.split(reply.arrays)
                size = int(counts.sum())
                teachers.append(ClientResult(reply.client, size, counts, params, buffers, {}, {}, float("nan")))
                continue
            reason = reply.problem or f"its metric {CLASS_COUNTS!r} is missing or all 0"
            report.left_out[reply.client] = reason
            _log.warning("round %d: client %d is no teacher: %s", report.round, reply.client, reason)
        return teachers

    def _for_base(self, reply: Reply) -> Message:
        message = reply.message
        if message.has_error():
            return message
        if reply.problem is not None:
            return make_message(message.metadata, error=Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reply.problem))
        if vars(self.base).get("train_metrics_aggr_fn") is aggregate_metricrecords:
            for metrics in message.content.metric_records.values():  # else it averages them
                for key in (CLASS_COUNTS, PARTITION_ID):
                    metrics.pop(key, None)
        return message

    def _refine(self, arrays: ArrayRecord | None, teachers: list[ClientResult], report: RefineReport) -> Params | None:
        """Returns what clients receive, the aggregate or None where refining fails; completes the report."""
        assert self._layout is not None
        aggregate = None if arrays is None else self._layout.accept(arrays)
        bad = first_non_finite(aggregate or {})
        if aggregate is None or bad is not None:
            reason = f"the aggregate is not finite ({bad})" if bad else "the base strategy gave no aggregate"
            report.rolled_back = f"{reason}; the global model stays as it was"
            return None
        if not teachers:
            self.deployed = None
            report.rolled_back = "there was no teacher"
            return aggregate
        report.teachers = [one.client for one in teachers]
        start, device = time.perf_counter(), self._device
        try:
            placed = [
                replace(
                    one,
                    params=to_device(one.params, device),
                    buffers=to_device(one.buffers, device),
                    previous=to_device(self._uploads.get(one.client, {}), device),
                )
                for one in teachers
            ]
            params, buffers = (to_device(part, device) for part in self._layout.split(aggregate))
            state = ServerState(report.round - 1, params, buffers, {}, to_device(self._memory, device))
            state = replace(state, refiner=self._refiner.observe(state, placed))
            self._memory = to_device(state.refiner, "cpu")
            if getattr(self._refiner, "reads_previous", False):
                self._uploads |= {one.client: {**one.params, **one.buffers} for one in teachers}
            if self._only not in (None, report.round):
                return aggregate
            rng = torch_rng(self._seed, report.round, SERVER, "refine")
            refined, report.metrics = self._refiner.refine(state, placed, rng)
            model = self._layout.join(refined.params, refined.buffers)
            bad = first_non_finite({**model, **refined.deployed}) or first_non_finite(refined.refiner)
            if bad is not None:
                raise FloatingPointError(f"{bad} of the refined model is not finite")
        except (RuntimeError, FloatingPointError) as error:
            self.deployed = None
            report.rolled_back = first_line(error)
            _log.error("the refiner failed", exc_info=True)
            return aggregate
        report.seconds = time.perf_counter() - start
        self._memory = to_device(refined.refiner, "cpu")
        sent = broadcast(state, refined, self._config.broadcast)
        self.deployed = encode(self._layout.join(*sent.model)) if sent.deployed else None
        return self._layout.join(sent.params, sent.buffers)

    def _logged(self, report: RefineReport, metrics: MetricRecord | None) -> MetricRecord:
        """Logs a report, and returns the base's metrics with its, without seconds: the same in each run."""
        count = len(report.teachers)
        if report.rolled_back:
            _log.error("round %d: not refined: %s", report.round, report.rolled_back)
        elif report.seconds:
            _log.info("round %d: refined with %d teachers in %.1f s", report.round, count, report.seconds)
        rolled_back = int(report.rolled_back is not None)
        own = {"teachers": count, "left-out": len(report.left_out), "rolled-back": rolled_back, **report.metrics}
        return MetricRecord(dict(metrics or {}) | {f"fedftg-{key.replace('_', '-')}": own[key] for key in own})

    def _save(self, path: Path, number: int, arrays: Params) -> None:
        assert self._layout is not None
        tensors = prefixed(arrays, "arrays/") | prefixed(self._memory, "refiner/")
        for client, upload in self._uploads.items():
            tensors |= prefixed(upload, f"uploads/{client}/")
        if self.deployed is not None:
            tensors |= prefixed(self._layout.accept(self.deployed), "deployed/")
        tensors |= prefixed(_state_of(self.base), "base/")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, tensors, {"refined": json.dumps({"round": number, **self._settings()})})

    def _settings(self) -> dict[str, Any]:
        refiner = {f"refiner.{key}": value for key, value in self._config.model_dump(mode="json").items()}
        return {"seed": self._seed, "base": type(self.base).__name__, **refiner}


class FedFTG(Refined):
    """`Refined` with FedFTG, which fine-tunes the aggregate on the server without data.

    Args:
        strategy: the base; see `Refined` for it and the other arguments.
        config: a preset (``fedftg``, ``paper``, ``official``), or a `DistillConfig`, the fine-tuning alone. ``fedftg``
            deploys an average of last uploads after round 20, for which it keeps one model per client.
        absent_weight: >= 0: the weight of the previous round's model as a teacher for the classes of absent clients;
            0 is off. None: the preset's, 0 with a `DistillConfig`.
        options: those of `Refined`: ``seed``, ``device``, ``checkpoint``.
    """

    def __init__(
        self,
        strategy: Strategy,
        *,
        model: nn.Module,
        image_shape: Sequence[int] = (3, 32, 32),
        config: str | DistillConfig = "fedftg",
        absent_weight: float | None = None,
        **options: Any,
    ) -> None:
        settings: dict[str, Any] = {"preset": config}
        if isinstance(config, DistillConfig):
            settings = {"preset": "paper", **config.model_dump()}
        if absent_weight is not None:
            settings["absent_weight"] = absent_weight
        settings = {**FedFTGConfig.defaults(settings, algorithm=getattr(strategy, "algorithm", "")), **settings}
        super().__init__(strategy, parse(FedFTGConfig, settings), model, image_shape, **options)


def _num_classes(model: FunctionalModel, image_shape: Sequence[int], device: torch.device) -> int:
    try:
        channels, height, width = image_shape
        with torch.no_grad():
            logits = model(*model.init(), torch.zeros(2, channels, height, width, device=device), train=False)
    except Exception as error:
        reason = f"the model does not take images of shape {image_shape} ({first_line(error)})"
        raise InputError(f"{reason}; pass its image_shape") from error
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
    if len(shape) != 2:
        raise InputError(f"the model must give logits (2, classes) for 2 images, got {shape}")
    return int(logits.shape[1])


def _check_base(base: Strategy) -> None:
    name = type(base).__name__
    if any(kind.__name__.startswith("DifferentialPrivacy") for kind in type(base).__mro__):
        raise InputError(f"{name} keeps only the sum of the updates private, a refiner uses each; use LocalDpMod")
    if isinstance(base, flower.MultiKrum | flower.Bulyan):
        _log.warning("all usable replies are teachers, also those that %s discards", name)


def _state_of(strategy: Any) -> Params:
    """Returns a strategy's ``state_tensors()``, or else its dicts and lists of arrays (Adam's moments, momentum)."""
    if hasattr(strategy, "state_tensors"):
        return dict(strategy.state_tensors())
    found: Params = {}
    for attribute, value in vars(strategy).items():
        if attribute != "current_arrays" and isinstance(value, dict | list):
            name, items = (attribute, value) if isinstance(value, dict) else (f"{attribute}[]", dict(enumerate(value)))
            if all(isinstance(item, np.ndarray | np.generic) for item in items.values()):
                found |= {f"{name}/{key}": torch.from_numpy(np.array(item)) for key, item in items.items()}
    return found


def _load_state(strategy: Any, tensors: Params) -> None:
    if hasattr(strategy, "load_state_tensors"):
        strategy.load_state_tensors(tensors)
        return
    attributes: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        attribute, _, key = name.partition("/")
        attributes.setdefault(attribute, {})[key] = tensor.numpy().copy()
    for attribute, items in attributes.items():
        listed = [items[key] for key in sorted(items, key=int)] if attribute.endswith("[]") else items
        setattr(strategy, attribute.removesuffix("[]"), listed)
