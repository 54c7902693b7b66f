"""Where decoded images are gathered: in memory, or in a file that is written block by block and mapped afterwards.

The file is written, not mapped, while it grows: a full disk is then an error that can be told, and not a signal that
kills the process, and written pages do not count as the process's memory.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.uint8]

_ROWS_AT_ONCE = 256


class Store(Protocol):
    """Takes ``count`` images in blocks ``(n, D, H, W)``; the first decides H and W, and D until one has colour."""

    def append(self, block: Array) -> None:
        """Add images; a block with 3 channels makes those before it 3-channelled, a grey one follows the others."""

    def to_colour(self) -> None:
        """Make all 3-channelled; nothing where they are."""

    def close(self) -> Array:
        """All images ``(count, D, H, W)``."""


class MemoryStore:
    """Images in one array, allocated once."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._filled = 0
        self._images: Array | None = None

    def append(self, block: Array) -> None:
        """See `Store`."""
        if self._images is None:
            self._images = np.empty((self._count, *block.shape[1:]), dtype=np.uint8)
        elif block.shape[1] > self._images.shape[1]:
            self.to_colour()
        self._images[self._filled : self._filled + len(block)] = block
        self._filled += len(block)

    def to_colour(self) -> None:
        """See `Store`."""
        if self._images is not None and self._images.shape[1] == 1:
            grey, self._images = self._images, np.empty((self._count, 3, *self._images.shape[2:]), dtype=np.uint8)
            self._images[: self._filled] = grey[: self._filled]

    def close(self) -> Array:
        """See `Store`."""
        assert self._images is not None
        assert self._filled == self._count
        return self._images


class FileStore:
    """Images in a ``.npy`` file, which `close` makes durable and maps; changes of the mapped array stay in memory."""

    def __init__(self, path: Path, count: int) -> None:
        self._path = path
        self._count = count
        self._filled = 0
        self._shape: tuple[int, ...] | None = None
        self._file: BinaryIO | None = None

    def append(self, block: Array) -> None:
        """See `Store`; OSError where the disk is full."""
        if self._shape is None:
            self._shape = block.shape[1:]
            self._file = self._start(self._path)
        elif block.shape[1] > self._shape[0]:
            self.to_colour()
        assert self._file is not None
        self._file.write(np.ascontiguousarray(np.broadcast_to(block, (len(block), *self._shape))).data)
        self._filled += len(block)

    def _start(self, path: Path) -> BinaryIO:
        assert self._shape is not None
        file = path.open("wb")
        header: dict[str, Any] = {"descr": "|u1", "fortran_order": False, "shape": (self._count, *self._shape)}
        np.lib.format.write_array_header_1_0(file, header)
        return file

    def to_colour(self) -> None:
        """See `Store`."""
        if self._file is None or self._shape is None or self._shape[0] == 3:
            return
        self._file.close()
        grey_shape, self._shape = self._shape, (3, *self._shape[1:])
        grey = self._path.with_suffix(".grey")
        self._path.rename(grey)
        self._file = self._start(self._path)
        left, self._filled = self._filled, 0
        with grey.open("rb") as file:
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            while left:
                rows = min(left, _ROWS_AT_ONCE)
                content = file.read(rows * int(np.prod(grey_shape)))
                self.append(np.frombuffer(content, dtype=np.uint8).reshape(rows, *grey_shape))
                left -= rows
        grey.unlink()

    def close(self) -> Array:
        """See `Store`."""
        assert self._file is not None
        assert self._filled == self._count
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return mapped(self._path)

    def abandon(self) -> None:
        """Let go of the file after an error."""
        if self._file is not None:
            self._file.close()


def mapped(path: Path) -> Array:
    """The array in a ``.npy`` file, read from the disk where it is used; what is changed in it stays in memory."""
    array: Array = np.lib.format.open_memmap(path, mode="c")
    if array.dtype != np.uint8 or array.ndim != 4:
        raise ValueError(f"{path} holds {array.dtype} of shape {array.shape}")
    return array
