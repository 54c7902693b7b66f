"""Sizes, parameters and statistics of the conditional generator."""

import pytest
import torch

from fedftg.distill.generator import Generator
from fedftg.errors import InputError


@pytest.mark.parametrize(("noise", "classes", "expected"), [(100, 10, 682_499), (256, 100, 1_690_115)])
def test_parameter_counts_of_the_paper(noise, classes, expected):
    """E.g. 100 noise, 10 classes: 4096 * 101 + 4096 * 11 + 256 + (128 * 1152 + 128 + 256) + (64 * 1152 + 64 + 128) +
    (3 * 576 + 3) = 682,499.
    """
    assert sum(parameter.numel() for parameter in Generator(noise, classes, (3, 32, 32)).parameters()) == expected


@pytest.mark.parametrize("size", [(8, 8), (9, 9), (28, 28), (31, 33), (96, 96), (8, 50), (224, 224)])
def test_image_shapes(size):
    for channels in (1, 3):
        generator = Generator(5, 4, (channels, *size), width=2)
        assert generator(torch.randn(3, 5), torch.tensor([0, 3, 1])).shape == (3, channels, *size)
        assert generator.image_shape == (channels, *size)


@pytest.mark.parametrize(
    ("side", "base", "width", "channels"),
    [(8, 2, 2, [4, 2]), (32, 8, 64, [128, 64]), (64, 8, 4, [8, 4, 4]), (224, 7, 16, [32, 16, 8, 8, 8])],
)
def test_base_map_and_channels(side, base, width, channels):
    """The base map is at most 8x8; channels halve beyond the second upsampling, down to 8."""
    generator = Generator(5, 4, (3, side, side), width)
    assert generator.noise_layer.out_features == width * base**2
    assert [block[0].out_channels for block in generator.blocks] == channels
    assert generator.to_image.in_channels == channels[-1]


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 9, 9), (3, 40, 31)])
def test_images_and_gradients_in_channels_last_are_the_same_up_to_rounding(shape):
    one = Generator(6, 3, shape, width=8).double()
    other = Generator(6, 3, shape, width=8, memory_format="channels_last").double()
    other.load_state_dict(one.state_dict())
    noise, labels = torch.randn(5, 6, dtype=torch.float64), torch.tensor([0, 2, 1, 1, 0])
    images = [generator(noise, labels) for generator in (one, other)]
    torch.testing.assert_close(*images)
    for each in images:
        each.cos().sum().backward()
    torch.testing.assert_close(*([p.grad for p in generator.parameters()] for generator in (one, other)))


def test_layers_are_those_of_the_paper_in_order():
    """Written out once more, layer by layer, from METHOD section 5."""
    generator = Generator(6, 3, (3, 32, 32), width=4).eval()
    noise, labels = torch.randn(2, 6), torch.tensor([2, 0])
    one_hot = torch.zeros(2, 3)
    one_hot[0, 2] = one_hot[1, 0] = 1
    features = torch.cat([generator.noise_layer(noise), generator.label_layer(one_hot)], dim=1).reshape(2, 8, 8, 8)
    features = generator.base_norm(features)
    for block in generator.blocks:
        convolution, norm, leaky = block
        assert leaky.negative_slope == 0.2
        features = features.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        features = leaky(norm(convolution(features)))
    expected = generator.image_norm(generator.to_image(features).tanh())
    torch.testing.assert_close(generator(noise, labels), expected)
    assert [block[0].out_channels for block in generator.blocks] == [8, 4]
    assert not list(generator.image_norm.parameters())


def test_a_training_batch_has_mean_zero_and_variance_one_in_every_channel():
    images = Generator(5, 4, (3, 16, 16), width=4)(torch.randn(50, 5), torch.randint(4, (50,)))
    torch.testing.assert_close(images.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(images.var(dim=(0, 2, 3), correction=0), torch.ones(3), atol=1e-2, rtol=0)


@pytest.mark.parametrize("shape", [(2, 8, 8), (3, 7, 8), (3, 225, 225), (8, 8)], ids=str)
def test_wrong_sizes(shape):
    with pytest.raises(InputError, match=r"\(D, H, W\), D 1 or 3, sides 8 to 224"):
        Generator(5, 4, shape)
