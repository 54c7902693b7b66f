"""The ``official`` preset against numbers measured by running the authors' public code.

The file may be replaced by another with other sizes: ``FEDFTG_GOLDEN=/path/to/other.npz pytest tests/distill``. All sizes
come from the arrays. Tolerance: 1e-4 of the largest number of each tensor.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedftg.distill import losses
from fedftg.distill.config import preset
from fedftg.distill.distiller import Distiller
from fedftg.distill.generator import Generator
from fedftg.distill.labels import ensemble_weights, sample_labels
from fedftg.distill.teachers import ListedTeachers
from fedftg.params import unprefixed

DEFAULT = Path(__file__).parents[1] / "golden" / "official_step_and_run.npz"
TOLERANCE = 1e-4

# Layers of the public code's generator, by their names in ours.
LAYERS = {
    "l1.0": "noise_layer",
    "l2.0": "label_layer",
    "conv_blocks0.0": "base_norm",
    "conv_blocks1.0": "blocks.0.0",
    "conv_blocks1.1": "blocks.0.1",
    "conv_blocks2.0": "blocks.1.0",
    "conv_blocks2.1": "blocks.1.1",
    "conv_blocks2.3": "to_image",
    "conv_blocks2.5": "image_norm",
}


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with np.load(os.environ.get("FEDFTG_GOLDEN") or DEFAULT, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(np.array(arrays[name])) for name in arrays.files}


def relative_error(got: Tensor, expected: Tensor) -> float:
    got, expected = got.detach().double(), expected.double()
    assert got.shape == expected.shape
    return float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-12))


def generator_state(golden: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in unprefixed(golden, prefix).items():
        layer, _, leaf = name.rpartition(".")
        renamed[f"{LAYERS[layer]}.{leaf}"] = tensor
    return renamed


def build_generator(golden: dict[str, Tensor]) -> Generator:
    state = generator_state(golden, "init.generator.")
    image_shape = tuple(golden["step.fake"].shape[1:])
    width = state["to_image.weight"].shape[1]
    base = math.isqrt(state["noise_layer.weight"].shape[0] // width)
    classes = golden["counts"].shape[1]
    upsamplings = round(math.log2(image_shape[1] / base))
    generator = Generator(golden["step.z"].shape[1], classes, image_shape, width, upsamplings=upsamplings)
    generator.load_state_dict(state)
    return generator


def build_classifier(golden: dict[str, Tensor], prefix: str) -> nn.Sequential:
    state = unprefixed(golden, prefix)
    out, channels, kernel, _ = state["0.weight"].shape
    classes, flat = state["4.weight"].shape
    size, side = golden["step.fake"].shape[2], math.isqrt(flat // out)
    stride = next(s for s in range(1, size) if (size + 2 - kernel) // s + 1 == side)
    model = nn.Sequential(
        nn.Conv2d(channels, out, kernel, stride=stride, padding=1),
        nn.BatchNorm2d(out),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(flat, classes),
    )
    model.load_state_dict(state)
    return model


def build_teachers(golden: dict[str, Tensor]) -> ListedTeachers:
    return ListedTeachers([build_classifier(golden, f"init.teacher{k}.") for k in range(golden["counts"].shape[0])])


def test_one_batch_at_the_initial_weights(golden: dict[str, Tensor]) -> None:
    noise, labels, student = golden["step.z"], golden["step.y"], build_classifier(golden, "init.student.").eval()
    images = build_generator(golden).train()(noise, labels)
    assert relative_error(images, golden["step.fake"]) < TOLERANCE
    assert relative_error(student(images), golden["step.student_logits"]) < TOLERANCE
    assert relative_error(build_teachers(golden)(images), golden["step.teacher_logits"]) < TOLERANCE
    weights = ensemble_weights(golden["counts"])[:, labels]
    assert relative_error(weights.T, golden["step.weights"]) < TOLERANCE


def test_generator_losses_of_each_teacher(golden: dict[str, Tensor]) -> None:
    config, labels = preset("official"), golden["step.y"]
    weights = ensemble_weights(golden["counts"])[:, labels]
    teachers, student = golden["step.teacher_logits"], golden["step.student_logits"]
    diversity = losses.diversity(golden["step.z"], golden["step.fake"])
    rows = []
    for k in range(len(teachers)):
        one = slice(k, k + 1)
        discrepancy = losses.model_discrepancy(teachers[one], student, weights[one], kind=config.discrepancy)
        fidelity = losses.fidelity(teachers[one], labels, weights[one], weighting=config.fidelity_weighting)
        total = config.lambda_cls * fidelity - config.lambda_md * discrepancy
        total = total + config.lambda_dis * diversity / len(teachers)
        rows.append(torch.stack([total, -discrepancy, fidelity, diversity]))
    expected = golden["step.losses_total_md_cls_dis"]
    for column in range(4):
        assert relative_error(torch.stack(rows)[:, column], expected[:, column]) < TOLERANCE


def test_student_loss(golden: dict[str, Tensor]) -> None:
    weights = ensemble_weights(golden["counts"])[:, golden["step.y"]]
    ensemble = losses.ensemble_probabilities(golden["step.teacher_logits"], weights)
    got = losses.student_loss(golden["step.student_logits"], ensemble, kind=preset("official").student_loss)
    assert relative_error(got, golden["step.loss_student"]) < TOLERANCE


def test_label_histogram(golden: dict[str, Tensor]) -> None:
    key = next(name for name in golden if name.startswith("labels.histogram_of_"))
    number = int(golden[key].sum())
    kind = preset("official").label_sampling
    labels = sample_labels(golden["counts"].double(), 1, number, kind, rng=torch.Generator().manual_seed(0))
    assert torch.bincount(labels.flatten(), minlength=golden["counts"].shape[1]).tolist() == golden[key].tolist()


@pytest.mark.parametrize("teacher_chunk", [0, 2])
def test_final_states_of_a_run(golden: dict[str, Tensor], teacher_chunk: int) -> None:
    iterations, batch_size, noise_dim = golden["run.z"].shape
    config = preset(
        "official", iterations=iterations, batch_size=batch_size, noise_dim=noise_dim, teacher_chunk=teacher_chunk
    )
    generator, student = build_generator(golden), build_classifier(golden, "init.student.")
    Distiller(config, generator).refine(
        student,
        build_teachers(golden),
        golden["counts"],
        rng=torch.Generator().manual_seed(0),
        noise=golden["run.z"],
        labels=golden["run.y"],
    )
    for state, expected in (
        (student.state_dict(), unprefixed(golden, "final.student.")),
        (generator.state_dict(), generator_state(golden, "final.generator.")),
    ):
        assert set(state) == set(expected)
        errors = {name: relative_error(state[name], expected[name]) for name in expected}
        assert max(errors.values()) < TOLERANCE, errors
