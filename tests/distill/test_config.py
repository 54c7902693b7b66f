"""The presets and their fields; the values of ``fedftg`` are measured, not tested."""

import subprocess
import sys

import pytest

from fedftg.distill.config import DistillConfig, preset
from fedftg.errors import InputError


def test_values_of_the_paper():
    """METHOD section 3."""
    paper = preset("paper")
    assert paper == DistillConfig()
    assert (paper.iterations, paper.generator_steps, paper.student_steps, paper.batch_size) == (10, 1, 5, 50)
    assert (paper.student_lr, paper.student_weight_decay, paper.student_momentum) == (0.1, 1e-3, 0.0)
    assert (paper.generator_lr, paper.lr_decay, paper.generator_optimizer_state) == (0.01, 0.998, "reset")
    assert (paper.lambda_md, paper.lambda_cls, paper.lambda_dis, paper.noise_dim) == (1.0, 1.0, 1.0, 100)
    assert (paper.student_mode, paper.discrepancy_mask) == ("train", "none")


def test_official_differs_from_the_paper_in_these_fields_only():
    pairs = zip(preset("paper"), preset("official"), strict=True)
    assert {name: (paper, official) for (name, paper), (_, official) in pairs if paper != official} == {
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
def test_wrong_values_give_one_line(overrides, message):
    with pytest.raises(InputError, match=message) as caught:
        preset("fedftg", **overrides)
    assert "\n" not in str(caught.value)


def test_the_presets_are_known_without_torch():
    code = "import sys, fedftg.distill.config; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
