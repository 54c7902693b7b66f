"""Leaves: ADI's images from another start."""

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
