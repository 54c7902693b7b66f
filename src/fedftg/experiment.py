"""Experiment: the objects of a run, and one round: local training, aggregation, refining, evaluation."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from fedftg.algorithms.base import (
    Algorithm,
    ClientResult,
    LocalTask,
    Metrics,
    Refiner,
    ServerState,
    broadcast,
    rejection,
)
from fedftg.config import RunConfig
from fedftg.data.federated import FederatedData
from fedftg.engine import sampling
from fedftg.engine.evaluate import Measured, evaluate, evaluate_clients, evaluate_ensemble, over_clients
from fedftg.engine.executors import Executor, Rejected
from fedftg.models.functional import ComputedModel, FunctionalModel
from fedftg.params import Params, first_non_finite, to_device
from fedftg.progress import Progress
from fedftg.rundir import records
from fedftg.rundir.clients import ClientStore
from fedftg.rundir.records import Record
from fedftg.seeds import SERVER, seed_for, torch_rng

Models = dict[str, tuple[Params, Params]]
"""Parameters and buffers of what a round evaluates: ``selected``, ``all``, ``refined`` (deployed), ``sent``."""


@dataclass
class Experiment:
    """The objects that a config names, and the state after the last completed round."""

    config: RunConfig
    data: FederatedData
    model: FunctionalModel
    models: tuple[FunctionalModel, ...]
    """Of the clients, where these have their own; then nothing is averaged."""
    algorithm: Algorithm
    refiner: Refiner
    executor: Executor
    state: ServerState
    clients: ClientStore
    partition_record: Record = field(repr=False)
    min_results: int = 1
    """With fewer usable updates a round leaves the global model unchanged."""
    shown: list[tuple[Tensor, Tensor | None]] = field(default_factory=list, repr=False)
    """The images that the refiner showed last, and their labels; whoever reads them takes them out."""
    evaluation: Record | None = field(default=None, init=False, repr=False)
    """What the last round measured in detail: the content of ``evaluation.json``."""

    def run_round(self, progress: Progress) -> Record:
        """Runs one round and returns its record; the state changes only once everything is done."""
        number = self.state.round + 1
        clock = _Clock()
        cohort = self._cohort(number)
        with clock.phase("local"):
            results, rejected = self._train(number, cohort, progress)
        with clock.phase("aggregate"):
            progress.phase(number, "aggregate", 0, 1)
            selected, server_metrics, undone = self._aggregate(results)
        # Where the aggregate is undone, so are the clients' memories: both belong together.
        results = [] if undone else results
        with clock.phase("refine"):
            due = number % self.config.evaluation.every == 0 or number == self.config.rounds
            refined, refine_metrics, rolled_back = self._refine(number, selected, results, due, progress)
        with clock.phase("aggregate"):
            clients = self.clients.updated(results)
        with clock.phase("evaluate"):
            measured = self._evaluate(number, selected, refined, results, clients, progress) if due else Measured()
        self.state, self.clients = replace(refined, round=number), clients
        record: Record = {"round": number, "clients": cohort}
        if rejected:
            record["rejected"] = rejected
        record |= {"seconds": clock.seconds, "accuracy": measured.accuracy, "loss": measured.loss}
        if measured.clients:
            record["client_accuracy"] = {kind: over_clients(found) for kind, found in measured.clients.items()}
        if measured.not_measured:
            record["not_measured"] = measured.not_measured
        if number == self.config.rounds:
            confusion = {kind: counts.tolist() for kind, counts in measured.confusion.items()}
            self.evaluation = {"round": number, "confusion": confusion, "clients": measured.clients}
        record |= {"server": server_metrics, "refine": refine_metrics}
        reasons = [reason for reason in (undone, rolled_back) if reason]
        return record | ({"rolled_back": "; ".join(reasons)} if reasons else {})

    def _cohort(self, number: int) -> list[int]:
        return sampling.cohort(self.config.cohort, self._candidates, self.config.seed, number)

    @property
    def _candidates(self) -> list[int]:
        return [client for client in range(self.data.num_clients) if self.data.num_samples(client) > 0]

    def _tasks(self, number: int, cohort: list[int]) -> Iterator[LocalTask]:
        message = self.algorithm.server.message(self.state)
        for client in cohort:
            params, buffers = self.state.params, self.state.buffers
            if self.models:
                params, buffers = self.models[client % len(self.models)].init()
            yield LocalTask(
                round=number,
                client=client,
                params=params,
                buffers=buffers,
                memory=to_device(self.clients.memory(client), self.data.device),
                message=message,
                num_samples=self.data.num_samples(client),
                relative_size=self.data.relative_size(client),
                lr=self.config.local.lr_at(number),
                seed=seed_for(self.config.seed, number, client, "local"),
            )

    def _train(self, number: int, cohort: list[int], progress: Progress) -> tuple[list[ClientResult], list[Record]]:
        kept: list[ClientResult] = []
        rejected: list[Record] = []
        progress.phase(number, "local", 0, len(cohort))
        tasks = self._tasks(number, cohort)
        for done, result in enumerate(self.executor.run(self.algorithm.local, tasks), start=1):
            reason = result.reason if isinstance(result, Rejected) else rejection(result)
            if isinstance(result, ClientResult) and reason is None:
                kept.append(result)
            else:
                rejected.append({"client": result.client, "reason": reason})
            progress.phase(number, "local", done, len(cohort))
        return kept, rejected

    def _aggregate(self, results: list[ClientResult]) -> tuple[ServerState, Metrics, str | None]:
        before = replace(self.state, deployed={}) if self.state.deployed else self.state
        if len(results) < self.min_results:
            few = f"only {len(results)} of at least {self.min_results} client updates were"
            got = few if results else "no client update was"
            return before, {}, f"{got} usable; the global model stays as it was"
        state, metrics = (before, {}) if self.models else self.algorithm.server.step(before, results)
        bad = _non_finite(state)
        if bad is not None:
            return before, {}, f"the aggregate was not finite ({bad}); the global model stays as it was"
        losses = [(result.loss, result.num_samples) for result in results if math.isfinite(result.loss)]
        total = sum(size for _, size in losses)
        if total:
            metrics = {"local_loss": sum(loss * size for loss, size in losses) / total, **metrics}
        return state, metrics, None

    def _refine(
        self, number: int, selected: ServerState, results: list[ClientResult], due: bool, progress: Progress
    ) -> tuple[ServerState, Metrics, str | None]:
        if not results:
            return self.state, {}, None
        progress.phase(number, "refine", 0, 1)
        if getattr(self.refiner, "reads_previous", False):
            results = [replace(r, previous=self._previous(r.client)) for r in results]
        params, buffers = selected.model
        start = replace(selected, params=params, buffers=buffers, deployed={})
        memory = self.refiner.observe(start, results)
        selected, start = replace(selected, refiner=memory), replace(start, refiner=memory)
        if self.config.refiner.when == "evaluation" and not due:
            refined_before = number > self.config.evaluation.every
            return replace(selected, deployed=(self.state if refined_before else selected).deployed), {}, None
        rng = torch_rng(self.config.seed, number, SERVER, "refine")
        refined, metrics = self.refiner.refine(start, results, rng)
        bad = _non_finite(refined)
        if bad is not None:
            return selected, metrics, f"fine-tuning was not finite ({bad}); rolled back to the aggregate"
        if refined is start:
            return selected, metrics, None
        return broadcast(selected, refined, self.config.refiner.broadcast), metrics, None

    def _previous(self, client: int) -> Params:
        return to_device(self.clients.upload(client), self.data.device) if client in self.clients else {}

    def _evaluate(
        self,
        number: int,
        selected: ServerState,
        refined: ServerState,
        results: list[ClientResult],
        clients: ClientStore,
        progress: Progress,
    ) -> Measured:
        models: Models = {"selected": selected.model}
        if self.config.evaluation.track_all and not self.models:
            average = to_device(clients.average(), self.data.device)
            params, buffers = ({name: average[name] for name in of} for of in (selected.params, selected.buffers))
            models["all"] = params, buffers
        if refined.params is not selected.params or refined.deployed is not selected.deployed:
            models["refined"] = refined.model
        sent, deployed = refined.params, refined.model[0]
        if any(sent[n] is not deployed[n] and sent[n] is not selected.model[0][n] for n in sent):
            models["sent"] = refined.params, refined.buffers
        measured = Measured()
        if self.data.has_test_data:
            size = self.config.evaluation.batch_size
            progress.phase(number, "evaluate", 0, 1)
            found = evaluate(self._computed(self.model), models, self.data, size)
            if self.config.evaluation.ensemble and results:
                own = [self._computed(model) for model in self.models or (self.model,)]
                found |= evaluate_ensemble(own, results, self.data, size)
            for kind, result in found.items():
                measured.add(kind, result)
        self._evaluate_clients(number, models, measured)
        by_kinds: tuple[dict[str, Any], ...] = (measured.accuracy, measured.loss, measured.confusion, measured.clients)
        for by_kind in by_kinds:
            if by_kind:
                by_kind.setdefault("refined", by_kind["selected"])
        return measured

    def _computed(self, model: FunctionalModel) -> FunctionalModel:
        """Returns the model in the precision and layout of local training."""
        return ComputedModel(model, self.config.local.precision, self.config.local.memory_format)

    def _evaluate_clients(self, number: int, models: Models, into: Measured) -> None:  # noqa: ARG002
        """Fills in the accuracy of the clients that hold samples back, where any does."""
        if self.data.holds_back:
            size = self.config.evaluation.batch_size
            for kind, values in models.items():
                into.clients[kind] = evaluate_clients(self._computed(self.model), *values, self.data, size)


def _non_finite(state: ServerState) -> str | None:
    parts = (state.params, state.buffers, state.server, state.refiner, state.deployed)
    return next((name for part in parts if (name := first_non_finite(part)) is not None), None)


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(records.PHASES, 0.0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = round(self.seconds[name] + time.perf_counter() - start, 6)
