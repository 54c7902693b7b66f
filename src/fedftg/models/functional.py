"""A module as a function of its parameters and buffers."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import is_lazy

from fedftg.errors import InputError
from fedftg.params import Params, clone, copied
from fedftg.precision import MemoryFormat, Precision, computed

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


class FunctionalModel:
    """Calls an image classifier with values for its parameters and buffers that are given at each call.

    Nothing is kept between calls but the structure, so one object serves all clients, the server and ``torch.func``
    transforms. In training mode BatchNorm updates the running statistics *in the buffers that were passed in*.

    Args:
        module: any classifier from images ``(B, D, H, W)`` to logits ``(B, C)``; its values are copied, not used.
    """

    def __init__(self, module: nn.Module) -> None:
        if any(map(is_lazy, module.parameters())):
            raise InputError("the model has lazy layers without a shape; call it once on a batch of images first")
        self._training = copied(module).train().requires_grad_(False)
        self._evaluating = copied(module).eval().requires_grad_(False)
        self._trainable = {name for name, value in module.named_parameters() if value.requires_grad}
        self.has_batchnorm = any(isinstance(layer, _BATCH_NORMS) for layer in module.modules())
        self.has_dropout = any(map(_drops, module.modules()))

    def init(self) -> tuple[Params, Params]:
        """Returns fresh copies of the parameters and the buffers that the module was given with.

        Frozen parameters (``requires_grad=False``) are among the buffers: nothing trains them.
        """
        return values(self._evaluating, self._trainable)

    def __call__(self, params: Params, buffers: Params, images: Tensor, *, train: bool) -> Tensor:
        """Returns logits ``(B, C)`` of images ``(B, D, H, W)``."""
        logits: Tensor = functional_call(self._training if train else self._evaluating, (params, buffers), (images,))
        return logits

    def with_features(self, params: Params, buffers: Params, images: Tensor, *, train: bool) -> tuple[Tensor, Tensor]:
        """Returns logits ``(B, C)`` and the representation ``(B, F)``: what enters the last registered ``nn.Linear``.

        Raises:
            InputError: the model has no ``nn.Linear`` layer.
        """
        module = self._training if train else self._evaluating
        linears = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
        if not linears:
            raise InputError(f"moon needs a model that ends with nn.Linear, {type(module).__name__} has none")
        seen: list[Tensor] = []

        def keep_input(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            seen.append(inputs[0])

        with linears[-1].register_forward_pre_hook(keep_input):
            logits = self(params, buffers, images, train=train)
        if not seen:
            raise InputError(f"{type(module).__name__} does not use its last nn.Linear; register the classifier last")
        return logits, seen[-1].to(logits.dtype)

    def module(self, params: Params, buffers: Params) -> nn.Module:
        """Returns a new module, in evaluation mode, with copies of these values; frozen ones stay frozen."""
        module = copied(self._evaluating)
        module.load_state_dict({**params, **buffers}, strict=False)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in self._trainable)
        return module


class ComputedModel(FunctionalModel):
    """A model in another precision and memory layout; all else is the model's."""

    def __init__(self, model: FunctionalModel, precision: Precision, memory_format: MemoryFormat) -> None:
        vars(self).update(vars(model))
        self._precision, self._memory_format = precision, memory_format

    def __call__(self, params: Params, buffers: Params, images: Tensor, *, train: bool) -> Tensor:
        """Returns logits ``(B, C)``, in the type of the images, of images ``(B, D, H, W)``."""
        call = partial(super().__call__, params, buffers, train=train)
        return computed(call, images, self._precision, self._memory_format)


class AdjustedModel(ComputedModel):
    """A model whose logits in training mode are ``scale * logits + shift``, both ``(C,)``; all else is the model's."""

    def __init__(self, model: ComputedModel, scale: Tensor, shift: Tensor) -> None:
        vars(self).update(vars(model))
        self._scale, self._shift = scale, shift

    def __call__(self, params: Params, buffers: Params, images: Tensor, *, train: bool) -> Tensor:
        """Returns logits ``(B, C)`` of images ``(B, D, H, W)``."""
        logits = super().__call__(params, buffers, images, train=train)
        return self._scale * logits + self._shift if train else logits


def values(module: nn.Module, trainable: Collection[str] | None = None) -> tuple[Params, Params]:
    """Returns copies of a module's parameters and of its buffers, frozen parameters among the latter.

    Args:
        trainable: names of the parameters that are not frozen; None: those that require a gradient.
    """
    named = dict(module.named_parameters())
    free = [name for name in named if (named[name].requires_grad if trainable is None else name in trainable)]
    frozen = {name: tensor for name, tensor in named.items() if name not in free}
    return clone({name: named[name] for name in free}), clone({**dict(module.named_buffers()), **frozen})


def _drops(layer: nn.Module) -> bool:
    """Whether a layer drops at random in training mode; attention and recurrent layers have a rate of their own."""
    rate = layer.p if isinstance(layer, _DROPOUTS) else getattr(layer, "dropout", 0.0)
    return isinstance(rate, int | float) and rate > 0
