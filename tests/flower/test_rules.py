"""Server rules as Flower strategies give the simulator's numbers."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parent))
import small_federation as small

from fedftg import build
from fedftg.config import RunConfig, from_mapping
from fedftg.engine import sampling
from fedftg.engine.local_train import LocalConfig, client_batches
from fedftg.errors import InputError
from fedftg.flower import FedDyn, FedFTG, Moon, Refined, RuleStrategy, Scaffold, class_counts, local_train
from fedftg.flower.rules import mean_metrics
from fedftg.flower.testing import LocalGrid
from fedftg.progress import Progress

CLIENTS, ROUNDS = 4, 3
ALGORITHM_SETTINGS: dict[str, dict[str, Any]] = {
    "fedprox": {"mu": 0.1},
    "feddyn": {"alpha": 0.1},
    "scaffold": {"server_lr": 0.9},
    "moon": {"mu": 1.0, "temperature": 0.5},
    "fedavgm": {"beta": 0.5},
    "fedacg": {"momentum": 0.5},
    "fedvarp": {},
    "fedgen": {"generator_steps": 2},
}
NAMES = {"feddyn": FedDyn, "scaffold": Scaffold, "moon": Moon}


def config(algorithm: str, refined: bool = False, refiner: dict[str, Any] | None = None) -> RunConfig:
    fedftg = {"name": "fedftg", "preset": "paper", **small.CONFIG.model_dump(), "absent_weight": 1.0}
    refiner = refiner or (fedftg if refined else {"name": "none"})
    given: dict[str, Any] = {"rounds": ROUNDS, "seed": 5, "threads": 1, "data": {"name": "digits"}, "refiner": refiner}
    given["partition"] = {"law": "dirichlet", "num_clients": CLIENTS, "alpha": 0.5}
    given |= {"cohort": {"size": 3}, "model": {"name": "lenet_bn"}, "executor": {"name": "sequential"}}
    given["algorithm"] = {"name": algorithm, **ALGORITHM_SETTINGS[algorithm]}
    given["local"] = {"lr": 0.05, "lr_decay": 0.9, "steps": 2, "batch_size": 16, "momentum": 0.5}
    return from_mapping({**given, "evaluation": {"every": 100, "track_all": False}})


class Simulated:
    """A simulator's experiment, and the Flower apps for the same clients."""

    def __init__(self, settings: RunConfig) -> None:
        self.settings = settings
        self.experiment = build.build(settings)
        self.model = self.experiment.model
        self.module = self.model.module(*self.model.init())
        self.initial = ArrayRecord(self.module.state_dict())

    def run(self) -> dict[str, torch.Tensor]:
        for _ in range(ROUNDS):
            self.experiment.run_round(Progress())
        params, buffers = self.experiment.state.model
        return {**params, **buffers}

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

    def strategy(self, **more: Any) -> RuleStrategy:
        name, data = self.settings.algorithm.name, self.experiment.data
        options: dict[str, Any] = {
            "model": self.module,
            "num_clients": CLIENTS,
            "local": self.settings.local,
            "seed": self.settings.seed,
            "mean_examples": sum(data.num_samples(client) for client in range(CLIENTS)) / CLIENTS,
            "fraction_evaluate": 0.0,
        }
        options |= ALGORITHM_SETTINGS[name] | more
        return NAMES[name](**options) if name in NAMES else RuleStrategy(algorithm=name, **options)

    def wrapped(self, base: RuleStrategy, **more: Any) -> FedFTG:
        settings = {"config": small.CONFIG, "absent_weight": 1.0, "seed": self.settings.seed, **more}
        return FedFTG(base, model=self.module, image_shape=self.experiment.data.image_shape, **settings)


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
@pytest.mark.parametrize("algorithm", ALGORITHM_SETTINGS)
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


@pytest.mark.parametrize(
    "refiner",
    [
        {"name": "head_prior"},
        {"name": "all", "prior_tau": 0.5, "recency": 2.0},
        {"name": "ema"},
        {"name": "wima", "window": 2, "broadcast": 0.5, "when": "round"},
        {
            "name": "fedftg",
            "preset": "paper",
            **small.CONFIG.model_dump(),
            "absent_weight": 1.0,
            "broadcast": 0.0,
        },
        {
            "name": "fedftg",
            "preset": "paper",
            **small.CONFIG.model_dump(),
            "average": "all",
            "prior_tau": 0.5,
            "lacking": 1e-9,
        },
    ],
    ids=lambda settings: f"{settings['name']}-{settings.get('broadcast')}",
)
def test_what_is_deployed_is_the_simulator_s(
    refiner: dict[str, Any], same_cohorts: Callable[..., None], tmp_path: Path
) -> None:
    """In one go, and stopped after round 2; nobody evaluates, so that refiners due for evaluation act in round 3."""
    settings = config("fedprox", refiner=refiner)
    here = Simulated(settings)
    deployed = here.run()
    sent = {**here.experiment.state.params, **here.experiment.state.buffers}
    assert any(not torch.equal(sent[name], deployed[name]) for name in sent)

    def strategy(**more: Any) -> Refined:
        shape = here.experiment.data.image_shape
        return Refined(here.strategy(), settings.refiner, here.module, shape, seed=5, **more)

    grid = LocalGrid.of(here.client_app(), CLIENTS)
    same_cohorts(settings)
    whole = strategy()
    assert_equal(whole.start(grid, here.initial, ROUNDS).arrays, deployed)
    rounds = ROUNDS if settings.refiner.when == "round" else 1
    assert [report.seconds > 0 for report in whole.reports].count(True) == rounds

    kept = {"checkpoint": tmp_path}
    same_cohorts(settings)
    strategy(**kept).start(grid, here.initial, 2)
    assert_equal(strategy(**kept).start(grid, here.initial, ROUNDS).arrays, deployed)
    found = strategy(**kept)
    number, arrays = found.restore() or (0, here.initial)
    assert number == ROUNDS
    assert_equal(arrays, sent)
    assert found.deployed is not None
    assert_equal(found.deployed, deployed)


@pytest.mark.parametrize(("algorithm", "memories"), [("scaffold", 3), ("fedacg", 0)])
def test_a_stopped_server_resumes_with_clients_that_were_ahead(
    algorithm: str, memories: int, tmp_path: Path, same_cohorts: Callable[..., None]
) -> None:
    """The server dies after its clients have trained round 3, their memories on disk are a round ahead of it."""
    settings = config(algorithm, refined=True)
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
    assert len(list((tmp_path / "nodes").rglob("memory-000003.safetensors"))) == memories
    same_cohorts(settings, 3)
    result = here.wrapped(here.strategy(), **checkpoint).start(LocalGrid.of(app, CLIENTS), here.initial, ROUNDS)
    assert_equal(result.arrays, here.run())


def broken(content: RecordDict) -> None:
    content["extra"] = ArrayRecord(
        {name: Array(array.numpy() * float("nan")) for name, array in content["extra"].items()}
    )


def test_a_client_whose_upload_is_not_usable_forgets_the_round(
    tmp_path: Path, same_cohorts: Callable[..., None]
) -> None:
    """Client 1's change of its control variate arrives as NaN in round 1: in round 2 it starts with zero again."""
    settings = config("scaffold").model_copy(update={"cohort": sampling.CohortConfig()})
    here = Simulated(settings)
    same_cohorts(settings)
    grid = small.grid_of(here.client_app(state_dir=tmp_path), CLIENTS, {2: broken})
    strategy = here.strategy()
    first = strategy.start(grid, here.initial, 1)
    assert strategy._order.counted == {0: 1, 2: 1, 3: 1}
    grid.faults.clear()
    strategy.aggregate_train(2, grid.send_and_receive(strategy.configure_train(2, first.arrays, ConfigRecord(), grid)))
    assert strategy._order.counted == dict.fromkeys(range(CLIENTS), 2)
    kept = [sorted(path.stem[-1] for path in tmp_path.glob(f"*/client-00000{client}/*")) for client in (0, 1)]
    assert kept == [["1", "2"], ["2"]]


def set_metric(key: str, value: Any) -> Callable[[RecordDict], None]:
    return lambda content: content["metrics"].__setitem__(key, value)


@pytest.mark.parametrize(
    ("change", "reason", "counted"),
    [
        (lambda content: content.pop("extra"), "the reply has no ArrayRecord 'extra'", [0, 1, 3]),
        (set_metric("partition-id", 1), "2 nodes are client 1", [0, 3]),
        (set_metric("num-examples", 2.5), "metric 'num-examples' must be a whole number, got 2.5", [0, 1, 3]),
    ],
)
def test_a_reply_that_does_not_fit_is_left_out(
    change: Callable[[RecordDict], None], reason: str, counted: list[int], log: pytest.LogCaptureFixture
) -> None:
    here = Simulated(config("scaffold"))
    strategy = here.strategy()
    strategy.start(small.grid_of(here.client_app(), CLIENTS, {3: change}), here.initial, 1)
    assert sorted(strategy._order.counted) == counted
    assert f"node 3 is left out: {reason}" in log.text


def test_a_result_that_is_not_finite_leaves_the_model(log: pytest.LogCaptureFixture) -> None:
    here = Simulated(config("scaffold"))
    strategy = here.strategy(server_lr=1e60)
    result = strategy.start(LocalGrid.of(here.client_app(), CLIENTS), here.initial, 1)
    assert not result.arrays
    assert strategy._order.counted == {}
    assert "the aggregate is not finite" in log.text


def test_a_run_with_other_rules_or_local_training_is_not_resumed(tmp_path: Path) -> None:
    here = Simulated(config("scaffold"))

    def wrapped(**more: Any) -> Refined:
        shape = here.experiment.data.image_shape
        return Refined(here.strategy(**more), "none", here.module, shape, checkpoint=tmp_path / "server")

    wrapped().start(LocalGrid.of(here.client_app(), CLIENTS), here.initial, 1)
    for more, name in (
        ({"num_clients": 9}, "num_clients = 4"),
        ({"local": LocalConfig(lr=0.5)}, "local = .*lr=0.05"),
        ({"seed": 6}, "seed = 5"),
        ({"server_lr": 1.0}, "algorithm = .*'server_lr': 0.9"),
    ):
        with pytest.raises(InputError, match=f"of a run with {name}.*; use the same"):
            wrapped(**more).restore()
    found = wrapped(min_train_nodes=3).restore()
    assert found is not None
    assert found[0] == 1


def training_app(batches: Callable[[int], Any], **more: Any) -> ClientApp:
    """A client trains on ``batches(client)`` by `local_train`."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        given = batches(int(context.node_config["partition-id"]))
        return local_train(message, context, model=small.net(), batches=given, class_counts=[1] * 10, **more)

    return app


def replies_of(app: ClientApp, strategy: Any, number: int = 1, arrays: ArrayRecord | None = None) -> list[Message]:
    grid = LocalGrid.of(app, 2)
    return grid.send_and_receive(
        list(strategy.configure_train(number, arrays or small.initial(), ConfigRecord(), grid))
    )


@pytest.mark.parametrize(
    ("batches", "local", "works"),
    [
        (list, LocalConfig(epochs=2), True),
        (iter, LocalConfig(epochs=2), False),
        (iter, LocalConfig(steps=3), False),
        (iter, LocalConfig(epochs=1), True),
        (itertools.cycle, LocalConfig(steps=3), True),
        (lambda _: [], LocalConfig(steps=3), True),
    ],
)
def test_several_passes_need_a_list(batches: Callable[[Any], Any], local: LocalConfig, works: bool) -> None:
    app = training_app(lambda client: batches([small.samples(small.data(2), client)] * 2))
    reply, _ = replies_of(app, Scaffold(model=small.net(), num_clients=2, local=local))
    assert reply.has_content() == works
    assert works or "batches is an iterator" in str(reply.error.reason)


def test_a_shuffling_data_loader_is_seeded_and_lost_memory_is_noticed(tmp_path: Path) -> None:
    shards, local = small.data(2), LocalConfig(epochs=2, lr=0.05)

    def app(**more: Any) -> ClientApp:
        def loader(client: int) -> Any:
            return DataLoader(TensorDataset(*small.samples(shards, client)), batch_size=13, shuffle=True)

        return training_app(loader, state_dir=tmp_path, **more)

    strategies = [
        Scaffold(model=small.net(), num_clients=2, local=local, seed=1, fraction_evaluate=0.0) for _ in range(2)
    ]
    one, two = (strategy.start(LocalGrid.of(app(), 2), small.initial(), 2).arrays for strategy in strategies)
    assert_equal(one, small.state(two))
    for path in tmp_path.rglob("client-000000/*"):
        path.unlink()
    lost, kept = replies_of(app(), strategies[0], 3, one)
    assert "has no memory of round 2" in str(lost.error.reason)
    assert kept.has_content()
    assert all(reply.has_content() for reply in replies_of(app(lost_memory="reset"), strategies[0], 3, one))


def test_wrong_settings_are_refused() -> None:
    model = small.net()
    for make, message in (
        (lambda: FedDyn(model=model, num_clients=2, alpha=-1.0), "alpha must be >= 0"),
        (lambda: Scaffold(model=model, num_clients=0), "num_clients must be >= 1, got 0"),
        (lambda: Moon(model=model, num_clients=2, temperature=0.0), "temperature must be > 0"),
        (lambda: RuleStrategy(model=model, num_clients=2, algorithm="mon"), "unknown algorithm 'mon'; did you mean"),
        (lambda: class_counts([1, 10], 10), r"from 0 to 9, got torch.int64 of shape \(2,\), 1 to 10"),
        (lambda: class_counts(torch.zeros(3), 10), r"got torch.float32 of shape \(3,\), 0.0 to 0.0"),
    ):
        with pytest.raises(InputError, match=message):
            make()
    assert class_counts([], 3) == [0, 0, 0]
    assert class_counts(torch.tensor([2, 0, 2]), 3) == [1, 0, 2]


def test_mean_metrics_by_hand() -> None:
    """(3 * 2 + 1 * 6) / 4 = 3; a client without steps has no loss, ids and lists have no mean."""
    contents = [
        RecordDict({"metrics": MetricRecord({"num-examples": size, "loss": loss, "partition-id": 7, "counts": [1]})})
        for size, loss in ((3, 2.0), (1, 6.0), (5, float("nan")))
    ]
    assert dict(mean_metrics(contents, "num-examples")) == {"loss": 3.0}
