"""The three slots (local rule, server rule, refiner), which are pure, and the values that pass between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from fedftg.models.functional import FunctionalModel
from fedftg.params import Params, first_non_finite

Memory = Params
"""What a rule keeps between rounds: named tensors, possibly none."""

Metrics = dict[str, float]


@dataclass(frozen=True)
class Batch:
    """Images ``(B, D, H, W)``, normalised and augmented, and labels ``(B,)``."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class LocalTask:
    """What one client gets for one round."""

    round: int
    """Counted from 1."""
    client: int
    params: Params
    """The received global parameters: the anchor ``a`` of FedProx and FedDyn."""
    buffers: Params
    memory: Memory
    """What `LocalRule.finish` returned when the client last took part."""
    message: Params
    """What the server rule sends besides the model: SCAFFOLD's ``c``."""
    num_samples: int
    relative_size: float
    """``num_samples`` over the mean of all clients; 1 where all hold the same."""
    lr: float
    """The local rate of this round, decay included."""
    seed: int
    """Of everything that is drawn while this client trains."""


@dataclass(frozen=True)
class ClientResult:
    """What the server receives from one client, and the memory that the client keeps."""

    client: int
    num_samples: int
    class_counts: Tensor
    """``(C,)`` int64: how many samples of each class the client holds."""
    params: Params
    buffers: Params
    extra: Params
    """What the local rule uploads besides the model: SCAFFOLD's change of ``c_k``."""
    memory: Memory
    loss: float
    """Mean of the local loss over the client's steps; NaN where it made none."""
    previous: Params = field(default_factory=dict)
    """The client's upload before, parameters and buffers, if there was one and a refiner ``reads_previous``."""


def rejection(result: ClientResult) -> str | None:
    """Returns why an update must not be averaged: its first tensor that is not finite; None if it may be."""
    parts = {"parameter": result.params, "buffer": result.buffers, "upload": result.extra, "memory": result.memory}
    found = ((kind, first_non_finite(tensors)) for kind, tensors in parts.items())
    return next((f"non-finite {kind} {name}" for kind, name in found if name is not None), None)


@dataclass(frozen=True)
class ServerState:
    """Everything on the server's side that a resumed run needs, as one value."""

    round: int
    """How many rounds are done: 0 during the first round, so schedules are ``rate * decay ** round``."""
    params: Params
    buffers: Params
    server: Memory
    refiner: Memory
    deployed: Params = field(default_factory=dict)
    """Parameters and buffers of the model that is deployed, where it is another than the one that clients receive."""

    @property
    def model(self) -> tuple[Params, Params]:
        """Returns parameters and buffers of the model that is deployed."""
        if not self.deployed:
            return self.params, self.buffers
        return {n: self.deployed[n] for n in self.params}, {n: self.deployed[n] for n in self.buffers}


def broadcast(aggregate: ServerState, refined: ServerState, weight: float) -> ServerState:
    """Returns the state that deploys the refined model and sends clients the aggregate, moved ``weight`` of the way.

    Args:
        aggregate: what the server rule returned.
        refined: what the refiner made of ``aggregate.model``; where it has a deployed model of its own, that stays.
        weight: 1 sends the refined model, 0 the aggregate.
    """
    if weight == 1 and not aggregate.deployed:
        return refined
    before, after = {**aggregate.model[0], **aggregate.model[1]}, {**refined.params, **refined.buffers}
    sent = {
        name: value + weight * (after[name] - before[name]) if weight and value.is_floating_point() else value
        for name, value in {**aggregate.params, **aggregate.buffers}.items()
    }
    params, buffers = ({name: sent[name] for name in of} for of in (aggregate.params, aggregate.buffers))
    return replace(refined, params=params, buffers=buffers, deployed=refined.deployed or after)


class LocalRule(Protocol):
    """One client's part of an algorithm.

    An attribute ``reads_round = False`` declares that ``loss`` and ``correct`` do not branch on ``task.round`` and
    ``task.lr``, which then are tensors where steps are recorded (``cuda_graph``): one recording serves all rounds.
    Without it both are numbers, and steps are recorded in each round. ``draws = True`` declares that ``loss`` draws
    random numbers, from torch's global generator, which is seeded for each client; such steps are not recorded.
    """

    def upload_like(self, params: Params) -> Params:
        """Returns zeros in the form of what `finish` uploads besides the model, given the model's parameters."""

    def init_memory(self, params: Params, buffers: Params) -> Memory:
        """Returns the memory of a client that never took part, from the initial global values."""

    def loss(self, model: FunctionalModel, params: Params, buffers: Params, batch: Batch, task: LocalTask) -> Tensor:
        """Returns the scalar loss of a batch; training mode updates BatchNorm statistics in ``buffers`` in place."""

    def correct(self, grads: Params, params: Params, task: LocalTask) -> Params:
        """Returns the gradients that the step uses, before clipping and weight decay."""

    def finish(self, params: Params, buffers: Params, task: LocalTask, num_steps: int) -> tuple[Params, Memory]:
        """Returns what to upload besides the trained model, and the new memory, after ``num_steps`` steps."""


class ServerRule(Protocol):
    """The server's part of an algorithm."""

    def init(self, params: Params) -> Memory:
        """Returns the server's memory before the first round."""

    def message(self, state: ServerState) -> Params:
        """Returns what every client is sent besides the model."""

    def step(self, state: ServerState, results: Sequence[ClientResult]) -> tuple[ServerState, Metrics]:
        """Returns the next state, from at least one result with samples, whatever the order of the results."""


class Refiner(Protocol):
    """Improves the aggregated model on the server.

    An attribute ``reads_previous = True`` asks for `ClientResult.previous`: the server then keeps one model per client.
    """

    def init(self, params: Params, rng: torch.Generator) -> Memory:
        """Returns the refiner's memory before the first round, such as a generator's weights."""

    def observe(self, state: ServerState, results: Sequence[ClientResult]) -> Memory:
        """Returns the new memory after a round, whether or not the model is refined in it."""

    def refine(
        self, state: ServerState, results: Sequence[ClientResult], rng: torch.Generator
    ) -> tuple[ServerState, Metrics]:
        """Returns the state with better parameters and the new memory, after `observe`; ``state`` stays as it is."""


@dataclass(frozen=True)
class Algorithm:
    """A local rule and the server rule that goes with it."""

    local: LocalRule
    server: ServerRule


class AlgorithmConfig(BaseModel):
    """The settings of an algorithm: subclass, give ``name`` a ``Literal`` type, and register it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str

    def build(self, num_clients: int) -> Algorithm:  # noqa: ARG002
        """Returns the rules for a federation of ``num_clients`` clients, of which a cohort takes part in each round."""
        raise TypeError(f"{type(self).__name__} does not define build(num_clients) -> Algorithm")


@dataclass(frozen=True)
class RefinerContext:
    """What a refiner may know of the experiment."""

    model: FunctionalModel
    num_classes: int
    image_shape: tuple[int, int, int]
    device: torch.device
    mean: tuple[float, ...] = ()
    """Per channel, as images were normalised for the clients; empty where it is not known (a strategy's server)."""
    std: tuple[float, ...] = ()
    models: tuple[FunctionalModel, ...] = ()
    """Where clients have models of their own: client k the k-th, over and over."""
    unlabelled: Tensor = field(default_factory=lambda: torch.empty(0, 1, 1, 1, dtype=torch.uint8))
    """Training images ``(N, D, H, W)``, as bytes, that no client holds."""
    shown: list[tuple[Tensor, Tensor | None]] = field(default_factory=list, repr=False)
    """What `show` took last."""

    def show(self, images: Tensor, labels: Tensor | None = None) -> None:
        """Takes the last images ``(B, D, H, W)`` that a refiner made, and their labels ``(B,)`` if known."""
        self.shown[:] = [(images, labels)]

    def model_of(self, client: int) -> FunctionalModel:
        """Returns the model that a client's parameters belong to."""
        return self.models[client % len(self.models)] if self.models else self.model


When = Literal["round", "evaluation"]
BROADCAST = (
    "weight of the refined model in what clients receive next: 1 sends it, 0 sends the aggregate, so that refining "
    "cannot harm training"
)
WHEN = "refine in every round, or only in rounds that are evaluated and the last; evaluation needs broadcast = 0"


class RefinerConfig(BaseModel):
    """The settings of a refiner: subclass, give ``name`` a ``Literal`` type, and register it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    broadcast: float = Field(default=1.0, ge=0, le=1, description=BROADCAST)
    when: When = Field(default="round", description=WHEN)

    @model_validator(mode="after")
    def _check_when(self) -> RefinerConfig:
        if self.when == "evaluation" and self.broadcast:
            raise ValueError(f"when = 'evaluation' needs broadcast = 0, got {self.broadcast}; or set when = 'round'")
        return self

    @classmethod
    def defaults(cls, given: Mapping[str, Any], **known: Any) -> dict[str, Any]:  # noqa: ARG003
        """Returns the defaults that other settings decide, or, where they are known, ``num_classes`` and ``algorithm``.

        Where setting one key changes these defaults, settings equal to the old ones are dropped.
        """
        return {}

    def build(self, context: RefinerContext) -> Refiner:  # noqa: ARG002
        """Returns the refiner for one experiment."""
        raise TypeError(f"{type(self).__name__} does not define build(context) -> Refiner")


class NoRefiner:
    """Returns the state as it is."""

    def init(self, params: Params, rng: torch.Generator) -> Memory:  # noqa: ARG002
        """Remembers nothing."""
        return {}

    def observe(self, state: ServerState, results: Sequence[ClientResult]) -> Memory:  # noqa: ARG002
        """Returns the memory as it is."""
        return state.refiner

    def refine(
        self,
        state: ServerState,
        results: Sequence[ClientResult],  # noqa: ARG002
        rng: torch.Generator,  # noqa: ARG002
    ) -> tuple[ServerState, Metrics]:
        """Returns the same state, no metrics."""
        return state, {}


class NoRefinerConfig(RefinerConfig):
    """``refiner.name = "none"``: deploys the aggregate."""

    name: Literal["none"] = "none"

    def build(self, context: RefinerContext) -> Refiner:  # noqa: ARG002
        """Needs nothing."""
        return NoRefiner()
