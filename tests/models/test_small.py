import pytest
import torch
from torch import nn

from fedftg.models.small import convnet


@pytest.mark.parametrize(
    ("side", "blocks", "map_side"), [(8, 1, 4), (28, 3, 3), (32, 3, 4), (64, 4, 4), (128, 5, 4), (224, 6, 3)]
)
def test_depth_follows_the_image(side, blocks, map_side):
    model = convnet(5, (3, side, side), width=8)
    convolutions = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == [8, 16, 32, 64, 128, 256][:blocks]
    with torch.no_grad():
        assert model.features(torch.zeros(2, 3, side, side)).shape[2:] == (map_side, map_side)
        assert model(torch.zeros(2, 3, side, side)).shape == (2, 5)


def test_parameters_by_hand():
    """32x32x3: 3*32*9 + 32*64*9 + 64*128*9 = 93,024; GroupNorm 2 * (32 + 64 + 128) = 448; linear 128 * 10 + 10."""
    assert sum(parameter.numel() for parameter in convnet(10, (3, 32, 32)).parameters()) == 93_024 + 448 + 1_290


def test_channels_stop_at_256():
    model = convnet(2, (1, 64, 64), width=128)
    assert [layer.out_channels for layer in model.features if isinstance(layer, nn.Conv2d)] == [128, 256, 256, 256]


@pytest.mark.parametrize(("kind", "layer"), [("group", nn.GroupNorm), ("batch", nn.BatchNorm2d), ("none", None)])
def test_normalisation(kind, layer):
    model = convnet(2, (1, 8, 8), normalisation=kind)
    found = [type(part) for part in model.modules() if isinstance(part, nn.GroupNorm | nn.BatchNorm2d)]
    assert found == ([layer] if layer else [])
    assert (model.features[0].bias is None) == (kind != "none")


def test_too_small():
    with pytest.raises(ValueError, match="at least 8x8, got 7x9"):
        convnet(2, (1, 7, 9))
