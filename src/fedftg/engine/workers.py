"""Clients in processes of one thread each.

Measured for ResNet-18 on 2 cores: two processes of one thread do more client steps a second than one process of two
threads. The numbers are those of the sequential executor with ``threads = 1``, bit for bit: each process runs it.

Processes are spawned, for torch's threads do not survive a fork. Models, memories and results travel in shared memory
(`fedftg.engine.shared`): the model of a round is copied there once for all processes.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from types import ModuleType
from typing import Any

import torch

from fedftg.algorithms.base import AlgorithmConfig, ClientResult, LocalRule, LocalTask
from fedftg.data.dataset import ImageDataset
from fedftg.data.federated import FederatedData
from fedftg.engine.executors import SequentialExecutor
from fedftg.engine.local_train import LocalConfig
from fedftg.engine.machine import keep_freed_memory
from fedftg.engine.shared import Inbox, Outbox
from fedftg.errors import ClientError, InputError
from fedftg.models import registry
from fedftg.models.functional import FunctionalModel
from fedftg.params import Params

_SPAWN = multiprocessing.get_context("spawn")
_START, _TRAINING = "start of a worker process", "local training"
_NUMBERS = ("round", "client", "num_samples", "relative_size", "lr", "seed")


@dataclass(frozen=True)
class RunRecipe:
    """What a run trains: how another process makes the same model and rule, and how much there is to train."""

    plugins: tuple[str, ...]
    model: registry.ModelConfig
    model_seed: int
    algorithm: AlgorithmConfig
    rounds: int
    cohort: int
    """Clients a round, on average."""
    threads: int
    """The run's setting; 0 leaves the number to torch."""

    def obstacle(self) -> str | None:
        """Why other processes cannot train this, or None."""
        cls = type(self.algorithm)
        if cls.__module__ == "__main__" or "<locals>" in cls.__qualname__:
            return f"algorithm class {cls.__qualname__} is defined in the started script; put it into a module"
        if self.model.name.startswith("__main__"):
            return f"model {self.model.name} is defined in the started script; put it into a module"
        if multiprocessing.current_process().daemon:
            return "a daemonic process of multiprocessing may not start others"
        return None


class WorkerDied(RuntimeError):
    """A process ended without an answer."""


class WorkersExecutor:
    """The clients of a round side by side in ``count`` processes, which live as long as the run.

    At most two results a process wait to be fetched in order. A generator that is closed early costs the time of the
    clients in training; their results are dropped.
    """

    def __init__(self, recipe: RunRecipe, data: FederatedData, settings: LocalConfig, count: int) -> None:
        problem = recipe.obstacle()
        if problem is not None:
            raise InputError(f"executor.name=workers: {problem}, or take executor.name=sequential")
        if data.device.type != "cpu":
            raise InputError(
                f"executor.name=workers trains on the CPU and device is {str(data.device)!r}; take device=cpu, or "
                "executor.name=sequential"
            )
        self.description = f"workers: {count} processes of one thread"
        self._recipe = recipe
        self._data = data
        self._settings = settings
        self._count = count
        self._workers: list[_Worker] = []
        self._arrays, self._model = Outbox(), Outbox()
        self._received: tuple[Params, ...] = ()
        """What all clients of a round receive, as it was copied to ``_model``."""

    def run(self, rule: LocalRule, tasks: Iterable[LocalTask]) -> Iterator[ClientResult]:  # noqa: ARG002
        """Yields one result per task, in order; the rule is the one that the recipe builds.

        Raises:
            ClientError: a client's training failed or its process died; names round, client and stage.
        """
        while self._busy():  # with clients of an earlier call, whose results nobody wants
            self._receive()
        jobs: deque[_Job] = deque()
        for task in tasks:
            while len(self._busy()) == self._count or len(jobs) == 2 * self._count:
                if jobs[0].result is None:
                    self._receive()
                else:
                    yield jobs.popleft().fetch()
            jobs.append(self._start(task))
        while jobs:
            if jobs[0].result is None:
                self._receive()
            else:
                yield jobs.popleft().fetch()

    def close(self) -> None:
        """Kills all workers, which hold nothing that must be saved; a later `run` starts new ones."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.connection.close()
            worker.memory.close()
        self._arrays.close()
        self._model.close()
        self._workers, self._received = [], ()

    def _busy(self) -> list[_Worker]:
        return [worker for worker in self._workers if worker.job is not None]

    def _start(self, task: LocalTask) -> _Job:
        """Gives a task to an idle worker, or to a new one where there is none."""
        worker = next((worker for worker in self._workers if worker.job is None), None) or self._new_worker()
        received = (task.params, task.buffers, task.message)
        if not (self._received and all(new is old for new, old in zip(received, self._received, strict=True))):
            while self._busy():  # with clients that still read the old values
                self._receive()
            self._received = received
            self._model.write(dict(zip(("params", "buffers", "message"), received, strict=True)))
        worker.job = _Job(task)
        worker.memory.write({"memory": task.memory})
        is_new = worker.received is not self._received
        worker.received = self._received
        # A process that died while idle is noticed when its result is awaited, and the client is named.
        with suppress(ConnectionError):
            worker.connection.send((is_new, {name: getattr(task, name) for name in _NUMBERS}))
            if is_new:
                self._model.send(worker.connection)
            worker.memory.send(worker.connection)
        return worker.job

    def _receive(self) -> None:
        """Waits until at least one client in training is done.

        Raises:
            ClientError: a process died or could not be set up. All are killed, and the clients in training are lost.
        """
        busy = {worker.connection: worker for worker in self._busy()}
        for connection in wait(list(busy)):
            assert isinstance(connection, Connection)
            worker = busy[connection]
            job, worker.job = worker.job, None
            assert job is not None
            task = job.task
            try:
                answer = connection.recv()
                if not isinstance(answer, _Failure):
                    groups = worker.results.receive(connection, copy=True)
                    counts = self._data.class_counts[task.client]
                    job.result = ClientResult(task.client, task.num_samples, counts, loss=answer, **groups)
                    continue
            except (EOFError, ConnectionError):
                died = _death(worker)
                self.close()
                raise ClientError(task.round, task.client, _TRAINING, died) from None
            job.result = answer.error(task)
            if answer.stage == _START:
                self.close()
                raise job.result

    def _new_worker(self) -> _Worker:
        data, dataset = self._data, self._data.dataset
        if not self._workers:
            arrays = {
                "images": dataset.train_images,
                "labels": dataset.train_labels,
                "rows": torch.cat(data.parts),
                "sizes": torch.tensor([len(part) for part in data.parts]),
                "noise": torch.tensor(data.noise, dtype=torch.float64),
            }
            self._arrays.write({"arrays": arrays}, files=True)
        worker = _Worker()
        self._workers.append(worker)
        fields = {name: getattr(dataset, name) for name in ("class_names", "mean", "std", "augment")}
        worker.connection.send((self._recipe, self._settings, fields))
        self._arrays.send(worker.connection)
        return worker


@dataclass
class _Job:
    """A client, and its result once it is trained."""

    task: LocalTask
    result: ClientResult | Exception | None = None

    def fetch(self) -> ClientResult:
        assert self.result is not None
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


class _Worker:
    """A process, the connection to it, and what it is doing."""

    def __init__(self) -> None:
        self.connection, theirs = _SPAWN.Pipe()
        self.process = _SPAWN.Process(target=_serve, args=(theirs,), daemon=True)
        with _protected_start():
            self.process.start()
        theirs.close()
        self.memory, self.results = Outbox(), Inbox()
        self.job: _Job | None = None
        self.received: tuple[Params, ...] = ()


@contextmanager
def _protected_start() -> Iterator[None]:
    """Processes started meanwhile ignore Ctrl-C, which is handled here, and do not run the user's script again."""
    resource_tracker.ensure_running()  # its own start would unblock the signal
    script = sys.modules["__main__"]
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    # Spawn imports what it finds as ``__main__``; of an empty module it imports nothing.
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _death(worker: _Worker) -> WorkerDied:
    worker.process.join()
    status = worker.process.exitcode
    if status is not None and status < 0:
        name = signal.Signals(-status).name
        hint = "; out of memory? take fewer executor.workers" if name == "SIGKILL" else ""
        return WorkerDied(f"its process was ended by {name}{hint}")
    return WorkerDied(f"its process ended with status {status}")


@dataclass(frozen=True)
class _Failure:
    """An exception as text, for not every exception can be pickled."""

    stage: str
    name: str
    text: str
    trace: str
    is_input: bool

    @staticmethod
    def of(error: Exception, stage: str) -> _Failure:
        trace = "".join(traceback.format_exception(error))
        return _Failure(stage, type(error).__name__, str(error), trace, isinstance(error, InputError))

    def error(self, task: LocalTask) -> Exception:
        if self.is_input:
            return InputError(self.text)
        # A class of the same name, which the message shows.
        cause: Exception = type(self.name, (RuntimeError,), {})(self.text)
        error = ClientError(task.round, task.client, self.stage, cause)
        error.add_note(self.trace)
        return error


def _serve(connection: Connection) -> None:
    """A worker's process: trains clients until the parent closes the connection or ends."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    keep_freed_memory()
    with suppress(EOFError, ConnectionError):
        try:
            executor, rule = _build(connection)
        except Exception as error:
            connection.send(_Failure.of(error, _START))
            return
        models, memories, results = Inbox(), Inbox(), Outbox()
        model: dict[str, Params] = {}
        while True:
            is_new, numbers = connection.recv()
            if is_new:
                model = models.receive(connection)
            fields: dict[str, Any] = {**numbers, **model, **memories.receive(connection)}
            try:
                result = executor.run_one(rule, LocalTask(**fields))
                results.write({name: getattr(result, name) for name in ("params", "buffers", "extra", "memory")})
            except Exception as error:
                connection.send(_Failure.of(error, _TRAINING))
            else:
                connection.send(result.loss)
                results.send(connection)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _build(connection: Connection) -> tuple[SequentialExecutor, LocalRule]:
    """Makes the parent's objects anew; images and labels are not copied."""
    recipe, settings, fields = connection.recv()
    arrays = Inbox().receive(connection)["arrays"]
    for module in recipe.plugins:
        importlib.import_module(module)
    images, labels = arrays["images"], arrays["labels"]
    dataset = ImageDataset(
        train_images=images, train_labels=labels, test_images=images[:0], test_labels=labels[:0], **fields
    )
    parts = [part.numpy() for part in torch.split(arrays["rows"], arrays["sizes"].tolist())]
    data = FederatedData(dataset, parts, noise=arrays["noise"].tolist())
    module = registry.build(recipe.model, data.num_classes, data.image_shape, recipe.model_seed)
    rule = recipe.algorithm.build(data.num_clients).local
    return SequentialExecutor(FunctionalModel(module), data, settings), rule
