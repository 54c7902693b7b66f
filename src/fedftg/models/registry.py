"""Models by name, or any ``nn.Module`` by dotted path."""

from __future__ import annotations

import copy
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
        "cnn": "fedftg.models.small:cnn",
        "convnet": "fedftg.models.small:convnet",
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


def build(config: ModelConfig, num_classes: int, image_shape: tuple[int, int, int], seed: int) -> nn.Module:
    """Returns a new classifier from images ``(B, D, H, W)`` to logits ``(B, C)``, on the CPU and in training mode.

    Its initial values depend on ``seed`` alone. They are drawn from torch's global random state, which is restored.

    Raises:
        InputError: unknown name, a path that cannot be imported, arguments that the model does not take, or a model
            that does not turn 2 images into ``(2, num_classes)``.
    """
    import torch
    from torch import nn

    factory = _factory(config.name)
    arguments = _arguments(config, factory, {"num_classes": num_classes, "image_shape": image_shape})
    with torch.random.fork_rng(devices=[]):
        # The CPU generator alone: torch.manual_seed would also reset the accelerators' and leave them so.
        torch.default_generator.manual_seed(seed)
        try:
            model = factory(**arguments)
        except Exception as error:
            raise InputError(
                f"model {config.name!r} cannot be built with {config.args}: {first_line(error)}"
            ) from error
        if not isinstance(model, nn.Module):
            raise InputError(
                f"model {config.name!r} gave a {type(model).__name__}; it must be a class or a function that gives "
                "a torch.nn.Module"
            )
        _check(model, config.name, num_classes, image_shape)
    return model.train()


def _check(model: nn.Module, name: str, num_classes: int, image_shape: tuple[int, int, int]) -> None:
    """Raises InputError for a model that cannot be trained here; works on a copy, which leaves statistics alone."""
    import torch
    from torch import nn

    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel | torch.jit.ScriptModule):
        raise InputError(
            f"model {name!r} is a {type(model).__name__}, which cannot be called with a client's values; give the "
            "plain nn.Module"
        )
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if bad := next((key for key, tensor in tensors.items() if tensor.is_complex()), None):
        raise InputError(f"model {name!r} has complex values in {bad}, which cannot be averaged; use two real tensors")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(f"model {name!r} has no parameter that requires a gradient; leave some unfrozen")
    for mode in ("evaluation", "training"):
        try:
            with torch.no_grad():
                output = copy.deepcopy(model).train(mode == "training")(torch.zeros(2, *image_shape))
        except Exception as error:
            raise InputError(f"model {name!r} fails on images of shape {image_shape}: {first_line(error)}") from error
        shape = tuple(output.shape) if isinstance(output, torch.Tensor) else f"a {type(output).__name__}"
        if shape != (2, num_classes):
            raise InputError(
                f"model {name!r} turns 2 images of shape {image_shape} into {shape} in {mode} mode; it must give "
                f"logits of shape (2, {num_classes})"
            )


def _factory(name: str) -> Factory:
    if name in MODELS:
        return MODELS[name]
    if "." not in name and ":" not in name:
        raise unknown("model", name, MODELS)
    path, _, attribute = name.partition(":") if ":" in name else name.rpartition(".")
    if not path or not attribute:
        raise InputError(f"model {name!r} is no dotted path; write package.module.Class or package.module:Class")
    try:
        module = import_user_module(path)
    except Exception as error:
        raise InputError(
            f"model {name!r}: cannot import {path!r} ({first_line(error)}); install it, or start in the folder it is in"
        ) from error
    factory: Factory | None = getattr(module, attribute, None)
    if not callable(factory):
        raise InputError(f"model {name!r}: module {path!r} has no class or function {attribute!r}; check the spelling")
    return factory


def _arguments(config: ModelConfig, factory: Factory, offered: dict[str, Any]) -> dict[str, Any]:
    """Returns the offered arguments that the factory takes by name, and the user's."""
    try:
        parameters = inspect.signature(factory).parameters
    except ValueError:  # some callables in C have no signature; they get the user's arguments only
        return dict(config.args)
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = [name for name, parameter in parameters.items() if parameter.kind in by_name]
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    for name in config.args:
        if name not in names and not takes_any:
            own = [known for known in names if known not in offered]
            raise InputError(
                f"model {config.name!r} takes no argument {name!r}; allowed in model.args: {', '.join(own) or 'none'}"
            )
    return {name: value for name, value in offered.items() if name in names or takes_any} | config.args
