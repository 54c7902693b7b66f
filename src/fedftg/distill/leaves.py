"""Random images that share the statistics of photographs and show nothing: dead leaves under 1/f noise.

Shapes of all sizes hide one another, which gives edges and correlations as in photographs (Lee, Mumford, Huang, IJCV
2001); networks learn from such images what they learn from real ones, if less (Baradad et al., "Learning to See by
Looking at Noise", NeurIPS 2021, https://arxiv.org/abs/2106.05963). Shapes, colours and noise are our choice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

LEAVES = 40
SMALLEST, EXPONENT = 0.06, 1.2  # of a power law of radii, in half images
NOISE = 1.2  # greatest standard deviation of an image's noise
CLIP = 2.2  # about the range of 8-bit images after normalisation
DRAWN_UP_TO = 64  # pixels a side; larger images are enlarged, as 40 shapes have no finer detail


def dead_leaves(number: int, image_shape: Sequence[int], rng: torch.Generator) -> Float[Tensor, "N D H W"]:
    """Returns images in the range of normalised ones (about mean 0, standard deviation 1), float32 on the CPU."""
    depth, *sides = image_shape
    height, width = (min(side, DRAWN_UP_TO) for side in sides)

    def normal(*shape: int) -> Tensor:
        return torch.randn(number, *shape, generator=rng)

    def uniform() -> Tensor:
        return torch.rand(number, 1, 1, generator=rng)

    rows, columns = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    tint = 0.8 * normal(depth, 1, 1)
    images = (tint + 0.8 * normal(depth, 1, 1)).expand(-1, -1, height, width)
    for _ in range(LEAVES):
        radius = SMALLEST / (1 - uniform() * (1 - (SMALLEST / 1.2) ** EXPONENT)) ** (1 / EXPONENT)
        right, down = columns - 2.4 * uniform() + 1.2, rows - 2.4 * uniform() + 1.2
        angle, stretch = math.pi * uniform(), (0.4 * normal(1, 1)).exp()
        along = (right * angle.cos() + down * angle.sin()) * stretch
        across = (down * angle.cos() - right * angle.sin()) / stretch
        kind = torch.randint(3, (number, 1, 1), generator=rng)  # an ellipse, a rectangle or a rhombus
        square = torch.where(kind == 1, torch.maximum(along.abs(), across.abs()), along.abs() + across.abs())
        distance = torch.where(kind == 0, (along**2 + across**2).sqrt(), square)
        sharpness = height / 2 * (0.7 * normal(1, 1)).exp()
        cover = ((radius - distance) * sharpness).sigmoid()[:, None]
        colour = tint + 1.1 * normal(1, 1, 1) + 0.55 * normal(depth, 1, 1)
        shade = 0.5 * (along * normal(1, 1) + across * normal(1, 1))[:, None]
        images = images * (1 - cover) + cover * (colour + shade)
    images = images + NOISE * uniform()[:, None] * _pink(0.4 * normal(depth, height, width) + normal(1, height, width))
    if [height, width] != sides:
        images = F.interpolate(images, sides, mode="bilinear")
    return images.clamp(-CLIP, CLIP)


def _pink(noise: Float[Tensor, "N D H W"]) -> Float[Tensor, "N D H W"]:
    """Returns noise whose amplitude falls with the frequency as in photographs, of standard deviation 1."""
    height, width = noise.shape[2:]
    frequency = (torch.fft.rfftfreq(width) ** 2 + torch.fft.fftfreq(height)[:, None] ** 2).sqrt()
    filtered = torch.fft.irfft2(torch.fft.rfft2(noise) / (frequency + 0.02), s=(height, width))
    pink: Tensor = filtered / filtered.std(dim=(1, 2, 3), keepdim=True)
    return pink
