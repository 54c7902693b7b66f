"""Distils a round's clients into one model, on images of any source: what the rivals of FedFTG have in common.

A rival subclasses `DistilledConfig`, sets its paper's defaults and returns its source of images. Nothing is kept from
round to round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from fedftg.algorithms.base import (
    ClientResult,
    Metrics,
    NoRefiner,
    Refiner,
    RefinerConfig,
    RefinerContext,
    ServerState,
)
from fedftg.distill.config import StudentConfig
from fedftg.distill.distiller import distil
from fedftg.distill.images import Images
from fedftg.distill.pool import pooled
from fedftg.distill.teachers import ListedTeachers, Teachers, stack_or_list
from fedftg.models.functional import values

ONE_STEP_STUDENT: Mapping[str, Any] = {
    "batch_size": 128,
    "student_steps": 1,
    "student_lr": 0.01,
    "student_momentum": 0.9,
    "ensemble": "uniform",
    "ensemble_mean": "logits",
}
"""What ADI, DAFL and DENSE have in common: one step of SGD on a batch, towards the plain mean of the logits."""


class DistilledConfig(RefinerConfig, StudentConfig):
    """The settings of a refiner that distils the clients' models into a student."""

    paper: ClassVar[Mapping[str, Any]] = {}
    """Defaults of inherited settings; a field declared anew would lose its bounds and description."""
    fresh: ClassVar[Mapping[str, Any]] = {}
    """Those that differ where the student starts from initial weights."""

    start: Literal["aggregate", "fresh"] = Field(
        default="aggregate", description="what the student starts from: the aggregate, or the run's initial weights"
    )

    @classmethod
    def defaults(cls, given: Mapping[str, Any], **known: Any) -> dict[str, Any]:  # noqa: ARG003
        """Returns the paper's settings, and those of a fresh student where the student is one."""
        return {**cls.paper, **(cls.fresh if given.get("start") == "fresh" else {})}

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, given: Any) -> Any:
        return {**cls.defaults(given), **given} if isinstance(given, dict) else given

    def images(self, context: RefinerContext, rng: torch.Generator) -> Images[Any]:  # noqa: ARG002
        """Returns the source of images for one round; networks of its own start from ``rng``."""
        raise TypeError(f"{type(self).__name__} does not define images(context, rng) -> Images")

    def build(self, context: RefinerContext) -> Refiner:
        """Returns the refiner for one experiment."""
        return Distilled(self, context)


@dataclass(frozen=True)
class Distilled(NoRefiner):
    """Trains a student on images of the config's source, each round anew."""

    config: DistilledConfig
    context: RefinerContext

    def refine(
        self, state: ServerState, results: Sequence[ClientResult], rng: torch.Generator
    ) -> tuple[ServerState, Metrics]:
        """Distils this round's clients into the student; rates decay as ``lr_decay ** state.round``."""
        return self.distil(self.config.images(self.context, rng), state, results, rng)

    def distil(
        self, source: Images[Any], state: ServerState, results: Sequence[ClientResult], rng: torch.Generator
    ) -> tuple[ServerState, Metrics]:
        """Does what `refine` does, on images of this source."""
        config, model = self.config, self.context.model
        clients = sorted((result for result in results if result.num_samples > 0), key=lambda result: result.client)
        start = (state.params, state.buffers) if config.start == "aggregate" else model.init()
        student, counts = model.module(*start), torch.stack([client.class_counts for client in clients])
        if self.context.models:
            of = self.context.model_of
            teachers: Teachers = ListedTeachers(
                [partial(of(c.client), c.params, c.buffers, train=False) for c in clients]
            )
        else:
            values_of = [c.params for c in clients], [c.buffers for c in clients]
            teachers = stack_or_list(partial(model, train=False), *values_of)
        images, scale = pooled(config, source), config.lr_decay**state.round
        metrics = distil(config, images, student, teachers, counts, rng=rng, lr_scale=scale)
        self.context.show(*images.newest)
        params, buffers = values(student)
        buffers = {name: buffers[name] for name in state.buffers}  # a tied buffer comes apart in the copy
        return replace(state, params=params, buffers=buffers), {name: float(m.mean()) for name, m in metrics.items()}
