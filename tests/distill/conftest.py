import pytest
import torch
from torch import nn

from fedftg.distill.config import preset
from fedftg.distill.generator import Generator


def _classifier(seed=0, *, classes=3, norm=True, width=4, dropout=0.0):
    """A small classifier of 1x8x8 images in evaluation mode, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = [nn.Conv2d(1, width, 3, stride=2, padding=1)]
        if norm:
            layers.append(nn.BatchNorm2d(width))
        model = nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Dropout(dropout), nn.Linear(width * 16, classes))
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                nn.init.uniform_(layer.running_mean, -0.2, 0.2)
                nn.init.uniform_(layer.running_var, 0.5, 1.5)
    return model.eval()


def _generator(seed=0, *, classes=3, noise_dim=6, width=4):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Generator(noise_dim, classes, (1, 8, 8), width)


def _config(name="fedftg", **overrides):
    small = {"iterations": 2, "batch_size": 6, "noise_dim": 6, "generator_width": 4, "student_steps": 2}
    return preset(name, **{**small, **overrides})


@pytest.fixture
def classifier():
    return _classifier


@pytest.fixture
def generator():
    return _generator


@pytest.fixture
def config():
    return _config


@pytest.fixture
def counts():
    """Three teachers, three classes."""
    return torch.tensor([[8, 1, 0], [0, 5, 3], [2, 2, 4]])
