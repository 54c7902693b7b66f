"""Random changes of training images, for a whole batch at once on the images' device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fedftg.data.dataset import Augmentation

PADDED_SHARE = 8
"""The crop may shift by an eighth of the longer side: 4 pixels at 32x32 as in the paper's CIFAR experiments."""


def augment(images: Tensor, kind: Augmentation, rng: torch.Generator) -> Tensor:
    """Images ``(B, D, H, W)`` of the same type and device, changed as ``kind`` says.

    flip: each image is mirrored left-right with probability 0.5. crop: with probability 0.5 it is a window of the
    original size at a uniform place in the image padded with black, an eighth of the longer side on each side (rounded
    up; 4 pixels at 28x28 and 32x32, 8 at 64x64). flip_crop: both. none: the images themselves.

    Give images *before* normalisation, where 0 is black: that is what torchvision's ``RandomCrop`` does to PIL images.

    Args:
        images: unsigned bytes or floats; left as they are.
        kind: what to do.
        rng: a CPU generator. All numbers are drawn on the CPU, so every device makes the same batch.
    """
    if kind == "none":
        return images
    size = len(images)
    flipped = torch.rand(size, generator=rng) < 0.5 if kind != "crop" else torch.zeros(size, dtype=torch.bool)
    if kind == "flip":
        return torch.where(moved(flipped[:, None, None, None], images.device), images.flip(-1), images)
    return _shifted(images, flipped, rng)


def _shifted(images: Tensor, flipped: Tensor, rng: torch.Generator) -> Tensor:
    size, _, height, width = images.shape
    padding = -(-max(height, width) // PADDED_SHARE)
    cropped = torch.rand(size, generator=rng) < 0.5
    offsets = torch.randint(0, 2 * padding + 1, (size, 2), generator=rng)
    offsets[~cropped] = padding
    rows = offsets[:, :1] + torch.arange(height)
    columns = offsets[:, 1:] + torch.arange(width)
    # The padded image is symmetric, so mirroring an index into it flips the image inside its black frame.
    columns = torch.where(flipped[:, None], width + 2 * padding - 1 - columns, columns)
    padded = functional.pad(images, (padding,) * 4).permute(0, 2, 3, 1)
    device = images.device
    chosen = torch.arange(size, device=device)[:, None, None]
    picked = padded[chosen, moved(rows[:, :, None], device), moved(columns[:, None], device)]
    return picked.permute(0, 3, 1, 2).contiguous()


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A small tensor of the CPU on the device; a GPU is not waited for where CUDA can do without.

    From ordinary memory, as here, CUDA copies before the call returns. Apple's GPUs may read later, so they are waited
    for.
    """
    return tensor.to(device, non_blocking=device.type == "cuda")
