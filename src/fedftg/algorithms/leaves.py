"""Leaves, our refiner for one round: ADI's images, optimised from dead leaves towards drawn labels in ten steps.

Images of random overlapping shapes have edges and correlations as photographs have, so that ten steps suffice, and
thousands of images are made in the time of ADI's first batches. The student starts from the aggregate and learns from
the mean of the clients' logits without their label priors. Hypothesis, ablations and limits: docs/algorithms/leaves.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from fedftg.algorithms.adi import AdiConfig


class LeavesConfig(AdiConfig):
    """``refiner.name = "leaves"``: optimises random overlapping shapes in ten steps, for one round; ours."""

    paper: ClassVar[Mapping[str, Any]] = {
        "broadcast": 0.0,  # clients put their priors back: sent in every round, it comes undone
        "iterations": 200,
        "batch_size": 128,
        "student_steps": 1,
        "student_optimizer": "adam",
        "student_lr": 0.003,
        "student_schedule": "cosine",
        "student_weight_decay": 0.0,
        "student_mode": "eval",  # the aggregate's BatchNorm statistics are of real images
        "ensemble": "samples",
        "ensemble_mean": "logits",
        "teacher_prior_tau": 1.0,
        "pool_size": 25600,
        "pool_batches": 9,
        "image_start": "leaves",
        "image_steps": 10,
        "image_augment": "none",
        "lambda_variation": 0.0,
        "lambda_norm": 0.0,
        "lambda_bn": 1.0,
        "lambda_adversarial": 0.0,
    }
    fresh: ClassVar[Mapping[str, Any]] = {"student_mode": "train"}
    name: Literal["leaves"] = "leaves"  # type: ignore[assignment]
