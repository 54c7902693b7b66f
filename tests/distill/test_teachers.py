"""Teachers: frozen, evaluating, and the same numbers in every form."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedftg.distill import teachers as teaching
from fedftg.distill.teachers import ListedTeachers, StackedTeachers, Teachers, stack_or_list
from fedftg.errors import InputError
from fedftg.params import stack


def classifier(seed: int, width: int = 3, classes: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(width * 64, classes),
    )
    model(torch.randn(16, 1, 8, 8))  # BatchNorm's statistics are now its own
    return model


IMAGES = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_listed_teachers_evaluate_and_leave_the_modules_as_they_are() -> None:
    modules = [classifier(0).train(), classifier(1, width=5).train()]
    before = [copy.deepcopy(module.state_dict()) for module in modules]
    teachers = ListedTeachers(modules)
    expected = torch.stack([copy.deepcopy(module).eval()(IMAGES) for module in modules])
    assert torch.equal(logits(teachers), expected)
    assert torch.equal(logits(teachers), expected)
    for module, state in zip(modules, before, strict=True):
        assert all(submodule.training for submodule in module.modules())
        assert all(parameter.requires_grad for parameter in module.parameters())
        assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())


def test_gradients_reach_the_images_and_no_weight() -> None:
    module, images = classifier(0), IMAGES.clone().requires_grad_()
    assert not logits(ListedTeachers([module])).requires_grad
    logits(ListedTeachers([module]), images).sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in module.parameters())


def logits(teachers: Teachers, images: Tensor = IMAGES) -> Tensor:
    return teachers(images, 0, len(teachers))


def three(kind: type[ListedTeachers | StackedTeachers]) -> ListedTeachers | StackedTeachers:
    modules = [classifier(seed).eval() for seed in range(3)]
    if kind is ListedTeachers:
        return ListedTeachers(modules)
    structure = copy.deepcopy(modules[0])

    def function(params: dict[str, Tensor], buffers: dict[str, Tensor], images: Tensor) -> Tensor:
        return functional_call(structure, (params, buffers), (images,))

    params = [dict(module.named_parameters()) for module in modules]
    return StackedTeachers(function, stack(params), stack([dict(module.named_buffers()) for module in modules]))


@pytest.mark.parametrize("kind", [ListedTeachers, StackedTeachers])
def test_parts(kind: type[ListedTeachers | StackedTeachers]) -> None:
    teachers = three(kind)
    assert len(teachers) == 3
    torch.testing.assert_close(teachers(IMAGES, 1, 3), logits(teachers)[1:3])


def test_stacked_is_listed() -> None:
    stacked, listed = three(StackedTeachers), three(ListedTeachers)
    torch.testing.assert_close(logits(stacked), logits(listed))
    expected = torch.stack([classifier(seed).eval()(IMAGES) for seed in range(3)])
    torch.testing.assert_close(logits(listed), expected)
    gradients = []
    for teachers in (stacked, listed):
        images = IMAGES.clone().requires_grad_()
        (logits(teachers, images) ** 2).sum().backward()
        gradients.append(images.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_teachers_are_stacked_on_an_accelerator_while_copies_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    def function(params: dict[str, Tensor], buffers: dict[str, Tensor], images: Tensor) -> Tensor:
        return images @ params["w"]

    weights = [{"w": torch.ones(2, 2, device="meta")} for _ in range(3)]  # 3 * 16 bytes
    for most, kind in ((48, StackedTeachers), (47, ListedTeachers)):
        monkeypatch.setattr(teaching, "STACKED_UP_TO", most)
        assert isinstance(stack_or_list(function, weights, [{}] * 3), kind)
    assert isinstance(stack_or_list(function, [{"w": torch.ones(1)}], [{}]), ListedTeachers)


def test_stacked_teachers_hold_no_gradient() -> None:
    def linear(params: dict[str, Tensor], buffers: dict[str, Tensor], images: Tensor) -> Tensor:
        return images.flatten(1) @ params["weight"] + buffers["shift"]

    weights = [{"weight": torch.randn(64, 4, requires_grad=True)} for _ in range(2)]
    shifts = [{"shift": torch.randn(4)} for _ in range(2)]
    teachers = StackedTeachers(linear, stack(weights), stack(shifts))
    assert not logits(teachers).requires_grad
    expected = torch.stack([linear(w, s, IMAGES) for w, s in zip(weights, shifts, strict=True)])
    torch.testing.assert_close(logits(teachers), expected.detach())
    listed = stack_or_list(linear, weights, shifts)
    assert not logits(listed).requires_grad


@pytest.mark.parametrize("build", [partial(ListedTeachers, []), partial(stack_or_list, lambda p, b, x: x, [], [])])
def test_no_teacher(build: partial[object]) -> None:
    with pytest.raises(InputError, match="got no teacher"):
        build()
