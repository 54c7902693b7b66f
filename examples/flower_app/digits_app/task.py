"""Model, data and local training, as in any Flower app; nothing here knows of FedFTG."""

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

NUM_CLASSES = 10
IMAGE_SHAPE = (1, 8, 8)


class Net(nn.Module):
    """Two convolutions with GroupNorm and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 16, 3, padding=1)
        self.first_norm = nn.GroupNorm(4, 16)
        self.second = nn.Conv2d(16, 32, 3, padding=1)
        self.second_norm = nn.GroupNorm(4, 32)
        self.head = nn.Linear(32 * 4, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.first_norm(self.first(images))), 2)
        x = F.max_pool2d(F.relu(self.second_norm(self.second(x))), 2)
        return self.head(x.flatten(1))


@lru_cache
def _digits() -> tuple[Tensor, Tensor]:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1)
    return (images - images.mean()) / images.std(), torch.tensor(digits.target)


def test_data() -> tuple[Tensor, Tensor]:
    """The last 297 digits, for the server."""
    images, labels = _digits()
    return images[1500:], labels[1500:]


def client_data(client: int, num_clients: int, alpha: float, seed: int) -> tuple[Tensor, Tensor]:
    """One client's part of the first 1500 digits: each class is divided by proportions from a Dirichlet law."""
    images, labels = (values[:1500] for values in _digits())
    rng = np.random.default_rng(seed)
    mine = []
    for label in range(NUM_CLASSES):
        rows = np.flatnonzero(labels.numpy() == label)
        ends = (rng.dirichlet([alpha] * num_clients).cumsum() * len(rows)).round().astype(int)
        mine.append(np.split(rows, ends[:-1])[client])
    rows = torch.from_numpy(np.concatenate(mine))
    return images[rows], labels[rows]


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, lr: float) -> float:
    """SGD; gives the mean loss of the last epoch, 0 for a client without data."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    losses = [0.0]
    model.train()
    for _ in range(epochs if len(labels) else 0):
        losses = []
        for batch, target in DataLoader(TensorDataset(images, labels), batch_size=32, shuffle=True):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(batch), target)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return sum(losses) / len(losses)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share that is right."""
    model.eval()
    return (model(images).argmax(1) == labels).float().mean().item()
