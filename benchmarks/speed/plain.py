"""Compares a run's seconds with those of a plain PyTorch script that does the same work, in turns.

    python benchmarks/speed/plain.py [RECIPE] [--set KEY=VALUE ...] [--repeats 3]

The script repeats a finished run from its records: the same clients, sizes, steps, threads, fine-tuned rounds and
evaluations with FedAvg, with or without FedFTG in `joint` steps, in float32, on random images. Model, generator,
augmentation and distances of images are this package's; all else is what one would write: modules, deep copies,
optimisers, one client after the other. The first round is left out.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from against import ROOT, Seconds, command, mean_phases, means, show
from torch import Tensor, nn

from fedftg import config as configs
from fedftg import load_run, recipes
from fedftg.augment import augment
from fedftg.config import RunConfig
from fedftg.distill.generator import new_generator
from fedftg.distill.losses import diversity
from fedftg.engine.machine import keep_freed_memory
from fedftg.models.registry import build
from fedftg.rundir import records

State = dict[str, Tensor]


def main() -> None:
    """Runs both in turns and prints the median of each phase, and ours over the plain script's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="default")
    parser.add_argument("--set", nargs="*", action="extend", default=[], metavar="KEY=VALUE")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--repeat", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.repeat:
        print(json.dumps(repeat(arguments.repeat)))
        return
    config = configs.load(recipes.find(arguments.recipe), arguments.set)
    if config.algorithm.name != "fedavg" or config.refiner.name not in ("none", "fedftg"):
        parser.error(
            f"the script has fedavg with none or fedftg, got {config.algorithm.name} with {config.refiner.name}"
        )
    ours, plain = list[Seconds](), list[Seconds]()
    for _ in range(arguments.repeats):
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            subprocess.run(command(arguments.recipe, arguments.set, run), stdout=subprocess.DEVNULL, check=True)
            ours.append(mean_phases(run))
            words = [sys.executable, __file__, "--repeat", str(run)]
            plain.append(json.loads(subprocess.run(words, stdout=subprocess.PIPE, check=True, cwd=ROOT).stdout))
    show({"ours": ours, "plain": plain})


def repeat(folder: Path) -> Seconds:
    """Does a run's work once more; returns the mean seconds of each phase over the rounds but the first."""
    keep_freed_memory()
    torch.set_num_threads(records.read_json(folder / "environment.json")["sessions"][-1]["threads"])
    record = load_run(folder)
    config = configs.from_mapping(record.config)
    partition, last = (json.loads((folder / f"{name}.json").read_text()) for name in ("partition", "evaluation"))
    tested = sum(map(sum, last["confusion"]["selected"]))
    script = Script(config, partition["class_counts"], partition["image_shape"], tested)
    seconds = [script.round(row) for row in record.rounds]
    return means(seconds[1:] or seconds)


class Script:
    """A federation on random images, and what its server holds."""

    def __init__(self, config: RunConfig, counts: list[list[int]], shape: list[int], tested: int) -> None:
        self.config, self.counts, self.shape = config, torch.tensor(counts).float(), shape
        self.classes = self.counts.shape[1]
        self.augment = config.data.augment
        if self.augment == "default":  # that of the data sets which these benchmarks use
            self.augment = "flip_crop" if config.data.name.startswith("cifar") else "none"
        self.images = [torch.randn(sum(of), *self.shape) for of in counts]
        self.labels = [torch.randint(self.classes, (sum(of),)) for of in counts]
        self.test = torch.randn(tested, *self.shape)
        self.model = build(config.model, self.classes, self.shape, 0)
        self.uploads: dict[int, State] = {}
        if config.refiner.name == "fedftg":
            self.generator = new_generator(config.refiner, self.classes, self.shape, 0)
            self.adam = torch.optim.Adam(self.generator.parameters(), lr=config.refiner.generator_lr)

    def round(self, row: dict[str, Any]) -> Seconds:
        """Does the work of a round on record; returns the seconds of each phase."""
        seconds, last = Seconds(), time.perf_counter()

        def lap(phase: str) -> None:
            nonlocal last
            now = time.perf_counter()
            seconds[phase], last = now - last, now

        trained = {client: self.train(client) for client in row["clients"]}
        lap("local")
        self.uploads |= {client: copy.deepcopy(net.state_dict()) for client, net in trained.items()}
        previous = copy.deepcopy(self.model)
        self.model.load_state_dict(self.average(list(trained)))
        everyone = self.average(list(self.uploads)) if "all" in row["accuracy"] else None
        lap("aggregate")
        refined = copy.deepcopy(self.model)
        if "student" in row["refine"]:
            teachers = [*trained.values(), *([previous] if self.config.refiner.absent_weight else [])]
            weights = torch.stack([self.counts[client] for client in trained] + [self.counts.sum(dim=0)])[
                : len(teachers)
            ]
            self.refine(refined, teachers, weights)
        lap("refine")
        for kind in row["accuracy"]:
            net = copy.deepcopy(refined if kind == "refined" else self.model)
            if kind == "all" and everyone is not None:
                net.load_state_dict(everyone)
            if kind != "refined" or self.config.refiner.name != "none":
                self.evaluate(net)
        lap("evaluate")
        if row["seconds"]["checkpoint"]:
            with tempfile.TemporaryFile() as file:
                torch.save([self.model.state_dict(), {client: self.uploads[client] for client in trained}], file)
        lap("checkpoint")
        return seconds

    def train(self, client: int) -> nn.Module:
        """Trains a copy of the model on a client's images."""
        local, net = self.config.local, copy.deepcopy(self.model).train()
        optimiser = torch.optim.SGD(
            net.parameters(), lr=local.lr, momentum=local.momentum, weight_decay=local.weight_decay, fused=True
        )
        images, labels, steps = self.images[client], self.labels[client], local.steps or 10**9
        for _ in range(local.epochs if local.steps is None else 10**9):
            for chosen in torch.randperm(len(images)).split(local.batch_size):
                batch = augment(images[chosen], self.augment, torch.default_generator)
                F.cross_entropy(net(batch), labels[chosen]).backward()
                if local.max_grad_norm:
                    torch.nn.utils.clip_grad_norm_(net.parameters(), local.max_grad_norm)
                optimiser.step()
                optimiser.zero_grad()
                steps -= 1
                if not steps:
                    return net
        return net

    def average(self, clients: list[int]) -> State:
        """Returns the mean of uploads, weighted by samples."""
        sizes = self.counts[clients].sum(dim=1)
        shares = (sizes / sizes.sum()).tolist()
        states = [self.uploads[client] for client in clients]
        return {
            name: sum(share * state[name] for share, state in zip(shares, states, strict=True)).to(value.dtype)
            for name, value in states[0].items()
        }

    def refine(self, student: nn.Module, teachers: list[nn.Module], counts: Tensor) -> None:
        """Fine-tunes the student with the losses of the paper."""
        refiner, shares = self.config.refiner, counts / counts.sum(dim=0).clamp(min=1)
        optimiser = torch.optim.SGD(
            student.parameters(), lr=refiner.student_lr, weight_decay=refiner.student_weight_decay
        )
        for net in teachers:
            net.eval().requires_grad_(False)
        for _ in range(refiner.iterations):
            labels = torch.randint(self.classes, (refiner.batch_size,))
            noise, weights = torch.randn(refiner.batch_size, refiner.noise_dim), shares[:, labels]
            student.eval().requires_grad_(False)
            self.generator.train()
            for _ in range(refiner.generator_steps):
                images = self.generator(noise, labels)
                answer = student(images).log_softmax(dim=1)
                loss = diversity(noise, images)
                for net, weight in zip(teachers, weights, strict=True):
                    logits = net(images)
                    distance = F.kl_div(answer, logits.log_softmax(dim=1), reduction="none", log_target=True).sum(dim=1)
                    loss = loss + (weight * (F.cross_entropy(logits, labels, reduction="none") - distance)).mean()
                self.adam.zero_grad()
                loss.backward()
                self.adam.step()
            self.generator.eval()
            with torch.no_grad():
                images = self.generator(noise, labels)
                target = sum(
                    weight[:, None] * net(images).softmax(dim=1) for net, weight in zip(teachers, weights, strict=True)
                )
            student.train(refiner.student_mode == "train").requires_grad_(True)
            for _ in range(refiner.student_steps):
                loss = F.kl_div(student(images).log_softmax(dim=1), target, reduction="batchmean")
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()

    @torch.no_grad()
    def evaluate(self, net: nn.Module) -> None:
        """Computes accuracy and loss over as many images as the test set has."""
        net.eval()
        for images in self.test.split(self.config.evaluation.batch_size):
            logits = net(images)
            labels = torch.zeros(len(images), dtype=torch.int64)
            float(F.cross_entropy(logits, labels)), int((logits.argmax(dim=1) == labels).sum())


if __name__ == "__main__":
    main()
