"""Models by name, or any ``nn.Module`` by dotted path."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from fedftg.errors import InputError, first_line, unknown
from fedftg.registry import Registry, import_user_module

if TYPE_CHECKING:
    from torch import nn

    Factory = Callable[..., nn.Module]

MODELS: Registry[Factory] = Registry(
    "model",
    {
        "lenet": "fedftg.models.small:lenet",
        "lenet_gn": "fedftg.models.small:lenet_gn",
        "lenet_bn": "fedftg.models.small:lenet_bn",
        "cnn": "fedftg.models.small:CNN",
        "convnet": "fedftg.models.small:ConvNet",
        "resnet18": "fedftg.models.resnet:resnet18",
        "resnet18_gn": "fedftg.models.resnet:resnet18_gn",
        "resnet18_cifar": "fedftg.models.resnet:resnet18_cifar",
    },
)
"""Called as ``factory(num_classes=..., image_shape=..., **args)``; the first line of each docstring describes it."""


class ModelConfig(BaseModel):
    """Which classifier is trained."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(
        default="cnn",
        description="a registered model, or a dotted path such as my_package.my_module.MyModel; called with "
        "num_classes and image_shape where it takes them",
    )
    args: dict[str, Any] = Field(default={}, description="further keyword arguments of the model")
    clients: tuple[str, ...] = Field(
        default=(),
        description="models of the clients: client k has the k-th, over and over; () is the server's, model.name. "
        "Others cannot be averaged: needs rounds = 1, fedavg, and a refiner with start = fresh",
    )


def build(config: ModelConfig, num_classes: int, image_shape: tuple[int, int, int], seed: int) -> nn.Module:
    """Returns a new classifier from images ``(B, D, H, W)`` to logits ``(B, C)``, on the CPU and in training mode.

    Its initial values depend on ``seed`` alone. They are drawn from torch's global random state, which is restored.

    Raises:
        InputError: unknown name, a path that cannot be imported, arguments that the model does not take, or a model
            that does not turn 2 images into ``(2, num_classes)``.
    """
    import torch

    factory = _factory(config.name)
    arguments = _arguments(config, factory, {"num_classes": num_classes, "image_shape": image_shape})
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        # The CPU generator alone: torch.manual_seed would also reset the accelerators' and leave them so.
        torch.default_generator.manual_seed(seed)
        try:
            model = factory(**arguments)
            if not isinstance(model, torch.nn.Module):
                raise TypeError(f"it is a {type(model).__name__}, not a torch.nn.Module")
            _check(model, config.name, num_classes, image_shape)
            return model.train()
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"model {config.name!r} with args {config.args} fails on images {image_shape}: {first_line(error)}"
            ) from error


def _check(model: nn.Module, name: str, num_classes: int, image_shape: tuple[int, int, int]) -> None:
    """Raises InputError for a model that cannot be trained here; calls copies, so that statistics stay as they are."""
    import torch
    from torch import nn
    from torch.nn.parameter import is_lazy

    from fedftg.params import copied, first_non_finite

    wrapped = isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel | torch.jit.ScriptModule)
    if wrapped or hasattr(model, "_orig_mod"):  # of torch.compile
        raise InputError(f"model {name!r} is a {type(model).__name__}; give the plain nn.Module")
    if any(map(is_lazy, model.parameters())):
        model.eval()(torch.zeros(2, *image_shape))  # gives lazy layers their shapes
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if bad := next((key for key, tensor in tensors.items() if tensor.is_complex()), None):
        raise InputError(f"model {name!r} has complex values in {bad}, which cannot be averaged; use two real tensors")
    if bad := first_non_finite(tensors):
        raise InputError(f"model {name!r} has values in {bad} that are not finite; a mask may be boolean or -1e9")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(f"model {name!r} has no parameter that requires a gradient; leave some unfrozen")
    for mode in ("evaluation", "training"):
        with torch.no_grad():
            output = copied(model).train(mode == "training")(torch.zeros(2, *image_shape))
        shape = tuple(output.shape) if isinstance(output, torch.Tensor) else f"a {type(output).__name__}"
        if shape != (2, num_classes):
            raise InputError(f"model {name!r} gives {shape} in {mode} mode; it must give logits {(2, num_classes)}")


def _factory(name: str) -> Factory:
    if name in MODELS:
        return MODELS[name]
    path, _, attribute = name.replace(":", ".").rpartition(".")
    if not path or not attribute:
        raise unknown("model", name, MODELS)
    try:
        factory: Factory = getattr(import_user_module(path), attribute)
        inspect.signature(factory)  # fails where it cannot be called
    except Exception as error:
        raise InputError(
            f"model {name!r} cannot be imported ({first_line(error)}); check the spelling, or start in its folder"
        ) from error
    return factory


def _arguments(config: ModelConfig, factory: Factory, offered: dict[str, Any]) -> dict[str, Any]:
    """Returns the offered arguments that the factory takes by name, and the user's."""
    parameters = inspect.signature(factory).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    names = [name for name, parameter in parameters.items() if parameter.kind is not parameter.VAR_KEYWORD]
    if wrong := [name for name in config.args if name not in names and not takes_any]:
        own = ", ".join(name for name in names if name not in offered)
        raise InputError(f"model {config.name!r} takes no {wrong[0]!r}; allowed in model.args: {own or 'none'}")
    return {name: value for name, value in offered.items() if name in names or takes_any} | config.args
