"""Dead leaves: in the range of normalised images, their neighbours alike, the same from the same generator."""

import pytest
import torch

from fedftg.distill.leaves import CLIP, dead_leaves


def made(shape, seed=0, number=64):
    return dead_leaves(number, shape, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 8, 8), (3, 20, 70)])
def test_they_look_like_normalised_photographs(shape):
    images = made(shape)
    assert images.shape == (64, *shape)
    assert float(images.abs().max()) == pytest.approx(CLIP)
    assert abs(float(images.mean())) < 0.3
    assert 0.8 < float(images.std()) < 1.6
    means = images.mean(dim=(2, 3), keepdim=True)
    assert float(means.std()) > 0.5  # images differ as wholes

    def step(distance):
        return float((images[..., distance:] - images[..., :-distance]).square().mean())

    assert step(1) < 0.6 * step(shape[2] // 2)  # a neighbour tells of a pixel, one far away tells little


def test_the_generator_decides():
    torch.manual_seed(1)
    first = made((3, 8, 8))
    torch.manual_seed(2)
    assert torch.equal(first, made((3, 8, 8)))
    assert not torch.equal(first, made((3, 8, 8), seed=1))
