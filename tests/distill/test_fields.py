"""Every field of `DistillConfig` does something, and the modes are those of METHOD's table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedftg.distill.api import refine
from fedftg.distill.config import DistillConfig
from fedftg.distill.distiller import Distiller
from fedftg.distill.generator import Generator
from fedftg.distill.teachers import ListedTeachers
from fedftg.params import Params, clone

Make = Callable[..., Any]

# Field: (another value, what else must be set for it to matter). Both sides start from the paper's preset.
CHANGES: dict[str, tuple[object, dict[str, object]]] = {
    "iterations": (3, {}),
    "generator_steps": (2, {}),
    "student_steps": (3, {}),
    "batch_size": (7, {}),
    "noise_dim": (5, {}),
    "generator_width": (3, {}),
    "discrepancy": ("l1_logits", {}),
    "discrepancy_mask": ("transferable", {}),
    "teacher_gradient": ("detached", {}),
    "fidelity_weighting": ("batch_mean", {}),
    "generator_update": ("per_client", {}),
    "student_loss": ("soft_cross_entropy", {}),
    "label_sampling": ("proportional", {}),
    "ensemble": ("uniform", {}),
    "ensemble_epsilon": (1.0, {}),
    "lambda_md": (0.5, {}),
    "lambda_cls": (0.5, {}),
    "lambda_dis": (0.5, {}),
    "temperature": (2.0, {}),
    "student_lr": (0.05, {}),
    "student_weight_decay": (0.1, {}),
    "student_momentum": (0.9, {}),
    "generator_lr": (0.001, {}),
    "lr_decay": (0.5, {}),
    "generator_optimizer_state": ("kept", {}),
    "student_mode": ("eval", {}),
    "restore_buffers": (True, {}),
    "generator_warmup": (2, {}),
    "fresh_batches": (True, {}),
    "generator_ema": (0.5, {}),
}
# How the step is executed, not what it computes: tests/distill/test_execution.py and the chunks below.
EXECUTION = {"teacher_chunk", "precision", "compile_teachers"}
OTHER_CHOICES = [("label_sampling", "uniform"), ("ensemble", "samples")]


@pytest.fixture
def outcome(classifier: Make, generator: Make, config: Make, counts: Tensor) -> Callable[..., Params]:
    """Student and generator after two rounds, rates decayed as the refiner of a federation does."""

    def run(dtype: torch.dtype = torch.float32, **overrides: object) -> Params:
        settings = config("paper", **overrides)
        made = generator(noise_dim=settings.noise_dim, width=settings.generator_width).to(dtype)
        student, distiller = classifier(4).to(dtype), Distiller(settings, made)
        teachers = ListedTeachers([classifier(seed).to(dtype) for seed in (1, 2, 3)])
        for round_ in range(2):
            rng = torch.Generator().manual_seed(round_)
            distiller.refine(student, teachers, counts, rng=rng, lr_scale=settings.lr_decay**round_)
        return {**clone(student.state_dict()), **{f"g.{n}": t for n, t in clone(made.state_dict()).items()}}

    return run


def same(left: Params, right: Params) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_no_field_is_forgotten() -> None:
    assert CHANGES.keys() | EXECUTION == set(DistillConfig.model_fields)


@pytest.mark.parametrize(
    ("field", "value"), [*((name, value) for name, (value, _) in CHANGES.items()), *OTHER_CHOICES], ids=str
)
def test_every_field_has_an_effect(outcome: Callable[..., Params], field: str, value: object) -> None:
    needed = CHANGES[field][1]
    assert not same(outcome(**needed), outcome(**{**needed, field: value}))


def test_the_same_fields_give_the_same_bits(outcome: Callable[..., Params]) -> None:
    assert same(outcome(), outcome())


@pytest.mark.parametrize("chunk", [1, 2, 5])
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"discrepancy_mask": "transferable", "generator_steps": 3, "fresh_batches": True, "generator_warmup": 1},
        {"generator_update": "per_client", "fidelity_weighting": "batch_mean", "teacher_gradient": "detached"},
        {"generator_ema": 0.5, "generator_optimizer_state": "kept", "temperature": 2.0, "student_mode": "eval"},
    ],
    ids=["paper", "masked", "per_client", "ema"],
)
def test_chunks_in_float64(outcome: Callable[..., Params], overrides: dict[str, object], chunk: int) -> None:
    """Whole runs with Adam: in float64 what rounding leaves of zero gradients is far below Adam's epsilon."""
    whole, parts = (outcome(torch.float64, **overrides, teacher_chunk=size) for size in (0, chunk))
    assert whole["0.weight"].dtype == torch.float64
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-7, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("chunk", "most"), [(0, 3), (1, 1), (2, 2)])
def test_a_chunk_is_what_is_called_at_a_time(
    classifier: Make,
    generator: Make,
    config: Make,
    counts: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    chunk: int,
    most: int,
) -> None:
    sizes: list[int] = []
    call = ListedTeachers.__call__

    def counted(self: ListedTeachers, images: Tensor) -> Tensor:
        sizes.append(len(self))
        return call(self, images)

    monkeypatch.setattr(ListedTeachers, "__call__", counted)
    teachers = ListedTeachers([classifier(seed) for seed in (1, 2, 3)])
    rng = torch.Generator().manual_seed(0)
    settings = config("paper", discrepancy_mask="transferable", teacher_chunk=chunk)
    Distiller(settings, generator()).refine(classifier(4), teachers, counts, rng=rng)
    assert max(sizes) == most


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_modes(classifier: Make, generator: Make, config: Make, counts: Tensor, mode: str) -> None:
    """One iteration of two generator and two student steps, as METHOD section 3 has them.

    The generator trains in its two steps and evaluates once for the student, whose images are made once; the student
    evaluates in the generator's steps. Only in its own steps is it in ``student_mode``. Teachers evaluate always.
    """
    made, student, modes = generator(), classifier(4).train(), []
    teachers = [classifier(seed).train() for seed in (1, 2, 3)]

    def record(name: str, module: nn.Module) -> None:
        module.register_forward_pre_hook(lambda called, _: modes.append((name, called.training)))

    record("generator", made)
    record("student", student)
    for teacher in teachers:
        record("teacher", teacher)
    settings = config("paper", iterations=1, generator_steps=2, student_mode=mode)
    rng = torch.Generator().manual_seed(0)
    Distiller(settings, made).refine(student, ListedTeachers(teachers), counts, rng=rng)
    called = {name: [training for who, training in modes if who == name] for name in ("generator", "student")}
    assert called["generator"] == [True, True, False]
    assert called["student"] == [False, False, mode == "train", mode == "train"]
    assert not any(training for name, training in modes if name == "teacher")
    assert sum(name == "teacher" for name, _ in modes) == 3 * 3


def test_no_gradient_of_weights_in_generator_steps(
    classifier: Make, generator: Make, config: Make, counts: Tensor
) -> None:
    """A hook on a tensor runs when its gradient is made; on the student's weights in its own steps only."""
    made, student, teachers = generator(), classifier(4), [classifier(seed) for seed in (1, 2, 3)]
    reached: list[str] = []
    for name, module in (("student", student), *(("teacher", teacher) for teacher in teachers)):
        for parameter in module.parameters():
            parameter.register_hook(lambda gradient, name=name: reached.append(name))
    for student_steps, expected in ((0, []), (2, ["student"])):
        settings, rng = config("paper", student_steps=student_steps), torch.Generator().manual_seed(0)
        Distiller(settings, made).refine(student, ListedTeachers(teachers), counts, rng=rng)
        assert sorted(set(reached)) == expected
    assert len(reached) == len(list(student.parameters())) * 2 * 2


def test_refine_works_in_the_students_type(classifier: Make, config: Make, counts: Tensor) -> None:
    teachers = [classifier(seed).double() for seed in (1, 2, 3)]
    settings = config(fresh_batches=True, generator_warmup=1)
    result = refine(classifier(4).double(), teachers, counts, config=settings, image_shape=(1, 8, 8))
    assert result.rolled_back is None
    assert {tensor.dtype for tensor in result.model.parameters()} == {torch.float64}
    assert result.sample(3)[0].dtype == torch.float64
    assert isinstance(result.generator, Generator)
