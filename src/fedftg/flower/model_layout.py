"""Which array of a Flower deployment is which parameter or buffer of the model, and of which type it travels."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from flwr.app import ArrayRecord
from torch import Tensor, nn

from fedftg.errors import InputError
from fedftg.flower.records import decode, encode
from fedftg.models.functional import FunctionalModel
from fedftg.params import Params

_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}


class TrainableModel(FunctionalModel):
    """A classifier in float32 whose parameters that were frozen stay so in every copy that is made of it.

    Args:
        module: as of `FunctionalModel`; it is copied.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(copy.deepcopy(module).float())
        self._frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]

    def module(self, params: Params, buffers: Params) -> nn.Module:
        """A new module, in evaluation mode, that holds copies of these values and trains what the given one trains."""
        module = super().module(params, buffers)
        for name in self._frozen:
            module.get_parameter(name).requires_grad_(False)
        return module


class ModelLayout:
    """The arrays of a deployment beside a model's ``state_dict``.

    Names are those of the ``state_dict``, or "0", "1", ... in its order, as ``ArrayRecord`` calls what it is given as
    a list. The types that the first arrays came in are kept: Flower's strategies turn integers into float64, and some
    of them float32 too.

    Args:
        module: the classifier.
        arrays: a record of its values, such as the initial ones.

    Raises:
        InputError: names, shapes or types that are not the model's.
    """

    def __init__(self, module: nn.Module, arrays: ArrayRecord) -> None:
        state: dict[str, Tensor] = dict(module.state_dict())
        keys = list(arrays)
        by_number = bool(keys) and "0" not in state and keys == [str(number) for number in range(len(keys))]
        names = list(state) if by_number else [key for key in keys if key in state]
        if len(names) != len(keys) or len(keys) != len(state):
            raise InputError(_misfit(keys, list(state)))
        self.template: Params = {}
        """Per array, in the order in which they came: its shape and type, without values."""
        self._names = dict(zip(keys, names, strict=True))
        for key, name in self._names.items():
            array, shape = arrays[key], tuple(state[name].shape)
            if array.dtype not in _DTYPES or tuple(array.shape) != shape:
                raise InputError(
                    f"array {key!r} must be {shape} of one of {', '.join(_DTYPES)}, as the model's {name!r} is, got "
                    f"{array.dtype} {tuple(array.shape)}; pass the model that the deployment trains"
                )
            self.template[key] = torch.empty(shape, dtype=_DTYPES[array.dtype], device="meta")
        own = dict(module.named_parameters()), dict(module.named_buffers())
        self._params, self._buffers = (list(values) for values in own)
        # A weight that two layers share has two names in a state_dict and one among the parameters.
        shared = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
        firsts = {id(tensor): name for values in own for name, tensor in values.items()}
        self._first_name = {name: firsts[id(tensor)] for name, tensor in shared}
        self._constant = {name: own[1][name].detach().clone() for name in self._buffers if name not in state}

    def split(self, tensors: Params) -> tuple[Params, Params]:
        """Parameters and buffers, under the model's names and in its order, of tensors under the arrays' names.

        Floating-point tensors become float32. Buffers that do not travel (``persistent=False``) are the module's own.
        """
        named = {self._first_name[name]: _single(tensors[key]) for key, name in self._names.items()}
        buffers = {**{name: tensor.clone() for name, tensor in self._constant.items()}, **named}
        return {name: named[name] for name in self._params}, {name: buffers[name] for name in self._buffers}

    def join(self, params: Params, buffers: Params) -> Params:
        """The inverse of `split`: tensors under the arrays' names, in their order and types."""
        values = {**params, **buffers}
        return self.cast({key: values[self._first_name[name]] for key, name in self._names.items()})

    def cast(self, tensors: Params) -> Params:
        """The same values in the types that the arrays travel in, integers rounded, on the CPU."""
        result: Params = {}
        for key, like in self.template.items():
            tensor = tensors[key].detach().cpu()
            whole = tensor.is_floating_point() and not like.is_floating_point()
            result[key] = (tensor.round() if whole else tensor).to(like.dtype)
        return result

    def decode(self, record: ArrayRecord) -> Params:
        """The values of a client's record, checked before they are read.

        Raises:
            fedftg.flower.records.RecordError: other names, shapes or types, a damaged array, NaN or an infinity.
        """
        return decode(record, self.template, finite=True)

    def encode(self, tensors: Params) -> ArrayRecord:
        """A record of tensors under the arrays' names."""
        return encode(self.cast(tensors))

    def accept(self, record: ArrayRecord) -> Params:
        """The values of an aggregate, whatever type a strategy has given them, in the types that travel.

        Raises:
            InputError: the strategy returned other names or shapes than it was given.
        """
        wrong = [key for key in self.template if key not in record] or [key for key in record if key not in self._names]
        wrong = wrong or [key for key in self.template if record[key].shape != tuple(self.template[key].shape)]
        if wrong:
            raise InputError(
                f"the base strategy returned other arrays than it was given, at {wrong[0]!r}; FedFTG needs the names "
                "and shapes of the model"
            )
        return self.cast({key: torch.from_numpy(record[key].numpy().copy()) for key in self.template})


def num_classes(model: FunctionalModel, image_shape: tuple[int, int, int], device: torch.device) -> int:
    """``C``, by two black images ``(D, H, W)`` on the device that the model is on.

    Raises:
        InputError: the model does not take them, or does not give logits ``(2, C)`` with at least two classes.
    """
    try:
        with torch.no_grad():
            logits = model(*model.init(), torch.zeros(2, *image_shape, device=device), train=False)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"the model does not take images of shape {image_shape}: {reason}; pass its image_shape"
        ) from error
    if logits.ndim != 2 or len(logits) != 2 or logits.shape[1] < 2:
        raise InputError(f"the model must give logits (2, classes) for 2 images, got {tuple(logits.shape)}")
    return int(logits.shape[1])


def _single(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _misfit(keys: list[str], names: Iterable[str]) -> str:
    names = list(names)
    missing = [name for name in names if name not in keys]
    unknown = [key for key in keys if key not in names]
    parts = [f"{word} {found[0]!r}" for word, found in (("lack", missing), ("have unknown", unknown)) if found]
    return (
        f"the deployment's {len(keys)} arrays {' and '.join(parts) or 'differ'}; they must be the {len(names)} of the "
        "model's state_dict(), by name or in its order"
    )
