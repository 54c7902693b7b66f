"""How the work is done, not what is done: chunks by default, bfloat16, compiled teachers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fedftg
from fedftg.distill import distiller as distilling
from fedftg.distill import steps, teachers
from fedftg.distill.config import DistillConfig
from fedftg.distill.distiller import Distiller
from fedftg.distill.generator import Generator
from fedftg.distill.teachers import ListedTeachers, StackedTeachers, stack_or_list
from fedftg.errors import InputError
from fedftg.params import Params


def refined(
    classifier: Callable[..., nn.Module], generator: Callable[..., Generator], config: DistillConfig, counts: Tensor
) -> tuple[nn.Module, Generator]:
    student, made = classifier(4), generator()
    ensemble = ListedTeachers([classifier(seed) for seed in (1, 2, 3)])
    Distiller(config, made).refine(student, ensemble, counts, rng=torch.Generator().manual_seed(0))
    return student, made


def test_many_teachers_are_taken_in_chunks(
    monkeypatch: pytest.MonkeyPatch, classifier: Any, generator: Any, config: Any, counts: Tensor
) -> None:
    calls: list[int] = []
    part = ListedTeachers.part

    def watched(self: ListedTeachers, start: int, stop: int) -> ListedTeachers:
        calls.append(stop - start)
        return part(self, start, stop)

    monkeypatch.setattr(ListedTeachers, "part", watched)
    refined(classifier, generator, config("paper"), counts)
    assert set(calls) == {3}
    calls.clear()
    monkeypatch.setattr(steps, "MOST_AT_ONCE", 2)
    refined(classifier, generator, config("paper"), counts)
    assert set(calls) == {1, 2}


@pytest.mark.parametrize("name", ["paper", "official", "fedftg"])
def test_bfloat16_moves_the_same_way_and_keeps_types(
    monkeypatch: pytest.MonkeyPatch, classifier: Any, generator: Any, config: Any, counts: Tensor, name: str
) -> None:
    """A bfloat16 has 8 bits of precision: after one iteration the student has moved within some percent of the same."""
    monkeypatch.setattr(distilling, "_has_bfloat16", lambda device: True)
    one = {"iterations": 1, "student_steps": 1, "student_lr": 1.0}
    start = classifier(4).state_dict()
    full, _ = refined(classifier, generator, config(name, **one), counts)
    half, made = refined(classifier, generator, config(name, precision="bfloat16", **one), counts)
    values = {**half.state_dict(), **made.state_dict()}.values()
    assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in values)
    moved, differs = 0.0, 0.0
    for key, parameter in full.named_parameters():
        moved += float((parameter.detach() - start[key]).square().sum())
        differs += float((parameter - half.get_parameter(key)).detach().square().sum())
    assert 0 < differs < 0.05 * moved


def test_bfloat16_without_the_hardware_is_refused(
    monkeypatch: pytest.MonkeyPatch, classifier: Any, generator: Any, config: Any, counts: Tensor
) -> None:
    monkeypatch.setattr(distilling, "_has_bfloat16", lambda device: False)
    with pytest.raises(InputError, match="'bfloat16' needs hardware that has it, and cpu has not"):
        refined(classifier, generator, config("paper", precision="bfloat16"), counts)


def test_teachers_are_stacked_on_an_accelerator_while_copies_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    def function(params: Params, buffers: Params, images: Tensor) -> Tensor:
        return images @ params["w"]

    made = [{"w": torch.ones(2, 2, device="meta")} for _ in range(3)]  # 3 * 16 bytes
    buffers: list[Params] = [{} for _ in made]
    monkeypatch.setattr(teachers, "STACKED_UP_TO", 48)
    assert isinstance(stack_or_list(function, made, buffers), StackedTeachers)
    monkeypatch.setattr(teachers, "STACKED_UP_TO", 47)
    assert isinstance(stack_or_list(function, made, buffers), ListedTeachers)
    assert isinstance(stack_or_list(function, [{"w": torch.ones(2, 2)}], [{}]), ListedTeachers)


@pytest.mark.filterwarnings("ignore")  # of the compiler's own parts
def test_compiled_teachers_give_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One trace serves all teachers and rounds; the compiler's back end, which takes minutes, is left out."""
    traced: list[object] = []
    real = torch.compile

    def traced_only(function: Any, **options: Any) -> Any:
        traced.append(options)
        return real(function, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", traced_only)
    small = [
        "rounds=2", "threads=1", "data.max_train=100", "partition.num_clients=4", "cohort={size=2}", "local.epochs=1",
        "refiner.iterations=1", "refiner.batch_size=8", "refiner.generator_width=4", "refiner.generator_steps=1",
    ]  # fmt: skip
    plain, compiled = (
        fedftg.run("default", overrides=[*small, f"refiner.compile_teachers={flag}"], out=tmp_path / flag)
        for flag in ("false", "true")
    )
    assert traced == [{"dynamic": False}]
    for name, values in plain.state.params.items():
        torch.testing.assert_close(compiled.state.params[name], values, atol=1e-5, rtol=1e-4)
