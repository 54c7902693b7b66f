"""Conditional generator ``x = G(z, y; theta)`` for images of 8x8 to 224x224 pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from fedftg.distill.config import GeneratorConfig
from fedftg.errors import InputError
from fedftg.precision import MemoryFormat
from fedftg.seeds import forked

_MIN_SIZE, _MAX_SIZE, _BASE, _LEAST_CHANNELS = 8, 224, 8, 8


class Generator(nn.Module):
    """Images from noise and labels: two linear layers side by side, then upsampling and convolutions.

    ``Linear(noise)`` and ``Linear(one-hot label)`` give ``width`` channels each of a small base map; BatchNorm; then
    per upsampling (nearest, x2) a 3x3 convolution, BatchNorm and LeakyReLU 0.2, with ``2 * width`` channels after the
    first, ``width`` after the second and half as many after each further one; a 3x3 convolution to the image channels,
    tanh and BatchNorm without affine, so that every channel of a training batch has mean 0 and variance 1, like
    normalised real images. At 32x32 this is the public code's generator.
    Sizes that are no multiple of the upsampling are generated larger and cropped at the centre. The upsamplings are at
    least 2, and as few as make the base map at most 8x8.

    Args:
        noise_dim: ``Z``; the public code uses 100 for CIFAR-10 and 256 for CIFAR-100.
        image_shape: ``(D, H, W)`` with 1 or 3 channels and 8 to 224 pixels a side.
        width: channels after the second upsampling, which is the last one up to 32x32; 64 in the public code. Larger
            images halve them at each further upsampling, down to 8: 128x128 measured 4 times the time of 32x32;
            without halving it was 22 times.
        memory_format: of feature maps and images. ``channels_last`` also makes each upsampling and its convolution one
            transposed convolution: on a CPU a batch took half the time or less (docs/speed.md); it rounds differently.
    """

    def __init__(
        self,
        noise_dim: int,
        num_classes: int,
        image_shape: Sequence[int],
        width: int = 64,
        memory_format: MemoryFormat = "contiguous",
    ) -> None:
        super().__init__()
        shape = tuple(image_shape)
        if len(shape) != 3 or shape[0] not in (1, 3) or not all(_MIN_SIZE <= size <= _MAX_SIZE for size in shape[1:]):
            raise InputError(f"image_shape must be (D, H, W), D 1 or 3, sides {_MIN_SIZE} to {_MAX_SIZE}, got {shape}")
        channels, height, breadth = shape
        self.image_shape = (channels, height, breadth)
        self.noise_dim, self.num_classes, self.width = noise_dim, num_classes, width
        self.memory_format = memory_format
        count = max(2, math.ceil(math.log2(max(height, breadth) / _BASE)))
        factor = 2**count
        self._base = (math.ceil(height / factor), math.ceil(breadth / factor))
        area = self._base[0] * self._base[1]
        self.noise_layer = nn.Linear(noise_dim, width * area)
        self.label_layer = nn.Linear(num_classes, width * area)
        self.base_norm = nn.BatchNorm2d(2 * width)
        outputs = [2 * width, *(max(width >> further, min(width, _LEAST_CHANNELS)) for further in range(count - 1))]
        self.blocks = nn.ModuleList(map(_block, [2 * width, *outputs], outputs))
        self.to_image = nn.Conv2d(outputs[-1], channels, 3, padding=1)
        self.image_norm = nn.BatchNorm2d(channels, affine=False)

    def forward(self, noise: Float[Tensor, "B Z"], labels: Int[Tensor, " B"]) -> Float[Tensor, "B D H W"]:
        """Returns images ``(B, D, H, W)``; labels are int64 in ``[0, C)``."""
        one_hot = F.one_hot(labels, self.num_classes).to(noise.dtype)
        features = torch.cat([self.noise_layer(noise), self.label_layer(one_hot)], dim=1)
        features = features.view(-1, 2 * self.width, *self._base)
        fast = self.memory_format == "channels_last"
        if fast:  # the layers follow
            features = features.contiguous(memory_format=torch.channels_last)
        features = self.base_norm(features)
        upsampled = _transposed if fast else _upsampled
        for block in self.blocks:
            conv, norm, activation = block.children()
            features = activation(norm(upsampled(conv, features)))
        images = torch.tanh(self.to_image(features))
        _, height, width = self.image_shape
        top, left = (images.shape[2] - height) // 2, (images.shape[3] - width) // 2
        cropped: Tensor = self.image_norm(images[:, :, top : top + height, left : left + width])
        return cropped


def new_generator(config: GeneratorConfig, num_classes: int, image_shape: Sequence[int], seed: int) -> Generator:
    """Returns a generator on the CPU, initialised from the seed."""
    with forked(seed, torch.device("cpu")):
        return Generator(config.noise_dim, num_classes, image_shape, config.generator_width, config.memory_format)


def _upsampled(conv: nn.Module, features: Tensor) -> Tensor:
    result: Tensor = conv(F.interpolate(features, scale_factor=2.0, mode="nearest"))
    return result


def _transposed(conv: nn.Module, features: Tensor) -> Tensor:
    """Returns what `_upsampled` does, up to rounding, with 4 instead of 9 products for each output and channel."""
    assert isinstance(conv, nn.Conv2d)
    kernel = conv.weight.transpose(0, 1).flip(2, 3)
    # A pixel of the map, repeated 2x2, meets sums of 2x2 weights.
    kernel = F.avg_pool2d(kernel, 2, stride=1, padding=1, divisor_override=1)
    return F.conv_transpose2d(features, kernel, conv.bias, stride=2, padding=1)


def _block(channels_in: int, channels_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, padding=1), nn.BatchNorm2d(channels_out), nn.LeakyReLU(0.2)
    )
