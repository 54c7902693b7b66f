import numpy as np
import pytest
import torch
from torch import nn

from fedftg.data.dataset import ImageDataset
from fedftg.data.federated import FederatedData
from fedftg.engine.evaluate import evaluate, evaluate_clients
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
    assert found == pytest.approx({"mean": 10.5 / 12, "worst_10": 0.25, "std": 0.0885416**0.5}, rel=1e-4)
    assert evaluate(model, *model.init(), data, 7)[0] == pytest.approx(54 / 60)


def test_clients_that_hold_nothing_back_do_not_count() -> None:
    model = FunctionalModel(SaysWhatThePixelSays())
    data = make([4] + [0] * (CLIENTS - 1))
    only_first = FederatedData(data.dataset, [[9], [14]], held_back=[[0, 1, 2, 3], []])
    assert evaluate_clients(model, *model.init(), only_first, 2) == {"mean": 0.0, "worst_10": 0.0, "std": 0.0}
