"""A pool of the last images of a source, from which the student's batches are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedftg.augment import augment, moved
from fedftg.distill.config import DistillConfig
from fedftg.distill.images import Call, Images
from fedftg.params import Params

Row = dict[str, Tensor]
"""The metrics of one iteration of the source."""


class PooledImages:
    """Lets a source finish its iterations, takes images of all its draws into a pool, and shows batches of that.

    While the pool is not full, images are added; then a call replaces the oldest ``pool_refresh`` of it.

    Attributes:
        pool: ``images``, in half precision, and ``labels`` where they are known: all that the next call needs besides
            the source's own memory. Replaced in each call, never written to.
    """

    def __init__(self, config: DistillConfig, source: Images[Any], pool: Params | None = None) -> None:
        self._config, self._source, self.pool = config, source, pool or {}

    def start(self, call: Call) -> Sequence[Row]:
        """Improves the source on each of its draws, and renews the pool; returns the rows of the metrics."""
        config, self._call = self._config, call
        draws = self._source.start(call)
        rows = [self._source.improve(call, draw) for draw in draws]
        made = [self._source.make(draw) for draw in draws]
        new = {"images": torch.cat([images.half() for images, _ in made])}
        if made[0][1] is not None:
            new["labels"] = torch.cat([labels for _, labels in made if labels is not None])
        held = len(self.pool.get("images", ()))
        number = max(config.pool_size - held, round(config.pool_refresh * config.pool_size))
        parts = {name: [self.pool.get(name, values[:0]), values[:number]] for name, values in new.items()}
        self.pool = {name: torch.cat(part)[-config.pool_size :] for name, part in parts.items()}
        return [row for row in rows for _ in range(config.pool_batches)]

    def improve(self, call: Call, draw: Row) -> Row:  # noqa: ARG002
        """Returns the source's metrics."""
        return draw

    def make(self, draw: Row) -> tuple[Float[Tensor, "B D H W"], Int[Tensor, " B"] | None]:  # noqa: ARG002
        """Returns a batch of the pool, drawn without replacement and changed at random, and its labels."""
        images, rng = self.pool["images"], self._call.rng
        chosen = moved(torch.randperm(len(images), generator=rng)[: self._config.batch_size], images.device)
        batch = images[chosen].to(next(self._call.student.parameters()).dtype)
        labels = self.pool["labels"][chosen] if "labels" in self.pool else None
        return augment(batch, self._config.pool_augment, rng), labels
