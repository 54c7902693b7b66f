"""DENSE: the terms by hand, and the generator's gradient against the objective written out."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from fedftg.algorithms.base import RefinerContext
from fedftg.algorithms.coboosting import CoBoostingConfig
from fedftg.algorithms.dense import DenseConfig, boundary_losses
from fedftg.distill.images import Call
from fedftg.distill.teachers import Ensemble, ListedTeachers
from fedftg.models.functional import FunctionalModel

COUNTS = torch.tensor([[8.0, 1.0, 0.0], [2.0, 5.0, 0.0]]).double()
SMALL: dict[str, Any] = {"iterations": 3, "batch_size": 6, "noise_dim": 5, "generator_width": 4, "generator_steps": 1}


def classifier(seed: int, norm: bool) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4) if norm else nn.Identity(), nn.ReLU(), nn.Flatten()]
        return nn.Sequential(*layers, nn.Linear(4 * 36, 3)).eval().requires_grad_(False)


def source(config, norm=False):
    """The images of a config, with two teachers and a student."""
    models = [classifier(seed, norm) for seed in range(3)]
    ensemble = Ensemble(ListedTeachers(models[:2]), COUNTS, config, torch.zeros(()))
    call = Call(models[2], ensemble, config.iterations, torch.Generator().manual_seed(0), 1.0)
    context = RefinerContext(FunctionalModel(models[0]), 3, (1, 8, 8), torch.device("cpu"))
    return config.images(context, torch.Generator().manual_seed(1)), call, models


def test_losses_by_hand():
    """Sample 0: ensemble (0.8, 0.2), student (1/4, 3/4), which disagree; sample 1: the student has (3/4, 1/4)."""
    ensemble = torch.tensor([[0.8, 0.2], [0.8, 0.2]]).log()
    student = torch.tensor([[0.0, math.log(3)], [math.log(3), 0.0]])
    found = boundary_losses(ensemble, student, torch.tensor([0, 1]))
    assert float(found["fidelity"]) == pytest.approx(-(math.log(0.8) + math.log(0.2)) / 2)
    disagreeing = 0.8 * math.log(0.8 * 4) + 0.2 * math.log(0.2 * 4 / 3)
    assert float(found["discrepancy"]) == pytest.approx(disagreeing / 2)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("ensemble_mean", ["logits", "probabilities"])
@pytest.mark.parametrize("kind", [DenseConfig, CoBoostingConfig])
def test_the_generators_gradient_is_that_of_the_objective(norm, ensemble_mean, kind):
    """Written out with torch alone; through teachers and student, and with L_bn where the model has BatchNorm."""
    config = kind(**SMALL, generator_lr=0, lambda_adv=3.0, lambda_bn=0.7, ensemble_mean=ensemble_mean)
    images, call, (*teachers, student) = source(config, norm)
    noise, labels = images.start(call)[0]
    metrics = images.improve(call, (noise, labels))
    assert (float(metrics["batchnorm"]) > 0) == norm
    generator = getattr(images, "_source", images)._generator
    found = [parameter.grad.clone() for parameter in generator.parameters()]

    generator.zero_grad()
    made, distances = generator(noise, labels), []
    for teacher in teachers if norm else []:
        inner = teacher[0](made)
        mean, variance = inner.mean(dim=(0, 2, 3)), inner.var(dim=(0, 2, 3), correction=0)
        distances.append((mean - teacher[1].running_mean).norm() + (variance - teacher[1].running_var).norm())
    logits = [teacher(made) for teacher in teachers]
    ensemble = (
        ((logits[0] + logits[1]) / 2).softmax(dim=1)
        if ensemble_mean == "logits"
        else (logits[0].softmax(dim=1) + logits[1].softmax(dim=1)) / 2
    )
    own = student(made)
    disagree = ensemble.argmax(dim=1) != own.argmax(dim=1)
    assert 0 < disagree.sum() < 6
    kl = (ensemble * (ensemble.log() - own.log_softmax(dim=1))).sum(dim=1)
    right = ensemble[range(6), labels]
    if kind is DenseConfig:
        loss = -right.log().mean() - 3.0 * kl[disagree].sum() / 6
    else:
        loss = -((1 - right.detach()) * right.log()).mean() - 3.0 * kl.mean()
    (loss + 0.7 * sum(distances) / 2).backward()
    for parameter, gradient in zip(generator.parameters(), found, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6)


def test_labels_are_drawn_evenly_from_the_classes_that_somebody_holds():
    images, call, _ = source(DenseConfig(**SMALL | {"iterations": 100}))
    labels = torch.stack([labels for _, labels in images.start(call)])
    shares = torch.bincount(labels.flatten(), minlength=3) / labels.numel()
    assert shares[2] == 0
    assert shares[0] == pytest.approx(0.5, abs=0.06)


def test_images_are_made_as_the_loss_saw_them():
    images, call, _ = source(DenseConfig(**SMALL))
    noise, labels = images.start(call)[0]
    images.improve(call, (noise, labels))
    made, same = images.make((noise, labels))
    assert same is labels
    assert not made.requires_grad
    torch.testing.assert_close(made.mean(dim=(0, 2, 3)), torch.zeros(1), atol=1e-5, rtol=0)
    torch.testing.assert_close(made, images._generator.train()(noise, labels).detach())
