"""Random changes of images, for a whole batch at once on the images' device."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Augmentation = Literal["none", "flip", "crop", "flip_crop"]


def augment(images: Tensor, kind: Augmentation, rng: torch.Generator) -> Tensor:
    """Returns changed images ``(B, D, H, W)``, of the same type and on the same device.

    flip: each image is mirrored left-right with probability 0.5. crop: with probability 0.5 it becomes a window of the
    original size at a uniform place in the image padded with 0 (black before normalisation, the mean after it) by an
    eighth of its longer side, rounded up. flip_crop: both. none: the images themselves. ``rng`` is a CPU generator on
    every device.
    """
    if kind == "none":
        return images
    size = len(images)
    flipped = torch.rand(size, generator=rng) < 0.5 if kind != "crop" else torch.zeros(size, dtype=torch.bool)
    device, height, width = images.device, *images.shape[2:]
    if kind == "flip":
        return torch.where(moved(flipped[:, None, None, None], device), images.flip(-1), images)
    padding = -(-max(height, width) // 8)
    cropped = torch.rand(size, generator=rng) < 0.5
    offsets = torch.randint(0, 2 * padding + 1, (size, 2), generator=rng)
    offsets[~cropped] = padding
    rows = offsets[:, :1] + torch.arange(height)
    columns = offsets[:, 1:] + torch.arange(width)
    # The padded image is symmetric, so mirroring an index into it flips the image inside its black frame.
    columns = torch.where(flipped[:, None], width + 2 * padding - 1 - columns, columns)
    padded = functional.pad(images, (padding,) * 4).permute(0, 2, 3, 1)
    chosen = torch.arange(size, device=device)[:, None, None]
    picked = padded[chosen, moved(rows[:, :, None], device), moved(columns[:, None], device)]
    return picked.permute(0, 3, 1, 2).contiguous()


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a small CPU tensor on the device; non-blocking on CUDA only, as Apple's GPUs may read it later."""
    return tensor.to(device, non_blocking=device.type == "cuda")
