from math import exp, log

import numpy as np
import pytest
import torch
from torch import nn

from fedftg.algorithms.base import ClientResult
from fedftg.data.dataset import ImageDataset
from fedftg.data.federated import FederatedData
from fedftg.engine.evaluate import evaluate, evaluate_clients, evaluate_ensemble, over_clients
from fedftg.models.functional import FunctionalModel

CLIENTS = 12


class SaysWhatThePixelSays(nn.Module):
    """Predicts class 1 for white images and class 0 for black ones."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits ``(B, 2)``."""
        value = images.mean(dim=(1, 2, 3)) * self.scale
        return torch.stack([-value, value], dim=1)


def make(wrong_per_client: list[int]) -> FederatedData:
    """Every client holds back 4 of its 5 samples; the first ``wrong`` of them have the other class's colour."""
    labels = np.arange(5 * CLIENTS) % 2
    images = np.zeros((len(labels), 1, 8, 8), dtype=np.uint8)
    images[labels == 1] = 255
    for client, wrong in enumerate(wrong_per_client):
        rows = slice(5 * client, 5 * client + wrong)
        images[rows] = 255 - images[rows]
    dataset = ImageDataset.from_tensors(images, labels, images, labels, mean=(0.5,), std=(0.5,))
    held = [np.arange(5 * client, 5 * client + 4) for client in range(CLIENTS)]
    return FederatedData(dataset, [[5 * client + 4] for client in range(CLIENTS)], held_back=held)


def test_accuracy_over_clients_by_hand() -> None:
    """Ten clients at 1, one at 1/2, one at 0: mean 10.5/12; the worst tenth of 12 is 2 clients: 1/4.

    The variance is (10 * (1/8)^2 + (3/8)^2 + (7/8)^2) / 12 = 0.0885.
    """
    model = FunctionalModel(SaysWhatThePixelSays())
    data = make([0] * 10 + [2, 4])
    found = evaluate_clients(model, *model.init(), data, 7)
    assert found == {**dict.fromkeys(range(10), 1.0), 10: 0.5, 11: 0.0}
    assert over_clients(found) == pytest.approx({"mean": 10.5 / 12, "worst_10": 0.25, "std": 0.0885416**0.5}, rel=1e-4)
    accuracy, _, confusion = evaluate(model, {"it": model.init()}, data, 7)["it"]
    assert accuracy == pytest.approx(54 / 60)
    assert confusion.tolist() == [[27, 3], [3, 27]]  # labels alternate: 1 and 2 wrong of each class


def test_clients_that_hold_nothing_back_do_not_count() -> None:
    model = FunctionalModel(SaysWhatThePixelSays())
    data = make([4] + [0] * (CLIENTS - 1))
    only_first = FederatedData(data.dataset, [[9], [14]], held_back=[[0, 1, 2, 3], []])
    assert evaluate_clients(model, *model.init(), only_first, 2) == {0: 0.0}


class Says(nn.Module):
    """Predicts the same logits for every image."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.logits, self.scale = nn.Parameter(torch.zeros(2)), scale

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.scale * self.logits.expand(len(images), 2)


def client(number: int, logits: list[float], counts: list[int]) -> ClientResult:
    params = {"logits": torch.tensor(logits)}
    return ClientResult(number, sum(counts), torch.tensor(counts), params, {}, {}, {}, 0.0)


def test_ensemble_by_hand() -> None:
    """Three samples of class 0 with probabilities .8 .2, one of class 1 with .1 .9; the test labels are 0 0 0 1.

    Mean probability of class 0: .75 * .8 + .25 * .1 = .625. Priors (3.5, .5) / 4 and (.5, 1.5) / 2: the logits without
    them differ by ln 4 - ln 7 and -ln 9 + ln 3, in the mean by .75 ln(4/7) - .25 ln 3, so class 1 is predicted. The
    second client has a model of its own, which doubles its logits.
    """
    images, labels = np.zeros((4, 1, 8, 8), np.uint8), np.array([0, 0, 0, 1])
    data = FederatedData(ImageDataset.from_tensors(images, labels, images, labels, std=(1.0,)), [[0, 1, 2, 3]])
    clients = [client(0, [log(4), 0], [3, 0]), client(1, [0, log(3)], [0, 1])]
    models = [FunctionalModel(Says(1)), FunctionalModel(Says(2))]
    first = 1 / (1 + exp(-0.75 * log(4 / 7) + 0.25 * log(3)))
    for size in (3, 4):
        found = evaluate_ensemble(models, clients, data, size)
        assert found["ensemble"][2].tolist() == [[3, 0], [1, 0]]
        assert found["ensemble"][:2] == pytest.approx((0.75, -(3 * log(0.625) + log(0.375)) / 4), rel=1e-6)
        assert found["best_client"][2].tolist() == [[3, 0], [1, 0]]  # the second is right about class 1 only
        assert found["ensemble_prior"][:2] == pytest.approx((0.25, -(3 * log(first) + log(1 - first)) / 4), rel=1e-6)
