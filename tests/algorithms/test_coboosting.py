"""Co-Boosting: terms, weights and moved images by hand."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from fedftg.algorithms.base import RefinerContext
from fedftg.algorithms.coboosting import CoBoostingConfig, hard_losses
from fedftg.distill.images import Call
from fedftg.distill.teachers import Ensemble, ListedTeachers
from fedftg.models.functional import FunctionalModel

SMALL: dict[str, Any] = {"iterations": 2, "batch_size": 6, "noise_dim": 5, "generator_width": 4, "generator_steps": 1}
POOL: dict[str, Any] = {"pool_size": 12, "pool_batches": 2, "pool_augment": "none"}


def linear(seed, classes=3):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, classes)).eval().requires_grad_(False)


def always(*logits):
    """A teacher that does not look, but has a gradient."""
    return lambda images: torch.tensor([logits]).expand(len(images), -1) + 0 * images.sum()


def source(teachers, counts=((1, 1, 1),), **settings):
    """The images of the method, with these teachers, on a call that has been started."""
    config, student = CoBoostingConfig(**{**SMALL, **POOL, **settings}), linear(9)
    counts = torch.tensor(counts).double().expand(len(teachers), -1)
    ensemble = Ensemble(ListedTeachers(teachers), counts, config, torch.zeros(()))
    call = Call(student, ensemble, config.iterations, torch.Generator().manual_seed(0), 1.0)
    context = RefinerContext(FunctionalModel(student), 3, (1, 8, 8), torch.device("cpu"))
    images = config.images(context, torch.Generator().manual_seed(1))
    return images, call, images.start(call)


def weights(call):
    return call.ensemble.weights(torch.tensor([0, 1, 2]), 0, len(call.ensemble))[:, 1].tolist()


def test_losses_by_hand():
    """p = 0.8 and 0.2 of the labels; the KL counts where the two agree too."""
    ensemble = torch.tensor([[0.8, 0.2], [0.8, 0.2]]).log().requires_grad_()
    student = torch.tensor([[0.0, math.log(3)], [math.log(3), 0.0]])
    found = hard_losses(ensemble, student, torch.tensor([0, 1]))
    assert found["fidelity"].item() == pytest.approx(-(0.2 * math.log(0.8) + 0.8 * math.log(0.2)) / 2)
    disagreeing = 0.8 * math.log(0.8 * 4) + 0.2 * math.log(0.2 * 4 / 3)
    agreeing = 0.8 * math.log(0.8 * 4 / 3) + 0.2 * math.log(0.2 * 4)
    assert found["discrepancy"].item() == pytest.approx((disagreeing + agreeing) / 2)
    (gradient,) = torch.autograd.grad(found["fidelity"], ensemble)
    torch.testing.assert_close(gradient, torch.tensor([[-0.1, 0.0], [0.0, -0.4]]))


def test_teachers_that_are_right_gain_weight_by_hand():
    """Class 1 alone is drawn, and the first teacher predicts it. The steps are 0.4 / 2, times 0.5 per iteration:

    0.5 + 0.1 = 0.6 on the new batch, 0.7 and 0.8 on those of the pool; then 0.85, 0.9 and 0.95 in the second iteration.
    """
    images, call, draws = source(
        [always(0.0, 2.0, 0.0), always(1.0, 0.0, 0.0)], ((0, 5, 0),), weight_step=0.4, weight_decay=0.5
    )
    assert weights(call) == [0.5, 0.5]
    for draw, expected in zip(draws, (0.6, 0.7, 0.8, 0.85, 0.9, 0.95), strict=True):
        images.improve(call, draw)
        images.make(draw)
        assert weights(call) == pytest.approx([expected, 1 - expected])
    torch.testing.assert_close(
        call.ensemble.probabilities(torch.zeros(1, 1, 8, 8), torch.tensor([1])),
        (torch.tensor([[0.05, 1.9, 0.0]]) / 4).softmax(dim=1),
    )
    images.start(call)
    images.improve(call, draws[0])
    images.make(draws[0])
    assert weights(call) != pytest.approx([0.6, 0.4])  # the ensemble of a call keeps what it has learnt


@pytest.mark.parametrize("teachers", [[always(1.0, 0.3, -0.2)], [always(1.0, 0.3, -0.2)] * 3])
def test_weights_stay_a_distribution_where_no_teacher_is_better(teachers):
    """The slopes are rounding errors here, and all weights may fall together."""
    images, call, draws = source(teachers, weight_step=0.9, weight_decay=1.0, pool_batches=40)
    for draw in draws:
        images.improve(call, draw)
        images.make(draw)
    assert sum(weights(call)) == pytest.approx(1)
    assert min(weights(call)) > 0


def test_weights_are_clipped_to_0_and_1():
    images, call, draws = source(
        [always(0.0, 2.0, 0.0), always(1.0, 0.0, 0.0)], ((0, 5, 0),), weight_step=0.8, weight_decay=1.0
    )
    for draw in draws:
        images.improve(call, draw)
        images.make(draw)
        assert min(weights(call)) >= 0
    assert weights(call) == [1, 0]


@pytest.mark.parametrize("shown", [0, 1])
def test_images_take_one_step_in_a_random_direction_of_the_output(shown):
    """A new batch, and one of the pool, in which they stay where they are; the direction by the draws of the method."""
    teachers = [linear(0), linear(1)]
    images, call, draws = source(teachers, image_step=0.25, weight_step=0)
    images.improve(call, draws[0])
    replay = torch.Generator().manual_seed(0)
    replay.set_state(call.rng.get_state())
    kept = images.pool["images"].float()
    before = kept[torch.randperm(6, generator=replay)] if shown else images.newest[0]
    found, _ = images.make(draws[shown])
    assert not found.requires_grad

    at = before.clone().requires_grad_()
    softened = ((teachers[0](at) + teachers[1](at)) / 2 / 4).softmax(dim=1)
    (slope,) = torch.autograd.grad(((2 * torch.rand(6, 3, generator=replay) - 1) * softened).sum(), at)
    torch.testing.assert_close(found, before + 0.25 * slope.sign())
    assert torch.equal(images.pool["images"], images.newest[0].half())
