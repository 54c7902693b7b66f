"""What has to be known of the strategies that FedFTG is put around: Flower's own, and any other."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Strategy
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords

from fedftg.errors import InputError
from fedftg.flower.train_replies import floating
from fedftg.params import Params, first_non_finite, prefixed, unprefixed

_PRIVATE = (
    flower.DifferentialPrivacyServerSideFixedClipping,
    flower.DifferentialPrivacyClientSideFixedClipping,
    flower.DifferentialPrivacyServerSideAdaptiveClipping,
    flower.DifferentialPrivacyClientSideAdaptiveClipping,
)
_IN_PLACE = (
    flower.QFedAvg,
    flower.DifferentialPrivacyServerSideFixedClipping,
    flower.DifferentialPrivacyServerSideAdaptiveClipping,
)
_TREES = (flower.FedXgbBagging, flower.FedXgbCyclic)
_ADAPTIVE = (
    flower.DifferentialPrivacyServerSideAdaptiveClipping,
    flower.DifferentialPrivacyClientSideAdaptiveClipping,
)
"""They move their ``clipping_norm`` from round to round."""


@runtime_checkable
class HasState(Protocol):
    """A strategy that says by itself what a resumed run needs of it."""

    def state_tensors(self) -> Params:
        """What it keeps from round to round."""
        ...

    def load_state_tensors(self, tensors: Params) -> None:
        """Goes on where `state_tensors` was taken."""
        ...


@runtime_checkable
class HasSettings(Protocol):
    """A strategy that says by itself what a resumed run must have the same."""

    def resume_settings(self) -> dict[str, Any]:
        """As JSON takes it."""
        ...


def chain(strategy: Strategy) -> list[Strategy]:
    """The strategy and those that it is put around, the outermost first."""
    found = [strategy]
    while isinstance(inner := vars(found[-1]).get("strategy"), Strategy) and inner not in found:
        found.append(inner)
    return found


def check_base(strategy: Strategy, *, accept_privacy_loss: bool) -> None:
    """Refuses what FedFTG cannot be put around.

    Raises:
        InputError: no Message-API strategy, decision trees, or differential privacy whose guarantee would be void.
    """
    if not isinstance(strategy, Strategy):
        raise InputError(
            f"the base strategy must be one of flwr.serverapp.strategy, got {type(strategy).__name__}; "
            "those of flwr.server.strategy are Flower's older interface"
        )
    for one in chain(strategy):
        name = type(one).__name__
        if isinstance(one, _TREES):
            raise InputError(f"{name} trains decision trees, FedFTG refines torch classifiers; run it without FedFTG")
        if not isinstance(one, _PRIVATE):
            continue
        if not accept_privacy_loss:
            raise InputError(
                f"{name} promises privacy for the sum of the updates, and FedFTG looks at every single one: the "
                "refined model would not be private; use local privacy (LocalDpMod in the ClientApp), or say "
                "accept_privacy_loss=True"
            )
        if getattr(one, "accountant", None) is not None:
            raise InputError(f"{name} has an accountant, whose epsilon would be wrong with FedFTG; leave it out")


def weight_keys(strategy: Strategy) -> tuple[str, ...]:
    """The metrics that updates are weighed by."""
    names = [vars(one).get(attribute) for attribute in ("weighted_by_key", "train_loss_key") for one in chain(strategy)]
    return tuple(dict.fromkeys(name for name in names if isinstance(name, str)))


def examples_key(strategy: Strategy) -> str | None:
    """The metric that has the number of examples, where updates are weighed by it."""
    names = (vars(one).get("weighted_by_key") for one in chain(strategy))
    return next((name for name in names if isinstance(name, str)), None)


def averages_all_metrics(strategy: Strategy) -> bool:
    """Whether metrics are averaged by Flower's own function, in which an id makes no sense."""
    found = [vars(one)["train_metrics_aggr_fn"] for one in chain(strategy) if "train_metrics_aggr_fn" in vars(one)]
    of_ours = any(isinstance(one, HasState) for one in chain(strategy))  # they tell clients apart by their ids
    return bool(found) and not of_ours and all(function is aggregate_metricrecords for function in found)


def before_configure(strategy: Strategy) -> None:
    """Has the strategy take what is sent out next as its current model.

    FedAvgM keeps the aggregate that it returned: it would take its next step from a model that no client has received.
    FedAdam, FedAdagrad, FedYogi, QFedAvg and server-side clipping take what they are given each time.
    """
    for one in chain(strategy):
        if isinstance(one, flower.FedAvgM):
            one.current_arrays = None


def works_in_place(strategy: Strategy) -> bool:
    """Whether it divides or scales arrays in place, which NumPy refuses for integers such as BatchNorm's counter."""
    return any(isinstance(one, _IN_PLACE) for one in chain(strategy))


def after_configure(strategy: Strategy) -> None:
    """Gives strategies that work in place a current model without integers, as they get replies without."""
    for one in chain(strategy):
        current = vars(one).get("current_arrays")
        if works_in_place(strategy) and isinstance(current, ArrayRecord):
            one.current_arrays = floating(current)  # type: ignore[attr-defined]


def shows_selection(strategy: Strategy) -> bool:
    """Whether one can see which replies the strategy has taken: it then averages the metrics of just those."""
    return any(callable(vars(one).get("train_metrics_aggr_fn")) for one in chain(strategy))


def discards_replies(strategy: Strategy) -> bool:
    """Whether it is one of Flower's strategies that leave replies out on purpose."""
    return any(isinstance(one, flower.MultiKrum | flower.Bulyan) for one in chain(strategy))


@contextmanager
def watched_selection(strategy: Strategy) -> Iterator[list[RecordDict]]:
    """A list that holds, after an aggregation within, the contents of the replies that were taken."""
    taken: list[RecordDict] = []
    owner: Any = next(one for one in reversed(chain(strategy)) if "train_metrics_aggr_fn" in vars(one))
    average: Callable[[list[RecordDict], str], MetricRecord] = owner.train_metrics_aggr_fn

    def watch(contents: list[RecordDict], weighted_by_key: str) -> MetricRecord:
        taken.extend(contents)
        return average(contents, weighted_by_key)

    owner.train_metrics_aggr_fn = watch
    try:
        yield taken
    finally:
        owner.train_metrics_aggr_fn = average


@contextmanager
def lent(strategy: Strategy, methods: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Puts other methods in the place of a strategy's own, so that a loop that it brings with it calls those."""
    for name, method in methods.items():
        setattr(strategy, name, method)
    try:
        yield
    finally:
        for name in methods:
            delattr(strategy, name)


def settings(strategy: Strategy) -> list[dict[str, Any]]:
    """Per strategy of the chain: its type, and what a resumed run must have the same of its settings.

    That is what `HasSettings.resume_settings` gives; else, of the arguments that Flower's own classes take, those kept
    as numbers or text that say how replies are aggregated. Who is asked, and how many, may change.
    """
    return [
        {"type": type(one).__name__, **(one.resume_settings() if isinstance(one, HasSettings) else _scalars(one))}
        for one in chain(strategy)
    ]


def _scalars(strategy: Strategy) -> dict[str, Any]:
    kinds = [kind for kind in type(strategy).__mro__ if kind.__module__.startswith("flwr.")]
    constructors = [vars(kind)["__init__"] for kind in kinds if "__init__" in vars(kind)]
    arguments = {name for one in constructors for name in inspect.signature(one).parameters}
    moving = {"clipping_norm"} if isinstance(strategy, _ADAPTIVE) else set()
    return {
        name: value
        for name, value in sorted(vars(strategy).items())
        if name in arguments - moving
        and isinstance(value, int | float | str)
        and not name.startswith(("fraction_", "min_"))
    }


def not_finite(strategy: Strategy) -> set[str]:
    """Names of those `state_tensors` that hold NaN or infinity."""
    return {name for name, tensor in state_tensors(strategy).items() if first_non_finite({name: tensor}) is not None}


def state_tensors(strategy: Strategy) -> Params:
    """What a resumed run needs of a strategy: every attribute that holds NumPy arrays, such as Adam's moments.

    The current model is not among them: it is what is sent out.
    """
    tensors: Params = {}
    for depth, one in enumerate(chain(strategy)):
        found: Params = dict(one.state_tensors()) if isinstance(one, HasState) else _arrays_of(one)
        if isinstance(one, _ADAPTIVE):
            found["clipping_norm#number"] = torch.tensor(one.clipping_norm, dtype=torch.float64)
        tensors |= prefixed(found, f"{depth}/")
    return tensors


def load_state_tensors(strategy: Strategy, tensors: Params) -> None:
    """Puts back what `state_tensors` gave."""
    for depth, one in enumerate(chain(strategy)):
        own = unprefixed(tensors, f"{depth}/")
        numbers = {name.removesuffix("#number"): own.pop(name) for name in list(own) if name.endswith("#number")}
        for name, number in numbers.items():
            setattr(one, name, float(number))
        if isinstance(one, HasState):
            one.load_state_tensors(own)
        else:
            _load_arrays(one, own)


def _arrays_of(strategy: Strategy) -> Params:
    found: Params = {}
    for attribute, value in vars(strategy).items():
        if attribute == "current_arrays":
            continue
        if isinstance(value, dict | list) and value:
            kind = "dict" if isinstance(value, dict) else "list"
            items = value.items() if isinstance(value, dict) else enumerate(value)
            # NumPy makes scalars of arrays without dimensions.
            copies = {key: np.array(item) for key, item in items if isinstance(item, np.ndarray | np.generic)}
            if len(copies) == len(value):
                found |= {f"{attribute}.{kind}/{key}": torch.from_numpy(item) for key, item in copies.items()}
    return found


def _load_arrays(strategy: Strategy, tensors: Params) -> None:
    dicts: dict[str, dict[str, np.ndarray[Any, Any]]] = {}
    lists: dict[str, list[np.ndarray[Any, Any]]] = {}
    for name, tensor in tensors.items():
        head, _, key = name.partition("/")
        attribute, _, kind = head.rpartition(".")
        if kind == "list":
            lists.setdefault(attribute, []).append(tensor.numpy().copy())
        else:
            dicts.setdefault(attribute, {})[key] = tensor.numpy().copy()
    for attribute, value in (*dicts.items(), *lists.items()):
        setattr(strategy, attribute, value)
