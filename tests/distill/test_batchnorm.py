"""L_bn: numbers by hand, in every form of teachers."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call

from fedftg import precision as precisions
from fedftg.distill import losses
from fedftg.distill.config import DistillConfig
from fedftg.distill.teachers import Ensemble, ListedTeachers, StackedTeachers, _batchnorm, stack_or_list
from fedftg.oneshot import refine
from fedftg.params import stack

IMAGES = torch.tensor([[1.0, 3.0], [5.0, 7.0]]).reshape(2, 1, 1, 2)
"""Two images of two pixels: mean 4 and biased variance 5; the first alone 2 and 1, the second alone 6 and 1."""


def teacher(mean, variance):
    """BatchNorm on the pixels, with these running statistics, and a linear layer."""
    with torch.random.fork_rng():
        layers = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(2, 2))
    layers[0].running_mean.fill_(mean)
    layers[0].running_var.fill_(variance)
    return layers.eval()


@pytest.mark.parametrize(
    ("weights", "expected"), [((1.0, 1.0), 3 + 4), ((0.2, 0.0), 1 + 0), ((0.5, 1.5), 4 + 3), ((0.0, 0.0), 1 + 1)]
)
def test_one_layer_by_hand(weights, expected):
    """From mean 1 and variance 1. Weights 1 : 3 give mean 5, and 1/4 (16 + 4) / 2 + 3/4 (0 + 4) / 2 = 4 as variance."""
    found = losses.batchnorm_distance(IMAGES, torch.ones(1), torch.ones(1), torch.tensor(weights))
    assert float(found) == pytest.approx(expected)


def test_the_distance_is_a_norm_over_features():
    """Two features that are 3 and 4 away in the mean, 0 in the variance."""
    values = torch.tensor([[3.0, 4.0]] * 2)
    found = losses.batchnorm_distance(values, torch.zeros(2), torch.zeros(2), torch.ones(2))
    assert float(found) == 5


def forms(modules):
    params = [dict(module.named_parameters()) for module in modules]
    buffers = [dict(module.named_buffers()) for module in modules]

    def function(params, buffers, images):
        return functional_call(modules[0], (params, buffers), (images,))

    yield ListedTeachers(modules)
    yield stack_or_list(function, params, buffers)
    yield StackedTeachers(function, stack(params), stack(buffers))
    yield ListedTeachers([partial(torch.nn.Module.__call__, module) for module in modules])


COUNTS = torch.tensor([[4.0, 0.0], [4.0, 2.0]], dtype=torch.float64)
LABELS = torch.tensor([0, 1])
"""a_k(y) is (1/2, 0) and (1/2, 1). The first teacher has weight 1/4, and image 0 alone has its moments, 2 and 1. The
second has 3/4, and weights the images 1/3 and 2/3: mean 14/3, variance 1/3 (64/9 + 1) + 2/3 (16/9 + 1) = 41/9."""


@pytest.mark.parametrize("ensemble", ["class", "uniform"])
@pytest.mark.parametrize("chunk", [0, 1])
def test_teachers_by_hand(ensemble, chunk):
    """Uniform: the moments are 4 and 5 for both, so 2 + 4 and 0 away, mean 3."""
    modules = [teacher(2.0, 1.0), teacher(4.0, 5.0)]
    expected = {"class": 3 / 4 * ((14 / 3 - 4) + (5 - 41 / 9)), "uniform": 3.0}[ensemble]
    config = DistillConfig(ensemble=ensemble, teacher_chunk=chunk)
    for teachers in forms(modules):
        of = Ensemble(teachers, COUNTS, config, IMAGES)
        parts = [of.with_batchnorm(IMAGES, LABELS, *part) for part in of.ranges(0, 2)]
        assert sum(float(terms["batchnorm"]) for _, terms in parts) == pytest.approx(expected, rel=1e-5)
        torch.testing.assert_close(torch.cat([logits for logits, _ in parts]), of.logits(IMAGES, 0, 2))


def test_layers_add_up_and_gradients_reach_the_images(classifier):
    for teachers in forms([classifier(seed) for seed in range(2)]):
        images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        _, one = teachers.measured(_batchnorm, images, torch.ones(2, 4), 0, 2)
        one.sum().backward()
        assert images.grad is not None
        assert images.grad.abs().sum() > 0
    twice = nn.Sequential(nn.BatchNorm2d(1), nn.Identity(), nn.BatchNorm2d(1, affine=False), nn.Flatten()).eval()
    _, both = ListedTeachers([twice]).measured(_batchnorm, IMAGES, torch.ones(1, 2), 0, 1)
    scale = 1 + 1e-5
    assert float(both) == pytest.approx((4 + 4) + (4 / math.sqrt(scale) + abs(5 / scale - 1)))


@pytest.mark.parametrize("overrides", [{}, {"teacher_chunk": 1}, {"generator_update": "per_client"}])
def test_the_generator_lowers_it(classifier, generator, counts, config, overrides):
    off = {"lambda_md": 0.0, "lambda_cls": 0.0, "lambda_dis": 0.0, "student_steps": 0, "iterations": 40}
    teachers = [classifier(seed) for seed in (1, 2, 3)]
    ends = []
    for weight in (1.0, 1e-12):
        settings = config("paper", lambda_bn=weight, **off, **overrides)
        given = {"method": settings, "generator": generator(), "image_shape": (1, 8, 8)}
        found = refine(classifier(4), teachers, counts, **given).metrics["batchnorm"]
        assert found.shape == (40,)
        ends.append(float(found[-10:].mean()))
    assert ends[0] < 0.9 * ends[1]


def test_bfloat16_measures_in_full_precision(classifier, counts, config, monkeypatch):
    monkeypatch.setattr(precisions, "has_bfloat16", lambda device: True)
    teachers, found = [classifier(seed) for seed in (1, 2, 3)], []
    for precision in ("float32", "bfloat16"):
        settings = config(lambda_bn=1.0, precision=precision, iterations=1)
        result = refine(classifier(4), teachers, counts, method=settings, image_shape=(1, 8, 8))
        found.append(float(result.metrics["batchnorm"][0]))
    assert found[1] == pytest.approx(found[0], rel=0.02)
    assert found[1] != found[0]


def test_a_teacher_without_batchnorm_counts_nothing(classifier, counts, config):
    def batchnorm(norms):
        teachers = [classifier(seed, norm=norm) for seed, norm in enumerate(norms)]
        settings = config(lambda_bn=1.0, iterations=1, ensemble="uniform")
        result = refine(classifier(4), teachers, counts, method=settings, image_shape=(1, 8, 8))
        return float(result.metrics["batchnorm"][0])

    assert batchnorm([False, False, False]) == 0
    assert 0 < batchnorm([True, False, False]) < batchnorm([True, True, True])
