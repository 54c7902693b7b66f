"""``K`` frozen teachers as one callable from images to logits ``(K, B, C)``."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedftg.errors import InputError
from fedftg.params import Params, stack

Classifier = Callable[[Tensor], Tensor]
ClassifierFunction = Callable[[Params, Params, Tensor], Tensor]
"""``(params, buffers, images) -> logits (B, C)``, in evaluation mode."""


STACKED_UP_TO = 2**30
"""Bytes of all teachers together: beyond, a second copy of them costs more memory than it saves launches."""


class Teachers(ABC):
    """Teachers in evaluation mode: gradients reach the images and never the teachers' weights."""

    @abstractmethod
    def __len__(self) -> int:
        """``K``."""

    @abstractmethod
    def __call__(self, images: Float[Tensor, "B D H W"]) -> Float[Tensor, "K B C"]:
        """Logits ``(K, B, C)``, differentiable with respect to the images."""

    @abstractmethod
    def part(self, start: int, stop: int) -> Teachers:
        """The teachers ``start <= k < stop``; nothing is copied."""


class ListedTeachers(Teachers):
    """Teachers of any architectures, called one after the other.

    Args:
        classifiers: modules or functions from images ``(B, D, H, W)`` to logits ``(B, C)``. A module is put in
            evaluation mode and frozen in a view that shares its values: the module itself stays as it is, and later
            changes in place of its values are seen. A function is called as it is and must evaluate, not train.

    Raises:
        InputError: no teacher.
    """

    def __init__(self, classifiers: Sequence[Classifier]) -> None:
        if not classifiers:
            raise InputError("got no teacher, at least 1 is needed; pass the models to distil from")
        self._classifiers = [_frozen_view(c) if isinstance(c, nn.Module) else c for c in classifiers]

    def __len__(self) -> int:
        """``K``."""
        return len(self._classifiers)

    def __call__(self, images: Float[Tensor, "B D H W"]) -> Float[Tensor, "K B C"]:
        """Logits ``(K, B, C)``.

        Raises:
            InputError: the teachers differ in the shape of their logits.
        """
        logits = [classifier(images) for classifier in self._classifiers]
        for index, other in enumerate(logits):
            if other.shape != logits[0].shape:
                raise InputError(
                    f"all teachers must have the same classes, got logits {tuple(logits[0].shape)} from teacher 0 "
                    f"and {tuple(other.shape)} from teacher {index}"
                )
        return torch.stack(logits)

    def part(self, start: int, stop: int) -> ListedTeachers:
        """The teachers ``start <= k < stop``; nothing is copied."""
        chosen = object.__new__(ListedTeachers)
        chosen._classifiers = self._classifiers[start:stop]
        return chosen


class StackedTeachers(Teachers):
    """Teachers of one architecture, called together by ``torch.func.vmap``.

    Args:
        function: logits ``(B, C)`` from one teacher's parameters, buffers and the images, in evaluation mode and
            without a write to the buffers.
        params: every tensor with a new first dimension of size ``K`` (`fedftg.params.stack`).
        buffers: likewise; may be empty.
    """

    def __init__(self, function: ClassifierFunction, params: Params, buffers: Params) -> None:
        self._function = function
        self._params = {name: tensor.detach() for name, tensor in params.items()}
        self._buffers = {name: tensor.detach() for name, tensor in buffers.items()}

    def __len__(self) -> int:
        """``K``."""
        return next(iter(self._params.values())).shape[0]

    def __call__(self, images: Float[Tensor, "B D H W"]) -> Float[Tensor, "K B C"]:
        """Logits ``(K, B, C)``."""
        logits: Tensor = torch.func.vmap(self._function, in_dims=(0, 0, None))(self._params, self._buffers, images)
        return logits

    def part(self, start: int, stop: int) -> StackedTeachers:
        """The teachers ``start <= k < stop``; nothing is copied."""
        params = {name: tensor[start:stop] for name, tensor in self._params.items()}
        return StackedTeachers(self._function, params, {n: tensor[start:stop] for n, tensor in self._buffers.items()})


def stack_or_list(
    function: ClassifierFunction, params: Sequence[Params], buffers: Sequence[Params], *, stacked: bool | None = None
) -> Teachers:
    """Teachers of one architecture in the form that is faster where their values lie; the numbers agree up to rounding.

    Args:
        function: see `StackedTeachers`.
        params: one per teacher.
        buffers: one per teacher.
        stacked: None chooses: stacked (copies all values) on an accelerator, where many small kernels wait for their
            launch, while the copies are at most 1 GiB; listed beyond that, and on the CPU, where a ``vmap`` over
            convolutions measured twice the time of a loop.

    Raises:
        InputError: no teacher.
    """
    if not params:
        raise InputError("got no teacher, at least 1 is needed; pass the models to distil from")
    if stacked is None:
        size = len(params) * sum(tensor.nbytes for tensor in params[0].values())
        stacked = next(iter(params[0].values())).device.type != "cpu" and size <= STACKED_UP_TO
    if stacked:
        return StackedTeachers(function, stack(params), stack(buffers))
    frozen = [{name: tensor.detach() for name, tensor in one.items()} for one in params]
    return ListedTeachers([partial(function, p, b) for p, b in zip(frozen, buffers, strict=True)])


def _frozen_view(module: nn.Module) -> nn.Module:
    """The same module with its own modes and flags, evaluating, without weight gradients; values are shared."""
    # deepcopy takes what the memo already holds for an object instead of copying it.
    memo: dict[int, Any] = {id(buffer): buffer for buffer in module.buffers()}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    return copy.deepcopy(module, memo).eval()
