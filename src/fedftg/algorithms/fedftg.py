"""FedFTG as a refiner, on any algorithm.

Zhang, Shen, Ding, Tao, Duan, "Fine-tuning Global Model via Data-Free Knowledge Distillation for Non-IID Federated
Learning", CVPR 2022, https://arxiv.org/abs/2203.09249.

    min_w max_theta E_{y ~ p_t(y), z ~ N(0, I)} [ sum_k a_k(y) (L_md - lambda_cls L_cls) - lambda_dis L_dis ]
    with x = G(z, y; theta)

The clients' models of this round are the teachers, the aggregate is the student, and the generator's weights persist
over rounds. The work is done by `fedftg.distill.distiller.Distiller`; the differences from paper and public code are
the fields of `fedftg.distill.config.DistillConfig`, and ours of a federation, ``absent_weight``:

Clients that sit a round out take what they know with them: the aggregate forgets the classes of the absent. The model
that the round before ended with still knows them, so it is one more teacher, with class counts ``absent_weight`` times
the sum of those that clients gave when they last took part. ``a_k(y)``, ``p_t(y)`` and the set of held classes then
follow as always.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fedftg.algorithms.base import ClientResult, Memory, Metrics, Refiner, RefinerConfig, RefinerContext, ServerState
from fedftg.distill.config import PRESETS, DistillConfig, preset
from fedftg.distill.distiller import Distiller
from fedftg.distill.generator import Generator
from fedftg.distill.teachers import stack_or_list
from fedftg.models.functional import values
from fedftg.params import Params, prefixed, unprefixed
from fedftg.seeds import forked

_MODEL, _CLIENTS, _COUNTS = "past.model.", "past.clients", "past.counts"

ABSENT_WEIGHTS = {"fedftg": 1.0}
"""Of the presets; 0 for those that are not named."""


@dataclass(frozen=True)
class FedFTG:
    """Distils the clients of a round into the aggregate, on inputs from a generator that lives on the server."""

    config: DistillConfig
    context: RefinerContext
    absent_weight: float = 0.0
    """See `FedFTGConfig`."""

    def init(self, params: Params, rng: torch.Generator) -> Memory:  # noqa: ARG002
        """The generator's initial weights, drawn from ``rng``."""
        return self._distiller(int(torch.randint(2**62, (), generator=rng))).memory()

    def refine(
        self, state: ServerState, results: Sequence[ClientResult], rng: torch.Generator
    ) -> tuple[ServerState, Metrics]:
        """Fine-tunes the aggregate; rates decay as ``lr_decay ** state.round``."""
        distiller = self._distiller(seed=0)
        distiller.load_memory(state.refiner)
        model = self.context.model
        student = model.module(state.params, state.buffers)
        ordered = sorted((r for r in results if r.num_samples > 0), key=lambda result: result.client)
        previous = PreviousRounds.of(state.refiner) if self.absent_weight else PreviousRounds()
        taught = [(r.params, r.buffers, r.class_counts.to(torch.float64)) for r in ordered]
        absent = previous.class_counts([r.client for r in ordered])
        if absent is not None:
            taught.append((previous.part(state.params), previous.part(state.buffers), self.absent_weight * absent))
        function = partial(model, train=False)
        teachers = stack_or_list(function, [params for params, _, _ in taught], [buffers for _, buffers, _ in taught])
        counts = torch.stack([counts for _, _, counts in taught])
        scale = self.config.lr_decay**state.round
        metrics = distiller.refine(student, teachers, counts, rng=rng, lr_scale=scale)
        params, buffers = values(student)
        memory = distiller.memory()
        if self.absent_weight:
            memory |= previous.after(ordered, {**params, **buffers}).memory()
        return replace(state, params=params, buffers=buffers, refiner=memory), metrics.means()

    def _distiller(self, seed: int) -> Distiller:
        with forked(seed, torch.device("cpu")):
            generator = Generator(
                self.config.noise_dim, self.context.num_classes, self.context.image_shape, self.config.generator_width
            )
        return Distiller(self.config, generator.to(self.context.device))


@dataclass(frozen=True)
class PreviousRounds:
    """What the server remembers of rounds before this one."""

    model: Params = field(default_factory=dict)
    """The last round's fine-tuned parameters and buffers; empty before it."""
    counts: dict[int, Tensor] = field(default_factory=dict)
    """``(C,)`` int64 of each client, as it gave them when it last took part."""

    @staticmethod
    def of(memory: Memory) -> PreviousRounds:
        """From what `memory` gave."""
        if _CLIENTS not in memory:
            return PreviousRounds()
        counts = dict(zip(memory[_CLIENTS].tolist(), memory[_COUNTS].cpu(), strict=True))
        return PreviousRounds(unprefixed(memory, _MODEL), counts)

    def memory(self) -> Memory:
        """As named tensors, which a checkpoint can hold."""
        known = {_CLIENTS: torch.tensor(list(self.counts)), _COUNTS: torch.stack(list(self.counts.values()))}
        return known | prefixed(self.model, _MODEL)

    def class_counts(self, present: Collection[int]) -> Tensor | None:
        """``(C,)`` float64: those of all known clients that are not present; None where these hold nothing."""
        absent = [counts for client, counts in self.counts.items() if client not in present]
        total = torch.stack(absent).sum(dim=0, dtype=torch.float64) if absent else None
        return total if total is not None and bool(total.any()) else None

    def part(self, like: Params) -> Params:
        """The remembered values of these names."""
        return {name: self.model[name] for name in like}

    def after(self, results: Sequence[ClientResult], model: Params) -> PreviousRounds:
        """With this round's clients and its fine-tuned model; clients in ascending order."""
        counts = self.counts | {result.client: result.class_counts.cpu().to(torch.int64) for result in results}
        return PreviousRounds(model, dict(sorted(counts.items())))


def of_preset(name: str) -> dict[str, Any]:
    """Every setting of a preset in a federation.

    Raises:
        InputError: no such preset.
    """
    return {**preset(name).model_dump(), "absent_weight": ABSENT_WEIGHTS.get(name, 0.0)}


class FedFTGConfig(RefinerConfig, DistillConfig):
    """``refiner.name = "fedftg"``: a preset, and any field of `DistillConfig` that should differ from it."""

    name: Literal["fedftg"] = "fedftg"
    preset: str = Field(default="fedftg", description="paper, official (the public code, exactly) or fedftg (ours)")
    absent_weight: float = Field(
        default=0.0,
        ge=0,
        description="last round's model is one more teacher, with this times the class counts that absent clients gave "
        "when they last took part; 0 is off, 1 counts the absent like the present",
    )

    @classmethod
    def defaults(cls, num_classes: int | None) -> dict[str, Any]:
        """From 100 classes on, the public code's noise of 256 for CIFAR-100; else the 100 of `DistillConfig`."""
        return {"noise_dim": 256} if num_classes is not None and num_classes >= 100 else {}

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {**of_preset(str(given.get("preset", "fedftg"))), **given}

    @classmethod
    def kept(cls, given: Mapping[str, Any], key: str) -> dict[str, Any]:
        """Another preset leaves in place the settings that differ from the preset that they came with."""
        name = str(given.get("preset", "fedftg"))
        values = of_preset(name) if key == "preset" and name in PRESETS else {}
        return {field: value for field, value in given.items() if field not in values or values[field] != value}

    def build(self, context: RefinerContext) -> Refiner:
        """The refiner for one experiment."""
        config = DistillConfig(**self.model_dump(include=set(DistillConfig.model_fields)))
        return FedFTG(config, context, self.absent_weight)
