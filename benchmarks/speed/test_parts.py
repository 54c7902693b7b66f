"""Small parts on their own, by pytest-benchmark: ``make bench`` runs them; a time here is never a pass or a fail."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from workload import BATCH, CLASSES, SHAPE, bare_loop, images, model

from fedftg import params as tree
from fedftg.augment import augment
from fedftg.data.config import PartitionConfig
from fedftg.data.partition import partition
from fedftg.distill import losses
from fedftg.distill.generator import Generator
from fedftg.models.functional import values


@pytest.mark.parametrize("name", ["lenet", "convnet", "resnet18"])
def test_training_step(benchmark: Any, name: str) -> None:
    module = model(name)
    benchmark(bare_loop, module, BATCH, 1)


@pytest.mark.parametrize("kind", ["flip", "crop", "flip_crop"])
def test_augment(benchmark: Any, kind: Any) -> None:
    batch, rng = images(BATCH).train_images, torch.Generator().manual_seed(0)
    benchmark(augment, batch, kind, rng)


@pytest.mark.parametrize("name", ["lenet", "resnet18"])
def test_weighted_mean_of_ten(benchmark: Any, name: str) -> None:
    trees = [values(model(name, seed=k))[0] for k in range(10)]
    benchmark(tree.weighted_mean, trees, [1.0] * 10)


@pytest.mark.parametrize("side", [32, 64, 128])
def test_generator_step(benchmark: Any, side: int) -> None:
    generator = Generator(100, CLASSES, (3, side, side))
    noise, labels = torch.randn(BATCH, 100), torch.arange(BATCH) % CLASSES
    benchmark(lambda: generator(noise, labels).square().mean().backward())


def test_diversity(benchmark: Any) -> None:
    noise, made = torch.randn(BATCH, 100), torch.randn(BATCH, *SHAPE)
    benchmark(losses.diversity, noise, made)


@pytest.mark.parametrize("law", ["iid", "dirichlet", "class_dirichlet", "pathological", "shards", "quantity"])
def test_partition_of_ten_thousand_clients(benchmark: Any, law: Any) -> None:
    labels = np.arange(50_000) % CLASSES
    config = PartitionConfig(law=law, num_clients=10_000)
    benchmark.pedantic(lambda: partition(labels, config, np.random.default_rng(0)), rounds=3)
