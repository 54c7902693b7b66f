"""Gradient descent on a weighted sum of losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def descend(
    optimizer: torch.optim.Optimizer, steps: int, weights: Mapping[str, float], terms: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Takes steps down ``sum weights[name] * terms()[name]``; returns the mean of each term over the steps."""
    rows: list[Tensor] = []
    for _ in range(steps):
        found = terms()
        rows.append(torch.stack(list(found.values())).detach())
        # A term of weight 0 is left out, so that it cannot turn the others into NaN.
        loss = torch.stack([weights[name] * value for name, value in found.items() if weights[name]]).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return dict(zip(found, torch.stack(rows).mean(dim=0), strict=True))
