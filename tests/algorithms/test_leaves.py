"""Leaves: ADI's images from another start, and digits."""

import torch

from fedftg.algorithms.leaves import LeavesConfig
from fedftg.distill.leaves import dead_leaves


def test_a_fresh_student_has_no_statistics_to_keep():
    assert LeavesConfig().student_mode == "eval"
    assert LeavesConfig(start="fresh").student_mode == "train"
    assert LeavesConfig(start="fresh", student_mode="eval").student_mode == "eval"


def test_images_start_from_leaves(digits):
    class Call:
        rng = torch.Generator().manual_seed(5)
        lr_scale = 0.0  # pixels stay
        ensemble = None

    source = LeavesConfig(batch_size=6, image_steps=1).images(digits.context, torch.Generator())
    source.terms = lambda call, images, labels: {"fidelity": images.sum()}
    source.improve(Call, torch.zeros(6, dtype=torch.int64))
    images, labels = source.make(torch.zeros(6, dtype=torch.int64))
    assert torch.equal(images, dead_leaves(6, (1, 8, 8), torch.Generator().manual_seed(5)))
    assert len(labels) == 6


def test_the_student_learns_digits_that_it_never_saw(digits):
    """From the run's initial weights, which know nothing; steps on the images help."""
    small = {"start": "fresh", "iterations": 8, "pool_size": 1024, "pool_batches": 60}
    accuracy, metrics = digits.refined(LeavesConfig(**small, image_steps=40, pool_augment="none"))
    still, _ = digits.refined(LeavesConfig(**small, image_lr=0, pool_augment="none"))
    assert digits.ensemble > 0.93
    assert accuracy > 0.8
    assert accuracy > still
    assert metrics["teacher_agreement"] > 0.9
