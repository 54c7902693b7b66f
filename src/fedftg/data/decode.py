"""Decodes images to unsigned bytes: 8-bit grey or RGB, upright, resized where a size is asked for.

Pillow does the work, one image after another: 0.1 ms for 32x32, 2.1 ms for a JPEG of 512x512. Two threads did not help,
for Pillow holds the interpreter's lock while it decodes. Reducing a JPEG to 64x64 takes 1.2 ms instead of 2.1, for most
of it need not be decoded (``_DRAFT_FACTOR``).
"""

from __future__ import annotations

import contextlib
import io
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image, ImageOps

from fedftg.data.cache import first_line
from fedftg.data.read import Split, Stored
from fedftg.errors import InputError

Array = NDArray[np.uint8]
Store = Callable[[int, Iterable[Array]], Array]
"""Gathers blocks ``(n, D, H, W)`` of a number of images in one array ``(N, D, H, W)``: `in_memory`, or `in_file`."""

_GREY = {"1", "L", "LA", "La"}
_COLOUR = {"RGB", "RGBA", "RGBX", "RGBa", "P", "PA", "CMYK", "YCbCr", "LAB", "HSV"}
_AT_ONCE = 64
"""Images in memory before they are stored: at 1024x1024 pixels 200 MB."""
_DRAFT_FACTOR = 2
"""JPEGs may be decoded at 1/2, 1/4 or 1/8 of their size where that leaves at least this many times ``image_size``, so
that the antialiased resize still decides how the image looks."""
DECODER = f"Pillow {PIL.__version__}, draft {_DRAFT_FACTOR}"
"""Part of the cache's keys: another version may decode or resize to other bytes."""


@dataclass(frozen=True)
class Sizing:
    """The side in pixels that images are resized to, and how; None leaves them as they are."""

    side: int | None = None
    resize: Literal["crop", "stretch"] = "crop"

    def apply(self, image: Image.Image) -> Image.Image:
        """Returns the image with sides of ``side``, antialiased (Pillow's bicubic filter widens with the reduction)."""
        if self.side is None or image.size == (self.side, self.side):
            return image
        size = (self.side, self.side)
        if self.resize == "crop":
            return ImageOps.fit(image, size, Image.Resampling.BICUBIC)
        return image.resize(size, Image.Resampling.BICUBIC)


def decode(content: Stored, sizing: Sizing) -> tuple[Array, str]:
    """Returns one image as ``(H, W)`` where it is grey, else ``(H, W, 3)``, and the mode in which it was stored.

    The orientation that a camera noted (EXIF) is applied. Palette, CMYK and other 8-bit images become RGB; transparency
    is dropped. Arrays are decoded already and only resized.

    Raises:
        InputError: no bytes, an image that is corrupt or cut off, or one of more than 8 bits.
    """
    if isinstance(content, np.ndarray):
        small = content if sizing.side is None else np.asarray(sizing.apply(Image.fromarray(content)))
        return small, "L" if content.ndim == 2 else "RGB"
    if not content:
        raise InputError("the image has no bytes; images must be stored in the file, not as paths")
    try:
        with Image.open(content if isinstance(content, Path) else io.BytesIO(content)) as image:
            # Pillow opens 16-bit colour as RGB and drops the lower half of each value.
            mode = f"{image.mode};16" if image.mode in _COLOUR | _GREY and _has_16_bits(image) else image.mode
            if mode in _GREY | _COLOUR:
                if sizing.side is not None:
                    image.draft(None, (sizing.side * _DRAFT_FACTOR,) * 2)
                return np.asarray(sizing.apply(_plain(image))), mode
    except Image.DecompressionBombError as error:
        raise InputError(f"the image is too large ({first_line(error)}); reduce it") from error
    # Pillow's decoders raise many kinds: OSError, SyntaxError, ValueError, struct.error, ...
    except Exception as error:
        raise InputError(f"the image is corrupt ({first_line(error)}); replace or remove it") from error
    raise InputError(f"images of mode {mode!r} are not supported; convert them to 8-bit grey or RGB")


def _has_16_bits(image: Image.Image) -> bool:
    """Returns whether an image of an 8-bit mode is stored with more bits a channel.

    PNG and TIFF have that in the raw mode (``RGB;16B``) of Pillow's decoder, PPM in the largest value beside it.
    """
    details = [part[3] for part in getattr(image, "tile", ())]
    if image.format == "PPM":
        return any(isinstance(detail, tuple) and detail[-1] > 255 for detail in details)
    return image.format in ("PNG", "TIFF") and any(";16" in str(detail) for detail in details)


def _plain(image: Image.Image) -> Image.Image:
    """Returns the image upright, and in mode L or RGB."""
    image.load()
    # A damaged note of the camera is no reason to refuse pixels that are whole.
    with contextlib.suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode in _GREY:
        return image.convert("L")
    # Palettes with transparency have no direct way to RGB.
    return (image.convert("RGBA") if image.mode in ("P", "PA") else image).convert("RGB")


def decode_all(
    wanted: Sequence[tuple[Split, NDArray[np.int64]]],
    sizing: Sizing,
    store: Store,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Array, dict[str, int]]:
    """Decodes the ascending rows of splits, all RGB unless every image is grey.

    Args:
        wanted: splits and their rows.
        sizing: the size of the images.
        store: gathers the images.
        progress: called with the number of images decoded so far and in all.

    Returns:
        The images ``(N, D, H, W)`` of all splits, and how many were converted to RGB, by mode.

    Raises:
        InputError: as `decode`, or images of different sizes; names the file and row.
    """
    modes: Counter[str] = Counter()
    total = sum(len(rows) for _, rows in wanted)
    images = store(total, _blocks(wanted, sizing, modes, progress))
    grey = sum(count for mode, count in modes.items() if mode in _GREY)
    if grey == total:
        return store(total, (images[start : start + _AT_ONCE, :1] for start in range(0, total, _AT_ONCE))), {}
    converted = {mode: count for mode, count in modes.items() if mode not in _GREY | {"RGB"}}
    return images, dict(sorted((converted | ({"grey": grey} if grey else {})).items()))


def _blocks(
    wanted: Sequence[tuple[Split, NDArray[np.int64]]],
    sizing: Sizing,
    modes: Counter[str],
    progress: Callable[[int, int], None] | None,
) -> Iterator[Array]:
    """Yields blocks ``(n, 3, H, W)`` and counts the modes in which the images were stored."""
    size: tuple[int, ...] = ()
    done, total = 0, sum(len(rows) for _, rows in wanted)
    for split, rows in wanted:
        contents = iter(split.images(rows))
        for start in range(0, len(rows), _AT_ONCE):
            part = rows[start : start + _AT_ONCE]
            block: Array | None = None
            for number, row in enumerate(part):
                try:
                    pixels, mode = decode(next(contents), sizing)
                    size = size or pixels.shape[:2]
                    if pixels.shape[:2] != size:
                        raise InputError(
                            f"the image is {pixels.shape[1]}x{pixels.shape[0]} (width x height), the first one is "
                            f"{size[1]}x{size[0]}; set data.image_size, to which all are resized once"
                        )
                except InputError as error:
                    raise InputError(f"{split.labels.where(int(row))}: {error}") from error
                if block is None:
                    block = np.empty((len(part), 3, *size), dtype=np.uint8)
                block[number] = pixels if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
                modes[mode] += 1
            assert block is not None
            yield block
            done += len(part)
            if progress is not None:
                progress(done, total)


def in_memory(count: int, blocks: Iterable[Array]) -> Array:
    """Returns blocks ``(n, D, H, W)`` of ``count`` images as one array."""
    images, start = np.empty(0, dtype=np.uint8), 0
    for block in blocks:
        if not start:
            images = np.empty((count, *block.shape[1:]), dtype=np.uint8)
        images[start : start + len(block)] = block
        start += len(block)
    return images


def in_file(path: Path, count: int, blocks: Iterable[Array]) -> Array:
    """As `in_memory`, in an ``.npy`` file that is then memory-mapped.

    The file is not mapped while it grows: a full disk is then an OSError, not a signal that kills the process.
    """
    aside = path.with_suffix(".part")  # the blocks may be read from ``path`` itself
    with aside.open("wb") as file:
        for number, block in enumerate(blocks):
            if number == 0:
                header: dict[str, Any] = {"descr": "|u1", "fortran_order": False, "shape": (count, *block.shape[1:])}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(np.ascontiguousarray(block).data)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    return np.lib.format.open_memmap(path, mode="r")
