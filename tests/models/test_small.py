import pytest
import torch
from torch import nn

from fedftg.models.small import ConvNet


@pytest.mark.parametrize(("side", "blocks", "map_side"), [(8, 1, 4), (28, 3, 3), (32, 3, 4), (64, 4, 4), (224, 6, 3)])
def test_convnet_depth_follows_the_image_and_channels_stop_at_256(side, blocks, map_side):
    model = ConvNet(5, (3, side, side))
    convolutions = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == [32, 64, 128, 256, 256, 256][:blocks]
    with torch.no_grad():
        assert model.features(torch.zeros(2, 3, side, side)).shape[2:] == (map_side, map_side)
        assert model(torch.zeros(2, 3, side, side)).shape == (2, 5)
