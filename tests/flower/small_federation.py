"""A Flower app as an engineer has it, small: digits on a few nodes, a model with BatchNorm, plain SGD."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from fedftg.data import federated
from fedftg.data.config import DataConfig, PartitionConfig
from fedftg.data.federated import FederatedData
from fedftg.distill.config import DistillConfig
from fedftg.flower import class_counts
from fedftg.flower.testing import LocalGrid

IMAGE_SHAPE = (1, 8, 8)
NUM_CLASSES = 10
CONFIG = DistillConfig(iterations=2, student_steps=2, batch_size=8, noise_dim=8, generator_width=8, student_lr=0.05)


class Net(nn.Module):
    """A convolution, BatchNorm (int64 buffers travel too) and a linear layer; the name of each is its own."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4 * 16, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.convolution(images))).flatten(1))


def net(seed: int = 0) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net()


def data(num_clients: int) -> FederatedData:
    division = PartitionConfig(law="dirichlet", num_clients=num_clients, alpha=0.3)
    return federated.load(DataConfig(name="digits"), division, seed=3)


def samples(shards: FederatedData, client: int) -> tuple[Tensor, Tensor]:
    """Up to 40 images and labels of a client, the same at each call."""
    rng = torch.Generator().manual_seed(client)
    batches = shards.batches(client, num_epochs=1, num_steps=1, batch_size=40, rng=rng, min_batch=2)
    return next(batches)


def client_app(shards: FederatedData, *, counts: bool = True, partition_id: bool = True) -> ClientApp:
    """Two steps of SGD a round; nothing in it knows of FedFTG but the class counts."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        model = net()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        images, labels = samples(shards, client)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model.train()
        for _ in range(2):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
        metrics: dict[str, Any] = {"num-examples": len(labels), "train_loss": float(loss.detach())}
        if counts:
            metrics["class-counts"] = class_counts(labels, NUM_CLASSES)
        if partition_id:
            metrics["partition-id"] = client
        record = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord(metrics)}
        return Message(RecordDict(record), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        model = net().eval()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        images, labels = samples(shards, int(context.node_config["partition-id"]))
        with torch.no_grad():
            correct = float((model(images).argmax(1) == labels).float().mean())
        metrics = MetricRecord({"num-examples": len(labels), "accuracy": correct})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


class FaultyGrid(LocalGrid):
    """Replies of some nodes are changed or lost before they arrive, and messages are seen before they are handled."""

    def __init__(self, *arguments: Any) -> None:
        self.faults: dict[int, Callable[[Message], Message | None]] = {}
        self.before_push: Callable[[list[Message]], Any] = lambda _: None
        super().__init__(*arguments)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        given = list(messages)
        self.before_push(given)
        return super().push_messages(given)

    def answer(self, message: Message) -> Message | None:
        reply, fault = super().answer(message), self.faults.get(message.metadata.dst_node_id)
        return reply if fault is None or reply is None else fault(reply)


def changed(act: Callable[[RecordDict], Any], kind: str = "train") -> Callable[[Message], Message]:
    """What arrives of one kind of message is the reply with its content changed."""

    def fault(reply: Message) -> Message:
        if reply.has_content() and reply.metadata.message_type == kind:
            act(reply.content)
        return reply

    return fault


def grid_of(app: ClientApp, num_clients: int, changes: Mapping[int, Callable[[RecordDict], Any]]) -> FaultyGrid:
    """A grid on which the replies of some nodes are changed before they arrive."""
    grid = FaultyGrid(app, {i + 1: {"partition-id": i} for i in range(num_clients)})
    grid.faults.update({node: changed(change) for node, change in changes.items()})
    return grid


def state(arrays: ArrayRecord) -> dict[str, Tensor]:
    return dict(arrays.to_torch_state_dict())


def initial() -> ArrayRecord:
    return ArrayRecord(net().state_dict())
