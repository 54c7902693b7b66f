"""FedFTG around a strategy of a Flower deployment: it aggregates, FedFTG refines what it returns."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import nn

from fedftg.algorithms.base import ClientResult, RefinerContext, ServerState
from fedftg.algorithms.fedftg import ABSENT_WEIGHTS
from fedftg.algorithms.fedftg import FedFTG as Refiner
from fedftg.distill.config import DistillConfig, preset
from fedftg.engine.machine import resolve_device
from fedftg.errors import InputError
from fedftg.flower import base_strategies as bases
from fedftg.flower import strategy_checkpoint
from fedftg.flower.guarded_base import aggregate, evaluated
from fedftg.flower.model_layout import ModelLayout, TrainableModel, num_classes
from fedftg.flower.records import ARRAYS, CLASS_COUNTS, PARTITION_ID, encode
from fedftg.flower.refine_report import RefineReport, shifted, with_metrics
from fedftg.flower.strategy_checkpoint import StrategyState
from fedftg.flower.train_replies import ReplyReader, TrainReply
from fedftg.params import Params, first_non_finite, to_device
from fedftg.seeds import SERVER, torch_rng

_log = logging.getLogger("flwr")

EvaluateFunction = Callable[[int, ArrayRecord], MetricRecord | None]
_FAILURES = 3
"""A base that fails so often without a round between will go on failing."""
_METHODS = ("configure_train", "aggregate_train", "configure_evaluate", "aggregate_evaluate")
_NO_COUNTS = (
    "no client told its class counts in round {round}: {problem} (docs/flower_strategy.md says what clients must send)"
)


class FedFTG(Strategy):
    """Any Flower strategy, with its aggregate refined by FedFTG in every round.

    All that a strategy does is left to the base: whom it asks, what it sends, how it aggregates and evaluates. FedFTG
    takes the clients' models and class counts from the same replies, fine-tunes the aggregate on the server without
    data, and returns it under the names and in the types of the arrays that were sent. Settings of the base are read
    and written through this object.

    Replies with errors, NaN or other arrays than the model's are kept from the base too (it sees an error). The result
    does not depend on the order of replies. A fine-tuning that fails or is not finite gives the base's aggregate. An
    aggregate that is not finite, or a base that fails after a round that went well, leaves the global model and the
    base as they were. All of it is logged, and in `reports`.

    Args:
        strategy: the base, of ``flwr.serverapp.strategy`` or one of your own.
        model: the classifier whose values the arrays are, from images ``(B, D, H, W)`` to logits ``(B, C)``; copied.
            Parameters that require no gradient stay as the base has aggregated them.
        image_shape: ``(D, H, W)`` of its images, 1 or 3 channels, 8 to 224 pixels a side.
        config: a preset (``fedftg``, ``paper``, ``official``), or a `DistillConfig`.
        absent_weight: what the model of the round before counts as a teacher for the classes of clients that are not
            there, beside those that are; 0 leaves it out. None: the preset's, 0 with a `DistillConfig`.
        seed: of everything that is drawn; the numbers are those of ``fedftg run`` with this seed.
        device: where the server refines; ``auto`` is a GPU where there is one.
        class_counts_key: where the ``MetricRecord`` of a training reply has the class counts, see `class_counts`.
        client_id_key: where it may have a number of the client that stays the same, such as the partition id; without
            it replies are ordered by node id, which differs from run to run and when a node starts again.
        teachers: ``all``: every valid reply; ``selected``: those that the base has averaged (Krum, MultiKrum, Bulyan).
        checkpoint: a folder for the state after each round. Where it holds one, `start` goes on after it.
        accept_privacy_loss: run around central differential privacy, whose guarantee does not hold for what is refined.

    Raises:
        InputError: a base that cannot be refined, or a model, shape, config or device that does not fit.
    """

    def __init__(
        self,
        strategy: Strategy,
        *,
        model: nn.Module,
        image_shape: Sequence[int] = (3, 32, 32),
        config: str | DistillConfig = "fedftg",
        absent_weight: float | None = None,
        seed: int = 0,
        device: str = "auto",
        class_counts_key: str = CLASS_COUNTS,
        client_id_key: str = PARTITION_ID,
        teachers: Literal["all", "selected"] = "all",
        checkpoint: str | Path | None = None,
        accept_privacy_loss: bool = False,
    ) -> None:
        if isinstance(strategy, FedFTG):
            raise InputError("the base strategy is a FedFTG already; refining twice is not what the paper does")
        bases.check_base(strategy, accept_privacy_loss=accept_privacy_loss)
        if teachers not in ("all", "selected"):
            raise InputError(f"teachers must be 'all' or 'selected', got {teachers!r}")
        if teachers == "selected" and not bases.shows_selection(strategy):
            raise InputError(f"{type(strategy).__name__} does not show which replies it takes; use teachers='all'")
        self.strategy = strategy
        self.reports: list[RefineReport] = []
        """One a round, of this session."""
        self._settings = preset(config) if isinstance(config, str) else config
        of_preset = ABSENT_WEIGHTS.get(config, 0.0) if isinstance(config, str) else 0.0
        self._absent_weight = of_preset if absent_weight is None else absent_weight
        if not 0 <= self._absent_weight < float("inf"):
            raise InputError(f"absent_weight must be >= 0, got {absent_weight}; 0 leaves the model before out")
        self._seed, self._teachers = seed, teachers
        self._keys = class_counts_key, client_id_key
        self._checkpoint = Path(checkpoint) if checkpoint is not None else None
        self._offset = 0
        """Rounds done in earlier sessions: Flower's loop counts from 1."""
        self._base = {name: getattr(strategy, name) for name in _METHODS}
        shape = int(image_shape[0]), int(image_shape[1]), int(image_shape[2])
        self._module, self._image_shape = model, shape
        place = torch.device(resolve_device(device))
        trainable = TrainableModel(copy.deepcopy(model).to(place))
        self._num_classes = num_classes(trainable, shape, place)
        self._device = place
        self._refiner = Refiner(
            self._settings, RefinerContext(trainable, self._num_classes, shape, place), self._absent_weight
        )
        params, _ = trainable.init()
        self._memory = self._refiner.init(params, torch_rng(seed, 0, SERVER, "refiner"))
        self._layout: ModelLayout | None = None
        self._sent: Params = {}
        """The global model that the round started from, where it may have to go into a checkpoint."""
        self._told_of_ids = False
        self._failures = 0
        """Rounds in a row in which the base has failed."""
        self._fingerprint_kept: dict[str, Any] | None = None
        self._went_well = False
        """Whether a round of the run, or of those before it, had an aggregate and a teacher."""
        self._ready = True
        if teachers == "all" and bases.discards_replies(strategy):
            _log.warning(
                "FedFTG learns from all valid replies, those that %s discards included; teachers='selected' takes only "
                "what it has averaged",
                type(strategy).__name__,
            )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "strategy" not in vars(self):
            raise AttributeError(name)
        return getattr(vars(self)["strategy"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        own = "_ready" not in vars(self) or name in vars(self)
        if own or not hasattr(self.strategy, name):
            super().__setattr__(name, value)
        else:
            setattr(self.strategy, name, value)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The base's messages, after its server optimiser was told that ``arrays`` is what clients start from.

        Raises:
            InputError: the arrays are not those of the model, or the base's ``resume_settings()`` cannot be kept.
        """
        if self._layout is None:
            self._layout = ModelLayout(self._module, arrays)
        if self._checkpoint is not None:
            self._sent = self._layout.accept(arrays)
            self._fingerprint()  # before a setting is moved, and before anything is trained in vain
        bases.before_configure(self.strategy)
        messages: Iterable[Message] = self._base["configure_train"](server_round + self._offset, arrays, config, grid)
        bases.after_configure(self.strategy)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The base's aggregate, refined, and its metrics with those of the refining (``fedftg-...``).

        Raises:
            InputError: before any round went well, not one usable reply has class counts; the message says what to
                add to the ClientApp.
            Exception: what the base raises, before any round went well, in the third round in a row, or where its
                privacy budget is spent.
        """
        if self._layout is None:
            raise InputError("aggregate_train came before configure_train; call configure_train with the model first")
        number = server_round + self._offset
        reader = self._reader(self._layout)
        read = reader.read(replies)
        self._check_counts(read, number)
        self._warn_of_ids(read)
        got = aggregate(
            self.strategy,
            lambda messages: self._base["aggregate_train"](number, messages),
            self._layout,
            reader,
            read,
            watch=self._teachers == "selected",
        )
        self._failures = 0 if got.error is None else self._failures + 1
        if got.error is not None and (not self._went_well or self._failures == _FAILURES):
            raise got.error
        report = RefineReport(number, left_out={r.client: r.problem for r in got.read if r.problem is not None})
        refined = None
        if got.arrays is None:
            report = replace(report, rolled_back=f"{got.problem}; the global model stays as it was")
        else:
            refined, report = self._refine(report, got.arrays, _teachers_of(got.read, got.taken))
            self._went_well = self._went_well or bool(report.teachers)
        self._tell(report)
        if self._checkpoint is not None:
            kept = self._sent if refined is None else refined
            base = bases.state_tensors(self.strategy)
            state = StrategyState(number, kept, self._memory, base, self._went_well)
            strategy_checkpoint.save(self._checkpoint, state, self._fingerprint())
        return None if refined is None else self._layout.encode(refined), with_metrics(got.metrics, report)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The base's."""
        messages: Iterable[Message] = self._base["configure_evaluate"](
            server_round + self._offset, arrays, config, grid
        )
        return messages

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The base's; None where the replies cannot be averaged."""
        return evaluated(lambda: self._base["aggregate_evaluate"](server_round + self._offset, replies))

    def summary(self) -> None:
        """Logs the settings, FedFTG's first."""
        config = self._settings
        _log.info("\t├──> FedFTG around %s:", type(self.strategy).__name__)
        _log.info("\t│\t├── Iterations: %d, of %d student steps", config.iterations, config.student_steps)
        _log.info("\t│\t├── Rates: student (%g) | generator (%g)", config.student_lr, config.generator_lr)
        _log.info("\t│\t├── Teachers: %s", self._teachers)
        _log.info("\t│\t└── Device: %s", self._device)
        self.strategy.summary()

    def restore(self) -> tuple[int, ArrayRecord] | None:
        """Takes up the state in the checkpoint folder: how many rounds are done, and the model after them.

        For loops of your own; `start` calls it by itself. None where no checkpoint was asked for or written yet.

        Raises:
            InputError: the state is damaged, or that of a run with other settings.
        """
        saved = strategy_checkpoint.load(self._checkpoint, self._fingerprint()) if self._checkpoint else None
        if saved is None:
            return None
        self._memory, self._went_well = saved.refiner, saved.went_well
        bases.load_state_tensors(self.strategy, saved.base)
        arrays = encode(saved.arrays)
        self._layout = ModelLayout(self._module, arrays)
        return saved.round, arrays

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
        """As Flower's, by the base's own loop where it has one; goes on after the last round of a checkpoint.

        ``num_rounds`` counts from the very first round: 10 after a checkpoint of round 4 makes 6 more. ``evaluate_fn``
        and the result have the rounds' true numbers, Flower's log lines count from 1.
        """
        found = self.restore()
        self._offset = found[0] if found else 0
        if found is not None:
            _log.warning(
                "FedFTG goes on after round %d, which %s holds; give another folder to start anew",
                self._offset,
                self._checkpoint,
            )
            initial_arrays = found[1]
            if self._offset >= num_rounds:
                return Result(arrays=initial_arrays)
        evaluate = evaluate_fn and (lambda number, arrays: evaluate_fn(number + self._offset, arrays))
        rest = num_rounds - self._offset
        values = (grid, initial_arrays, rest, timeout, train_config, evaluate_config, evaluate)
        if type(self.strategy).start is Strategy.start:
            result = super().start(*values)
        else:
            with bases.lent(self.strategy, {name: getattr(self, name) for name in _METHODS}):
                result = self.strategy.start(*values)
        if not isinstance(result, Result):
            return result  # a loop of the base's own may give something else
        if found is not None and not result.arrays:
            result.arrays = initial_arrays  # no round of this session had a result, those before it had
        return shifted(result, self._offset)

    def _reader(self, layout: ModelLayout) -> ReplyReader:
        counts_key, id_key = self._keys
        return ReplyReader(
            layout=layout,
            num_classes=self._num_classes,
            arrays_key=getattr(self.strategy, "arrayrecord_key", ARRAYS),
            class_counts_key=counts_key,
            client_id_key=id_key,
            weight_keys=bases.weight_keys(self.strategy),
            examples_key=bases.examples_key(self.strategy),
            selects=bases.discards_replies(self.strategy),
            hidden=(id_key,) if bases.averages_all_metrics(self.strategy) else (),
            without_integers=bases.works_in_place(self.strategy),
        )

    def _check_counts(self, read: list[TrainReply], number: int) -> None:
        usable = [reply for reply in read if reply.update_is_usable]
        if usable and all(reply.lacks_class_counts for reply in usable) and not self._went_well:
            raise InputError(_NO_COUNTS.format(round=number, problem=usable[0].problem))

    def _warn_of_ids(self, read: list[TrainReply]) -> None:
        nameless = any(reply.update_is_usable and not reply.tells_partition for reply in read)
        if nameless and self._absent_weight and not self._told_of_ids:
            self._told_of_ids = True
            _log.warning(
                "FedFTG: clients do not tell %r; a node that starts again is taken for a new client beside its old "
                "self, which counts as absent from then on (docs/flower_strategy.md)",
                self._keys[1],
            )

    def _refine(self, report: RefineReport, mixed: Params, teachers: list[ClientResult]) -> tuple[Params, RefineReport]:
        if not teachers:
            return mixed, replace(report, rolled_back="there was no teacher")
        assert self._layout is not None
        report = replace(report, teachers=[result.client for result in teachers])
        start = time.perf_counter()
        try:
            placed = [
                replace(one, params=to_device(one.params, self._device), buffers=to_device(one.buffers, self._device))
                for one in teachers
            ]
            params, buffers = (to_device(part, self._device) for part in self._layout.split(mixed))
            state = ServerState(report.round - 1, params, buffers, {}, to_device(self._memory, self._device))
            rng = torch_rng(self._seed, report.round, SERVER, "refine")
            state, metrics = self._refiner.refine(state, placed, rng)
        except Exception as error:
            reason = f"fine-tuning failed ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
            return mixed, replace(report, rolled_back=reason)
        bad = first_non_finite({**state.params, **state.buffers}) or first_non_finite(state.refiner)
        refined = self._layout.join(state.params, state.buffers)
        bad = bad or first_non_finite(refined)
        report = replace(report, seconds=time.perf_counter() - start, metrics=metrics)
        if bad is not None:
            return mixed, replace(report, rolled_back=f"fine-tuning was not finite ({bad})")
        self._memory = to_device(state.refiner, "cpu")
        return refined, report

    def _tell(self, report: RefineReport) -> None:
        self.reports.append(report)
        for client, problem in report.left_out.items():
            _log.warning("FedFTG, round %d: client %d is no teacher: %s", report.round, client, problem)
        if report.rolled_back:
            _log.error("FedFTG, round %d: not refined: %s", report.round, report.rolled_back)
            return
        _log.info(
            "FedFTG, round %d: refined with %d teachers in %.1f s", report.round, len(report.teachers), report.seconds
        )

    def _fingerprint(self) -> dict[str, Any]:
        """What a resumed run must have the same, as it was when the run was started or taken up."""
        if self._fingerprint_kept is None:
            self._fingerprint_kept = {
                "base strategy": bases.settings(self.strategy),
                "config": self._settings.model_dump(mode="json"),
                "image_shape": list(self._image_shape),
                "classes": self._num_classes,
                "absent_weight": self._absent_weight,
                "seed": self._seed,
                "teachers": self._teachers,
            }
            strategy_checkpoint.check_settings(self._fingerprint_kept)
        return self._fingerprint_kept


def _teachers_of(read: list[TrainReply], taken: list[RecordDict] | None) -> list[ClientResult]:
    chosen = {id(content) for content in taken or ()}
    return [
        reply.result
        for reply in read
        if reply.result is not None and (taken is None or id(reply.for_base.content) in chosen)
    ]
