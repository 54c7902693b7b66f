"""Three classifiers that know different digits become one that knows them all, with no data.

    python examples/refine_only.py --seed 0

Each teacher is trained on its own classes of scikit-learn's 8x8 digits (0-3, 4-6, 7-9) from common initial weights.
Their plain average is the model to beat: `fedftg.refine` chooses a start and distils the teachers into it, on synthetic
images only. No image is seen after the teachers' training; the test images are used for the table alone. Exit status 1
where the refined model is not better than the average.
"""

from __future__ import annotations

import argparse
import copy
import sys

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import fedftg

CLASSES = [range(4), range(4, 7), range(7, 10)]


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images, training labels, test images, test labels; the images with mean 0 and variance 1."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None]
    labels = torch.tensor(data.target, dtype=torch.int64)
    train, test = train_test_split(torch.arange(len(labels)), test_size=0.3, random_state=0, stratify=labels)
    mean, std = images[train].mean(), images[train].std()
    images = (images - mean) / std
    return images[train], labels[train], images[test], labels[test]


def new_model() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))


def trained(model: nn.Module, images: Tensor, labels: Tensor, epochs: int = 20) -> nn.Module:
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(32):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model


def averaged(models: list[nn.Module], sizes: list[int]) -> nn.Module:
    """The mean of the models' weights by size, as FedAvg takes it."""
    states = [model.state_dict() for model in models]
    mean = {n: sum(s[n] * size for s, size in zip(states, sizes, strict=True)) / sum(sizes) for n in states[0]}
    average = copy.deepcopy(models[0])
    average.load_state_dict(mean)
    return average


@torch.no_grad()
def accuracy(models: list[nn.Module], images: Tensor, labels: Tensor) -> float:
    """Of one model, or of the mean of several models' probabilities."""
    probabilities = torch.stack([model(images).softmax(dim=1) for model in models]).mean(dim=0)
    return float((probabilities.argmax(dim=1) == labels).float().mean())


def main() -> int:
    parser = argparse.ArgumentParser(description="refine the average of three digit classifiers, with no data")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights, the training and the refining")
    seed = parser.parse_args().seed
    torch.manual_seed(seed)
    train_images, train_labels, images, labels = digits()

    start = new_model()
    parts = [torch.isin(train_labels, torch.tensor(list(classes))) for classes in CLASSES]
    teachers = [trained(start, train_images[part], train_labels[part]) for part in parts]
    counts = torch.stack([torch.bincount(train_labels[part], minlength=10) for part in parts])
    average = averaged(teachers, [int(part.sum()) for part in parts])

    result = fedftg.refine(None, teachers, counts, image_shape=(1, 8, 8), seed=seed)
    rows = [
        (f"teacher of {classes[0]}-{classes[-1]}", accuracy([teacher], images, labels))
        for classes, teacher in zip(CLASSES, teachers, strict=True)
    ]
    before, after = accuracy([average], images, labels), accuracy([result.model], images, labels)
    rows += [("ensemble, for reference", accuracy(teachers, images, labels))]
    rows += [("average of the weights", before), ("refined, with no data", after)]
    print(f"test accuracy, {len(labels)} images, seed {seed}; refined from: {result.start}")
    for name, value in rows:
        print(f"  {name:<24} {value:.3f}")
    return 0 if after > before else 1


if __name__ == "__main__":
    sys.exit(main())
