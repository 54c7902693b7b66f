"""Models that people bring to a Flower app: frozen parts, shared weights, other types, features that are kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import small_federation as small
import torch
from flwr.app import ArrayRecord, Context, Message
from flwr.clientapp import ClientApp
from torch import Tensor, nn

import fedftg
from fedftg.engine.local_train import LocalConfig
from fedftg.flower import FedDyn, FedFTG, Moon, Scaffold, class_counts, local_train
from fedftg.flower.rules import RuleStrategy
from fedftg.flower.testing import LocalGrid

Net = Callable[[], nn.Module]


class Odd(nn.Module):
    """A frozen BatchNorm, a frozen weight in two places, a layer in two places, and buffers of several types."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1).requires_grad_(False)
        self.one, self.two = (nn.Linear(64, 64, bias=False).requires_grad_(False) for _ in range(2))
        self.two.weight = self.one.weight
        self.layer = nn.Linear(64, 64)
        self.again = self.layer
        self.register_buffer("mask", torch.arange(64) % 5 > 0)
        self.register_buffer("bytes", torch.ones(64, dtype=torch.uint8))
        self.register_buffer("halves", torch.ones(64, dtype=torch.float16))
        self.register_buffer("window", torch.linspace(0.5, 1, 64), persistent=False)
        self.head = nn.Linear(64, small.NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.two(self.one(self.norm(images).flatten(1) * self.mask * self.window)).relu()
        return self.head(self.again(self.layer(hidden).relu()) * self.bytes * self.halves.float())


class Keeps(nn.Module):
    """Keeps its features in a list; it was called once."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, small.NUM_CLASSES)
        self(torch.ones(2, *small.IMAGE_SHAPE))

    def forward(self, images: Tensor) -> Tensor:
        self.seen = [self.head(images.flatten(1))]
        return self.seen[0]


class Dictionary(Keeps):
    def forward(self, images: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"logits": super().forward(images)}


def made(net: Net) -> nn.Module:
    torch.manual_seed(0)
    return net()


def app(net: Net, folder: Path) -> ClientApp:
    shards, found = small.data(3), ClientApp()

    @found.train()
    def train(message: Message, context: Context) -> Message:
        images, labels = small.samples(shards, int(context.node_config["partition-id"]))
        counts = class_counts(labels, small.NUM_CLASSES)
        with torch.no_grad():  # an app may be decorated with it
            return local_train(
                message, context, model=made(net), batches=[(images, labels)], class_counts=counts, state_dir=folder
            )

    return found


@pytest.mark.parametrize("net", [Odd, Keeps])
@pytest.mark.parametrize("rule", [FedDyn, Scaffold, Moon])
def test_rules_and_the_refiner_take_them(net: Net, rule: type[RuleStrategy], tmp_path: Path) -> None:
    model = made(net)
    base = rule(model=model, num_clients=3, local=LocalConfig(epochs=2), fraction_evaluate=0.0)
    strategy = FedFTG(base, model=model, image_shape=small.IMAGE_SHAPE, config=small.CONFIG)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    found = strategy.start(LocalGrid.of(app(net, tmp_path), 3), ArrayRecord(start), 2).arrays.to_torch_state_dict()
    assert [(len(report.teachers), report.rolled_back) for report in strategy.reports] == [(3, None)] * 2
    frozen = [name for name, value in model.named_parameters() if not value.requires_grad]
    assert all(torch.equal(found[name], start[name]) for name in [*frozen, *(["mask", "two.weight"] if frozen else [])])
    assert {name: value.dtype for name, value in found.items()} == {name: value.dtype for name, value in start.items()}
    assert not torch.equal(found["head.weight"], start["head.weight"])
    model.load_state_dict(found)


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (Dictionary, r"the model must give logits \(2, classes\) for 2 images, got a dict"),
        (lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(10)), "the model has lazy layers without a shape; call it"),
    ],
)
def test_what_cannot_be_refined_is_one_line(net: Net, message: str) -> None:
    model = made(net)
    with pytest.raises(fedftg.InputError, match=message):
        FedFTG(FedDyn(model=made(Keeps), num_clients=3), model=model, image_shape=small.IMAGE_SHAPE)
