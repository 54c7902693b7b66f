"""Leaving out taps that only meet padding changes neither values, gradients nor names."""

import pytest
import torch
from torch import nn

from fedftg.models.resnet import LiveConv3x3


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (1, 2), (2, 1), (3, 3), (4, 2)])
def test_same_values_and_gradients(shape: tuple[int, int], stride: int) -> None:
    live, plain = LiveConv3x3(5, 7, stride), nn.Conv2d(5, 7, 3, stride=stride, padding=1, bias=False)
    plain.load_state_dict(live.state_dict())
    images = torch.randn(3, 5, *shape, generator=torch.Generator().manual_seed(1))
    left, right = images.clone().requires_grad_(), images.clone().requires_grad_()
    ours, theirs = live(left), plain(right)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    torch.testing.assert_close(left.grad, right.grad, rtol=1e-4, atol=1e-5)
    assert live.weight.grad is not None
    assert plain.weight.grad is not None
    torch.testing.assert_close(live.weight.grad, plain.weight.grad, rtol=1e-4, atol=1e-5)
    assert torch.equal(live.weight.grad == 0, plain.weight.grad == 0)
