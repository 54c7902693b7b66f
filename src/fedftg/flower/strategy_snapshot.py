"""Where a strategy of someone else's stands, taken down before a round and put back where the round goes wrong."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import Strategy
from torch import Tensor, nn
from torch.optim import Optimizer

_RENEWED = ("current_arrays",)
"""What strategies are given anew in each round."""


def snapshot(strategies: Iterable[Strategy]) -> Callable[[], None]:
    """The function that brings strategies back to where they stand now; it may be called more than once.

    All attributes are put back, and in place what is in them: NumPy arrays, tensors, modules, optimisers, random
    generators, dicts, lists, sets, deques and further strategies, also within each other. What objects of other
    classes hold is not.
    """
    undos: list[Callable[[], Any]] = []
    seen: dict[int, Any] = {}
    for strategy in strategies:
        _watch(strategy, undos, seen)

    def undo() -> None:
        for one in undos:
            one()

    return undo


def _watch(value: Any, undos: list[Callable[[], Any]], seen: dict[int, Any]) -> None:
    if id(value) in seen:
        return
    inner: list[Any] = []
    undo: Callable[[], Any] | None = None
    if isinstance(value, Strategy):
        undo = _of_mapping(vars(value))
        inner = [item for name, item in vars(value).items() if name not in _RENEWED]
    elif isinstance(value, dict | ArrayRecord):
        undo, inner = _of_mapping(value), list(value.values())
    elif isinstance(value, list | set | deque | tuple):
        undo, inner = _of_items(value), list(value)
    elif isinstance(value, nn.Module):
        inner = [*value.parameters(), *value.buffers()]
    elif isinstance(value, Optimizer):
        inner = [value.state]
    else:
        undo = _of_numbers(value)
    if undo is None and not inner:
        return
    seen[id(value)] = value
    if undo is not None:
        undos.append(undo)
    for item in inner:
        _watch(item, undos, seen)


def _of_mapping(value: Any) -> Callable[[], Any]:
    kept = dict(value.items())

    def undo() -> None:
        value.clear()
        value.update(kept)

    return undo


def _of_items(value: Any) -> Callable[[], Any] | None:
    kept = list(value)

    def undo() -> None:
        value.clear()
        (value.update if isinstance(value, set) else value.extend)(kept)

    return None if isinstance(value, tuple) else undo


def _of_numbers(value: Any) -> Callable[[], Any] | None:
    if isinstance(value, np.ndarray) and value.flags.writeable:
        array = value.copy()
        return lambda: np.copyto(value, array)
    if isinstance(value, Tensor):
        tensor = value.detach().clone()
        return lambda: value.detach().copy_(tensor)
    if isinstance(value, np.random.Generator):
        numpy_state = value.bit_generator.state
        return lambda: setattr(value.bit_generator, "state", numpy_state)
    if isinstance(value, torch.Generator):
        torch_state = value.get_state()
        return lambda: value.set_state(torch_state)
    return None
