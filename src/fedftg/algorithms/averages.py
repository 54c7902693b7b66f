"""Averages that are deployed in place of the aggregate, and the label-prior correction; clients never receive them.

    ema:   m <- b m + (1 - b) w                            w the round's aggregate
    wima:  m = mean of the last W aggregates               arXiv 2310.01366
    all:   m = sum_k v_k w_k / sum_k v_k                   w_k client k's last upload, of round r_k,
                                                           and v_k = n_k (r_k / t)^recency
    head:  b_c <- b_c + tau (log q_c - sum_k v_k log((n_k^c + 1/2) / (n_k + C/2)) / sum_k v_k)

b_c is the bias of class c in the last layer, q the class distribution to expect, uniform unless given. A client's
logits carry the log of its own label prior, and averaging weights is close to averaging logits: so the priors are taken
out member by member (logit adjustment: Menon et al., ICLR 2021, arXiv 2007.07314). Both sums of the last line are over
clients and can come from secure aggregation: docs/algorithms/averages.md.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fedftg.algorithms.base import (
    BROADCAST,
    WHEN,
    ClientResult,
    Memory,
    Metrics,
    NoRefiner,
    Refiner,
    RefinerConfig,
    RefinerContext,
    ServerState,
    When,
)
from fedftg.distill.labels import label_log_prior
from fedftg.errors import InputError
from fedftg.models.functional import FunctionalModel
from fedftg.params import Params, clone, prefixed, unprefixed, weighted_mean

_SUM, _WINDOW = "sum.", "window."
_CLIENTS, _SHARES, _COUNTS = "seen.clients", "seen.shares", "seen.counts"


class AverageConfig(RefinerConfig):
    """Which average is deployed, and how its head is corrected."""

    average: Literal["aggregate", "ema", "wima", "all"] = Field(
        default="aggregate",
        description="of what: the round's aggregate alone, aggregates of several rounds (ema, wima), or every client's "
        "last upload (all; the server keeps one model per client)",
    )
    ema_decay: float = Field(
        default=0.8, ge=0, lt=1, description="ema: b, weight of the earlier average; 0 gives the aggregate"
    )
    window: int = Field(default=5, ge=1, description="wima: W, how many aggregates; 1 gives the aggregate")
    recency: float = Field(
        default=0.0,
        ge=0,
        description="all: in round t an upload of round r counts (r / t)^recency times its samples; 0 ignores age",
    )
    class_rows: bool = Field(
        default=False,
        description="all: row c of the last layer is averaged by the clients' samples of class c instead of all",
    )
    prior_tau: float = Field(
        default=0.0, ge=0, description="tau: share of the clients' log label priors taken out of the logits; 0 is off"
    )
    prior_of: Literal["cohort", "all"] = Field(
        default="cohort", description="whose label priors: this round's clients, or all that ever took part"
    )
    target_prior: tuple[float, ...] = Field(
        default=(), description="q: class distribution where the model is used, one positive number a class; () uniform"
    )

    @classmethod
    def defaults(cls, given: Mapping[str, Any], **known: Any) -> dict[str, Any]:  # noqa: ARG003
        """Returns whose priors are taken out: those of the clients in the average."""
        average = given.get("average", cls.model_fields["average"].default)
        return {"prior_of": "cohort" if average == "aggregate" else "all"}

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, given: Any) -> Any:
        return {**cls.defaults(given), **given} if isinstance(given, dict) else given


@dataclass(frozen=True)
class Averaged(NoRefiner):
    """Deploys an average, with its head corrected or not."""

    config: AverageConfig
    context: RefinerContext
    bias: str = ""
    """Name of the last layer's bias, where the head is corrected or averaged by class."""

    @classmethod
    def build(cls, config: AverageConfig, context: RefinerContext) -> Averaged:
        """Returns the refiner; an `InputError` says which setting does not fit the model."""
        given, classes = config.target_prior, context.num_classes
        if given and (len(given) != classes or min(given) <= 0):
            raise InputError(f"refiner.target_prior must be {classes} positive numbers, got {list(given)}")
        needed = config.prior_tau > 0 or config.class_rows
        bias = head_bias(context.model, context.image_shape) if needed else ""
        if config.class_rows and _weight_of(bias) not in context.model.init()[0]:
            raise InputError(f"refiner.class_rows needs a parameter {_weight_of(bias)!r} beside {bias!r}; set it false")
        return cls(config, context, bias)

    @property
    def reads_previous(self) -> bool:
        """Whether `observe` needs `ClientResult.previous`."""
        return self.config.average == "all"

    def observe(self, state: ServerState, results: Sequence[ClientResult]) -> Memory:
        """Takes a round's aggregate and uploads into the average."""
        results = [result for result in results if result.num_samples > 0]
        seen, share = _seen(state.refiner), float((state.round + 1) ** self.config.recency)
        model = {**state.params, **state.buffers}
        memory: Memory = {}
        if self.config.average == "ema":
            old, keep = unprefixed(state.refiner, _SUM), self.config.ema_decay
            new = {name: value.double() for name, value in model.items()}
            memory = prefixed({n: keep * old[n] + (1 - keep) * new[n] for n in new} if old else new, _SUM)
        elif self.config.average == "wima":
            window = [model, *_window(state.refiner)][: self.config.window]
            for age, one in enumerate(window):
                memory |= prefixed(one, f"{_WINDOW}{age}.")
        elif self.config.average == "all":
            memory = prefixed(self._exchanged(state, results, seen, share), _SUM)
        seen |= {result.client: (share, result.class_counts.cpu().double()) for result in results}
        return memory | _seen_memory(seen)

    def refine(
        self,
        state: ServerState,
        results: Sequence[ClientResult],
        rng: torch.Generator,  # noqa: ARG002
    ) -> tuple[ServerState, Metrics]:
        """Returns the average as `observe` left it, corrected."""
        seen, values = _seen(state.refiner), {**state.params, **state.buffers}
        if self.config.average == "wima":
            window = _window(state.refiner)
            values = weighted_mean(window, [1.0] * len(window))
        elif self.config.average != "aggregate":
            values = self._divided(values, unprefixed(state.refiner, _SUM), seen)
        if self.config.prior_tau:
            cohort = seen.keys() if self.config.prior_of == "all" else {result.client for result in results}
            members = [of for client, of in seen.items() if client in cohort]
            weights = torch.stack([share * counts.sum() for share, counts in members])
            priors = label_log_prior(torch.stack([counts for _, counts in members]))
            target = torch.tensor(self.config.target_prior or [1.0] * priors.shape[1], dtype=torch.float64).log()
            values = shifted(values, self.bias, self.config.prior_tau * (target - weights @ priors / weights.sum()))
        params, buffers = ({name: values[name] for name in of} for of in (state.params, state.buffers))
        return replace(state, params=params, buffers=buffers), {}

    def _exchanged(self, state: ServerState, results: Sequence[ClientResult], seen: Seen, share: float) -> Params:
        """Returns the weighted sum of last uploads, with those of this round's clients exchanged."""
        model = {**state.params, **state.buffers}
        zeros = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in model.items()}
        total = clone(unprefixed(state.refiner, _SUM)) or zeros
        for result in sorted(results, key=lambda result: result.client):
            uploads = [(share, result.class_counts, {**result.params, **result.buffers})]
            if result.client in seen:
                before, counts = seen[result.client]
                uploads.append((-before, counts, result.previous))
            for factor, counts, upload in uploads:
                for name, value in total.items():
                    value.addcmul_(upload[name], self._weight(name, factor, counts, value))
        return total

    def _divided(self, like: Params, total: Params, seen: Seen) -> Params:
        if self.config.average == "all":
            for name, value in total.items():
                weights = [self._weight(name, share, counts, value) for share, counts in seen.values()]
                total[name] = value / torch.stack(weights).sum(dim=0)
        return {n: (v if like[n].is_floating_point() else v.round()).to(like[n].dtype) for n, v in total.items()}

    def _weight(self, name: str, share: float, counts: Tensor, like: Tensor) -> Tensor:
        """Returns a client's weight in a tensor: its samples, or by class in the rows of the last layer."""
        total = counts.sum().double()
        if self.config.class_rows and name in (self.bias, _weight_of(self.bias)):
            rows = counts.double() + total / 1000  # a class that nobody holds is averaged like everything else
            total = rows.view(-1, *[1] * (like.ndim - 1))
        return (share * total).to(like.device)


def shifted(values: Params, bias: str, shift: Tensor) -> Params:
    """Returns the same values with ``shift``, ``(C,)``, minus its mean added to the parameter named ``bias``."""
    moved = values[bias].double() + (shift - shift.mean()).to(values[bias].device)
    return {**values, bias: moved.to(values[bias].dtype)}


@torch.no_grad()
def head_bias(model: FunctionalModel, image_shape: Sequence[int]) -> str:
    """Returns the name of the parameter that is added to the logits, whatever it is called.

    Raises:
        InputError: there is none.
    """
    params, buffers = model.init()
    images = torch.randn(4, *image_shape, generator=torch.Generator().manual_seed(0)).to(next(iter(params.values())))
    logits = model(params, buffers, images, train=False)
    step = torch.linspace(-1, 1, logits.shape[1]).to(logits)  # of mean 0, as log-probabilities show it
    rounding = max(1e-3, 8 * torch.finfo(logits.dtype).eps)
    for name, value in params.items():
        if value.shape == step.shape:
            moved = model({**params, name: value + step}, buffers, images, train=False) - logits
            if torch.allclose(moved - moved.mean(dim=1, keepdim=True), step.expand_as(logits), atol=rounding):
                return name
    raise InputError(
        "the label-prior correction adds to the bias of the model's last layer, which must be trainable; this model "
        "has none: give the layer bias=True, or set refiner.prior_tau=0 (and class_rows=false)"
    )


def _weight_of(bias: str) -> str:
    return bias.removesuffix("bias") + "weight"


Seen = dict[int, tuple[float, Tensor]]
"""By client that ever took part: the round of its last upload to the power of ``recency``, ``(C,)`` class counts."""


def _seen(memory: Memory) -> Seen:
    if _CLIENTS not in memory:
        return {}
    rows = zip(memory[_CLIENTS].tolist(), memory[_SHARES].tolist(), memory[_COUNTS].cpu(), strict=True)
    return {client: (share, counts) for client, share, counts in rows}


def _seen_memory(seen: Seen) -> Memory:
    clients = sorted(seen)
    counts = torch.stack([seen[client][1] for client in clients])
    shares = torch.tensor([seen[client][0] for client in clients], dtype=torch.float64)
    return {_CLIENTS: torch.tensor(clients), _SHARES: shares, _COUNTS: counts}


def _window(memory: Memory) -> list[Params]:
    found = (unprefixed(memory, f"{_WINDOW}{age}.") for age in itertools.count())
    return list(itertools.takewhile(bool, found))


class DeployedConfig(AverageConfig):
    """The settings of a refiner that deploys an average."""

    broadcast: float = Field(default=0.0, ge=0, le=1, description=BROADCAST)
    when: When = Field(default="evaluation", description=WHEN)

    def build(self, context: RefinerContext) -> Refiner:
        """Returns the refiner for one experiment."""
        return Averaged.build(self, context)


class EmaConfig(DeployedConfig):
    """``refiner.name = "ema"``: deploys an exponential average of the aggregates."""

    name: Literal["ema"] = "ema"
    average: Literal["ema"] = "ema"


class WimaConfig(DeployedConfig):
    """``refiner.name = "wima"``: deploys the mean of the last ``window`` aggregates (ICCV workshops 2023)."""

    name: Literal["wima"] = "wima"
    average: Literal["wima"] = "wima"


class AllConfig(DeployedConfig):
    """``refiner.name = "all"``: deploys the mean of every client's last upload."""

    name: Literal["all"] = "all"
    average: Literal["all"] = "all"


class HeadPriorConfig(DeployedConfig):
    """``refiner.name = "head_prior"``: deploys the aggregate, or an average, without its clients' label priors."""

    name: Literal["head_prior"] = "head_prior"
    prior_tau: float = Field(default=0.75, ge=0, description=AverageConfig.model_fields["prior_tau"].description)
