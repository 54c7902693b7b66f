"""A pool of the last images of a source, which are shown again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedftg.augment import augment, moved
from fedftg.distill.config import StudentConfig
from fedftg.distill.images import Call, Images
from fedftg.params import Params


class PooledImages:
    """Shows each batch of a source, then ``pool_batches`` from a pool, into which the source's images go.

    With ``pool_size = 0`` it is the source alone.

    Attributes:
        pool: ``images``, in half precision, and ``labels`` where they are known: all that the next call needs besides
            the source's own memory. Replaced in each iteration, never written to.
        newest: the source's last images and their labels, once it made some.
    """

    def __init__(self, config: StudentConfig, source: Images[Any], pool: Params | None = None) -> None:
        self._config, self._source, self.pool = config, source, pool or {}

    def start(self, call: Call) -> Sequence[Any]:
        """Returns each draw of the source, followed by a None for each batch of the pool."""
        size, self._call = self._config.pool_size, call
        repeats = self._config.pool_batches if size else 0
        full = len(self.pool.get("images", ())) == size
        self._admitted = math.ceil(self._config.pool_refresh * size / call.iterations) if full else size
        return [shown for draw in self._source.start(call) for shown in (draw, *[None] * repeats)]

    def improve(self, call: Call, draw: Any) -> dict[str, Tensor]:
        """Improves the source on a draw and takes its images into the pool; returns the last metrics."""
        if draw is not None:
            self._metrics = self._source.improve(call, draw)
            self.newest = self._source.make(draw)
            if self._config.pool_size:
                self._take(*self.newest)
        return self._metrics

    def make(self, draw: Any) -> tuple[Float[Tensor, "B D H W"], Int[Tensor, " B"] | None]:
        """Returns the new images, or some of the pool, drawn without replacement and changed at random."""
        if draw is not None:
            return self.newest
        images, rng = self.pool["images"], self._call.rng
        chosen = moved(torch.randperm(len(images), generator=rng)[: self._config.batch_size], images.device)
        batch = augment(images[chosen].to(self.newest[0].dtype), self._config.pool_augment, rng)
        return batch, self.pool["labels"][chosen] if "labels" in self.pool else None

    def _take(self, images: Float[Tensor, "B D H W"], labels: Int[Tensor, " B"] | None) -> None:
        size, number = self._config.pool_size, self._admitted
        new = {"images": images.half()} | ({} if labels is None else {"labels": labels})
        parts = {name: [self.pool.get(name, values[:0]), values[:number]] for name, values in new.items()}
        self.pool = {name: torch.cat(part)[-size:] for name, part in parts.items()}


def pooled(config: StudentConfig, source: Images[Any]) -> PooledImages:
    """Returns the source with the config's pool, or as it is where it is one."""
    return source if isinstance(source, PooledImages) else PooledImages(config, source)
