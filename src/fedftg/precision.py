"""Lower precision and another memory layout for forward and backward passes; weights and losses stay in float32.

Torch is imported where it is used: settings name these types, and a command line that only reads settings is quick.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from fedftg.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Precision = Literal["float32", "bfloat16", "auto"]
MemoryFormat = Literal["contiguous", "channels_last"]


def computed(
    function: Callable[[Tensor], Tensor], images: Tensor, precision: Precision, memory_format: MemoryFormat
) -> Tensor:
    """Returns ``function(images)`` in the type of the images, computed in this precision and layout.

    Layers follow the layout of their input, so that of the images is enough.
    """
    import torch

    if memory_format == "channels_last":
        images = images.to(memory_format=torch.channels_last)  # contiguous() leaves those of one channel
    with autocast(precision, images.device):
        result = function(images)
    return result.to(images.dtype)


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """Returns torch's autocast to bfloat16, or a context that does nothing; ``auto`` takes bfloat16 where it is fast.

    Weights are converted in each call anew, as a recorded step on a GPU needs.

    Raises:
        InputError: bfloat16 on hardware without it.
    """
    import torch

    wanted = precision == "bfloat16" or (precision == "auto" and has_bfloat16(device))
    if precision == "bfloat16" and not has_bfloat16(device):
        raise InputError(f"precision 'bfloat16' needs hardware that has it, got {device}; set 'float32' or 'auto'")
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted, cache_enabled=False)


def has_bfloat16(device: torch.device) -> bool:
    """Returns whether the hardware computes in bfloat16: on x86 AVX512_BF16, which processors with AMX have too.

    A product of 2048x2048 without it measured 0.3 GFLOP/s, in float32 84 (AVX2).
    """
    import platform

    import torch

    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if platform.machine() in ("x86_64", "AMD64"):  # oneDNN takes any AVX512 and emulates the rest
        return bool(torch.cpu._is_avx512_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
