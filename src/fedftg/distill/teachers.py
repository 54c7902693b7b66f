"""``K`` frozen teachers as one callable from images to logits ``(K, B, C)``, and their weighted ensemble."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_forward_pre_hook

from fedftg.distill import losses
from fedftg.distill.config import StudentConfig
from fedftg.distill.labels import class_probabilities, ensemble_weights, label_log_prior
from fedftg.params import Params, copied, stack
from fedftg.precision import computed

Classifier = Callable[[Tensor], Tensor]
ClassifierFunction = Callable[[Params, Params, Tensor], Tensor]
"""``(params, buffers, images) -> logits (B, C)``, in evaluation mode."""

STACKED_UP_TO = 2**30  # bytes of all teachers together
MOST_AT_ONCE = 32  # teachers whose graphs are in memory at a time where ``teacher_chunk`` is 0

Measure = Callable[[list[Tensor], nn.Module, tuple[Any, ...], Tensor], None]
"""Called before each layer as ``(terms, layer, inputs, weights (B,))``; changes the scalars that are then added up."""


@runtime_checkable  # the tests check types at run time
class Teachers(Protocol):
    """Teachers in evaluation mode: gradients reach the images and never the teachers' weights."""

    def __len__(self) -> int:
        """Returns ``K``."""

    def __call__(self, images: Float[Tensor, "B D H W"], start: int, stop: int) -> Float[Tensor, "K B C"]:
        """Returns logits of the teachers ``start <= k < stop``, differentiable in the images."""

    def measured(
        self, measure: Measure, images: Float[Tensor, "B D H W"], weights: Float[Tensor, "K B"], start: int, stop: int
    ) -> tuple[Float[Tensor, "K B C"], Float[Tensor, " K"]]:
        """Returns the logits, and the sum of the scalars that ``measure`` takes of each teacher's layers."""


class ListedTeachers:
    """Teachers of any architectures, modules or functions (see `frozen`), called one after the other."""

    def __init__(self, classifiers: Sequence[Classifier]) -> None:
        self._classifiers = [frozen(classifier) for classifier in classifiers]

    def __len__(self) -> int:
        return len(self._classifiers)

    def __call__(self, images: Float[Tensor, "B D H W"], start: int, stop: int) -> Float[Tensor, "K B C"]:
        """Returns logits of the teachers ``start <= k < stop``."""
        return torch.stack([classifier(images) for classifier in self._classifiers[start:stop]])

    def measured(
        self, measure: Measure, images: Float[Tensor, "B D H W"], weights: Float[Tensor, "K B"], start: int, stop: int
    ) -> tuple[Float[Tensor, "K B C"], Float[Tensor, " K"]]:
        """Returns logits and measurements of the teachers ``start <= k < stop``."""
        pairs = zip(weights, self._classifiers[start:stop], strict=True)
        found = (_measured(measure, classifier)(of, images) for of, classifier in pairs)
        logits, sums = zip(*found, strict=True)
        return torch.stack(logits), torch.stack(sums)


class StackedTeachers:
    """Teachers of one architecture, called together by ``torch.func.vmap``.

    Args:
        function: must not write to the buffers.
        params: every tensor with a new first dimension of size ``K`` (`fedftg.params.stack`).
        buffers: likewise; may be empty.
    """

    def __init__(self, function: ClassifierFunction, params: Params, buffers: Params) -> None:
        self._function = function
        self._params = {name: tensor.detach() for name, tensor in params.items()}
        self._buffers = {name: tensor.detach() for name, tensor in buffers.items()}

    def __len__(self) -> int:
        return next(iter(self._params.values())).shape[0]

    def __call__(self, images: Float[Tensor, "B D H W"], start: int, stop: int) -> Float[Tensor, "K B C"]:
        """Returns logits of the teachers ``start <= k < stop``."""
        logits: Tensor = torch.func.vmap(self._function, in_dims=(0, 0, None))(*self._values(start, stop), images)
        return logits

    def measured(
        self, measure: Measure, images: Float[Tensor, "B D H W"], weights: Float[Tensor, "K B"], start: int, stop: int
    ) -> tuple[Float[Tensor, "K B C"], Float[Tensor, " K"]]:
        """Returns logits and measurements of the teachers ``start <= k < stop``."""
        function = torch.func.vmap(_measured(measure, self._function), in_dims=(0, 0, 0, None))
        logits, sums = function(weights, *self._values(start, stop), images)
        return logits, sums

    def _values(self, start: int, stop: int) -> tuple[Params, Params]:
        params = {name: tensor[start:stop] for name, tensor in self._params.items()}
        return params, {name: tensor[start:stop] for name, tensor in self._buffers.items()}


def stack_or_list(function: ClassifierFunction, params: Sequence[Params], buffers: Sequence[Params]) -> Teachers:
    """Returns teachers of one architecture in the form that is faster; the numbers agree up to rounding.

    Stacked (which copies all values) on an accelerator, where many small kernels wait for their launch, while the
    copies are at most 1 GiB; listed beyond that, and on the CPU, where a ``vmap`` over convolutions measured twice the
    time of a loop.
    """
    tensors = [tensor for one in params for tensor in one.values()]
    on_cpu = all(tensor.device.type == "cpu" for tensor in tensors)
    if not on_cpu and sum(tensor.nbytes for tensor in tensors) <= STACKED_UP_TO:
        return StackedTeachers(function, stack(params), stack(buffers))
    values = [{name: tensor.detach() for name, tensor in one.items()} for one in params]
    return ListedTeachers([partial(function, p, b) for p, b in zip(values, buffers, strict=True)])


class Ensemble:
    """Teachers with the weight of each on the samples of each class.

    Args:
        class_counts: ``(K, C)`` as `fedftg.distill.labels.check_class_counts` returns them.
        like: a tensor on the device and in the type of the images.
    """

    def __init__(
        self, teachers: Teachers, class_counts: Float[Tensor, "K C"], config: StudentConfig, like: Tensor
    ) -> None:
        self.class_counts = class_counts
        self._teachers, self._config = teachers, config
        weights = ensemble_weights(class_counts, config.ensemble, config.ensemble_epsilon)
        self._class_weights = weights.to(like)
        self._mean_weights = (weights.double() @ class_probabilities(class_counts)).to(like)
        self._priors = (config.teacher_prior_tau * label_log_prior(class_counts))[:, None].to(like)

    def __len__(self) -> int:
        return len(self._teachers)

    @property
    def num_classes(self) -> int:
        """Returns ``C``."""
        return self._class_weights.shape[1]

    def ranges(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Returns the teachers ``start <= k < stop`` as ranges whose graphs are in memory at a time."""
        size = self._config.teacher_chunk or MOST_AT_ONCE
        return [(first, min(first + size, stop)) for first in range(start, stop, size)]

    def reweight(self, weights: Float[Tensor, " K"]) -> None:
        """Gives each teacher one weight, whatever the label; they are divided by their sum."""
        self._mean_weights = weights / weights.sum()
        self._class_weights = self._mean_weights[:, None].expand_as(self._class_weights)

    def weights(self, labels: Int[Tensor, " B"], start: int, stop: int) -> Float[Tensor, "K B"]:
        """Returns ``a_k(y_i)`` of the teachers ``start <= k < stop``."""
        return self._class_weights[start:stop][:, labels]

    def logits(self, images: Float[Tensor, "B D H W"], start: int, stop: int) -> Float[Tensor, "K B C"]:
        """Returns logits of the teachers ``start <= k < stop``, in the type of the images."""
        return self._corrected(self.computed(partial(self._teachers, start=start, stop=stop), images), start, stop)

    def measured(
        self, measure: Measure, images: Float[Tensor, "B D H W"], weights: Float[Tensor, "K B"], start: int, stop: int
    ) -> tuple[Float[Tensor, "K B C"], Float[Tensor, " K"]]:
        """Returns logits of the teachers ``start <= k < stop``, and the sum of what ``measure`` takes of each one."""
        found: list[Tensor] = []

        def teachers(images: Tensor) -> Tensor:
            logits, sums = self._teachers.measured(measure, images, weights, start, stop)
            found.append(sums)
            return logits

        return self._corrected(self.computed(teachers, images), start, stop), found[0]

    def with_batchnorm(
        self, images: Float[Tensor, "B D H W"], labels: Int[Tensor, " B"], start: int, stop: int, weight: float = 1.0
    ) -> tuple[Float[Tensor, "K B C"], dict[str, Tensor]]:
        """Returns the logits, and ``{"batchnorm": L_bn}``, each teacher's distance times its mean ``a_k(y)``.

        ``L_bn`` is left out where its weight in the loss is 0.

        A teacher's moments weight each sample by ``a_k(y)`` too: labels drawn from ``p_t(y)`` are then mixed as in its
        own data, on which its running statistics are. With uniform weights all is a plain mean over teachers; one
        without BatchNorm counts 0.
        """
        if not weight:
            return self.logits(images, start, stop), {}
        weights = self.weights(labels, start, stop)
        logits, distances = self.measured(_batchnorm, images, weights, start, stop)
        return logits, {"batchnorm": (weights.mean(dim=1) * distances).sum()}

    def computed(self, function: Classifier, images: Float[Tensor, "B D H W"]) -> Tensor:
        """Returns ``function(images)`` in the config's precision and memory layout."""
        return computed(function, images, self._config.precision, self._config.memory_format)

    def _corrected(self, logits: Float[Tensor, "K B C"], start: int, stop: int) -> Float[Tensor, "K B C"]:
        return logits - self._priors[start:stop] if self._config.teacher_prior_tau else logits

    @torch.no_grad()
    def probabilities(self, images: Float[Tensor, "B D H W"], labels: Int[Tensor, " B"] | None) -> Float[Tensor, "B C"]:
        """Returns what the student learns, ``(B, C)``: `combined`, without a graph."""
        parts = []
        for first, last in self.ranges(0, len(self)):
            parts.append(self.combined(self.logits(images, first, last), labels, first))
        total = torch.stack(parts).sum(dim=0)
        return total.softmax(dim=-1) if self._config.ensemble_mean == "logits" else total

    def combined(
        self,
        logits: Float[Tensor, "K B C"],
        labels: Int[Tensor, " B"] | None,
        start: int = 0,
        temperature: float | None = None,
    ) -> Float[Tensor, "B C"]:
        """Returns the weighted sum of teachers' probabilities or logits (``ensemble_mean``), over the temperature.

        Where ``labels`` is None (unknown), a teacher's weight is its mean over ``p_t(y)``: with ``ensemble = "class"``
        its share of all samples, as FedDF weights.

        Args:
            logits: of the teachers from ``start`` on, as `logits` returns them.
            temperature: None takes the config's.
        """
        stop = start + len(logits)
        if labels is None:
            weights = self._mean_weights[start:stop, None].expand(-1, logits.shape[1])
        else:
            weights = self.weights(labels, start, stop)
        temperature = self._config.temperature if temperature is None else temperature
        if self._config.ensemble_mean == "logits":
            return (weights[..., None] * logits / temperature).sum(dim=0)
        return losses.ensemble_probabilities(logits, weights, temperature)

    def log_probabilities(
        self, logits: Float[Tensor, "K B C"], labels: Int[Tensor, " B"] | None
    ) -> Float[Tensor, "B C"]:
        """Returns the log of what all teachers predict together, at temperature 1, from their `logits`."""
        mean = self.combined(logits, labels, temperature=1.0)
        if self._config.ensemble_mean == "logits":
            return mean.log_softmax(dim=-1)
        return mean.clamp(min=torch.finfo(mean.dtype).tiny).log()


def _measured(measure: Measure, function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Returns a function that takes weights ``(B,)`` before the arguments and returns the measured sum too."""

    def call(weights: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        terms: list[Tensor] = []
        # On all modules, so that it does not matter in what kind of function a teacher is wrapped.
        with register_module_forward_pre_hook(lambda layer, inputs: measure(terms, layer, inputs, weights)):
            logits = function(*arguments)
        return logits, torch.stack([logits.new_zeros(()), *terms]).sum()

    return call


def _batchnorm(terms: list[Tensor], layer: nn.Module, inputs: tuple[Any, ...], weights: Tensor) -> None:
    if isinstance(layer, _BatchNorm) and layer.running_mean is not None and layer.running_var is not None:
        terms.append(losses.batchnorm_distance(inputs[0], layer.running_mean, layer.running_var, weights))


def frozen(classifier: Classifier) -> Classifier:
    """Returns a view of a module that shares its values, evaluates and has no weight gradients; a function as it is."""
    if not isinstance(classifier, nn.Module):
        return classifier
    # deepcopy takes what the memo already holds for an object instead of copying it.
    memo: dict[int, Any] = {id(buffer): _plain(buffer) for buffer in classifier.buffers()}
    for parameter in classifier.parameters():
        memo[id(parameter)] = nn.Parameter(_plain(parameter.detach()), requires_grad=False)
    return copied(classifier, memo).eval()


def _plain(tensor: Tensor) -> Tensor:
    """Returns the tensor, or a copy where it was made in inference mode, so that gradients can pass it."""
    return tensor.clone() if tensor.is_inference() else tensor
