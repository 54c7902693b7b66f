"""Clients in processes of one thread each.

Measured for ResNet-18 on 2 cores: two processes of one thread do more client steps a second than one process of two
threads. The numbers are those of the sequential executor with ``threads = 1``, bit for bit: each process runs it.

Processes are spawned, for torch's threads do not survive a fork. Tasks and results travel through pipes; all processes
map the same images.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
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
from multiprocessing.reduction import ForkingPickler, recv_handle, send_handle
from pathlib import Path
from queue import SimpleQueue
from types import ModuleType
from typing import IO, Any, NamedTuple

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


class WorkerDied(RuntimeError):
    """A process ended without an answer."""


class _Worker(NamedTuple):
    process: SpawnProcess
    connection: Connection


class _Failure(NamedTuple):
    """An exception as text, for not every exception can be sent."""

    stage: str
    name: str
    text: str
    trace: str


class WorkersExecutor:
    """The clients of a round side by side in ``count`` processes, which live as long as the run.

    At most two clients a process are in training or wait to be fetched in order. A generator that is closed early costs
    the time of the clients in training; their results are dropped.

    Raises:
        InputError: other processes cannot train this, or ``data`` is not on the CPU.
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
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        self._threads: ThreadPoolExecutor | None = None
        """Each waits for the answer of one process."""

    def run(self, rule: LocalRule, tasks: Iterable[LocalTask]) -> Iterator[ClientResult]:  # noqa: ARG002
        """Yields one result per task, in order; the rule is the one that the recipe builds.

        Raises:
            ClientError: a client's training failed or its process died; all processes are killed.
        """
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
        for process, connection in self._workers:
            process.join()
            connection.close()
        self._workers, self._threads, self._idle = [], None, SimpleQueue()

    def _train(self, task: LocalTask) -> ClientResult:
        """Has a client trained by an idle worker."""
        worker = self._idle.get()
        try:
            _send(worker.connection, task)
            answer = worker.connection.recv()
        except (EOFError, ConnectionError):
            raise ClientError(task.round, task.client, _TRAINING, _death(worker.process)) from None
        finally:
            self._idle.put(worker)
        if isinstance(answer, _Failure):
            # A class of the same name, which the message shows.
            cause: Exception = type(answer.name, (RuntimeError,), {})(answer.text)
            error = ClientError(task.round, task.client, answer.stage, cause)
            error.add_note(answer.trace)
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
                self._workers.append(_Worker(process, ours))
        data, dataset = self._data, self._data.dataset
        images = _dense(dataset.train_images)
        file, offset = _open(images)
        place = (offset, tuple(images.shape), images.stride())
        fields = {name: getattr(dataset, name) for name in ("train_labels", "class_names", "mean", "std", "augment")}
        setup = (self._recipe, self._settings, fields, place, [part.numpy() for part in data.parts], data.noise)
        for worker in self._workers:
            # A process that died is noticed when a client's result is awaited.
            with suppress(ConnectionError):
                send_handle(worker.connection, file.fileno(), worker.process.pid)
                _send(worker.connection, setup)
            self._idle.put(worker)
        file.close()
        self._threads = ThreadPoolExecutor(self._count)
        return self._threads


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


def _death(process: SpawnProcess) -> WorkerDied:
    process.join()
    status = process.exitcode or 0
    if status == -signal.SIGKILL:
        return WorkerDied("its process was ended by SIGKILL; out of memory? take fewer executor.workers")
    return WorkerDied(f"its process ended with status {status}")


class _Pickler(ForkingPickler):
    """Sends tensors by value; torch would share them by /dev/shm, which holds 64 MB in a container.

    All strides are kept: even that of a side of length 1 decides which kernel a convolution takes, and so the last bits
    of its gradients (measured with grey 8x8 images).
    """

    def reducer_override(self, value: object) -> Any:
        """Returns how a tensor is made anew, NotImplemented for the rest."""
        if not isinstance(value, Tensor):
            return NotImplemented
        dense = _dense(value)
        return _tensor, (_bytes(dense).numpy(), dense.dtype, tuple(dense.shape), dense.stride())


def _tensor(
    content: np.ndarray[Any, Any], dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...]
) -> Tensor:
    tensor = torch.empty_strided(shape, stride, dtype=dtype)
    _bytes(tensor).copy_(torch.from_numpy(content))
    return tensor


def _send(connection: Connection, value: object) -> None:
    connection.send_bytes(_Pickler.dumps(value, 5))


def _dense(tensor: Tensor) -> Tensor:
    """Returns the tensor where its values lie without a gap, else a copy."""
    extent = 1 + sum((side - 1) * step for side, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.detach() if extent == tensor.numel() else tensor.detach().clone()


def _bytes(dense: Tensor) -> Tensor:
    """Returns a view of all bytes, in the order of memory."""
    return dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)


def _open(images: Tensor) -> tuple[IO[bytes], int]:
    """Opens the file that images are a memory map of, or a copy without a name; returns it and where they start."""
    found = file_behind(images)
    if found is not None:
        return open(found[0], "rb"), found[1]
    if hasattr(os, "memfd_create"):
        file: IO[bytes] = os.fdopen(os.memfd_create("fedftg"), "w+b")
    else:
        file = tempfile.TemporaryFile()  # noqa: SIM115
    file.write(_bytes(images).numpy().data)
    file.flush()
    return file, 0


def file_behind(tensor: Tensor) -> tuple[str, int] | None:
    """Returns path and offset of the file that a dense CPU tensor is a memory map of; None where there is none.

    A private map counts while nothing was written to it, and a file while it was neither deleted nor replaced.
    """
    start, stop = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    found: tuple[str, int] | None = None
    try:
        lines = Path("/proc/self/smaps").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None
    for line in lines:
        fields = line.split(maxsplit=5)
        if "-" in fields[0]:  # the first line of a map: 7f00-7fff rw-p OFFSET DEVICE INODE PATH
            low, high = (int(end, 16) for end in fields[0].split("-"))
            inside = low <= start and stop <= high and len(fields) == 6
            found = (fields[5], int(fields[2], 16) + start - low) if inside else None
        elif found is not None and fields[0] == "Anonymous:":  # pages that are no longer the file's
            # The kernel appends " (deleted)" to the path of a file that was deleted or replaced.
            return found if fields[1] == "0" and os.path.isfile(found[0]) else None
    return None


def _serve(connection: Connection) -> None:
    """A worker's process: trains clients until the parent closes the connection or ends."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    keep_freed_memory()
    built: tuple[SequentialExecutor, LocalRule] | None = None
    with suppress(EOFError, ConnectionError):
        file, setup = os.fdopen(recv_handle(connection), "rb"), connection.recv_bytes()
        while True:
            task = connection.recv()
            answer: object
            try:
                built = built or _build(file, setup)
                executor, rule = built
                answer = executor.run_one(rule, task)
            except InputError as error:
                answer = InputError(str(error))
            except Exception as error:
                trace = "".join(traceback.format_exception(error))
                answer = _Failure(_TRAINING if built else _START, type(error).__name__, str(error), trace)
            _send(connection, answer)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _build(file: IO[bytes], setup: bytes) -> tuple[SequentialExecutor, LocalRule]:
    """Makes the parent's objects anew; the images are not copied."""
    recipe, settings, fields, (offset, shape, stride), parts, noise = _Pickler.loads(setup)
    for module in recipe.plugins:
        importlib.import_module(module)
    content = np.memmap(file, np.uint8, "c", offset, (int(np.prod(shape)),))
    images = torch.from_numpy(content).as_strided(shape, stride)
    dataset = ImageDataset(
        train_images=images, test_images=images[:0], test_labels=fields["train_labels"][:0], **fields
    )  # fmt: skip
    data = FederatedData(dataset, parts, noise=noise)
    module = registry.build(recipe.model, data.num_classes, data.image_shape, recipe.model_seed)
    rule = recipe.algorithm.build(data.num_clients).local
    return SequentialExecutor(FunctionalModel(module), data, settings), rule
