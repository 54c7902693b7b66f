"""Teachers: frozen, evaluating, and the same numbers in every form."""

import copy

import torch
from torch.func import functional_call

from fedftg.distill import teachers as teaching
from fedftg.distill.teachers import ListedTeachers, StackedTeachers, stack_or_list
from fedftg.params import stack

IMAGES = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_listed_teachers_evaluate_and_leave_the_modules_as_they_are(classifier):
    modules = [classifier(0, dropout=0.5).train(), classifier(1, width=5).train()]
    before = [copy.deepcopy(module.state_dict()) for module in modules]
    teachers = ListedTeachers(modules)
    expected = torch.stack([copy.deepcopy(module).eval()(IMAGES) for module in modules])
    assert torch.equal(logits(teachers), expected)
    assert torch.equal(logits(teachers), expected)
    for module, state in zip(modules, before, strict=True):
        assert all(submodule.training for submodule in module.modules())
        assert all(parameter.requires_grad for parameter in module.parameters())
        assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())


def test_gradients_reach_the_images_and_no_weight(classifier):
    module, images = classifier(0), IMAGES.clone().requires_grad_()
    assert not logits(ListedTeachers([module])).requires_grad
    logits(ListedTeachers([module]), images).sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in module.parameters())


def logits(teachers, images=IMAGES):
    return teachers(images, 0, len(teachers))


def test_every_form_gives_the_same_numbers(classifier):
    modules = [classifier(seed) for seed in range(3)]

    def function(params, buffers, images):
        return functional_call(modules[0], (params, buffers), (images,))

    params = [dict(module.named_parameters()) for module in modules]
    buffers = [dict(module.named_buffers()) for module in modules]
    forms = (
        StackedTeachers(function, stack(params), stack(buffers)),
        ListedTeachers(modules),
        stack_or_list(function, params, buffers),
    )
    expected, gradients = torch.stack([module(IMAGES) for module in modules]).detach(), []
    for teachers in forms:
        assert len(teachers) == 3
        assert not logits(teachers).requires_grad
        torch.testing.assert_close(logits(teachers), expected)
        torch.testing.assert_close(teachers(IMAGES, 1, 3), expected[1:3])
        images = IMAGES.clone().requires_grad_()
        (logits(teachers, images) ** 2).sum().backward()
        gradients.append(images.grad)
    torch.testing.assert_close(gradients[0], gradients[1])
    torch.testing.assert_close(gradients[0], gradients[2])


def test_teachers_are_stacked_on_an_accelerator_while_copies_are_small(monkeypatch):
    def function(params, buffers, images):
        return images @ params["w"]

    weights = [{"w": torch.ones(2, 2, device="meta")} for _ in range(3)]  # 3 * 16 bytes
    for most, kind in ((48, StackedTeachers), (47, ListedTeachers)):
        monkeypatch.setattr(teaching, "STACKED_UP_TO", most)
        assert isinstance(stack_or_list(function, weights, [{}] * 3), kind)
    assert isinstance(stack_or_list(function, [{"w": torch.ones(1)}], [{}]), ListedTeachers)
