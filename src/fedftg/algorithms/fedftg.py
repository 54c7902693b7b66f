"""FedFTG as a refiner, on any algorithm.

Zhang, Shen, Ding, Tao, Duan, "Fine-tuning Global Model via Data-Free Knowledge Distillation for Non-IID Federated
Learning", CVPR 2022, https://arxiv.org/abs/2203.09249.

    min_w max_theta E_{y ~ p_t(y), z ~ N(0, I)} [ sum_k a_k(y) (L_md - lambda_cls L_cls) - lambda_dis L_dis ]
    with x = G(z, y; theta)

The clients' models of this round are the teachers, the aggregate is the student, and the generator's weights persist
over rounds. With ``absent_weight`` the model that the round before ended with is one more teacher, for the classes of
absent clients. Differences from paper and public code: docs/algorithms/fedftg.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedftg.algorithms.averages import AverageConfig, Averaged
from fedftg.algorithms.base import ClientResult, Memory, Metrics, NoRefiner, Refiner, RefinerContext, ServerState
from fedftg.distill.config import DistillConfig, preset
from fedftg.distill.distiller import distil
from fedftg.distill.generator import new_generator
from fedftg.distill.images import GeneratorImages
from fedftg.distill.labels import least_share
from fedftg.distill.pool import PooledImages
from fedftg.distill.teachers import stack_or_list
from fedftg.errors import InputError
from fedftg.models.functional import values
from fedftg.params import Params, prefixed, unprefixed
from fedftg.seeds import drawn_seed

_MODEL, _CLIENTS, _COUNTS, _AVERAGE, _POOL = "past.model.", "past.clients", "past.counts", "average.", "pool."

WITH_PRESET: dict[str, dict[str, Any]] = {
    "fedftg": {
        "absent_weight": 1.0, "lacking": 0.1, "last_round": 20, "average": "all", "recency": 2.0, "prior_tau": 0.75,
    },
}  # fmt: skip
"""What goes with a preset in a federation. Chosen by pilots: benchmarks/results/deployed.md."""
WITH_SCAFFOLD: dict[str, Any] = {"average": "ema", "recency": 0.0, "prior_tau": 0.25}
"""Instead, with SCAFFOLD: its control variates take most of the clients' label priors out of what they upload."""


@dataclass(frozen=True)
class FedFTG(NoRefiner):
    """Distils the clients of a round into the aggregate, on inputs from a generator that lives on the server."""

    config: DistillConfig
    context: RefinerContext
    absent_weight: float = 0.0
    lacking: float = 0.0
    last_round: int = 0
    average: Averaged | None = None
    """What is deployed in rounds that are not fine-tuned; None: the aggregate."""

    @property
    def reads_previous(self) -> bool:
        """Whether the average does."""
        return self.average is not None and self.average.reads_previous

    def init(self, params: Params, rng: torch.Generator) -> Memory:  # noqa: ARG002
        """Returns the generator's initial weights, drawn from ``rng``."""
        return self._images(drawn_seed(rng)).memory()

    def observe(self, state: ServerState, results: Sequence[ClientResult]) -> Memory:
        """Takes the round into the average."""
        if self.average is None:
            return state.refiner
        own = {name: value for name, value in state.refiner.items() if not name.startswith(_AVERAGE)}
        return own | prefixed(self.average.observe(_of_average(state), results), _AVERAGE)

    def refine(
        self, state: ServerState, results: Sequence[ClientResult], rng: torch.Generator
    ) -> tuple[ServerState, Metrics]:
        """Fine-tunes the aggregate, rates decay as ``lr_decay ** state.round``; or deploys the average."""
        model, memory = self.context.model, dict(state.refiner)
        ordered = sorted((r for r in results if r.num_samples > 0), key=lambda result: result.client)
        known = known_counts(memory)
        params, buffers = [r.params for r in ordered], [r.buffers for r in ordered]
        counts = [r.class_counts.to(torch.float64) for r in ordered]
        absent = absent_counts(known, ordered)
        if absent is not None and self.absent_weight:
            previous = unprefixed(memory, _MODEL)
            params.append({name: previous[name] for name in state.params})
            buffers.append({name: previous[name] for name in state.buffers})
            counts.append(self.absent_weight * absent)
        present = torch.stack([r.class_counts for r in ordered]).sum(dim=0).double()
        everyone = present if absent is None else present + absent
        early = not self.last_round or state.round < self.last_round
        means: Metrics = {"least_share": least_share(present, everyone)} if self.lacking and early else {}
        refined = state
        if early and means.get("least_share", -1.0) < self.lacking:
            images, student = self._images(seed=0), model.module(state.params, state.buffers)
            images.load_memory(memory)
            pool = PooledImages(self.config, images, unprefixed(memory, _POOL))
            teachers = stack_or_list(partial(model, train=False), params, buffers)
            scale = self.config.lr_decay**state.round
            metrics = distil(self.config, pool, student, teachers, torch.stack(counts), rng=rng, lr_scale=scale)
            self.context.show(*pool.newest)
            means |= {name: float(metric.mean()) for name, metric in metrics.items()}
            tuned, statistics = values(student)  # unties buffers, so the state's names are kept
            refined = replace(state, params=tuned, buffers={name: statistics[name] for name in state.buffers})
            memory |= images.memory() | prefixed(pool.pool, _POOL)
        elif self.average is not None:
            deployed = self.average.refine(_of_average(state), results, rng)[0]
            refined = replace(state, deployed={**deployed.params, **deployed.buffers})
        if self.last_round and state.round + 1 >= self.last_round:  # nothing is fine-tuned any more
            memory = {name: value for name, value in memory.items() if name.startswith(_AVERAGE)}
        elif self.absent_weight or self.lacking:
            known |= {r.client: r.class_counts.cpu().to(torch.int64) for r in ordered}
            clients = sorted(known)
            memory |= {_CLIENTS: torch.tensor(clients), _COUNTS: torch.stack([known[client] for client in clients])}
            memory |= prefixed({**refined.params, **refined.buffers}, _MODEL) if self.absent_weight else {}
        return replace(refined, refiner=memory), means

    def _images(self, seed: int) -> GeneratorImages:
        context = self.context
        generator = new_generator(self.config, context.num_classes, context.image_shape, seed)
        return GeneratorImages(self.config, generator.to(context.device))


def _of_average(state: ServerState) -> ServerState:
    return replace(state, refiner=unprefixed(state.refiner, _AVERAGE))


def known_counts(memory: Memory) -> dict[int, Tensor]:
    """Returns the ``(C,)`` int64 class counts that each client gave when it last took part."""
    if _CLIENTS not in memory:
        return {}
    return dict(zip(memory[_CLIENTS].tolist(), memory[_COUNTS].cpu(), strict=True))


def absent_counts(known: Mapping[int, Tensor], present: Sequence[ClientResult]) -> Tensor | None:
    """Returns the ``(C,)`` float64 class counts of all known clients that are absent; None where these hold nothing."""
    absent = [known[client] for client in known.keys() - {result.client for result in present}]
    total = torch.stack(absent).sum(dim=0, dtype=torch.float64) if absent else torch.zeros(1)
    return total if bool(total.any()) else None


class FedFTGConfig(AverageConfig, DistillConfig):
    """``refiner.name = "fedftg"``: trains a generator to find where clients and aggregate disagree (CVPR 2022).

    The settings are a preset, and any field of `DistillConfig` that should differ from it.
    """

    name: Literal["fedftg"] = "fedftg"
    preset: str = Field(default="fedftg", description="paper, official (the public code, exactly) or fedftg (ours)")
    absent_weight: float = Field(
        default=0.0,
        ge=0,
        description="last round's model is one more teacher, with this times the class counts that absent clients gave "
        "when they last took part; 0 is off, 1 counts the absent like the present",
    )
    lacking: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="only rounds whose clients lack a class, with less than this times its share among all clients "
        "known, are fine-tuned, the others deploy the average; 0: all are fine-tuned. IID clients lack none",
    )
    last_round: int = Field(
        default=0,
        ge=0,
        description="rounds after this one are not fine-tuned and deploy the average; 0: all are fine-tuned",
    )

    @classmethod
    def defaults(cls, given: Mapping[str, Any], **known: Any) -> dict[str, Any]:
        """Returns the preset; from 100 classes on with the public code's noise of 256 for CIFAR-100."""
        name = str(given.get("preset", "fedftg"))
        own = WITH_PRESET.get(name, {})
        if own and known.get("algorithm") == "scaffold":
            own = own | WITH_SCAFFOLD
        values = {**preset(name).model_dump(), **own, **super().defaults({**own, **given})}
        return {**values, "noise_dim": 256} if (known.get("num_classes") or 0) >= 100 else values

    def build(self, context: RefinerContext) -> Refiner:
        """Returns the refiner for one experiment."""
        config = DistillConfig(**self.model_dump(include=set(DistillConfig.model_fields)))
        if self.lambda_bn and not context.model.has_batchnorm:
            raise InputError("refiner.lambda_bn needs a model with BatchNorm, and this one has none; set it to 0")
        deploys = (self.lacking or self.last_round) and (self.average != "aggregate" or self.prior_tau)
        average = Averaged.build(self, context) if deploys else None
        return FedFTG(config, context, self.absent_weight, self.lacking, self.last_round, average)
