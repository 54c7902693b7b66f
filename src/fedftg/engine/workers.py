"""Clients in processes of one thread each.

Measured for ResNet-18 on 2 cores: two processes of one thread do more client steps a second than one process of two
threads. The numbers are those of the sequential executor with ``threads = 1``, bit for bit: each process calls it.

A process is a fresh interpreter, and not a fork (torch's threads do not survive one) nor ``multiprocessing``'s spawn
(which runs the user's script again). All that goes over its socket is JSON; tensors lie in shared memory without a
name, so that nothing is left behind whoever is killed.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from fedftg.algorithms.base import AlgorithmConfig, ClientResult, LocalRule, LocalTask
from fedftg.data.federated import FederatedData
from fedftg.engine.local_train import LocalConfig
from fedftg.engine.shared import Layout, Segment, dense_strides, file_behind
from fedftg.errors import ClientError, InputError
from fedftg.models.registry import ModelConfig

Message = dict[str, Any]

_PROGRAM = "from fedftg.engine.worker import main; main()"


@dataclass(frozen=True)
class Origin:
    """How another process makes the same model and the same rule."""

    plugins: tuple[str, ...]
    model: ModelConfig
    model_seed: int
    algorithm: AlgorithmConfig

    def obstacle(self) -> str | None:
        """Why another process cannot, or None."""
        cls = type(self.algorithm)
        if cls.__module__ == "__main__" or "<locals>" in cls.__qualname__:
            return f"algorithm class {cls.__qualname__} is defined in the started script; put it into a module"
        if self.model.name.startswith("__main__"):
            return f"model {self.model.name} is defined in the started script; put it into a module"
        return None


class WorkersExecutor:
    """Clients of a round side by side in ``count`` processes that live as long as the run.

    At most two results a process wait to be fetched in order. A generator that is closed early costs the time of the
    clients that are in training, not more; their results are dropped.
    """

    def __init__(self, origin: Origin, data: FederatedData, settings: LocalConfig, count: int) -> None:
        problem = origin.obstacle()
        if problem is not None:
            raise InputError(f"executor.name=workers: {problem}, or take executor.name=sequential")
        if data.device.type != "cpu":
            raise InputError(
                f"executor.name=workers trains on the CPU and device is {str(data.device)!r}; take device=cpu, or "
                "executor.name=sequential"
            )
        self.description = f"workers: {count} processes of one thread"
        self._data = data
        self._count = count
        self._pool = _Pool(origin, data, settings)
        # Also where nobody closes it: at the end of the interpreter, or of the last reference.
        self._finalizer = weakref.finalize(self, self._pool.close)

    def run(self, rule: LocalRule, tasks: Iterable[LocalTask]) -> Iterator[ClientResult]:
        """One result per task, in order.

        Raises:
            ClientError: a client's training failed or its process died; names round, client and stage.
        """
        if type(rule) is not self._pool.rule:
            raise ValueError(f"the processes were made for {self._pool.rule.__name__}, got {type(rule).__name__}")
        self._pool.settle()
        waiting = iter(tasks)
        upcoming = next(waiting, None)
        number = done = 0
        ready: dict[int, ClientResult | Exception] = {}
        while True:
            while upcoming is not None and number - done < 2 * self._count and self._can_start(upcoming):
                self._pool.start(number, upcoming)
                number, upcoming = number + 1, next(waiting, None)
            if done == number:
                return
            if done not in ready:
                ready |= self._pool.finished(self._data)
                continue
            result = ready.pop(done)
            done += 1
            if isinstance(result, Exception):
                raise result
            yield result

    def close(self) -> None:
        """Ends the processes; a later `run` starts new ones."""
        self._pool.close()

    def _can_start(self, task: LocalTask) -> bool:
        if self._pool.busy == 0:
            return True
        return self._pool.busy < self._count and self._pool.holds(task)


@dataclass
class _Process:
    popen: subprocess.Popen[bytes]
    connection: Connection
    tasks: Segment
    results: Segment
    version: int = -1
    current: tuple[int, LocalTask] | None = None


class _Pool:
    """The processes, and the memory shared with them."""

    def __init__(self, origin: Origin, data: FederatedData, settings: LocalConfig) -> None:
        self.rule = type(origin.algorithm.build(data.num_clients).local)
        self._origin = origin
        self._data = data
        self._settings = settings
        self._processes: list[_Process] = []
        self._shared: Segment | None = None
        self._setup: Message = {}
        self._inherited: list[int] = []
        self._lifeline = self._alive = -1
        self._common: tuple[Any, ...] = ()
        self._layout: Layout = {}
        self._version = 0

    @property
    def busy(self) -> int:
        """How many processes have a client."""
        return sum(process.current is not None for process in self._processes)

    def holds(self, task: LocalTask) -> bool:
        """Whether the shared memory has what this task starts from."""
        parts = (task.params, task.buffers, task.message)
        return bool(self._common) and all(a is b for a, b in zip(parts, self._common, strict=True))

    def start(self, number: int, task: LocalTask) -> None:
        """Gives a task to an idle process, or to a new one where there is none."""
        if self._shared is None:
            self._prepare()
        assert self._shared is not None
        if not self.holds(task):
            groups = {"params": task.params, "buffers": task.buffers, "message": task.message}
            self._layout = self._shared.write(groups)
            # Held on to, so that "is" means the same tensors.
            self._common = (task.params, task.buffers, task.message)
            self._version += 1
        process = next((process for process in self._processes if process.current is None), None) or self._spawn()
        plain = ("round", "client", "num_samples", "relative_size", "lr", "seed")
        message: Message = {
            "version": self._version,
            "task": {name: getattr(task, name) for name in plain},
            "layout": process.tasks.write({"memory": task.memory}),
        }
        if process.version != self._version:
            message["common"] = self._layout
            process.version = self._version
        process.current = (number, task)
        try:
            process.connection.send_bytes(json.dumps(message).encode())
        except (BrokenPipeError, ConnectionResetError):
            # It died while idle: `finished` finds that out, and names the client.
            return

    def finished(self, data: FederatedData) -> dict[int, ClientResult | Exception]:
        """Waits for at least one client; its result, or the error that it raised, by its number.

        Raises:
            ClientError: a process died. All are ended then, and all that they were at is lost.
        """
        busy = {process.connection: process for process in self._processes if process.current is not None}
        found: dict[int, ClientResult | Exception] = {}
        for connection in wait(list(busy)):
            assert isinstance(connection, Connection)
            process = busy[connection]
            assert process.current is not None
            number, task = process.current
            try:
                answer = json.loads(connection.recv_bytes())
            except (EOFError, ConnectionResetError):
                died = _died(process.popen)
                self.close()
                raise ClientError(task.round, task.client, "local training", died) from None
            process.current = None
            if "failed" not in answer:
                found[number] = _result(task, answer, process, data)
                continue
            found[number] = failed = _failed(task, answer)
            if answer["stage"] != "local training":
                # The process could not be set up, and no other could.
                self.close()
                raise failed
        return found

    def settle(self) -> None:
        """Waits for clients that nobody wants any more; their results are dropped."""
        while self.busy:
            self.finished(self._data)

    def close(self) -> None:
        """Ends all processes at once: they have nothing to lose."""
        processes, self._processes = self._processes, []
        for process in processes:
            process.popen.kill()
        for process in processes:
            process.popen.wait()
            process.connection.close()
            process.tasks.close()
            process.results.close()
        if self._shared is None:
            return
        for descriptor in (*self._inherited, self._alive):
            os.close(descriptor)
        self._shared.close()
        self._inherited, self._shared, self._setup, self._common = [], None, {}, ()

    def _prepare(self) -> None:
        """The shared memory and the first message of all processes."""
        self._shared = Segment()
        division = Segment()
        # Reading from it ends when the only end that writes is closed: that of this process, whatever ends it.
        self._lifeline, self._alive = os.pipe()
        dataset, parts = self._data.dataset, self._data.parts
        images = file_behind(dataset.train_images)
        if images is None:
            copy = Segment()
            copy.write({"data": {"images": dataset.train_images}})
            images = copy.descriptor, 0
        self._inherited = [division.descriptor, self._lifeline, images[0]]
        algorithm = self._origin.algorithm
        self._setup = {
            "plugins": list(self._origin.plugins),
            "model": self._origin.model.model_dump(mode="json"),
            "model_seed": self._origin.model_seed,
            "algorithm": {
                "module": type(algorithm).__module__,
                "class": type(algorithm).__qualname__,
                "settings": algorithm.model_dump(mode="json"),
            },
            "num_clients": self._data.num_clients,
            "local": self._settings.model_dump(mode="json"),
            "shared": self._shared.descriptor,
            "data": {
                "images": images[0],
                "offset": images[1],
                "count": len(dataset.train_images),
                "image_shape": list(dataset.image_shape),
                "stride": list(dense_strides(dataset.train_images)),
                "division": division.descriptor,
                "layout": division.write({"data": {"labels": dataset.train_labels, "rows": torch.cat(parts)}}),
                "sizes": [len(part) for part in parts],
                "noise": self._data.noise,
                "class_names": list(dataset.class_names),
                "mean": list(dataset.mean),
                "std": list(dataset.std),
                "augment": dataset.augment,
            },
        }

    def _spawn(self) -> _Process:
        ours, theirs = socket.socketpair()
        tasks, results = Segment(), Segment()
        assert self._shared is not None
        descriptors = [theirs.fileno(), tasks.descriptor, results.descriptor, self._shared.descriptor]
        path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
        one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        popen = subprocess.Popen(
            # -P: no folder but those of the parent's path.
            [sys.executable, "-P", "-c", _PROGRAM, str(theirs.fileno()), str(self._lifeline)],
            env={**os.environ, **one_thread, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[*descriptors, *self._inherited],
            process_group=0,
        )
        theirs.close()
        connection = Connection(ours.detach())
        process = _Process(popen, connection, tasks, results)
        self._processes.append(process)
        setup = {**self._setup, "tasks": tasks.descriptor, "results": results.descriptor}
        connection.send_bytes(json.dumps(setup).encode())
        return process


def _result(task: LocalTask, answer: Message, process: _Process, data: FederatedData) -> ClientResult:
    # Copied: the process writes its next result over this one.
    groups = process.results.read(answer["layout"], copy=True)
    counts = data.class_counts[task.client]
    return ClientResult(task.client, task.num_samples, counts, loss=answer["loss"], **groups)


def _failed(task: LocalTask, answer: Message) -> Exception:
    if answer["input"]:
        return InputError(answer["text"])
    # A class of the same name, for that is what the message shows.
    cause: Exception = type(answer["failed"], (RuntimeError,), {})(answer["text"])
    cause.add_note(answer["trace"])
    return ClientError(task.round, task.client, answer["stage"], cause)


class WorkerDied(RuntimeError):
    """A process ended without an answer."""


def _died(popen: subprocess.Popen[bytes]) -> WorkerDied:
    status = popen.wait()
    if status < 0:
        name = signal.Signals(-status).name
        hint = "; out of memory? take fewer executor.workers" if name == "SIGKILL" else ""
        return WorkerDied(f"its process was ended by {name}{hint}")
    return WorkerDied(f"its process ended with status {status}")
