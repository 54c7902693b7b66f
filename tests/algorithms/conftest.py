"""Clients that are trained on digits, for refiners that distil them."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from fedftg.algorithms.base import ClientResult, RefinerContext, ServerState
from fedftg.distill.images import Call
from fedftg.distill.teachers import Ensemble, ListedTeachers
from fedftg.models.functional import FunctionalModel, values
from fedftg.models.small import CNN

CLIENTS, TRAINED = 3, 1200


@dataclass
class Digits:
    """Clients that each hold a third of the digits, IID, and what is measured on 597 others."""

    context: RefinerContext
    results: list[ClientResult]
    images: torch.Tensor
    labels: torch.Tensor
    ensemble: float

    def refined(self, config, seed=0, rounds=1):
        """The student's accuracy after rounds in which the clients teach the same, and the last round's metrics."""
        refiner, (params, buffers) = config.build(self.context), self.context.model.init()
        rng = torch.Generator().manual_seed(seed)
        state = ServerState(0, params, buffers, {}, refiner.init(params, torch.Generator().manual_seed(seed)))
        for done in range(rounds):
            state, metrics = refiner.refine(replace(state, round=done), self.results, rng)
        logits = self.context.model(*state.model, self.images, train=False)
        return float((logits.argmax(dim=1) == self.labels).float().mean()), metrics


@pytest.fixture(scope="session")
def digits():
    raw = load_digits()
    images, labels = torch.tensor(raw.images, dtype=torch.float32)[:, None], torch.tensor(raw.target)
    images = (images - images.mean()) / images.std()
    rng = torch.Generator().manual_seed(0)
    order = torch.randperm(len(labels), generator=rng)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FunctionalModel(CNN(10, (1, 8, 8), (8, 16), (64, 32), "group"))
    results = []
    for client in range(CLIENTS):
        held, module = order[client:TRAINED:CLIENTS], model.module(*model.init()).train()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
        for _ in range(10):
            for batch in held[torch.randperm(len(held), generator=rng)].split(32):
                optimizer.zero_grad()
                F.cross_entropy(module(images[batch]), labels[batch]).backward()
                optimizer.step()
        counts = torch.bincount(labels[held], minlength=10)
        results.append(ClientResult(client, len(held), counts, *values(module), {}, {}, 0.0))
    images, labels = images[order[TRAINED:]], labels[order[TRAINED:]]
    mean = torch.stack([model(one.params, one.buffers, images, train=False) for one in results]).mean(dim=0)
    context = RefinerContext(model, 10, (1, 8, 8), torch.device("cpu"))
    return Digits(context, results, images, labels, float((mean.argmax(dim=1) == labels).float().mean()))


@pytest.fixture
def call():
    """Makes a call from functions: the student, and teachers that saw the same unless counts are given."""

    def make(config, student, *teachers, counts=None, iterations=1, seed=0):
        counts, module = torch.tensor(counts or [[1, 1]] * len(teachers)), nn.Module()
        module.forward = student
        ensemble = Ensemble(ListedTeachers(teachers), counts.double(), config, torch.zeros(()))
        return Call(module, ensemble, iterations, torch.Generator().manual_seed(seed), 1.0)

    return make
