"""Any refiner around any Flower strategy: the base strategy aggregates, the refiner improves what it returns."""

from __future__ import annotations

import copy
import json
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.app.message import make_message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Result, Strategy
from flwr.serverapp.strategy.multikrum import select_multikrum
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords
from pydantic import ValidationError
from torch import nn

from fedftg.algorithms.base import ClientResult, Memory, RefinerConfig, RefinerContext, ServerState
from fedftg.algorithms.fedftg import FedFTGConfig
from fedftg.algorithms.registry import REFINERS
from fedftg.distill.config import DistillConfig
from fedftg.engine.machine import resolve_device
from fedftg.errors import InputError, explain, unknown
from fedftg.flower.wire import ARRAYS, CLASS_COUNTS, PARTITION_ID, Layout, Reply, encode, read_replies
from fedftg.models.functional import FunctionalModel
from fedftg.params import Params, first_non_finite, prefixed, to_device, unprefixed
from fedftg.rundir.tensors import read_metadata, read_tensors, write_tensors
from fedftg.seeds import SERVER, torch_rng

_log = logging.getLogger("flwr")

EvaluateFunction = Callable[[int, ArrayRecord], MetricRecord | None]

_HOOKS = ("configure_train", "aggregate_train", "configure_evaluate", "aggregate_evaluate")
_CHECKPOINT = "refined.safetensors"
_PRIVATE = (
    flower.DifferentialPrivacyServerSideFixedClipping,
    flower.DifferentialPrivacyServerSideAdaptiveClipping,
    flower.DifferentialPrivacyClientSideFixedClipping,
    flower.DifferentialPrivacyClientSideAdaptiveClipping,
)
_IN_PLACE = (flower.QFedAvg, *_PRIVATE[:2])
"""Strategies that scale arrays in place, which NumPy refuses for integers such as BatchNorm's counter."""


@dataclass
class RefineReport:
    """What the refiner did in one round."""

    round: int
    teachers: list[int] = field(default_factory=list)
    """The clients whose models the refiner used: partition ids, or the low 63 bits of node ids."""
    left_out: dict[int, str] = field(default_factory=dict)
    """Per client that was no teacher, the reason."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The refiner's; for FedFTG ``discrepancy``, ``fidelity``, ``diversity``, ``student``, ``teacher_agreement``."""
    seconds: float = 0.0
    """Duration of the refining."""
    rolled_back: str | None = None
    """Why the round's result is the base strategy's aggregate, or the model before; None: it was refined."""


class Refined(Strategy):
    """A Flower strategy whose aggregate a refiner improves in every round.

    Sampling, messages, aggregation and evaluation are the base strategy's, and what it raises is raised. The refiner
    gets the clients' models and class counts from the same replies. Replies with errors, NaN or other arrays than the
    model's reach the base as errors. Results do not depend on the order of replies. Where the refined model is not
    finite, or the refiner raises ``RuntimeError`` (out of memory), the base's aggregate is returned and the refiner's
    memory stays; where the aggregate is not finite, the global model stays. Each is logged, and in `reports`.

    Args:
        base: of ``flwr.serverapp.strategy``, or one of your own for Flower's Message API.
        refiner: the settings of a refiner, or the name of a registered one with its default settings.
        model: the classifier to which the arrays belong, from images ``(B, D, H, W)`` to logits ``(B, C)``; copied.
            Parameters with ``requires_grad=False`` keep their aggregated values.
        image_shape: ``(D, H, W)`` of its images; FedFTG's generator takes 1 or 3 channels, 8 to 224 pixels a side.
        seed: of everything that is drawn on the server; the numbers are those of ``fedftg run`` with this seed.
        device: where the server refines; ``auto`` is a GPU if there is one.
        class_counts_key: where the ``MetricRecord`` of a training reply has the class counts, see `class_counts`.
        client_id_key: where it may have a number that identifies the client, such as the partition id. Without it
            replies are ordered by node id, which changes from run to run and when a node restarts.
        teachers: ``all``: every usable reply; ``selected``: those that Krum, MultiKrum or Bulyan averages.
        checkpoint: a folder for the state after each round; `start` resumes from it.
        accept_privacy_loss: allow central differential privacy as base, whose guarantee is void for a refined model.

    Raises:
        InputError: a base that cannot be refined, or a refiner, model, shape or device that does not fit.
    """

    def __init__(
        self,
        base: Strategy,
        refiner: RefinerConfig | str,
        model: nn.Module,
        image_shape: Sequence[int],
        *,
        seed: int = 0,
        device: str = "auto",
        class_counts_key: str = CLASS_COUNTS,
        client_id_key: str = PARTITION_ID,
        teachers: Literal["all", "selected"] = "all",
        checkpoint: str | Path | None = None,
        accept_privacy_loss: bool = False,
    ) -> None:
        _check_base(base, teachers, accept_privacy_loss)
        if isinstance(refiner, str):
            if refiner not in REFINERS:
                raise unknown("refiner", refiner, REFINERS)
            refiner = REFINERS[refiner](name=refiner)
        self.base = base
        self.reports: list[RefineReport] = []
        """One a round, of this session."""
        self._config, self._module, self._seed, self._teachers = refiner, model, seed, teachers
        self._counts_key, self._id_key = class_counts_key, client_id_key
        self._checkpoint = Path(checkpoint) / _CHECKPOINT if checkpoint is not None else None
        self._device = torch.device(resolve_device(device))
        trainable = _Trainable(model, self._device)
        self._num_classes = _num_classes(trainable, image_shape, self._device)
        self._shape = int(image_shape[0]), int(image_shape[1]), int(image_shape[2])
        self._refiner = refiner.build(RefinerContext(trainable, self._num_classes, self._shape, self._device))
        self._memory: Memory = self._refiner.init(trainable.init()[0], torch_rng(seed, 0, SERVER, "refiner"))
        self._layout: Layout | None = None
        self._sent = ArrayRecord()
        self._offset = 0
        """Rounds done in earlier sessions; Flower's loop counts from 1."""
        self._had_teachers = self._warned_of_ids = False

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Returns the base's messages.

        Raises:
            InputError: the arrays are not those of the model.
        """
        self._layout = self._layout or Layout(self._module, arrays)
        self._sent = arrays
        for one in _chain(self.base):
            if isinstance(one, flower.FedAvgM):
                one.current_arrays = None  # else it steps from its own last aggregate, which no client received
        number = server_round + self._offset
        messages = type(self.base).configure_train(self.base, number, arrays, config, grid)
        for one in _chain(self.base):
            if isinstance(one, _IN_PLACE) and one.current_arrays is not None:
                one.current_arrays = _floating(one.current_arrays)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Returns the base's aggregate, refined, and its metrics with those of the refining (``fedftg-...``).

        Raises:
            InputError: no reply has class counts, neither in this round nor before.
        """
        if self._layout is None:
            raise InputError("aggregate_train came before configure_train; call configure_train with the model first")
        report = RefineReport(server_round + self._offset)
        read = self._read(replies)
        self._check_metrics(report.round, [reply for reply in read if reply.problem is None])
        messages = [self._for_base(reply) for reply in read]
        teachers = self._teachers_of(read, messages, report)
        arrays, metrics = type(self.base).aggregate_train(self.base, report.round, messages)
        result = self._refine(arrays, teachers, report)
        self.reports.append(report)
        if self._checkpoint is not None:
            self._save(self._checkpoint, report.round, self._layout.accept(self._sent) if result is None else result)
        return None if result is None else encode(result), self._logged(report, metrics)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Returns the base's messages."""
        return type(self.base).configure_evaluate(self.base, server_round + self._offset, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Returns the base's metrics."""
        return type(self.base).aggregate_evaluate(self.base, server_round + self._offset, replies)

    def summary(self) -> None:
        """Logs the refiner's settings that are not its defaults, then the base's."""
        _log.info("\t├──> %s around %s:", type(self).__name__, type(self.base).__name__)
        _log.info("\t│\t├── Refiner: %s %s", self._config.name, self._config.model_dump(exclude_defaults=True))
        _log.info("\t│\t└── Device: %s | teachers: %s", self._device, self._teachers)
        self.base.summary()

    def restore(self) -> tuple[int, ArrayRecord] | None:
        """Loads the checkpoint and returns the number of rounds done and the model after them; None: there is none.

        `start` calls it; call it before a loop of your own.

        Raises:
            InputError: the checkpoint is damaged, or of a run with other settings.
        """
        if self._checkpoint is None or not self._checkpoint.exists():
            return None
        tensors = read_tensors(self._checkpoint)
        saved = json.loads(read_metadata(self._checkpoint)["refined"])
        before, here = saved["settings"], json.loads(json.dumps(self._settings()))
        for key in {**here, **before}:
            if before.get(key) != here.get(key):
                raise InputError(
                    f"{self._checkpoint} is of a run with {key} = {before.get(key)}, this one has {here.get(key)}; "
                    "use the same, or another folder"
                )
        self._memory = unprefixed(tensors, "refiner/")
        for depth, one in enumerate(_chain(self.base)):
            _load_state(one, unprefixed(tensors, f"base{depth}/"))
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
        evaluate_fn: EvaluateFunction | None = None,
    ) -> Result:
        """Runs the rounds in Flower's loop, or in the base's own ``start``; resumes from a checkpoint.

        ``num_rounds`` counts from the very first round: 10 after a checkpoint of round 4 runs 6 more. ``evaluate_fn``
        and the result have the true numbers of rounds, Flower's log lines count from 1.
        """
        found = self.restore()
        self._offset = done = found[0] if found else 0
        if found is not None:
            initial_arrays = found[1]
            _log.warning("resumed after round %d from %s; give another folder to start anew", done, self._checkpoint)
            if done >= num_rounds:
                return Result(arrays=initial_arrays)
        evaluate = evaluate_fn and (lambda number, arrays: evaluate_fn(number + done, arrays))
        arguments = (grid, initial_arrays, num_rounds - done, timeout, train_config, evaluate_config, evaluate)
        own_loop = type(self.base).start is not Strategy.start
        result = self._start_base(*arguments) if own_loop else super().start(*arguments)
        if not isinstance(result, Result):
            return result  # a loop of the base's own may return something else
        result.arrays = result.arrays or initial_arrays if found else result.arrays
        for name in ("train_metrics_clientapp", "evaluate_metrics_clientapp", "evaluate_metrics_serverapp"):
            setattr(result, name, {number + done: value for number, value in getattr(result, name).items()})
        return result

    def _start_base(self, *arguments: Any) -> Result:
        """Runs the base's own loop with this object's hooks in the place of the base's."""
        vars(self.base).update({name: getattr(self, name) for name in _HOOKS})
        try:
            return self.base.start(*arguments)
        finally:
            for name in _HOOKS:
                del vars(self.base)[name]

    def _read(self, messages: Iterable[Message]) -> list[Reply]:
        assert self._layout is not None
        weights = [vars(one).get(key) for key in ("weighted_by_key", "train_loss_key") for one in _chain(self.base)]
        return read_replies(
            messages,
            self._layout.template,
            num_classes=self._num_classes,
            arrays_key=getattr(self.base, "arrayrecord_key", ARRAYS),
            class_counts_key=self._counts_key,
            client_id_key=self._id_key,
            weight_keys=[key for key in weights if key],
        )

    def _check_metrics(self, number: int, usable: list[Reply]) -> None:
        """Requires class counts of some client, and warns once where clients send no id."""
        if usable and not self._had_teachers and all(reply.class_counts is None for reply in usable):
            raise InputError(
                f"no reply of round {number} has the metric {self._counts_key!r}; in the ClientApp, add "
                f"{self._counts_key!r}: fedftg.flower.class_counts(labels, {self._num_classes}) to the MetricRecord"
            )
        if not self._warned_of_ids and not all(reply.named for reply in usable):
            self._warned_of_ids = True
            text = "clients send no %r: a node that restarts is a new client, and results differ in the last digits"
            _log.warning(text, self._id_key)

    def _for_base(self, reply: Reply) -> Message:
        """Returns what the base gets: an error, or the reply, without counts and ids where it averages all metrics."""
        message, chain = reply.message, _chain(self.base)
        if message.has_error():
            return message
        if reply.problem is not None:
            return make_message(message.metadata, error=Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reply.problem))
        if any(vars(one).get("train_metrics_aggr_fn") is aggregate_metricrecords for one in chain):
            for metrics in message.content.metric_records.values():
                for key in (self._counts_key, self._id_key):
                    metrics.pop(key, None)
        if any(isinstance(one, _IN_PLACE) for one in chain):
            for name, arrays in list(message.content.array_records.items()):
                message.content[name] = _floating(arrays)
        return message

    def _teachers_of(self, read: list[Reply], messages: list[Message], report: RefineReport) -> list[ClientResult]:
        """Returns the teachers, and logs and reports why the other clients are none."""
        assert self._layout is not None
        contents = [message.content for message in messages if message.has_content()]
        selected = _selected(self.base, contents) if self._teachers == "selected" and contents else contents
        chosen = {id(content) for content in selected}
        teachers = []
        for reply, message in zip(read, messages, strict=True):
            counts = reply.class_counts
            if reply.problem is not None:
                report.left_out[reply.client] = reply.problem
            elif id(message.content) not in chosen:
                report.left_out[reply.client] = f"{type(self.base).__name__} did not select it"
            elif counts is None:
                report.left_out[reply.client] = f"it has no metric {self._counts_key!r}"
            elif not counts.any():
                report.left_out[reply.client] = "its class counts are all 0"
            else:
                params, buffers = self._layout.split(reply.arrays)
                size = int(counts.sum())
                teachers.append(ClientResult(reply.client, size, counts, params, buffers, {}, {}, float("nan")))
        for client, problem in report.left_out.items():
            _log.warning(
                "%s, round %d: client %d is no teacher: %s", type(self).__name__, report.round, client, problem
            )
        return teachers

    def _refine(self, arrays: ArrayRecord | None, teachers: list[ClientResult], report: RefineReport) -> Params | None:
        """Returns the refined aggregate, or the aggregate or None where that fails; completes the report."""
        assert self._layout is not None
        aggregate = None if arrays is None else self._layout.accept(arrays)
        bad = first_non_finite(aggregate or {})
        if aggregate is None or bad is not None:
            reason = f"the aggregate is not finite ({bad})" if bad else "the base strategy gave no aggregate"
            report.rolled_back = f"{reason}; the global model stays as it was"
            return None
        if not teachers:
            report.rolled_back = "there was no teacher"
            return aggregate
        self._had_teachers = True
        report.teachers = [one.client for one in teachers]
        start = time.perf_counter()
        params, buffers = self._layout.split(aggregate)
        rng = torch_rng(self._seed, report.round, SERVER, "refine")
        try:
            placed = [
                replace(one, params=to_device(one.params, self._device), buffers=to_device(one.buffers, self._device))
                for one in teachers
            ]
            state = ServerState(
                round=report.round - 1,
                params=to_device(params, self._device),
                buffers=to_device(buffers, self._device),
                server={},
                refiner=to_device(self._memory, self._device),
            )
            state, report.metrics = self._refiner.refine(state, placed, rng)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            report.rolled_back = f"refining failed ({type(error).__name__}: {reason})"
            _log.error("the refiner failed", exc_info=True)
            return aggregate
        report.seconds = time.perf_counter() - start
        refined = self._layout.join(state.params, state.buffers)
        bad = first_non_finite(refined) or first_non_finite(state.refiner)
        if bad is not None:
            report.rolled_back = f"the refined model is not finite ({bad})"
            return aggregate
        self._memory = to_device(state.refiner, "cpu")
        return refined

    def _logged(self, report: RefineReport, metrics: MetricRecord | None) -> MetricRecord:
        """Logs a report, and returns the base's metrics with its; none of them depends on the machine's speed."""
        name, number, count = type(self).__name__, report.round, len(report.teachers)
        if report.rolled_back:
            _log.error("%s, round %d: not refined: %s", name, number, report.rolled_back)
        else:
            _log.info("%s, round %d: refined with %d teachers in %.1f s", name, number, count, report.seconds)
        merged = MetricRecord(dict(metrics or {}))
        merged["fedftg-teachers"], merged["fedftg-left-out"] = count, len(report.left_out)
        merged["fedftg-rolled-back"] = int(report.rolled_back is not None)
        for key, value in report.metrics.items():
            merged[f"fedftg-{key.replace('_', '-')}"] = value
        return merged

    def _save(self, path: Path, number: int, arrays: Params) -> None:
        tensors = prefixed(arrays, "arrays/") | prefixed(self._memory, "refiner/")
        for depth, one in enumerate(_chain(self.base)):
            tensors |= prefixed(_state_of(one), f"base{depth}/")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, tensors, {"refined": json.dumps({"round": number, "settings": self._settings()})})

    def _settings(self) -> dict[str, Any]:
        """Returns what a resumed run must have the same."""
        settings: dict[str, Any] = {"seed": self._seed, "image_shape": self._shape, "classes": self._num_classes}
        settings |= {f"refiner.{key}": value for key, value in self._config.model_dump(mode="json").items()}
        settings["teachers"] = self._teachers
        for depth, one in enumerate(_chain(self.base)):
            name = "base" + ".strategy" * depth
            settings[name] = type(one).__name__
            if hasattr(one, "resume_settings"):
                settings |= {f"{name}.{key}": value for key, value in one.resume_settings().items()}
        return settings


class FedFTG(Refined):
    """A Flower strategy whose aggregate FedFTG fine-tunes on the server without data: `Refined` with its settings.

    Args:
        strategy: the base.
        model: see `Refined`.
        image_shape: see `Refined`.
        config: a preset (``fedftg``, ``paper``, ``official``), or a `DistillConfig`.
        absent_weight: >= 0: the weight of the previous round's model as a teacher for the classes of absent clients;
            0 is off. None: the preset's, 0 with a `DistillConfig`.
        options: those of `Refined`: ``seed``, ``device``, ``teachers``, ``checkpoint``, ...
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
        preset = {"preset": config} if isinstance(config, str) else {**config.model_dump(), "absent_weight": 0.0}
        try:
            refiner = FedFTGConfig(**preset | ({} if absent_weight is None else {"absent_weight": absent_weight}))
        except ValidationError as error:
            raise explain(error, FedFTGConfig) from None
        super().__init__(strategy, refiner, model, image_shape, **options)


class _Trainable(FunctionalModel):
    """A classifier in float32 on a device, whose copies keep its frozen parameters frozen."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        super().__init__(copy.deepcopy(module).float().to(device))
        self._frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]

    def module(self, params: Params, buffers: Params) -> nn.Module:
        module = super().module(params, buffers)
        for name in self._frozen:
            module.get_parameter(name).requires_grad_(False)
        return module


def _num_classes(model: FunctionalModel, image_shape: Sequence[int], device: torch.device) -> int:
    """Returns the number of classes, by two black images.

    Raises:
        InputError: the model does not take such images, or does not give logits ``(2, C)`` with C >= 2.
    """
    try:
        channels, height, width = image_shape
        with torch.no_grad():
            logits = model(*model.init(), torch.zeros(2, channels, height, width, device=device), train=False)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"the model does not take images of shape {image_shape}: {reason}; pass its image_shape"
        ) from error
    if logits.ndim != 2 or len(logits) != 2 or logits.shape[1] < 2:
        raise InputError(f"the model must give logits (2, classes) for 2 images, got {tuple(logits.shape)}")
    return int(logits.shape[1])


def _check_base(base: Strategy, teachers: str, accept_privacy_loss: bool) -> None:
    if not isinstance(base, Strategy):
        raise InputError(f"the base strategy must be one of flwr.serverapp.strategy, got {type(base).__name__}")
    for one in _chain(base):
        name = type(one).__name__
        if isinstance(one, Refined):
            raise InputError(f"the base strategy is a {name} already; refine once")
        if isinstance(one, flower.FedXgbBagging | flower.FedXgbCyclic):
            raise InputError(f"{name} trains decision trees, refiners need torch classifiers; use it alone")
        if isinstance(one, _PRIVATE) and not accept_privacy_loss:
            raise InputError(
                f"{name} promises privacy for the sum of the updates, and a refiner uses every single one; use local "
                "privacy (LocalDpMod in the ClientApp), or pass accept_privacy_loss=True"
            )
        if isinstance(one, _PRIVATE) and getattr(one, "accountant", None) is not None:
            raise InputError(f"{name} has an accountant, whose epsilon would be wrong for a refined model; remove it")
    selects = isinstance(base, flower.MultiKrum | flower.Bulyan)
    if teachers not in ("all", "selected"):
        raise InputError(f"teachers must be 'all' or 'selected', got {teachers!r}")
    if teachers == "selected" and not selects:
        raise InputError(f"teachers='selected' is for Krum, MultiKrum and Bulyan, got {type(base).__name__}; use 'all'")
    if teachers == "all" and selects:
        _log.warning("all usable replies are teachers, discarded ones too; teachers='selected' takes the averaged ones")


def _chain(strategy: Strategy) -> list[Strategy]:
    """Returns the strategy and those that it wraps, the outermost first."""
    inner = vars(strategy).get("strategy")
    return [strategy, *_chain(inner)] if isinstance(inner, Strategy) else [strategy]


def _selected(base: Strategy, contents: list[RecordDict]) -> list[RecordDict]:
    """Returns the replies that Krum, MultiKrum or Bulyan will average."""
    if isinstance(base, flower.Bulyan):
        return base.selection_rule(contents, base.num_malicious_nodes, len(contents) - 2 * base.num_malicious_nodes)
    assert isinstance(base, flower.MultiKrum)
    return select_multikrum(contents, base.num_malicious_nodes, base.num_nodes_to_select)


def _floating(record: ArrayRecord) -> ArrayRecord:
    """Returns a record with integers as float64, as which Flower averages them anyway."""
    whole = {key for key, array in record.items() if np.dtype(array.dtype).kind in "iub"}
    return ArrayRecord(
        {key: Array(np.asarray(a.numpy(), np.float64)) if key in whole else a for key, a in record.items()}
    )


def _state_of(strategy: Any) -> Params:
    """Returns what a strategy keeps between rounds: its ``state_tensors()``, or else its dicts and lists of arrays.

    Those are Adam's moments and momentum; the current model is what is sent out.
    """
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
    """Restores what `_state_of` returned."""
    if hasattr(strategy, "load_state_tensors"):
        strategy.load_state_tensors(tensors)
        return
    attributes: dict[str, Any] = {}
    for name, tensor in tensors.items():
        attribute, _, key = name.partition("/")
        if attribute.endswith("[]"):
            attributes.setdefault(attribute.removesuffix("[]"), []).append(tensor.numpy().copy())
        else:
            attributes.setdefault(attribute, {})[key] = tensor.numpy().copy()
    for attribute, value in attributes.items():
        setattr(strategy, attribute, value)
