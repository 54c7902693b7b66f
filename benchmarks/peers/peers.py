"""The same FedAvg job here, in Flower's simulation, in pfl-research and in a bare loop, in turns, from start to end.

    python benchmarks/peers/peers.py --data-root CIFAR10 [--repeats 3] [--ways ours,bare,flower,pfl] [--rounds 3]

Needs ``pip install fedftg[simulation] pfl``. The job: CIFAR-10 without augmentation, 100 IID clients, 10 of them a
round, 5 epochs in batches of 50, SGD 0.1 with weight decay 1e-3, the model ``cnn`` of this package, evaluated after
every round. Two cores: ours and Flower in two processes of one thread, pfl-research in two by torchrun, the bare loop
in one with two threads. ``ours channels_last`` sets `local.memory_format`, ``ours bfloat16`` `local.precision` as well;
the others are in float32 and PyTorch's own layout, as one would write them. In its first round pfl-research evaluates
the clients before and after training in place of the test set, as many images.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLIENTS, COHORT, EPOCHS, BATCH, RATE, DECAY, TEST_BATCH = 100, 10, 5, 50, 0.1, 1e-3, 500
LAYOUT = ("local.memory_format=channels_last",)
OURS = {"ours": (), "ours channels_last": LAYOUT, "ours bfloat16": (*LAYOUT, "local.precision=bfloat16")}
WAYS = (*OURS, "bare", "flower", "pfl")


def main() -> None:
    """Runs every way in turns, each in a process of its own, and prints medians and ratios to the first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--do", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.do:
        {"bare": bare, "flower": flower, "pfl": pfl}[given.do](given.data_root, given.rounds)
        return
    ways = given.ways.split(",")
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(given.repeats):
        for way in ways:
            with tempfile.TemporaryDirectory() as folder:
                words, threads = command(way, given, Path(folder))
                start = time.perf_counter()
                done = subprocess.run(
                    words, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment(threads)
                )
                taken[way].append(time.perf_counter() - start)
                if done.returncode:
                    sys.exit(f"{way} failed: {done.stderr.decode()}")
            print(f"{way}: {taken[way][-1]:.1f} s", flush=True)
    first = statistics.median(taken[ways[0]])
    for way, seconds in taken.items():
        middle = statistics.median(seconds)
        ratio = f"{ways[0]} takes {first / middle:.2f} of it"
        print(f"{way}: median {middle:.1f} s, {min(seconds):.1f} to {max(seconds):.1f}; {ratio}")


def command(way: str, given: argparse.Namespace, folder: Path) -> tuple[list[str], int]:
    """Returns the words of a way's command and its threads a process."""
    again = [__file__, "--do", way, "--data-root", str(given.data_root), "--rounds", str(given.rounds)]
    if way == "pfl":
        return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", *again], 1
    if way not in OURS:
        return [sys.executable, *again], 2 if way == "bare" else 1
    settings = [
        f"rounds={given.rounds}", "data.name=cifar10", f"data.root={given.data_root}", "data.augment=none",
        "partition.law=iid", f"partition.num_clients={CLIENTS}", f"cohort.size={COHORT}", "model.name=cnn",
        "refiner.name=none", f"local.epochs={EPOCHS}", f"local.batch_size={BATCH}", f"local.lr={RATE}",
        f"local.weight_decay={DECAY}", "local.max_grad_norm=0", "local.lr_decay=1", "evaluation.track_all=false",
        "executor.name=workers", f"evaluation.batch_size={TEST_BATCH}", "threads=2", *OURS[way],
    ]  # fmt: skip
    words = [word for setting in settings for word in ("--set", setting)]
    start = "from fedftg.cli import main; main()"
    return [sys.executable, "-c", start, "run", "default_base", *words, "--out", str(folder / "run")], 2


def environment(threads: int) -> dict[str, str]:
    """Returns this process's environment with a number of OpenMP threads, and without messages to others."""
    return {
        **os.environ, "OMP_NUM_THREADS": str(threads), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0", "PFL_PYTORCH_DEVICE": "cpu",
    }  # fmt: skip


def data(root: Path) -> tuple[list[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
    """Returns the normalised images and labels of each client, and those of the test set."""
    from fedftg.data import sources
    from fedftg.data.config import DataConfig

    found = sources.load(DataConfig(name="cifar10", root=root))
    mean, std = (torch.tensor(values)[:, None, None] for values in (found.mean, found.std))
    train, test = ((images / 255 - mean) / std for images in (found.train_images, found.test_images))
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).chunk(CLIENTS)
    return [(train[chosen], found.train_labels[chosen]) for chosen in order], (test, found.test_labels)


def new_model() -> nn.Module:
    """Returns the package's ``cnn``."""
    from fedftg.models.registry import ModelConfig, build

    return build(ModelConfig(name="cnn"), 10, (3, 32, 32), 0)


def train(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Trains as every way's clients do."""
    model.train()
    optimiser = torch.optim.SGD(model.parameters(), lr=RATE, weight_decay=DECAY)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(images)).split(BATCH):
            optimiser.zero_grad()
            F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimiser.step()


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Returns the accuracy."""
    model.eval()
    pairs = zip(images.split(TEST_BATCH), labels.split(TEST_BATCH), strict=True)
    return sum(int((model(batch).argmax(dim=1) == of).sum()) for batch, of in pairs) / len(images)


def bare(root: Path, rounds: int) -> None:
    """One client after the other."""
    clients, test = data(root)
    model = new_model()
    for _ in range(rounds):
        states = []
        for client in torch.randperm(CLIENTS)[:COHORT].tolist():
            own = copy.deepcopy(model)
            train(own, *clients[client])
            states.append(own.state_dict())
        model.load_state_dict({name: torch.stack([s[name] for s in states]).mean(dim=0) for name in states[0]})
        print(evaluate(model, *test))


def flower(root: Path, rounds: int) -> None:
    """Flower's simulation: Ray, one core a client."""
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    client_app, server_app, held = ClientApp(), ServerApp(), {}

    @client_app.train()
    def fit(message: Message, context: Context) -> Message:
        torch.set_num_threads(1)
        if not held:
            held["clients"], held["model"] = data(root)[0], new_model()
        model = held["model"]
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        images, labels = held["clients"][int(context.node_config["partition-id"])]
        train(model, images, labels)
        metrics = MetricRecord({"num-examples": len(images)})
        return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)

    @server_app.main()
    def serve(grid: Grid, context: Context) -> None:
        torch.set_num_threads(2)
        test, model = data(root)[1], new_model()

        def central(number: int, arrays: ArrayRecord) -> MetricRecord | None:
            if not number:
                return None  # the others do not evaluate the initial model
            model.load_state_dict(arrays.to_torch_state_dict())
            return MetricRecord({"accuracy": evaluate(model, *test)})

        share = COHORT / CLIENTS
        strategy = FedAvg(fraction_train=share, fraction_evaluate=0.0, min_available_nodes=CLIENTS)
        found = strategy.start(grid, ArrayRecord(model.state_dict()), num_rounds=rounds, evaluate_fn=central)
        print(found.evaluate_metrics_serverapp)

    run_simulation(server_app, client_app, CLIENTS, backend_config={"client_resources": {"num_cpus": 1}})


def pfl(root: Path, rounds: int) -> None:
    """pfl-research: two processes by torchrun, central evaluation shared by them."""
    import numpy as np
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.central_evaluation import CentralEvaluationCallback
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.sampling import get_user_sampler
    from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
    from pfl.metrics import Metrics, Weighted
    from pfl.model.pytorch import PyTorchModel

    class Model(nn.Module):
        """What pfl asks of a model."""

        def __init__(self) -> None:
            super().__init__()
            self.net = new_model()

        def loss(self, images: Tensor, labels: Tensor) -> Tensor:
            self.net.train()
            return F.cross_entropy(self.net(images), labels)

        @torch.no_grad()
        def metrics(self, images: Tensor, labels: Tensor) -> dict[str, Any]:
            self.net.eval()
            right = (self.net(images).argmax(dim=1) == labels).sum()
            return {"accuracy": Weighted(float(right), len(images))}

    class After(CentralEvaluationCallback):
        """Does not evaluate the initial model, as the others do not."""

        def on_train_begin(self, *, model: PyTorchModel) -> Metrics:
            return Metrics()

    clients, test = data(root)
    users = {client: list(pair) for client, pair in enumerate(clients)}
    federated = FederatedDataset.from_slices(users, get_user_sampler("random", range(CLIENTS)))
    np.random.seed(0)
    model = Model()
    wrapped = PyTorchModel(
        model, partial(torch.optim.SGD, weight_decay=DECAY), torch.optim.SGD(model.parameters(), lr=1.0)
    )
    FederatedAveraging().run(
        NNAlgorithmParams(rounds, 10**9, COHORT, None),
        SimulatedBackend(federated, federated),
        wrapped,
        NNTrainHyperParams(local_batch_size=BATCH, local_num_epochs=EPOCHS, local_learning_rate=RATE),
        NNEvalHyperParams(TEST_BATCH),
        [After(Dataset(test), NNEvalHyperParams(TEST_BATCH))],
    )


if __name__ == "__main__":
    main()
