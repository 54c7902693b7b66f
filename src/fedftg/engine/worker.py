"""The process of the ``workers`` executor: builds the run's objects anew, then trains one client a message.

Started as ``python -c "from fedftg.engine.worker import main; main()" CONNECTION LIFELINE``; the two numbers are open
descriptors. Messages are JSON; tensors lie in shared memory (`fedftg.engine.shared`).
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from operator import attrgetter
from typing import Any

import numpy as np
import torch

from fedftg.algorithms.base import LocalRule, LocalTask
from fedftg.data.dataset import ImageDataset
from fedftg.data.federated import FederatedData
from fedftg.engine.executors import SequentialExecutor
from fedftg.engine.local_train import LocalConfig
from fedftg.engine.machine import keep_freed_memory
from fedftg.engine.shared import Layout, Segment, mapped
from fedftg.errors import InputError
from fedftg.models import registry
from fedftg.models.functional import FunctionalModel
from fedftg.params import Params

Message = dict[str, Any]


def main() -> None:
    """Serves one parent until it closes the connection or dies."""
    # Ctrl-C reaches the whole terminal; what to do about it is the parent's decision.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection, lifeline = Connection(int(sys.argv[1])), int(sys.argv[2])
    threading.Thread(target=_die_with_parent, args=(lifeline,), daemon=True).start()
    torch.set_num_threads(1)
    keep_freed_memory()
    try:
        worker = Worker(json.loads(connection.recv_bytes()))
    except EOFError:
        return
    except Exception as error:
        _answer(connection, failure(error, "start of a worker process"))
        return
    while True:
        try:
            message = json.loads(connection.recv_bytes())
        except EOFError:
            return
        _answer(connection, worker.answer(message))


class Worker:
    """What a process needs to train clients; made of the parent's first message."""

    def __init__(self, setup: Message) -> None:
        for module in setup["plugins"]:
            importlib.import_module(module)
        self._shared = Segment(setup["shared"])
        self._tasks = Segment(setup["tasks"])
        self._results = Segment(setup["results"])
        self._version = -1
        self._common: dict[str, Params] = {"params": {}, "buffers": {}, "message": {}}
        data = _data(setup)
        module = registry.build(
            registry.ModelConfig(**setup["model"]), data.num_classes, data.image_shape, setup["model_seed"]
        )
        owner = importlib.import_module(setup["algorithm"]["module"])
        config = attrgetter(setup["algorithm"]["class"])(owner).model_validate(setup["algorithm"]["settings"])
        self._rule: LocalRule = config.build(setup["num_clients"]).local
        self._executor = SequentialExecutor(FunctionalModel(module), data, LocalConfig(**setup["local"]))

    def answer(self, message: Message) -> Message:
        """Trains the client of a task; the tensors of the result lie in shared memory afterwards."""
        try:
            if message["version"] != self._version:
                self._common = self._shared.read(message["common"], copy=False)
                self._version = message["version"]
            memory = self._tasks.read(message["layout"], copy=False)["memory"]
            task = LocalTask(
                params=self._common["params"],
                buffers=self._common["buffers"],
                message=self._common["message"],
                memory=memory,
                **message["task"],
            )
            result = self._executor.run_one(self._rule, task)
            groups = {
                "params": result.params,
                "buffers": result.buffers,
                "extra": result.extra,
                "memory": result.memory,
            }
            layout: Layout = self._results.write(groups)
        except Exception as error:
            return failure(error, "local training")
        return {"layout": layout, "loss": result.loss}


def failure(error: BaseException, stage: str) -> Message:
    """An error as plain text."""
    return {
        "failed": type(error).__name__,
        "stage": stage,
        "text": str(error),
        "input": isinstance(error, InputError),
        "trace": "".join(traceback.format_exception(error)),
    }


def _data(setup: Message) -> FederatedData:
    """The parent's division of the training images; images and labels are not copied."""
    given = setup["data"]
    count, shape = given["count"], given["image_shape"]
    pixels = count * int(np.prod(shape))
    start = given["offset"]
    images = mapped(given["images"], start + pixels, private=True)[start:].as_strided((count, *shape), given["stride"])
    division = Segment(given["division"]).read(given["layout"], copy=False)["data"]
    dataset = ImageDataset(
        train_images=images,
        train_labels=division["labels"],
        test_images=images[:0],
        test_labels=division["labels"][:0],
        class_names=tuple(given["class_names"]),
        mean=tuple(given["mean"]),
        std=tuple(given["std"]),
        augment=given["augment"],
    )
    parts = [part.numpy() for part in torch.split(division["rows"], given["sizes"])]
    return FederatedData(dataset, parts, noise=given["noise"])


def _answer(connection: Connection, message: Message) -> None:
    try:
        connection.send_bytes(json.dumps(message).encode())
    except BrokenPipeError:
        # The parent went away; the lifeline ends this process.
        return


def _die_with_parent(lifeline: int) -> None:
    """Nothing is ever written there: reading ends when the parent is gone, however it went."""
    os.read(lifeline, 1)
    os._exit(1)
