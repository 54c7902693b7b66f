import math
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from fedftg import params as tree
from fedftg import precision
from fedftg.algorithms.base import LocalTask
from fedftg.algorithms.fedavg import PlainLocal
from fedftg.algorithms.registry import ALGORITHMS
from fedftg.config import parse
from fedftg.engine.local_train import LocalConfig, Sgd, clip, local_model, train
from fedftg.models.functional import FunctionalModel
from fedftg.models.small import ConvNet
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


def test_logits_of_a_loss_by_hand() -> None:
    """Counts 3, 0, 1 of C = 3: log((n + 0.5) / 5.5) = log(7/11), log(1/11), log(3/11), at tau = 2 twice that.

    FedRS halves the logit of the class that the client does not hold. In evaluation mode logits stay.
    """
    model, counts, images = FunctionalModel(layers()), torch.tensor([3, 0, 1]), BATCHES[0][0]

    def logits(model: FunctionalModel, train: bool = True) -> torch.Tensor:
        params, buffers = model.init()
        return model(params, buffers, images, train=train)

    plain, features = logits(model), model.with_features(*model.init(), images, train=True)[1]
    balanced = local_model(model, LocalConfig(loss="balanced_softmax", loss_tau=2.0), counts)
    expected = [2 * math.log(share / 11) for share in (7, 1, 3)]
    torch.testing.assert_close(logits(balanced) - plain, torch.tensor(expected).expand(6, 3))
    fedrs = local_model(model, LocalConfig(loss="fedrs"), counts)
    assert torch.equal(logits(fedrs), plain * torch.tensor([1.0, 0.5, 1.0]))
    for adjusted in (balanced, fedrs):
        assert torch.equal(logits(adjusted, train=False), logits(model, train=False))
        both = adjusted.with_features(*model.init(), images, train=True)
        assert torch.equal(both[0], logits(adjusted))
        assert torch.equal(both[1], features)
    assert torch.equal(logits(local_model(model, LocalConfig(), counts)), plain)


class Watched(ConvNet):
    """Notes the strides of what it gets."""

    seen: ClassVar[list[tuple[int, ...]]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images.stride())
        return super().forward(images)


@pytest.mark.parametrize("name", ["fedavg", "moon"])
def test_another_precision_and_layout_train_the_same_up_to_rounding(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights stay float32 and near those of full precision, in the strides that files are written with."""
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: True)
    torch.manual_seed(0)
    model = FunctionalModel(Watched(3, (1, 8, 8), width=8))
    params, buffers = model.init()
    rule = parse(ALGORITHMS[name], {}).build(2).local
    task = LocalTask(1, 0, params, buffers, rule.init_memory(params, buffers), {}, 12, 1.0, 0.05, 0)
    batches = [(torch.randn(12, 1, 8, 8), torch.arange(12) % 3)] * 4
    found = [
        train(model, rule, task, batches, torch.tensor([4, 4, 4]), LocalConfig(precision=kind, memory_format=layout))
        for kind, layout in (("float32", "contiguous"), ("bfloat16", "channels_last"))
    ]
    assert all(value.dtype == torch.float32 and value.is_contiguous() for value in found[1].params.values())
    change, error = (tree.norm(tree.sub(found[0].params, other)) for other in (params, found[1].params))
    assert 0 < error < 0.1 * change
    half = len(Watched.seen) // 2
    assert Watched.seen == [(64, 64, 8, 1)] * half + [(64, 1, 8, 1)] * half
    Watched.seen.clear()


def test_clip_by_hand() -> None:
    """Norm of (3, 4) is 5: clipped at 1 it becomes (0.6, 0.8); at 10 and at 0 (off) it stays."""
    grads: Params = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}
    assert [value.item() for value in clip(grads, 1.0).values()] == pytest.approx([0.6, 0.8], rel=1e-5)
    assert clip(grads, 10.0) is clip(grads, 0.0) is grads
    assert clip({"a": torch.tensor([math.nan]), "b": torch.ones(2)}, 1.0)["b"].isnan().all()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_sgd_is_that_of_torch_whatever_the_strides(momentum: float, weight_decay: float) -> None:
    torch.manual_seed(0)
    params = {"a": torch.randn(5, 3), "kernel": torch.randn(4, 3, 3, 3), "c": torch.randn(2)}
    leaves = [nn.Parameter(value.clone()) for value in params.values()]
    reference = torch.optim.SGD(leaves, lr=0.1, momentum=momentum, weight_decay=weight_decay, foreach=False)
    sgd = Sgd(params, 0.1, LocalConfig(momentum=momentum, weight_decay=weight_decay))
    for _ in range(3):
        grads = {name: torch.randn_like(value) for name, value in params.items()}
        # As a convolution may return it, and as the gradient of a mean is: other strides than the parameter.
        grads["kernel"] = grads["kernel"].contiguous(memory_format=torch.channels_last)
        grads["c"] = torch.randn((), dtype=torch.float64).expand(2)  # a rule may count in another type
        for leaf, grad in zip(leaves, grads.values(), strict=True):
            leaf.grad = grad.to(leaf.dtype).clone()
        before = {name: grad.clone() for name, grad in grads.items()}
        sgd.step(grads)
        assert all(torch.equal(grads[name], value) for name, value in before.items())
        reference.step()
    for leaf, value in zip(leaves, params.values(), strict=True):
        if momentum:
            torch.testing.assert_close(value, leaf.detach(), rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(value, leaf)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_a_rate_in_a_tensor_is_followed(fused: bool, momentum: float) -> None:
    """Also without the fused kernel, as on a GPU."""
    settings = LocalConfig(weight_decay=0.1, momentum=momentum)
    rate, found, expected = torch.tensor(0.0), {"a": torch.ones(3, 4)}, {"a": torch.ones(3, 4)}
    following, plain = Sgd(found, rate, settings), Sgd(expected, 0.0, settings)
    following._fused = plain._fused = fused
    for lr in (0.3, 0.1):
        plain._lr = float(rate.fill_(lr))
        for sgd in (following, plain):
            sgd.step({"a": torch.full((3, 4), 2.0)})
        torch.testing.assert_close(found["a"], expected["a"], rtol=1e-6, atol=0)
    assert found["a"].max() < 0.2
