"""The images that a refiner showed, as PNG files: ``images/00016.png`` has a row a class."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedftg.rundir import records

if TYPE_CHECKING:
    from torch import Tensor

COLUMNS, ROWS = 8, 20
"""Images in a row, and at most this many classes."""


def mosaic(
    images: Tensor, labels: Tensor | None, num_classes: int, mean: Sequence[float], std: Sequence[float]
) -> NDArray[np.uint8]:
    """Returns the first `COLUMNS` images of each of the first `ROWS` classes as ``(rows * H, COLUMNS * W, D)``.

    Normalised images ``(B, D, H, W)`` are brought back to 0..1, clipped, and put in the row of their label; without
    labels they fill the rows in order. Cells that stay blank are white.
    """
    import torch

    rows, (depth, height, width) = min(num_classes, ROWS), images.shape[1:]
    scale, shift = (torch.tensor(values).view(-1, 1, 1) for values in (std, mean))
    pixels = (images.detach().float().cpu() * scale + shift).clamp(0, 1).nan_to_num()
    found = (pixels * 255).round().to(torch.uint8)
    cells = torch.full((rows, COLUMNS, depth, height, width), 255, dtype=torch.uint8)
    for row in range(rows):
        of = found[row * COLUMNS :] if labels is None else found[labels.cpu() == row]
        cells[row, : len(of)] = of[:COLUMNS]
    return cells.permute(0, 3, 1, 4, 2).reshape(rows * height, COLUMNS * width, depth).numpy()


def due(folder: Path, number: int) -> bool:
    """Returns whether a round is at least 1.5 times that of the newest file: about a dozen files in 100 rounds."""
    return number >= 1.5 * max((int(path.stem) for path in folder.glob("*.png")), default=0)


def write(folder: Path, number: int, pixels: NDArray[np.uint8], *, labelled: bool) -> None:
    """Writes what `mosaic` returned, as the file of a round, and as PNG text ``rows`` whether rows are classes."""
    from PIL import Image, PngImagePlugin

    folder.mkdir(exist_ok=True)
    file, about = io.BytesIO(), PngImagePlugin.PngInfo()
    about.add_text("rows", "classes" if labelled else "images")
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(file, "PNG", pnginfo=about)
    records.write_atomically(folder / f"{number:05}.png", file.getvalue())


def found(folder: Path) -> Iterator[tuple[int, Path, bool]]:
    """Yields the round of each file, the file, and whether its rows are classes, in the order of rounds."""
    from PIL import Image

    for path in sorted(folder.glob("*.png")):
        with Image.open(path) as image:
            yield int(path.stem), path, image.info.get("rows") == "classes"
