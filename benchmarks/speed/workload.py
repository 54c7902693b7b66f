"""The work that is timed: the paper's round on random images, bare loops for comparison, and the FLOP of each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import wait
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fedftg import ImageDataset, RunConfig
from fedftg import config as configs
from fedftg.algorithms.base import LocalTask
from fedftg.algorithms.fedavg import PlainLocal
from fedftg.distill.config import DistillConfig, preset
from fedftg.distill.distiller import distil
from fedftg.distill.generator import Generator
from fedftg.distill.images import GeneratorImages
from fedftg.distill.teachers import stack_or_list
from fedftg.engine.local_train import LocalConfig, train
from fedftg.models.functional import FunctionalModel, values
from fedftg.models.registry import ModelConfig, build
from fedftg.precision import MemoryFormat, Precision, autocast

BATCH = 50
CLASSES = 10
SHAPE = (3, 32, 32)


def images(count: int, seed: int = 0) -> ImageDataset:
    """Returns ``count`` random training images, and a tenth as many test images."""
    rng = np.random.default_rng(seed)
    train, test = (rng.integers(0, 256, (number, *SHAPE), dtype=np.uint8) for number in (count, max(count // 10, 1)))
    labels = np.arange(count) % CLASSES
    return ImageDataset.from_tensors(
        train, labels, test, labels[: len(test)], class_names=list(map(str, range(CLASSES))), augment="flip_crop"
    )


def round_config(**changes: Any) -> RunConfig:
    """One round of the paper's protocol (``docs/algorithms/fedftg.md``); ``changes`` are keys with __ for the point."""
    settings = {
        "rounds": 1, "partition.law": "iid", "partition.num_clients": 10, "model.name": "resnet18",
        "local.epochs": 5, "local.batch_size": 50, "refiner.preset": "paper", "evaluation.track_all": True,
    }  # fmt: skip
    settings |= {key.replace("__", "."): value for key, value in changes.items()}
    if settings.get("refiner.name") == "none":
        settings.pop("refiner.preset")
    return configs.from_mapping(configs.apply({}, [f"{key}={json.dumps(value)}" for key, value in settings.items()]))


def model(name: str, seed: int = 0, device: torch.device | str = "cpu") -> nn.Module:
    """A classifier of the package for 32x32 colour images."""
    return build(ModelConfig(name=name), CLASSES, SHAPE, seed).to(device)


def step_flops(module: nn.Module, batch: int) -> int:
    """FLOP of one training step (forward and backward; twice the multiplications) as torch's counter has them."""
    counter = FlopCounterMode(display=False)
    labels = torch.zeros(batch, dtype=torch.int64)
    with counter:
        nn.functional.cross_entropy(module(torch.zeros(batch, *SHAPE)), labels).backward()
    return int(counter.get_total_flops())


def bare_loop(module: nn.Module, batch: int, steps: int, device: torch.device | str = "cpu") -> float:
    """Seconds of the plainest training loop: forward, backward, SGD, always on the same batch."""
    module.train()
    optimiser = torch.optim.SGD(module.parameters(), lr=0.01, weight_decay=1e-3, fused=True)
    inputs, labels = torch.randn(batch, *SHAPE, device=device), torch.arange(batch, device=device) % CLASSES
    start = time.perf_counter()
    for _ in range(steps):
        nn.functional.cross_entropy(module(inputs), labels).backward()
        optimiser.step()
        optimiser.zero_grad()
    wait(device)
    return time.perf_counter() - start


def bare_loops(name: str, steps: int, processes: int) -> float:
    """Seconds of the slowest of ``processes`` processes of one thread, each with a `bare_loop` of ``steps`` steps."""
    code = (
        "import sys, torch; torch.set_num_threads(1); from fedftg.engine.machine import keep_freed_memory; "
        "keep_freed_memory(); from workload import BATCH, bare_loop, model; module = model(sys.argv[1]); "
        "bare_loop(module, BATCH, 2); print('ready', flush=True); input(); "
        "print(bare_loop(module, BATCH, int(sys.argv[2])))"
    )
    command = [sys.executable, "-c", code, name, str(steps)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    running = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(processes)
    ]
    for process in running:
        assert process.stdout is not None
        process.stdout.readline()  # all wait until the last one is ready
    for process in running:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    return max(float(process.communicate()[0]) for process in running)


def client_steps(
    name: str, steps: int, device: torch.device | str = "cpu"
) -> Callable[[Precision, MemoryFormat], float]:
    """Returns a function that gives the seconds of that many steps of a client, in a precision and layout."""
    functional = FunctionalModel(model(name, device=device))
    params, buffers = functional.init()
    batch = torch.randn(BATCH, *SHAPE, device=device), torch.arange(BATCH, device=device) % CLASSES
    task = LocalTask(1, 0, params, buffers, {}, {}, BATCH, 1.0, 0.01, 0)

    def seconds(precision: Precision, memory_format: MemoryFormat) -> float:
        settings = LocalConfig(precision=precision, memory_format=memory_format)
        wait(device)
        start = time.perf_counter()
        train(functional, PlainLocal(), task, [batch] * steps, torch.full((CLASSES,), 5), settings)
        wait(device)
        return time.perf_counter() - start

    return seconds


class Refining:
    """A distiller with ``K`` ResNet teachers, and its necessary passes one by one."""

    def __init__(self, chosen: str, num_teachers: int, name: str, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.config: DistillConfig = preset(chosen)
        self.num_teachers = num_teachers
        self.function = FunctionalModel(model(name, device=device))
        held = [values(model(name, seed=k, device=device)) for k in range(num_teachers)]
        call = partial(self.function, train=False)
        self.teachers = stack_or_list(call, [params for params, _ in held], [buffers for _, buffers in held])
        self.student = self.function.module(*held[0])
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.generator = Generator(self.config.noise_dim, CLASSES, SHAPE, self.config.generator_width).to(device)
        self.counts = torch.full((num_teachers, CLASSES), 50.0)

    def refine(
        self, iterations: int, precision: Precision = "float32", memory_format: MemoryFormat = "contiguous"
    ) -> float:
        """Seconds of that many iterations."""
        changed = {"iterations": iterations, "precision": precision, "memory_format": memory_format}
        config = self.config.model_copy(update=changed)
        self.generator.memory_format = memory_format
        images, rng = GeneratorImages(config, self.generator), torch.Generator().manual_seed(0)
        return self._timed(lambda: distil(config, images, self.student, self.teachers, self.counts, rng=rng))

    def generate(
        self, steps: int, precision: Precision = "float32", memory_format: MemoryFormat = "contiguous"
    ) -> float:
        """Seconds of that many forward and backward passes of the generator."""
        self.generator.memory_format = memory_format
        noise = torch.randn(self.config.batch_size, self.config.noise_dim, device=self.device)
        labels = torch.arange(self.config.batch_size, device=self.device) % CLASSES
        with autocast(precision, self.device):
            return self._timed(lambda: [self._generator(noise, labels, train=True) for _ in range(steps)])

    def necessary(self, iterations: int) -> tuple[float, float]:
        """Seconds and FLOP of the forward and backward passes that the iterations need, each timed alone.

        Per generator step (as many as there are teachers in ``official``): generator forward and backward, teachers and
        student forward and backward to the images. Per batch for the student: generator and teachers forward. Per
        student step: student forward and backward.
        """
        config, size = self.config, self.config.batch_size
        batch = torch.randn(size, *SHAPE, device=self.device)
        noise = torch.randn(size, config.noise_dim, device=self.device)
        labels = torch.arange(size, device=self.device) % CLASSES
        one = partial(self.teachers, start=0, stop=1)
        joint = config.generator_update == "joint"
        generator_steps = config.generator_steps * (1 if joint else self.num_teachers)
        # Each teacher sees each generator step once: in turn, or all of them jointly.
        teacher_steps = config.generator_steps * self.num_teachers
        passes: list[tuple[int, Callable[[], object]]] = [
            (generator_steps, lambda: self._generator(noise, labels, train=True)),
            (teacher_steps, lambda: self._to_images(one, batch)),
            (generator_steps, lambda: self._to_images(self._student(frozen=True), batch)),
            (1, lambda: self._generator(noise, labels, train=False)),
            (self.num_teachers, lambda: self._without_graph(one, batch)),
            (config.student_steps, lambda: self._student(frozen=False)(batch).square().mean().backward()),
        ]
        seconds = flops = 0.0
        for count, work in passes:
            counter = FlopCounterMode(display=False)
            with counter:
                work()
            taken = min(self._timed(work) for _ in range(3))
            seconds += iterations * count * taken
            flops += iterations * count * counter.get_total_flops()
        return seconds, flops

    def _generator(self, noise: Tensor, labels: Tensor, *, train: bool) -> None:
        self.generator.train(train)
        if train:
            self.generator(noise, labels).square().mean().backward()
        else:
            self._without_graph(partial(self.generator, labels=labels), noise)

    def _student(self, *, frozen: bool) -> nn.Module:
        self.student.train(not frozen and self.config.student_mode == "train")
        return self.student.requires_grad_(not frozen)

    @staticmethod
    def _to_images(classifier: Callable[[Tensor], Tensor], batch: Tensor) -> None:
        classifier(batch.clone().requires_grad_()).square().mean().backward()

    @staticmethod
    @torch.no_grad()
    def _without_graph(function: Callable[[Tensor], Tensor], batch: Tensor) -> None:
        function(batch)

    def _timed(self, work: Callable[[], object]) -> float:
        wait(self.device)
        start = time.perf_counter()
        work()
        wait(self.device)
        return time.perf_counter() - start
