"""Models by name, or any ``nn.Module`` by dotted path."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from fedftg.errors import InputError, unknown
from fedftg.models import resnet, small

Factory = Callable[..., nn.Module]

MODELS: dict[str, Factory] = {
    "lenet": small.lenet,
    "lenet_gn": small.lenet_gn,
    "lenet_bn": small.lenet_bn,
    "cnn": small.cnn,
    "convnet": small.convnet,
    "resnet18": resnet.resnet18,
    "resnet18_gn": resnet.resnet18_gn,
    "resnet18_cifar": resnet.resnet18_cifar,
}
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


def build(
    config: ModelConfig, num_classes: int, image_shape: tuple[int, int, int], rng: torch.Generator | int
) -> nn.Module:
    """A new classifier from images ``(B, D, H, W)`` to logits ``(B, C)``, on the CPU and in training mode.

    Its initial values depend on ``rng`` alone (a seed, or a generator that one seed is drawn from). torch's global
    random state is used, for the layers take no other, and is put back.

    Raises:
        InputError: unknown name, a path that cannot be imported, arguments that the model does not take, or a model
            that does not turn 2 images into ``(2, num_classes)``.
    """
    factory = _factory(config.name)
    arguments = _arguments(config, factory, {"num_classes": num_classes, "image_shape": image_shape})
    seed = rng if isinstance(rng, int) else int(torch.randint(0, 2**63 - 1, (), generator=rng))
    with torch.random.fork_rng(devices=[]):
        # The CPU generator alone: torch.manual_seed would also reset the accelerators' and leave them so.
        torch.default_generator.manual_seed(seed)
        try:
            model = factory(**arguments)
        except Exception as error:
            raise InputError(f"model {config.name!r} cannot be built with {config.args}: {_one_line(error)}") from error
        if not isinstance(model, nn.Module):
            raise InputError(
                f"model {config.name!r} gave a {type(model).__name__}; it must be a class or a function that gives "
                "a torch.nn.Module"
            )
        _check(model, config.name, num_classes, image_shape)
    return model.train()


def _factory(name: str) -> Factory:
    if name in MODELS:
        return MODELS[name]
    if "." not in name and ":" not in name:
        raise unknown("model", name, MODELS)
    path, separator, attribute = name.partition(":") if ":" in name else name.rpartition(".")
    if not path or not attribute or not separator:
        raise InputError(f"model {name!r} is no dotted path; write package.module.Class or package.module:Class")
    try:
        module = _import(path)
    except ImportError as error:
        raise InputError(
            f"model {name!r}: cannot import {path!r} ({_one_line(error)}); install it, or start in the folder it is in"
        ) from error
    except Exception as error:
        raise InputError(f"model {name!r}: importing {path!r} failed: {_one_line(error)}") from error
    if not hasattr(module, attribute):
        raise InputError(f"model {name!r}: module {path!r} has no {attribute!r}; check the spelling")
    factory = getattr(module, attribute)
    if not callable(factory):
        raise InputError(f"model {name!r} is a {type(factory).__name__}; give a class or function that makes a model")
    result: Factory = factory
    return result


def _import(path: str) -> Any:
    """The module; also one in the current folder, which an installed command does not have on its path."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name != path.split(".")[0] or os.getcwd() in sys.path:
            raise
    sys.path.append(os.getcwd())
    importlib.invalidate_caches()
    return importlib.import_module(path)


def _arguments(config: ModelConfig, factory: Factory, offered: dict[str, Any]) -> dict[str, Any]:
    """The offered arguments that the factory takes by name, and the user's."""
    try:
        parameters = inspect.signature(factory).parameters
    except ValueError:  # some callables in C tell no signature; they get the user's arguments only
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


def _check(model: nn.Module, name: str, num_classes: int, image_shape: tuple[int, int, int]) -> None:
    """Evaluation mode, so that the check leaves BatchNorm statistics alone."""
    model.eval()
    try:
        with torch.no_grad():
            output = model(torch.zeros(2, *image_shape))
    except Exception as error:
        raise InputError(f"model {name!r} fails on images of shape {image_shape}: {_one_line(error)}") from error
    shape = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
    if shape != (2, num_classes):
        raise InputError(
            f"model {name!r} turns 2 images of shape {image_shape} into {shape}; it must give logits of shape "
            f"(2, {num_classes})"
        )


def _one_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(": ")
