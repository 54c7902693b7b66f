"""Arithmetic on model parameters held as ``dict[str, Tensor]``: new tensors, with the keys of the first argument.

Integer tensors (BatchNorm's ``num_batches_tracked``) take part in `weighted_mean`, rounded back to their type.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Params = dict[str, Tensor]


def clone(params: Params) -> Params:
    """Returns detached copies that share no memory with the original."""
    return {name: tensor.detach().clone() for name, tensor in params.items()}


class _Detaching(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kept = func is Tensor.__deepcopy__ and args[0].grad_fn is not None
        return args[0].detach() if kept else func(*args, **(kwargs or {}))


def copied(module: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Returns a deep copy; results that a module keeps with their graph, such as features, are detached in it."""
    with _Detaching():
        return copy.deepcopy(module, memo)


def zeros_like(params: Params) -> Params:
    """Returns zeros of the same names, shapes, types and devices."""
    return {name: torch.zeros_like(tensor) for name, tensor in params.items()}


def add(left: Params, right: Params, *, scale: float = 1.0) -> Params:
    """Returns ``left + scale * right``, tensor by tensor."""
    return {name: tensor + scale * right[name] for name, tensor in left.items()}


def sub(left: Params, right: Params) -> Params:
    """Returns ``left - right``, tensor by tensor."""
    return {name: tensor - right[name] for name, tensor in left.items()}


def weighted_mean(trees: Sequence[Params], weights: Sequence[float]) -> Params:
    """Returns ``sum_i weights_i * trees_i / sum_i weights_i``, summed in the order given and in float64.

    float64 makes the mean of equal trees equal to them, bit for bit, and keeps the sum of many clients exact to the
    last float32 digit. Trees of weight 0 are skipped, so their values may even be non-finite.

    Raises:
        ValueError: no tree, a negative weight, or weights that sum to 0.
    """
    if any(weight < 0 for weight in weights) or not sum(weights) > 0:
        raise ValueError(f"weights must be >= 0 with a sum > 0, got {list(weights)}")
    total = float(sum(weights))
    used = [(tree, weight / total) for tree, weight in zip(trees, weights, strict=True) if weight > 0]
    mean: Params = {}
    for name, like in used[0][0].items():
        value = torch.zeros_like(like, dtype=torch.float64)
        pieces = _pieces(value, *(tree[name] for tree, _ in used))
        for target, *sources in pieces:
            change = torch.empty_like(target)
            for source, (_, weight) in zip(sources, used, strict=True):
                target.add_(change.copy_(source).mul_(weight))
        mean[name] = value.to(like.dtype) if like.is_floating_point() else value.round().to(like.dtype)
    return mean


def add_changes(total: Params, changes: Sequence[tuple[float, Params, Params]]) -> Params:
    """Returns ``total + sum_i weight_i (after_i - before_i)``, summed in the order given and in float64.

    Args:
        total: float64 tensors.
        changes: ``(weight, after, before)``, trees of the same names.
    """
    result: Params = {}
    for name, start in total.items():
        value = start.clone()
        sides = [_number(side[name]) for _, after, before in changes for side in (after, before)]
        for target, *sources in _pieces(value, *sides):
            change = torch.empty_like(target)
            for index, (weight, _, _) in enumerate(changes):
                target.add_(change.copy_(sources[2 * index]).sub_(sources[2 * index + 1]).mul_(weight))
        result[name] = value
    return result


def _number(tensor: Tensor) -> Tensor:
    """Returns a tensor that can be subtracted: booleans as 0 and 1."""
    return tensor.byte() if tensor.dtype == torch.bool else tensor


def _pieces(*tensors: Tensor) -> Iterator[Sequence[Tensor]]:
    """Returns views of short stretches of all tensors together: sums over many trees stay in a CPU's cache."""
    if any(tensor.device.type != "cpu" or not tensor.is_contiguous() for tensor in tensors):
        return iter([tensors])
    # As many elements as torch gives to one thread of an elementwise operation.
    size = 32768 * torch.get_num_threads()
    return zip(*(torch.split(tensor.view(-1), size) for tensor in tensors), strict=True)


def stack(trees: Sequence[Params]) -> Params:
    """Returns one tree whose tensors have a new first dimension of size ``len(trees)``."""
    return {name: torch.stack([tree[name] for tree in trees]) for name in trees[0]}


def to_device(params: Params, device: torch.device | str) -> Params:
    """Returns the same values on ``device``; tensors already there are not copied."""
    return {name: tensor.to(device) for name, tensor in params.items()}


def first_non_finite(params: Params) -> str | None:
    """Returns the name of the first tensor that holds a NaN or an infinity, or None if all are finite."""
    tensors = {name: tensor for name, tensor in params.items() if isinstance(tensor, Tensor)}  # extra state may be none
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel()}
    finite: dict[str, bool] = {}
    for device in {tensor.device for tensor in floats.values()}:  # one wait for each
        there = {name: tensor for name, tensor in floats.items() if tensor.device == device}
        # The extremes of a tensor are finite if and only if all of it is; `isfinite` takes nine times as long on a CPU.
        extremes = [torch.stack(torch.aminmax(tensor.detach())).double() for tensor in there.values()]
        finite |= zip(there, torch.stack(extremes).isfinite().all(dim=1).tolist(), strict=True)
    return next((name for name in floats if not finite[name]), None)


def norm(params: Params) -> float:
    """Returns the Euclidean norm over all floating-point tensors together, in float64."""
    squares = [tensor.double().square().sum() for tensor in params.values() if tensor.is_floating_point()]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


def prefixed(params: Params, prefix: str) -> Params:
    """Returns the same tensors under ``prefix + name``."""
    return {prefix + name: tensor for name, tensor in params.items()}


def unprefixed(params: Params, prefix: str) -> Params:
    """Returns the tensors whose names start with ``prefix``, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in params.items() if name.startswith(prefix)}
