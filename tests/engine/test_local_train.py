import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from fedftg.algorithms.base import LocalTask
from fedftg.algorithms.fedavg import PlainLocal
from fedftg.engine.local_train import LocalConfig, Sgd, clip, train
from fedftg.models.functional import FunctionalModel
from fedftg.params import Params

BATCHES = [
    (torch.randn(6, 4, generator=torch.Generator().manual_seed(i)), torch.tensor([0, 1, 2, 0, 1, 2])) for i in range(4)
]


def make(module: nn.Module, lr: float = 0.3) -> tuple[FunctionalModel, LocalTask]:
    model = FunctionalModel(module)
    params, buffers = model.init()
    return model, LocalTask(1, 0, params, buffers, {}, {}, 24, 1.0, lr, 0)


def layers() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.parametrize(
    "settings",
    [
        LocalConfig(weight_decay=0, max_grad_norm=0),
        LocalConfig(weight_decay=0.1, max_grad_norm=0),
        LocalConfig(weight_decay=0.1, momentum=0.9, max_grad_norm=0.05),
    ],
    ids=["plain", "weight_decay", "momentum_and_clipping"],
)
def test_equals_torch_optim(settings: LocalConfig) -> None:
    """The same steps by torch.optim.SGD and clip_grad_norm_, written out."""
    module = layers()
    model, task = make(module)
    result = train(model, PlainLocal(), task, BATCHES, torch.ones(3), settings)
    reference = layers().train()
    sgd = torch.optim.SGD(reference.parameters(), 0.3, momentum=settings.momentum, weight_decay=settings.weight_decay)
    losses = []
    for images, labels in BATCHES:
        sgd.zero_grad()
        loss = nn.functional.cross_entropy(reference(images), labels)
        loss.backward()
        if settings.max_grad_norm:
            nn.utils.clip_grad_norm_(reference.parameters(), settings.max_grad_norm)
        sgd.step()
        losses.append(loss.item())
    for name, tensor in reference.named_parameters():
        torch.testing.assert_close(result.params[name], tensor.detach())
    for name, tensor in reference.named_buffers():
        torch.testing.assert_close(result.buffers[name], tensor)
    assert result.loss == pytest.approx(sum(losses) / len(losses))


def test_no_batch_gives_the_model_back() -> None:
    model, task = make(layers())
    result = train(model, PlainLocal(), task, [], torch.zeros(3), LocalConfig())
    assert math.isnan(result.loss)
    assert all(torch.equal(result.params[name], tensor) for name, tensor in task.params.items())


def test_a_parameter_that_the_loss_does_not_use_only_decays() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)
            self.idle = nn.Parameter(torch.ones(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(x)

    model, task = make(Unused(), lr=0.5)
    result = train(model, PlainLocal(), task, BATCHES[:1], torch.ones(3), LocalConfig(weight_decay=0.1))
    assert result.params["idle"].tolist() == pytest.approx([0.95, 0.95])


def test_clip_by_hand() -> None:
    """Norm of (3, 4) is 5: clipped at 1 it becomes (0.6, 0.8); at 10 and at 0 (off) it stays."""
    grads: Params = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}
    assert [value.item() for value in clip(grads, 1.0).values()] == pytest.approx([0.6, 0.8], rel=1e-5)
    assert clip(grads, 10.0)["b"].item() == 4.0
    assert clip(grads, 0.0) is grads


def test_rate_decays_from_round_2() -> None:
    """0.1 * 0.5^(t - 1)."""
    settings = LocalConfig(lr=0.1, lr_decay=0.5)
    assert [settings.lr_at(round) for round in (1, 2, 3)] == [0.1, 0.05, 0.025]


def stepped(make_step: Callable[[Params], Callable[[Params], None]], rounds: int = 3) -> Params:
    torch.manual_seed(0)
    params = {"a": torch.randn(5, 3), "kernel": torch.randn(4, 3, 3, 3), "c": torch.randn(2)}
    step = make_step(params)
    for _ in range(rounds):
        grads = {name: torch.randn_like(value) for name, value in params.items()}
        # As a convolution may return it, and as the gradient of a mean is: other strides than the parameter.
        grads["kernel"] = grads["kernel"].contiguous(memory_format=torch.channels_last)
        grads["c"] = torch.randn((), dtype=torch.float64).expand(2)  # a rule may count in another type
        before = {name: grad.clone() for name, grad in grads.items()}
        step(grads)
        assert all(torch.equal(grads[name], value) for name, value in before.items())
    return params


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_sgd_is_that_of_torch_whatever_the_strides(momentum: float, weight_decay: float) -> None:
    def reference(params: Params) -> Callable[[Params], None]:
        leaves = [nn.Parameter(value) for value in params.values()]
        optimiser = torch.optim.SGD(leaves, lr=0.1, momentum=momentum, weight_decay=weight_decay, foreach=False)

        def step(grads: Params) -> None:
            for leaf, grad in zip(leaves, grads.values(), strict=True):
                leaf.grad = grad.to(leaf.dtype).clone()
            optimiser.step()

        return step

    settings = LocalConfig(momentum=momentum, weight_decay=weight_decay)
    expected = stepped(reference)
    found = stepped(lambda params: Sgd(params, 0.1, settings).step)
    for name, value in expected.items():
        if momentum:
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(found[name], value), name


def test_clipping_into_scratch_gives_the_same_bits() -> None:
    torch.manual_seed(1)
    grads = {"a": torch.randn(50), "b": torch.randn(3, 4)}
    scratch: Params = {}
    for max_norm in (1.0, 2.5, 1e6):
        plain, kept = clip(grads, max_norm), clip(grads, max_norm, scratch)
        assert all(torch.equal(plain[name], kept[name]) for name in grads)
    assert clip(grads, 1e6, scratch) is grads
    bad = {"a": torch.tensor([math.nan]), "b": torch.ones(2)}
    assert clip(bad, 1.0, {})["b"].isnan().all()


def test_parameters_that_are_parts_of_others_leave_the_rest_alone() -> None:
    whole = torch.ones(3, 4)
    Sgd({"half": whole[:, ::2]}, 0.1, LocalConfig(weight_decay=0.0)).step({"half": torch.ones(3, 2)})
    assert whole.tolist() == [[pytest.approx(0.9), 1.0, pytest.approx(0.9), 1.0]] * 3


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_a_rate_in_a_tensor_is_followed(fused: bool, momentum: float) -> None:
    """Parameters that are parts of others take the way of a GPU."""
    settings = LocalConfig(weight_decay=0.1, momentum=momentum)
    rate = torch.tensor(0.0)
    found, expected = ({"a": torch.ones(3, 4)[:, :: 1 if fused else 2]} for _ in range(2))
    grads = {"a": torch.full_like(found["a"], 2.0)}
    following = Sgd(found, rate, settings)
    assert following._fused == fused
    velocity: list[torch.Tensor] = [torch.zeros_like(expected["a"])]
    for lr in (0.3, 0.1):
        rate.fill_(lr)
        following.step(grads)
        Sgd(expected, lr, settings, velocity).step(grads)
        torch.testing.assert_close(found["a"], expected["a"], rtol=1e-6, atol=0)
    assert found["a"].max() < 0.2
