"""Clients in processes of one thread each.

They are spawned, for torch's threads do not survive a fork, and run the sequential executor. All map the same images.
"""

from __future__ import annotations

import importlib
import io
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from multiprocessing.reduction import recv_handle, send_handle
from queue import SimpleQueue
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedftg.algorithms.base import ClientResult, LocalRule, LocalTask
from fedftg.data.dataset import ImageDataset
from fedftg.data.federated import FederatedData
from fedftg.engine.executors import RunRecipe, SequentialExecutor
from fedftg.engine.local_train import LocalConfig
from fedftg.engine.machine import keep_freed_memory
from fedftg.errors import ClientError, InputError
from fedftg.models import registry
from fedftg.models.functional import FunctionalModel

_SPAWN = multiprocessing.get_context("spawn")
_START, _TRAINING = "start of a worker process", "local training"


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: object) -> Any:
        """Keeps a tensor's strides: even of a side of 1, they decide the kernel of a convolution and its last bits."""
        if not isinstance(value, Tensor):
            return NotImplemented
        dense = _dense(value)
        return _tensor, (_bytes(dense).numpy(), dense.dtype, tuple(dense.shape), dense.stride())


class _Channel(NamedTuple):
    """Values in turn to and from another process: tensors through a shared file, the rest through a pipe."""

    connection: Connection
    file: BinaryIO

    def send(self, value: object) -> None:
        content, buffers = io.BytesIO(), list[pickle.PickleBuffer]()
        _Pickler(content, 5, buffer_callback=buffers.append).dump(value)
        self.file.seek(0)
        sizes = [self.file.write(buffer.raw()) for buffer in buffers]
        self.connection.send((content.getvalue(), sizes))

    def receive(self) -> Any:
        content, sizes = self.connection.recv()
        buffers = [torch.empty(size, dtype=torch.uint8).numpy() for size in sizes]
        self.file.seek(0)
        for buffer in buffers:
            self.file.readinto(buffer)  # type: ignore[attr-defined]
        return pickle.loads(content, buffers=buffers)


def _tensor(content: Any, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(content).view(dtype).as_strided(shape, stride)


def _dense(tensor: Tensor) -> Tensor:
    """Returns the tensor where its values lie without a gap, else a copy."""
    extent = 1 + sum((side - 1) * step for side, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.detach() if extent == tensor.numel() else tensor.detach().clone()


def _bytes(dense: Tensor) -> Tensor:
    """Returns a view of all bytes, in the order of memory."""
    return dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)


def _shared_file() -> BinaryIO:
    """Returns an unbuffered file without a name, in memory where the system can."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("fedftg"), "w+b", 0)
    return tempfile.TemporaryFile(buffering=0)


_Worker = tuple[SpawnProcess, _Channel]


class WorkersExecutor:
    """The clients of a round side by side in ``count`` processes, which live as long as the run.

    At most two clients a process are in training or wait to be fetched in order.
    """

    def __init__(self, recipe: RunRecipe, data: FederatedData, settings: LocalConfig, count: int) -> None:
        problem = recipe.obstacle()
        if problem is not None:
            raise InputError(f"executor.name=workers: {problem}, or take executor.name=sequential")
        if data.device.type != "cpu":
            raise InputError(f"executor.name=workers needs device=cpu, got {data.device}; or take sequential")
        self.description = f"workers: {count} processes of one thread"
        self._recipe = recipe
        self._data = data
        self._settings = settings
        self._count = count
        self._workers: list[_Worker] = []
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        self._threads: ThreadPoolExecutor | None = None  # each waits for the answer of one process

    def run(self, rule: LocalRule, tasks: Iterable[LocalTask]) -> Iterator[ClientResult]:  # noqa: ARG002
        """Yields one result per task, in order; kills all processes where one died or a client's training failed."""
        threads = self._threads or self._start()
        waiting: deque[Future[ClientResult]] = deque()
        try:
            for task in tasks:
                if len(waiting) == 2 * self._count:
                    yield waiting.popleft().result()
                waiting.append(threads.submit(self._train, task))
            while waiting:
                yield waiting.popleft().result()
        except ClientError:
            self.close()
            raise
        finally:
            for future in waiting:
                future.cancel()

    def close(self) -> None:
        """Kills all workers, which hold nothing that must be saved; a later `run` starts new ones."""
        for process, _ in self._workers:
            process.kill()
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        for process, channel in self._workers:
            process.join()
            channel.connection.close()
            channel.file.close()
        self._workers, self._threads, self._idle = [], None, SimpleQueue()

    def _train(self, task: LocalTask) -> ClientResult:
        worker = process, channel = self._idle.get()
        try:
            channel.send(task)
            answer = channel.receive()
        except (EOFError, ConnectionError):
            raise ClientError(task.round, task.client, _TRAINING, _death(process)) from None
        finally:
            self._idle.put(worker)
        if isinstance(answer, tuple):
            stage, name, text, trace = answer
            # A class of the same name, which the message shows.
            error = ClientError(task.round, task.client, stage, type(name, (RuntimeError,), {})(text))
            error.add_note(trace)
            raise error
        if isinstance(answer, InputError):
            raise answer
        assert isinstance(answer, ClientResult)
        return answer

    def _start(self) -> ThreadPoolExecutor:
        """Starts all processes, then sends each what it trains; they import torch side by side."""
        with _protected_start():
            for _ in range(self._count):
                ours, theirs = _SPAWN.Pipe()
                process = _SPAWN.Process(target=_serve, args=(theirs,), daemon=True)
                process.start()
                theirs.close()
                self._workers.append((process, _Channel(ours, _shared_file())))
        data, dataset = self._data, self._data.dataset
        images = _dense(dataset.train_images)
        place = (tuple(images.shape), images.stride())
        fields = {name: getattr(dataset, name) for name in ("train_labels", "class_names", "mean", "std", "augment")}
        setup = (self._recipe, self._settings, fields, place, [part.numpy() for part in data.parts], data.noise)
        with tempfile.TemporaryFile() as file:
            file.write(_bytes(images).numpy().data)
            file.flush()
            for process, channel in self._workers:
                # A process that died is noticed when a client's result is awaited.
                with suppress(ConnectionError):
                    for shared in (file, channel.file):
                        send_handle(channel.connection, shared.fileno(), process.pid)
                    channel.connection.send_bytes(pickle.dumps(setup))
                self._idle.put((process, channel))
        self._threads = ThreadPoolExecutor(self._count)
        return self._threads


@contextmanager
def _protected_start() -> Iterator[None]:
    """Processes started meanwhile ignore Ctrl-C, which is handled here, and do not run the user's script again."""
    resource_tracker.ensure_running()  # its own start would unblock the signal
    script = sys.modules["__main__"]
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP, signal.SIGTERM})
    # Spawn imports what it finds as ``__main__``; of an empty module it imports nothing.
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _death(process: SpawnProcess) -> ChildProcessError:
    process.join()
    if process.exitcode == -signal.SIGKILL:
        return ChildProcessError("the worker was ended by SIGKILL; out of memory? take fewer executor.workers")
    return ChildProcessError(f"the worker ended with status {process.exitcode}")


def _serve(connection: Connection) -> None:
    """Trains clients until the parent closes the connection or ends."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    keep_freed_memory()
    built: tuple[SequentialExecutor, LocalRule] | None = None
    with suppress(EOFError, ConnectionError):
        images, shared = (os.fdopen(recv_handle(connection), "r+b", 0) for _ in range(2))
        setup, channel = connection.recv_bytes(), _Channel(connection, shared)
        while True:
            task = channel.receive()
            answer: object
            try:
                built = built or _build(images, setup)
                executor, rule = built
                answer = executor.run_one(rule, task)
            except InputError as error:
                answer = InputError(str(error))
            except Exception as error:  # as text, for not every exception can be sent
                trace = "".join(traceback.format_exception(error))
                answer = (_TRAINING if built else _START, type(error).__name__, str(error), trace)
            channel.send(answer)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _build(file: BinaryIO, setup: bytes) -> tuple[SequentialExecutor, LocalRule]:
    recipe, settings, fields, (shape, stride), parts, noise = pickle.loads(setup)
    for module in recipe.plugins:
        importlib.import_module(module)
    content = np.memmap(file, np.uint8, "c", shape=(int(np.prod(shape)),))
    images = torch.from_numpy(content).as_strided(shape, stride)
    fields |= {"train_images": images, "test_images": images[:0], "test_labels": fields["train_labels"][:0]}
    data = FederatedData(ImageDataset(**fields), parts, noise=noise)
    module = registry.build(recipe.model, data.num_classes, data.image_shape, recipe.model_seed)
    rule = recipe.algorithm.build(data.num_clients).local
    return SequentialExecutor(FunctionalModel(module), data, settings), rule
