"""Digits, for every refiner that keeps nothing and has no real images."""

from typing import Any

import pytest
import torch

from fedftg.algorithms.adi import AdiConfig
from fedftg.algorithms.base import ServerState
from fedftg.algorithms.coboosting import CoBoostingConfig
from fedftg.algorithms.dafl import DaflConfig
from fedftg.algorithms.dense import DenseConfig
from fedftg.algorithms.dfrd import DfrdConfig
from fedftg.algorithms.leaves import LeavesConfig

LEAVES: dict[str, Any] = {"iterations": 8, "pool_size": 1024, "pool_batches": 60, "image_steps": 40}
ADI: dict[str, Any] = {"iterations": 5, "batch_size": 100, "pool_batches": 60, "image_steps": 50}
DAFL: dict[str, Any] = {"iterations": 100, "batch_size": 64, "pool_batches": 8, "generator_width": 8}
DENSE: dict[str, Any] = {"iterations": 30, "batch_size": 64, "pool_batches": 10, "generator_width": 8}
DENSE |= {"noise_dim": 16, "generator_steps": 10, "generator_lr": 0.005}
UNTAUGHT = {"iterations": 1, "student_steps": 0}


@pytest.mark.parametrize(
    ("kind", "settings", "without", "most", "least", "metric", "bound"),
    [
        (LeavesConfig, LEAVES, {"image_lr": 0}, 0.8, 0.8, "teacher_agreement", 0.9),
        (AdiConfig, ADI | {"image_augment": "none"}, UNTAUGHT, 0.2, 0.85, "teacher_agreement", 0.8),
        (DaflConfig, DAFL | {"student_lr": 0.05}, UNTAUGHT, 0.2, 0.75, "one_hot", 1.0),
        (DenseConfig, DENSE, UNTAUGHT, 0.2, 0.8, "teacher_agreement", 0.9),
        (CoBoostingConfig, DENSE | {"lambda_adv": 0.3}, UNTAUGHT, 0.2, 0.7, "teacher_agreement", 0.9),
    ],
)
def test_the_student_learns_digits_that_it_never_saw(digits, kind, settings, without, most, least, metric, bound):
    """From the run's initial weights, which know nothing: all it can learn from are the clients' models."""
    settings = {"start": "fresh", "pool_augment": "none", **settings}
    before, _ = digits.refined(kind(**settings | without))
    after, metrics = digits.refined(kind(**settings))
    assert digits.ensemble > 0.93
    assert before < most <= least < after
    assert (metrics[metric] > bound) == (metric == "teacher_agreement")


@pytest.mark.parametrize("kind", [DaflConfig, AdiConfig, DenseConfig, CoBoostingConfig, DfrdConfig])
def test_rates_decay_with_the_round(digits, kind):
    """In round 1 at a decay of 1/2 each rate is what it is in round 0 at half of it."""
    few = {"iterations": 2, "batch_size": 8, "pool_batches": 1}
    few |= {name: 2 for name in ("image_steps", "generator_steps", "generator_width") if name in kind.model_fields}
    rates = [name for name in ("student_lr", "generator_lr", "image_lr") if name in kind.model_fields]
    plain = kind(**few)
    halved = kind(**few, **{name: getattr(plain, name) / 2 for name in rates})
    ends = []
    for config, done in ((kind(**few, lr_decay=0.5), 1), (halved, 0), (plain, 0)):
        refiner, (params, buffers) = config.build(digits.context), digits.context.model.init()
        state = ServerState(done, params, buffers, {}, refiner.init(params, torch.Generator().manual_seed(0)))
        ends.append(refiner.refine(state, digits.results, torch.Generator().manual_seed(0))[0].params)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in params)
    assert not all(torch.equal(ends[0][name], ends[2][name]) for name in params)
