"""From an encoded image to unsigned bytes: 8-bit grey or RGB, upright, and of one size where one is asked for.

Pillow does the work, one image after another: 0.1 ms for 32x32, 2.1 ms for a JPEG of 512x512. Two threads were tried on
two cores and did not help even there (2.3 ms an image), for Pillow holds the interpreter's lock while it decodes.
Reducing a JPEG to 64x64 takes 1.2 ms instead of 2.1, for most of it need not be decoded (``_DRAFT_FACTOR``).
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image, ImageOps

from fedftg.errors import InputError

Array = NDArray[np.uint8]
Encoded = tuple[str, "bytes | Path | None"]
"""Where an image stands (``file, row 3``, or only the file), and its bytes or its file; None where it has none."""

_GREY = {"1", "L", "LA", "La"}
_COLOUR = {"RGB", "RGBA", "RGBX", "RGBa", "P", "PA", "CMYK", "YCbCr", "LAB", "HSV"}
_AT_ONCE = 64
"""Images decoded before they are handed on: at 1024x1024 pixels 200 MB."""
_DRAFT_FACTOR = 2
"""JPEGs may be decoded at 1/2, 1/4 or 1/8 of their size where that leaves this many times ``image_size``, so that the
antialiased resize still decides how the image looks."""
DECODER = f"Pillow {PIL.__version__}, draft {_DRAFT_FACTOR}"
"""Part of the cache's keys: another version may decode or resize to other bytes."""


@dataclass(frozen=True)
class Sizing:
    """The side in pixels that images are resized to, and how; None leaves them as they are."""

    side: int | None = None
    resize: Literal["crop", "stretch"] = "crop"

    def apply(self, image: Image.Image) -> Image.Image:
        """The image with both sides ``side``, antialiased (Pillow's bicubic filter widens with the reduction)."""
        if self.side is None or image.size == (self.side, self.side):
            return image
        size = (self.side, self.side)
        if self.resize == "crop":
            return ImageOps.fit(image, size, Image.Resampling.BICUBIC)
        return image.resize(size, Image.Resampling.BICUBIC)


def decode(where: str, content: bytes | Path | None, sizing: Sizing) -> tuple[Array, str]:
    """One image as ``(H, W)`` where it is grey, else ``(H, W, 3)``, and the mode in which it was stored.

    The orientation that a camera noted (EXIF) is applied. Palette, CMYK and other 8-bit images become RGB; transparency
    is dropped.

    Raises:
        InputError: no bytes, an image that is corrupt or cut off, or one of more than 8 bits.
    """
    if not content:
        raise InputError(f"{where}: the image has no bytes; images must be stored in the file, not as paths")
    try:
        with Image.open(content if isinstance(content, Path) else io.BytesIO(content)) as image:
            # Pillow opens 16-bit colour as RGB and drops the lower half of each value.
            mode = f"{image.mode};16" if image.mode in _COLOUR | _GREY and _has_16_bits(image) else image.mode
            if mode in _GREY | _COLOUR:
                if sizing.side is not None:
                    image.draft(None, (sizing.side * _DRAFT_FACTOR,) * 2)
                return np.asarray(sizing.apply(_plain(image))), mode
    # Pillow's decoders raise many kinds: OSError, SyntaxError, ValueError, struct.error, ...
    except Exception as error:
        raise InputError(f"{where}: the image is corrupt ({one_line(error)}); replace or remove it") from error
    raise InputError(f"{where}: images of mode {mode!r} are not supported; convert them to 8-bit grey or RGB")


def _has_16_bits(image: Image.Image) -> bool:
    """Whether an image of a mode that passes for 8-bit holds more bits a channel, as Pillow's decoder is told.

    PNG and TIFF say so in the raw mode (``RGB;16B``), PPM by the largest value beside it.
    """
    details = [part[3] for part in getattr(image, "tile", ())]
    if image.format == "PPM":
        return any(isinstance(detail, tuple) and detail[-1] > 255 for detail in details)
    return image.format in ("PNG", "TIFF") and any(";16" in str(detail) for detail in details)


def _plain(image: Image.Image) -> Image.Image:
    """Upright, and in mode L or RGB."""
    image.load()
    # The pixels are whole: a note about the camera that cannot be read is no reason to refuse them.
    with contextlib.suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode in _GREY:
        return image.convert("L")
    # Palettes with transparency have no direct way to RGB.
    return (image.convert("RGBA") if image.mode in ("P", "PA") else image).convert("RGB")


def decoded(images: Iterable[Encoded], sizing: Sizing) -> Iterator[list[tuple[str, Array, str]]]:
    """Blocks of where, pixels and stored mode, in the order of ``images``; a few dozen images are in memory at a time.

    Raises:
        InputError: as `decode`, for the first image in order that is bad.
    """
    waiting = iter(images)
    while block := [(where, *decode(where, content, sizing)) for where, content in islice(waiting, _AT_ONCE)]:
        yield block


def resized(images: Array, sizing: Sizing) -> Array:
    """Images ``(N, D, H, W)`` of 1 or 3 channels, resized like encoded ones."""
    if sizing.side is None or images.shape[2:] == (sizing.side, sizing.side):
        return images
    made = np.empty((*images.shape[:2], sizing.side, sizing.side), dtype=np.uint8)
    for number, image in enumerate(images):
        pixels = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
        new = np.asarray(sizing.apply(Image.fromarray(np.ascontiguousarray(pixels))))
        made[number] = new if new.ndim == 2 else new.transpose(2, 0, 1)
    return made


def is_grey(mode: str) -> bool:
    """Whether images stored in this Pillow mode have no colour."""
    return mode in _GREY


def one_line(error: BaseException) -> str:
    """The first line of an error's text without addresses in memory, or its kind where it has no text."""
    lines = str(error).strip().splitlines()
    return re.sub(r" object at 0x[0-9a-f]+", "", lines[0]) if lines else type(error).__name__
