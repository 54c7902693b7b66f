"""The presets and their fields; the values of ``fedftg`` are measured, not tested."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from fedftg.distill.config import PRESETS, DistillConfig, preset
from fedftg.errors import InputError


def differences(left: DistillConfig, right: DistillConfig) -> dict[str, tuple[Any, Any]]:
    pairs = {name: (getattr(left, name), getattr(right, name)) for name in DistillConfig.model_fields}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def test_the_paper_is_the_class_default() -> None:
    assert preset("paper") == DistillConfig()
    assert set(PRESETS) == {"paper", "official", "fedftg"}


def test_values_of_the_paper() -> None:
    """METHOD section 3."""
    paper = preset("paper")
    assert (paper.iterations, paper.generator_steps, paper.student_steps, paper.batch_size) == (10, 1, 5, 50)
    assert (paper.student_lr, paper.student_weight_decay, paper.student_momentum) == (0.1, 1e-3, 0.0)
    assert (paper.generator_lr, paper.lr_decay, paper.generator_optimizer_state) == (0.01, 0.998, "reset")
    assert (paper.lambda_md, paper.lambda_cls, paper.lambda_dis, paper.noise_dim) == (1.0, 1.0, 1.0, 100)
    assert (paper.student_mode, paper.discrepancy_mask) == ("train", "none")


def test_official_differs_from_the_paper_in_these_fields_only() -> None:
    assert differences(preset("paper"), preset("official")) == {
        "discrepancy": ("kl", "l1_logits"),
        "teacher_gradient": ("full", "detached"),
        "fidelity_weighting": ("sample", "batch_mean"),
        "generator_update": ("joint", "per_client"),
        "student_loss": ("kl", "soft_cross_entropy"),
        "label_sampling": ("iid", "proportional"),
        "ensemble_epsilon": (0.0, 1e-6),
    }


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"iterations": 0}, r"iterations must .*got 0; I: batches"),
        ({"iteratons": 3}, "unknown key 'iteratons'; did you mean 'iterations'"),
        ({"batch_size": 1}, "batch_size must .*got 1"),
        ({"student_lr": -0.1}, "student_lr must .*got -0.1"),
        ({"discrepancy": "js"}, "discrepancy must .*'kl' or 'l1_logits'.*got 'js'"),
    ],
)
def test_wrong_values_give_one_line(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        preset("fedftg", **overrides)
    assert "\n" not in str(caught.value)


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(InputError, match="unknown preset 'offical'; did you mean 'official'"):
        preset("offical")


def test_the_presets_are_known_without_torch() -> None:
    code = "import sys, fedftg.distill.config; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
