"""Decodes images to unsigned bytes: 8-bit grey or RGB, upright, resized where a size is asked for."""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image, ImageOps

from fedftg.data.cache import Allocate, Images
from fedftg.data.classes import Labels
from fedftg.data.read import Split, Stored
from fedftg.errors import InputError, first_line

_GREY = {"1", "L", "LA", "La"}
_COLOUR = {"RGB", "RGBA", "RGBX", "RGBa", "P", "PA", "CMYK", "YCbCr", "LAB", "HSV"}
DECODER = f"Pillow {PIL.__version__}"  # part of the cache's keys: another version may decode or resize to other bytes

_FIRST = " (first of several frames)"

Resize = Literal["crop", "stretch"]


def decode(content: Stored, side: int | None = None, resize: Resize = "crop") -> tuple[NDArray[np.uint8], str]:
    """Returns one image as ``(H, W)`` where it is grey, else ``(H, W, 3)``, and the mode in which it was stored.

    ``crop`` makes the shorter side ``side`` pixels long and keeps the middle, ``stretch`` both.
    """
    if isinstance(content, np.ndarray):
        small = content if side is None else np.asarray(_resized(Image.fromarray(content), side, resize))
        return small, "L" if content.ndim == 2 else "RGB"
    if not content:
        raise InputError("the image has no bytes; images must be stored in the file, not as paths")
    try:
        with Image.open(content if isinstance(content, Path) else io.BytesIO(content)) as image:
            mode, more = image.mode, getattr(image, "is_animated", False)
            deep = any(  # PNG, TIFF and PPM: read as 8 bits
                ";16" in str(args) or (codec[:3] == "ppm" and args[0] == "RGB" and args[1] > 255)
                for codec, _, _, args in getattr(image, "tile", ())
            )
            if mode in _GREY | _COLOUR:
                if side is not None:
                    # JPEGs may be decoded at a fraction of their size that leaves work for the antialiased resize.
                    image.draft(None, (2 * side, 2 * side))
                return np.asarray(_resized(_plain(image), side, resize)), "16-bit " * deep + mode + _FIRST * more
    except InputError:
        raise
    # Pillow's decoders raise many kinds: OSError, SyntaxError, ValueError, struct.error, ...
    except Exception as error:
        raise InputError(f"the image cannot be decoded ({first_line(error)}); replace or remove it") from error
    raise InputError(f"images of mode {mode!r} are not supported; convert them to 8-bit grey or RGB")


def _plain(image: Image.Image) -> Image.Image:
    """Returns the image upright, in mode L or RGB, and on white where it is transparent."""
    image.load()
    with contextlib.suppress(Exception):  # a damaged note of the camera is no reason to refuse whole pixels
        ImageOps.exif_transpose(image, in_place=True)
    mode = "L" if image.mode in _GREY else "RGB"
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), layers)
        if image.getcolors(1) and not layers.getcolors(1):
            raise InputError(
                "all white after its transparent parts are filled with white; flatten it onto another background"
            )
    return image.convert(mode)


def _resized(image: Image.Image, side: int | None, resize: Resize) -> Image.Image:
    if side is None or image.size == (side, side):
        return image
    if resize == "crop":
        return ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)
    return image.resize((side, side), Image.Resampling.BICUBIC)  # antialiased: the filter widens with the reduction


def decode_all(
    wanted: Sequence[tuple[Split, Labels]],
    side: int | None,
    resize: Resize,
    allocate: Allocate,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Images, dict[str, int]]:
    """Decodes the ascending rows of splits, all to RGB unless every image is grey.

    Returns the images ``(N, D, H, W)`` of all splits, and how many were converted to RGB, by mode.
    """
    modes: Counter[str] = Counter()
    done, total = 0, sum(len(rows) for _, rows in wanted)
    images: Images = np.empty((0, 0, 0, 0), np.uint8)
    for split, rows in wanted:
        for row, content in zip(rows, split.images(rows), strict=True):
            try:
                pixels, mode = decode(content, side, resize)
                if done and pixels.shape[:2] != images.shape[2:]:
                    sizes = ["x".join(map(str, shape)) for shape in (pixels.shape[:2], images.shape[2:])]
                    raise InputError(f"the image is {sizes[0]} (H x W), the first one {sizes[1]}; set data.image_size")
            except InputError as error:
                raise InputError(f"{split.labels.where(int(row))}: {error}") from error
            depth = 1 if pixels.ndim == 2 else 3
            if images.shape[1] < depth:  # the first image, or the first colour image after grey ones
                grey, images = images, allocate((total, depth, *pixels.shape[:2]))
                if done:
                    images[:done] = grey[:done]
            images[done] = pixels if depth == 1 else pixels.transpose(2, 0, 1)
            modes[mode] += 1
            done += 1
            if progress is not None and (done % 64 == 0 or done == total):
                progress(done, total)
    converted = {mode: count for mode, count in modes.items() if mode not in _GREY | {"RGB"}}
    grey_count = sum(modes[mode] + modes[mode + _FIRST] for mode in _GREY)
    if 0 < grey_count < total:
        converted["grey"] = grey_count
    return images, dict(sorted(converted.items()))
