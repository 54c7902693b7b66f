"""FedDyn, SCAFFOLD and MOON as Flower strategies give the simulator's numbers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Strategy
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parent))
import small_federation as small

from fedftg import experiment
from fedftg.config import RunConfig, from_mapping
from fedftg.engine import sampling
from fedftg.engine.local_train import LocalConfig, client_batches
from fedftg.errors import InputError
from fedftg.flower import FedDyn, FedFTG, Moon, Scaffold, class_counts, local_train
from fedftg.flower.local_grid import LocalGrid
from fedftg.flower.local_training import TASK
from fedftg.progress import Silent

CLIENTS, ROUNDS = 4, 3
ALGORITHMS: dict[str, dict[str, Any]] = {
    "feddyn": {"name": "feddyn", "alpha": 0.1},
    "scaffold": {"name": "scaffold", "server_lr": 0.9},
    "moon": {"name": "moon", "mu": 1.0, "temperature": 0.5},
}


def config(algorithm: str, refined: bool) -> RunConfig:
    refiner = {"name": "fedftg", **small.CONFIG.model_dump(), "absent_weight": 1.0} if refined else {"name": "none"}
    return from_mapping(
        {
            "rounds": ROUNDS,
            "seed": 5,
            "threads": 1,
            "data": {"name": "digits"},
            "partition": {"law": "dirichlet", "num_clients": CLIENTS, "alpha": 0.5},
            "cohort": {"size": 3},
            "model": {"name": "lenet_bn"},
            "algorithm": ALGORITHMS[algorithm],
            "local": {"lr": 0.05, "lr_decay": 0.9, "steps": 2, "batch_size": 16, "momentum": 0.5},
            "refiner": refiner,
            "evaluation": {"every": 100, "track_all": False},
            "executor": {"name": "sequential"},
        }
    )


BASE_OPTIONS: dict[str, Any] = {
    "num_clients": CLIENTS,
    "seed": 5,
    "server_lr": 0.9,
    "local": LocalConfig(lr=0.05, lr_decay=0.9, steps=2, batch_size=16, momentum=0.5),
}


class Simulated:
    """A simulator's experiment, and the Flower apps for the same clients."""

    def __init__(self, settings: RunConfig) -> None:
        self.settings = settings
        self.experiment = experiment.build(settings)
        self.model = self.experiment.model
        self.module = self.model.module(*self.model.init())
        self.initial = ArrayRecord(self.module.state_dict())

    def run(self) -> dict[str, torch.Tensor]:
        for _ in range(ROUNDS):
            self.experiment.run_round(Silent())
        return {**self.experiment.state.params, **self.experiment.state.buffers}

    def client_app(self, **more: Any) -> ClientApp:
        app, data = ClientApp(), self.experiment.data

        @app.train()
        def train(message: Message, context: Context) -> Message:
            client = int(context.node_config["partition-id"])
            return local_train(
                message,
                context,
                model=self.module,
                batches=lambda task, local: client_batches(self.model, data, local, task),
                class_counts=data.class_counts[client].tolist(),
                **more,
            )

        return app

    def strategy(self, **more: Any) -> Strategy:
        options: dict[str, Any] = {
            "model": self.module,
            "num_clients": CLIENTS,
            "local": self.settings.local,
            "seed": self.settings.seed,
            "fraction_evaluate": 0.0,
            **more,
        }
        given = {key: value for key, value in self.settings.algorithm.model_dump().items() if key != "name"}
        if self.settings.algorithm.name == "feddyn":
            data = self.experiment.data
            total = sum(data.num_samples(client) for client in range(CLIENTS))
            return FedDyn(**options, **given, mean_examples=total / CLIENTS)
        return {"scaffold": Scaffold, "moon": Moon}[self.settings.algorithm.name](**options, **given)

    def wrapped(self, base: Strategy, **more: Any) -> FedFTG:
        shape = self.experiment.data.image_shape
        settings = {
            "config": small.CONFIG,
            "absent_weight": 1.0,
            "seed": self.settings.seed,
            "image_shape": shape,
            **more,
        }
        return FedFTG(base, model=self.module, **settings)


@pytest.fixture
def same_cohorts(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Flower asks those that the simulator draws, from a round on."""

    def use(settings: RunConfig, first: int = 1) -> None:
        rounds = iter(range(first, 100))

        def sample(grid: Any, *_: Any) -> tuple[list[int], list[int]]:
            drawn = sampling.cohort(settings.cohort, list(range(CLIENTS)), settings.seed, next(rounds))
            return [client + 1 for client in drawn], grid.get_node_ids()

        monkeypatch.setattr("flwr.serverapp.strategy.fedavg.sample_nodes", sample)

    return use


def assert_equal(arrays: ArrayRecord, expected: dict[str, torch.Tensor]) -> None:
    got = small.state(arrays)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), f"{name}: {float((got[name] - value).abs().max())}"


@pytest.mark.parametrize("refined", [False, True], ids=["alone", "refined"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_equals_the_simulator(algorithm: str, refined: bool, same_cohorts: Callable[..., None]) -> None:
    """Bit for bit over three rounds, in which clients skip rounds and come back."""
    settings = config(algorithm, refined)
    here = Simulated(settings)
    base = here.strategy()
    strategy = here.wrapped(base) if refined else base
    same_cohorts(settings)
    result = strategy.start(LocalGrid.of(here.client_app(), CLIENTS), here.initial, ROUNDS)
    assert_equal(result.arrays, here.run())
    if isinstance(strategy, FedFTG):
        assert [report.rolled_back for report in strategy.reports] == [None] * ROUNDS
    assert result.train_metrics_clientapp[1]["loss"] > 0
    assert result.train_metrics_clientapp[1]["update-norm"] > 0


def test_a_stopped_server_goes_on_with_clients_that_were_ahead(
    tmp_path: Path, same_cohorts: Callable[..., None]
) -> None:
    """The server dies after its clients have trained round 3, their memories on disk are a round ahead of it."""
    settings = config("scaffold", refined=True)
    here = Simulated(settings)
    app = here.client_app(state_dir=tmp_path / "nodes")
    checkpoint = {"checkpoint": tmp_path / "server"}
    same_cohorts(settings)
    here.wrapped(here.strategy(), **checkpoint).start(LocalGrid.of(app, CLIENTS), here.initial, 2)

    class Dying(LocalGrid):
        def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> list[Message]:
            super().send_and_receive(messages, timeout=timeout)
            raise KeyboardInterrupt

    same_cohorts(settings, 3)
    with pytest.raises(KeyboardInterrupt):
        here.wrapped(here.strategy(), **checkpoint).start(Dying.of(app, CLIENTS), here.initial, ROUNDS)
    assert len(list((tmp_path / "nodes").rglob("memory-000003.safetensors"))) == 3
    same_cohorts(settings, 3)
    result = here.wrapped(here.strategy(), **checkpoint).start(LocalGrid.of(app, CLIENTS), here.initial, ROUNDS)
    assert_equal(result.arrays, here.run())


def broken(content: RecordDict) -> None:
    content["extra"] = ArrayRecord(
        {name: Array(array.numpy() * float("nan")) for name, array in content["extra"].items()}
    )


def test_a_client_whose_upload_is_not_usable_forgets_the_round(same_cohorts: Callable[..., None]) -> None:
    """Node 2's change of its control variate arrives as NaN in round 1: in round 2 it starts with zero again."""
    settings = config("scaffold", refined=False).model_copy(update={"cohort": sampling.CohortConfig()})
    here = Simulated(settings)
    same_cohorts(settings)
    grid = small.grid_of(here.client_app(), CLIENTS, {2: broken})
    strategy = here.strategy()
    first = strategy.start(grid, here.initial, 1)
    assert isinstance(strategy, Scaffold)
    assert strategy._counted == {0: 1, 2: 1, 3: 1}
    state = grid._contexts[2].state
    assert [name.rpartition("/")[2] for name in state if name.startswith("fedftg/")] == ["1"]
    seen: list[str] = []

    def look(content: RecordDict) -> None:
        seen.extend(name.rpartition("/")[2] for name in state if name.startswith("fedftg/"))

    grid.faults[2] = lambda reply: (look(reply.content), reply)[1]
    messages = strategy.configure_train(2, first.arrays, ConfigRecord(), grid)
    strategy.aggregate_train(2, grid.send_and_receive(messages))
    assert seen == ["2"]
    assert strategy._counted == dict.fromkeys(range(CLIENTS), 2)


@pytest.mark.parametrize("kind", ["missing", "wrong shape"])
def test_scaffold_needs_the_change_of_the_control_variates(kind: str, same_cohorts: Callable[..., None]) -> None:
    def spoil(content: RecordDict) -> None:
        if kind == "missing":
            del content["extra"]
        else:
            name = next(iter(content["extra"]))
            content["extra"][name] = Array(content["extra"][name].numpy()[:1])

    settings = config("scaffold", refined=False)
    here = Simulated(settings)
    same_cohorts(settings)
    strategy = here.strategy()
    cohort = sampling.cohort(settings.cohort, list(range(CLIENTS)), settings.seed, 1)
    strategy.start(small.grid_of(here.client_app(), CLIENTS, {cohort[0] + 1: spoil}), here.initial, 1)
    assert isinstance(strategy, Scaffold)
    assert sorted(strategy._counted) == cohort[1:]


@pytest.mark.parametrize(
    ("key", "value"), [("partition-id", 1), ("partition-id", [3]), ("num-examples", 2**60), ("num-examples", 2.5)]
)
def test_odd_numbers_in_a_reply_cost_the_clients_that_gave_them(
    key: str, value: Any, log: pytest.LogCaptureFixture
) -> None:
    """Node 3 answers with them; as client 1 it makes both of that name doubtful."""
    settings = config("scaffold", refined=False)
    here = Simulated(settings)

    def change(content: RecordDict) -> None:
        content["metrics"][key] = value

    strategy = here.strategy()
    strategy.start(small.grid_of(here.client_app(), CLIENTS, {3: change}), here.initial, 1)
    doubled = value == 1
    assert isinstance(strategy, Scaffold)
    assert sorted(strategy._counted) == ([0, 3] if doubled else [0, 1, 3])
    assert strategy._clients.keys() == ({1, 4} if doubled else {1, 2, 4})
    assert ("2 nodes are client 1" if doubled else f"'{key}' must be a whole number from 0 to 2**") in log.text


def test_a_run_with_other_rules_or_local_training_is_not_resumed(tmp_path: Path) -> None:
    settings = config("scaffold", refined=True)
    here = Simulated(settings)
    kept = {"checkpoint": tmp_path / "server"}
    here.wrapped(here.strategy(), **kept).start(LocalGrid.of(here.client_app(), CLIENTS), here.initial, 1)
    cases = ({"num_clients": 9}, {"local": LocalConfig(lr=0.5)}, {"seed": 6}, {"server_lr": 1.0})
    names = ("num_clients = 4", "local.lr = 0.05", "seed = 5", "algorithm.server_lr = 0.9")
    for more, name in zip(cases, names, strict=True):
        base = Scaffold(**{"model": here.module, **BASE_OPTIONS, **more})
        with pytest.raises(InputError, match=f"of a run with base strategy.0.{name}, this one has"):
            here.wrapped(base, **kept).restore()
    found = here.wrapped(Scaffold(model=here.module, **BASE_OPTIONS, min_train_nodes=3), **kept).restore()
    assert found is not None
    assert found[0] == 1


def replies_of(batches: Any, nodes: dict[int, dict[str, Any]], **more: Any) -> list[Message]:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return local_train(message, context, model=small.net(), batches=batches, class_counts=[1] * 10, **more)

    grid = LocalGrid(app, nodes)
    strategy = Scaffold(model=small.net(), num_clients=2, local=LocalConfig(epochs=2))
    return list(grid.send_and_receive(strategy.configure_train(1, small.initial(), ConfigRecord(), grid)))


def test_what_would_go_wrong_without_a_word_is_refused(tmp_path: Path) -> None:
    nodes: dict[int, dict[str, Any]] = {1: {"partition-id": 0}, 2: {}}
    data = [small.samples(small.data(2), 0)]
    named, nameless = replies_of(data, nodes, state_dir=tmp_path)
    assert named.has_content()
    assert "needs a partition id" in str(nameless.error.reason)
    assert all(reply.has_content() for reply in replies_of(data, nodes))
    for reply in replies_of(iter(data), nodes):
        assert "batches is an iterator, which ends after one epoch" in str(reply.error.reason)


def test_a_data_loader_and_lost_memory(tmp_path: Path) -> None:
    """Shuffling is seeded; a node whose files are gone says so unless it may start anew."""
    shards = small.data(2)
    lost: list[str] = []

    def app_of(**more: Any) -> ClientApp:
        app = ClientApp()

        @app.train()
        def train(message: Message, context: Context) -> Message:
            images, labels = small.samples(shards, int(context.node_config["partition-id"]))
            loader = DataLoader(TensorDataset(images, labels), batch_size=13, shuffle=True)
            counts = class_counts(labels, small.NUM_CLASSES)
            return local_train(message, context, model=small.net(), batches=loader, class_counts=counts, **more)

        return app

    def trained(app: ClientApp, grid: LocalGrid | None = None) -> tuple[Scaffold, ArrayRecord]:
        local = LocalConfig(epochs=2, lr=0.05)
        strategy = Scaffold(model=small.net(), num_clients=2, local=local, seed=1, fraction_evaluate=0.0)
        return strategy, strategy.start(grid or LocalGrid.of(app, 2), small.initial(), 2).arrays

    app = app_of(state_dir=tmp_path)
    (strategy, one), (_, two) = trained(app), trained(app)
    assert all(torch.equal(value, small.state(two)[name]) for name, value in small.state(one).items())
    assert not torch.equal(small.state(one)["head.weight"], small.net().head.weight)
    for path in tmp_path.rglob("client-000000/*"):
        path.unlink()

    def third_round(app: ClientApp) -> list[int]:
        grid = LocalGrid.of(app, 2)
        replies = grid.send_and_receive(strategy.configure_train(3, one, ConfigRecord(), grid))
        lost.extend(str(reply.error.reason) for reply in replies if reply.has_error())
        return [reply.metadata.src_node_id for reply in replies if reply.has_content()]

    assert third_round(app) == [2]
    assert "has no memory of round 2" in lost[0]
    assert third_round(app_of(state_dir=tmp_path, lost_memory="reset")) == [1, 2]


def test_wrong_settings_and_messages_are_told() -> None:
    model = small.net()
    for make, message in (
        (lambda: FedDyn(model=model, num_clients=2, alpha=-1.0), "alpha must be >= 0"),
        (lambda: Scaffold(model=model, num_clients=0), "num_clients must be >= 1, got 0"),
        (lambda: FedDyn(model=model, num_clients=2, mean_examples=0.0), "mean_examples must be > 0"),
        (lambda: Moon(model=model, num_clients=2, temperature=0.0), "temperature must be > 0"),
        (lambda: class_counts([0, 10], 10), "whole numbers from 0 to 9, got 0 to 10"),
        (lambda: class_counts(torch.rand(3), 10), "got torch.float32"),
    ):
        with pytest.raises(InputError, match=message):
            make()
    assert class_counts([], 3) == [0, 0, 0]
    assert class_counts(torch.tensor([2, 0, 2]), 3) == [1, 0, 2]


def test_local_train_under_another_strategy_names_those_that_it_is_for() -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return local_train(message, context, model=small.net(), batches=[], class_counts=[1] * 10)

    grid = LocalGrid.of(app, 2)
    messages = list(flower.FedAvg().configure_train(1, small.initial(), ConfigRecord(), grid))
    (first, _) = grid.send_and_receive(messages)
    assert TASK in str(first.error.reason)
    assert "FedDyn, Scaffold and Moon" in str(first.error.reason)
