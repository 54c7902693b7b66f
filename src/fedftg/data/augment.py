"""Random changes of training images, for a whole batch at once on the images' device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

PADDING = 4
"""Pixels of black added on each side before the crop, as in the paper's CIFAR experiments."""


def flip_crop(images: Tensor, rng: torch.Generator) -> Tensor:
    """Images ``(B, D, H, W)`` of the same type, each flipped left-right with p 0.5 and shift-cropped with p 0.5.

    The crop takes a window of the original size at a uniform place in the image padded with 4 zeros on each side. Give
    images *before* normalisation, where 0 is black: that is what torchvision's ``RandomCrop`` does to PIL images.

    Args:
        images: unsigned bytes or floats; left as they are.
        rng: a CPU generator. All numbers are drawn on the CPU, so every device makes the same batch.
    """
    size, _, height, width = images.shape
    flipped = torch.rand(size, generator=rng) < 0.5
    cropped = torch.rand(size, generator=rng) < 0.5
    offsets = torch.randint(0, 2 * PADDING + 1, (size, 2), generator=rng)
    offsets[~cropped] = PADDING
    rows = offsets[:, :1] + torch.arange(height)
    columns = offsets[:, 1:] + torch.arange(width)
    # The padded image is symmetric, so mirroring an index into it flips the image inside its black frame.
    columns = torch.where(flipped[:, None], width + 2 * PADDING - 1 - columns, columns)
    padded = functional.pad(images, (PADDING,) * 4).permute(0, 2, 3, 1)
    device = images.device
    picked = padded[
        torch.arange(size)[:, None, None].to(device), rows[:, :, None].to(device), columns[:, None].to(device)
    ]
    return picked.permute(0, 3, 1, 2).contiguous()
