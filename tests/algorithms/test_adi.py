"""ADI: the terms of the images' loss by hand, and their directions."""

import math

import pytest
import torch
from torch import nn

from fedftg.algorithms.adi import AdiConfig, AdiImages, jensen_shannon, total_variation
from fedftg.algorithms.base import RefinerContext
from fedftg.models.functional import FunctionalModel

SLOPE = torch.tensor([[1.0, -1.0]])
"""Two pixels: logits of a teacher are (first - second, 0)."""


def reads(images):
    return torch.cat([images.flatten(1) @ SLOPE.T, torch.zeros(len(images), 1)], dim=1)


def undecided(images):
    """Logits of 0, which have a gradient of 0."""
    return 0 * reads(images)


def source(norm=False, **settings):
    config = AdiConfig(**{"image_augment": "none", "batch_size": 4, **settings})
    layers = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten()) if norm else nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
    return AdiImages(config, RefinerContext(FunctionalModel(layers), 2, (1, 1, 2), torch.device("cpu")))


def test_total_variation_by_hand():
    """Right: 1, 4; down: 3, 6; the diagonals: 7 and 2. The second image is flat."""
    image = torch.tensor([[[[1.0, 2.0], [4.0, 8.0]]], [[[5.0, 5.0], [5.0, 5.0]]]])
    expected = math.sqrt(1 + 16) + math.sqrt(9 + 36) + 7 + 2
    assert float(total_variation(image)) == pytest.approx(expected / 2)


def test_jensen_shannon_by_hand():
    """Of (1/2, 1/2) and (9/10, 1/10) the middle is (7/10, 3/10); opposites that are certain are ln 2 apart."""
    left, right = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    expected = (0.5 * math.log(5 / 7) + 0.5 * math.log(5 / 3) + 0.9 * math.log(9 / 7) + 0.1 * math.log(1 / 3)) / 2
    assert float(jensen_shannon(left, right)) == pytest.approx(expected)
    assert float(jensen_shannon(right, left)) == pytest.approx(expected)
    certain = torch.tensor([[40.0, 0.0]]).log_softmax(dim=1)
    assert float(jensen_shannon(certain, certain.flip(1))) == pytest.approx(math.log(2))
    assert float(jensen_shannon(torch.cat([left, left]), torch.cat([left, right]))) == pytest.approx(expected / 2)


def test_terms_by_hand(call):
    """Images (ln 9, 0) and (0, ln 9): the teachers' odds are 9 and 1, of which the mean of the logits makes 3."""
    images = math.log(9) * torch.tensor([[1.0, 0.0], [0.0, 1.0]]).reshape(2, 1, 1, 2)
    found = source().terms(call(AdiConfig(), undecided, reads, undecided), images, torch.tensor([0, 0]))
    assert set(found) == {"fidelity", "variation", "norm", "adversarial", "batchnorm"}
    assert float(found["fidelity"]) == pytest.approx(-(math.log(0.75) + math.log(0.25)) / 2)
    assert float(found["variation"]) == pytest.approx(math.log(9))
    assert float(found["norm"]) == pytest.approx(math.log(9))
    near = jensen_shannon(torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log())
    assert float(found["adversarial"]) == pytest.approx(1 - float(near))


def test_batchnorm_where_there_is_any(call):
    """Pixels 1 and 3 have mean 2 and variance 1; the layer remembers 0 and 1. Without BatchNorm it is 0."""
    layers = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten()).eval()
    images = torch.tensor([[1.0, 3.0]]).reshape(1, 1, 1, 2)
    of, labels = call(AdiConfig(), undecided, layers), torch.tensor([1])
    assert float(source(norm=True).terms(of, images, labels)["batchnorm"]) == pytest.approx(2.0)
    assert "batchnorm" not in source(norm=True, lambda_bn=0).terms(of, images, labels)


def test_the_images_gradient_is_that_of_the_objective(call):
    """Written out with torch alone, every weight large enough to be seen: nothing moves at rate 0."""
    weights = {"lambda_variation": 0.2, "lambda_norm": 0.3, "lambda_adversarial": 4.0, "lambda_bn": 0.7}
    images = source(norm=True, image_steps=1, image_lr=0, **weights)
    teacher = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten()).eval()
    of = call(AdiConfig(**weights), lambda shown: reads(shown).flip(1), teacher, iterations=1)
    draw = images.start(of)[0]
    images.improve(of, draw)
    made = images.make(draw)[0].clone().requires_grad_()

    logits, own = teacher(made), reads(made).flip(1).log_softmax(dim=1)
    ensemble = logits.log_softmax(dim=1)
    middle = ((ensemble.exp() + own.exp()) / 2).log()
    divergence = sum((one.exp() * (one - middle)).sum(dim=1).mean() / 2 for one in (ensemble, own))
    loss = -ensemble[range(len(draw)), draw].mean() + 4.0 * (1 - divergence)
    loss = loss + 0.2 * total_variation(made) + 0.3 * made.flatten(1).norm(dim=1).mean()
    loss = loss + 0.7 * (made.mean().abs() + (made.var(correction=0) - 1).abs())
    loss.backward()
    torch.testing.assert_close(images._images.grad, made.grad)


@pytest.mark.parametrize("adversarial", [0.0, 10.0])
def test_images_become_those_of_their_labels(call, adversarial):
    """From noise, anew for each batch; the steps on the pixels are the same for the same seed."""
    config = {"image_steps": 60, "lambda_adversarial": adversarial, "batch_size": 16}
    ends = []
    for seed in (0, 0, 1):
        images, of = source(**config), call(AdiConfig(), undecided, reads, iterations=2, seed=seed)
        draws = images.start(of)
        assert [draw.shape for draw in draws] == [(16,)] * 2
        batches = []
        for draw in draws:
            metrics = images.improve(of, draw)
            batch, labels = images.make(draw)
            assert torch.equal(labels, draw)
            assert not batch.requires_grad
            assert (reads(batch).argmax(dim=1) == labels).all()
            assert metrics["fidelity"] > 0
            batches.append(batch)
        assert not torch.equal(*batches)
        ends.append(batches[1])
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])
