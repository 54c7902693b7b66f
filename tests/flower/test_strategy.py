"""Refiners around Flower's strategies, on the in-process grid."""

from __future__ import annotations

import gc
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
import small_federation as small

from fedftg.algorithms.base import ClientResult, NoRefiner, RefinerConfig, RefinerContext, ServerState
from fedftg.algorithms.feddf import FedDFConfig
from fedftg.algorithms.registry import REFINERS, register_refiner
from fedftg.distill.distiller import distil
from fedftg.distill.generator import Generator
from fedftg.distill.images import GeneratorImages
from fedftg.distill.teachers import ListedTeachers
from fedftg.errors import InputError
from fedftg.flower import FedFTG, Refined, RuleStrategy
from fedftg.flower.testing import LocalGrid
from fedftg.models.functional import FunctionalModel, values
from fedftg.seeds import SERVER, forked, torch_rng

CLIENTS = 4
CONFIG = small.CONFIG
ALL: dict[str, Any] = {"min_train_nodes": CLIENTS, "min_evaluate_nodes": CLIENTS, "min_available_nodes": CLIENTS}
TWO: dict[str, Any] = {"min_train_nodes": 2, "min_available_nodes": 2, "fraction_evaluate": 0.0}


@pytest.fixture(autouse=True)
def frozen_garbage() -> Iterator[None]:
    """Bulyan collects garbage for every client, which takes seconds beside all that tests have loaded."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def app() -> ClientApp:
    return small.client_app(small.data(CLIENTS))


def wrapped(base: Strategy, **changes: Any) -> FedFTG:
    return FedFTG(base, **{"model": small.net(), "image_shape": small.IMAGE_SHAPE, "config": CONFIG, **changes})


def refined(base: Strategy, refiner: RefinerConfig | str, **more: Any) -> Refined:
    return Refined(base, refiner, small.net(), small.IMAGE_SHAPE, **more)


def run(strategy: Strategy, grid: Any, rounds: int = 2, **more: Any) -> Result:
    return strategy.start(grid, small.initial(), rounds, **more)


def equal(left: ArrayRecord, right: ArrayRecord) -> bool:
    a, b = small.state(left), small.state(right)
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


BASES: dict[str, Callable[[], Strategy]] = {
    "FedAvg": lambda: flower.FedAvg(**ALL),
    "FedProx": lambda: flower.FedProx(proximal_mu=0.1, **ALL),
    "FedAdam": lambda: flower.FedAdam(eta=0.01, **ALL),
    "FedYogi": lambda: flower.FedYogi(eta=0.01, **ALL),
    "FedAdagrad": lambda: flower.FedAdagrad(eta=0.01, **ALL),
    "FedAvgM": lambda: flower.FedAvgM(server_momentum=0.5, server_learning_rate=0.5, **ALL),
    "FedMedian": lambda: flower.FedMedian(**ALL),
    "FedTrimmedAvg": lambda: flower.FedTrimmedAvg(beta=0.25, **ALL),
    "Krum": lambda: flower.Krum(num_malicious_nodes=1, **ALL),
    "MultiKrum": lambda: flower.MultiKrum(num_malicious_nodes=1, num_nodes_to_select=2, **ALL),
    "Bulyan": lambda: flower.Bulyan(num_malicious_nodes=0, **ALL),
}


def aggregate_then_distil(base: Strategy, grid: LocalGrid, rounds: int) -> dict[str, Tensor]:
    """What FedFTG must give, written out: the base's aggregate, and one distillation a round."""
    model = FunctionalModel(small.net())
    seed = int(torch.randint(2**62, (), generator=torch_rng(0, 0, SERVER, "refiner")))
    with forked(seed, torch.device("cpu")):
        generator = Generator(CONFIG.noise_dim, small.NUM_CLASSES, small.IMAGE_SHAPE, CONFIG.generator_width)
    images = GeneratorImages(CONFIG, generator)
    arrays = small.initial()
    for number in range(1, rounds + 1):
        if isinstance(base, flower.FedAvgM):
            base.current_arrays = arrays
        replies = grid.send_and_receive(list(base.configure_train(number, arrays, ConfigRecord(), grid)))
        teachers, counts = [], []
        for reply in replies:
            own = small.state(reply.content["arrays"])
            split = [{name: own[name] for name in part} for part in model.init()]
            teachers.append(partial(model, *split, train=False))
            counts.append(reply.content["metrics"]["class-counts"])
        aggregate, _ = base.aggregate_train(number, replies)
        assert aggregate is not None
        like = small.net().state_dict()
        arrived = {name: torch.from_numpy(aggregate[name].numpy().copy()) for name in like}
        mixed = {n: t.float() if like[n].is_floating_point() else t.round().long() for n, t in arrived.items()}
        student = model.module(*({name: mixed[name] for name in part} for part in model.init()))
        rng = torch_rng(0, number, SERVER, "refine")
        scale = CONFIG.lr_decay ** (number - 1)
        distil(CONFIG, images, student, ListedTeachers(teachers), torch.tensor(counts), rng=rng, lr_scale=scale)
        params, buffers = values(student)
        arrays = ArrayRecord({name: {**params, **buffers}[name] for name in like})
    return small.state(arrays)


@pytest.mark.parametrize("name", BASES)
def test_each_strategy_is_its_aggregate_distilled(name: str, app: ClientApp) -> None:
    strategy = wrapped(BASES[name]())
    result = run(strategy, LocalGrid.of(app, CLIENTS))
    expected = aggregate_then_distil(BASES[name](), LocalGrid.of(app, CLIENTS), rounds=2)
    assert [report.rolled_back for report in strategy.reports] == [None, None]
    assert [report.teachers for report in strategy.reports] == [[0, 1, 2, 3]] * 2
    got = small.state(result.arrays)
    assert list(got) == list(small.net().state_dict())
    for key, value in expected.items():
        assert got[key].dtype == value.dtype
        assert torch.equal(got[key], value), f"{name}: {key}"
    assert set(result.evaluate_metrics_clientapp) == {1, 2}
    assert not {"class-counts", "partition-id"} & set(result.train_metrics_clientapp[1])
    assert result.train_metrics_clientapp[1]["fedftg-teachers"] == CLIENTS


class AddConfig(NoRefiner, RefinerConfig):
    """A refiner that the library does not know: it adds a number to all parameters."""

    name: Literal["add"] = "add"
    amount: float = 10.0

    def build(self, context: RefinerContext) -> Any:
        return self

    def init(self, params: Any, rng: torch.Generator) -> dict[str, Tensor]:
        return {"calls": torch.zeros(())}

    def refine(
        self, state: ServerState, results: Sequence[ClientResult], rng: torch.Generator
    ) -> tuple[ServerState, dict[str, float]]:
        params = {name: value + self.amount for name, value in state.params.items()}
        return replace(state, params=params, refiner={"calls": state.refiner["calls"] + 1}), {"mean_size": 2.5}


def moving_app(step: float, examples: Callable[[int], int] = lambda client: 1) -> ClientApp:
    """Every client adds ``step`` times its number + 1 to all floats, and 2 to counters."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        arrays = {
            name: Array(np.asarray(a.numpy() + (step * (client + 1) if a.dtype == "float32" else 2), dtype=a.dtype))
            for name, a in message.content["arrays"].items()
        }
        counts = [1] * small.NUM_CLASSES
        metrics = MetricRecord({"num-examples": examples(client), "class-counts": counts, "train_loss": 1.0})
        return Message(RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics}), reply_to=message)

    return app


# By hand, from a model of zeros. Clients 0 and 1 add d and 2 d, weighted by their examples; refining adds 10.
BY_HAND = {
    # (1 * 1 + 3 * 2) / 4 = 1.75 a round.
    "mean": (flower.FedAvg(**TWO), moving_app(1.0, lambda client: 1 + 2 * client), [11.75, 23.5]),
    # The mean is 1, gradients are -1; momentum 0.5, rate 0.5. Round 1: velocity -1, model 0.5, refined 10.5. Round 2:
    # velocity -1.5, model 10.5 + 0.75, refined 21.25. Had the strategy kept its own 0.5 as current model, the gradient
    # would be 0.5 - 11.5 = -11 and the model 6.25.
    "momentum": (
        flower.FedAvgM(server_momentum=0.5, server_learning_rate=0.5, **TWO),
        moving_app(2 / 3),
        [10.5, 21.25],
    ),
    # Without moments and with tau 1, a step is eta * d / (|d| + 1) = 0.5 for d = 1.
    "adam": (flower.FedAdam(eta=1.0, beta_1=0.0, beta_2=0.0, tau=1.0, **TWO), moving_app(2 / 3), [10.5, 21.0]),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_each_round_starts_from_what_clients_received(name: str) -> None:
    base, app, expected = BY_HAND[name]
    zero = {key: torch.zeros_like(value) for key, value in small.net().state_dict().items()}
    seen: list[float] = []

    def look(_: int, arrays: ArrayRecord) -> None:
        seen.append(float(small.state(arrays)["head.bias"][0]))

    refined(base, AddConfig()).start(LocalGrid.of(app, 2), ArrayRecord(zero), 2, evaluate_fn=look)
    assert seen[1:] == pytest.approx(expected, abs=1e-5)


def test_a_registered_refiner_is_known_by_its_name(app: ClientApp, request: pytest.FixtureRequest) -> None:
    request.addfinalizer(lambda: REFINERS.pop("add"))
    register_refiner("add", AddConfig)
    result = run(refined(BASES["FedAdam"](), "add"), LocalGrid.of(app, CLIENTS), 1)
    assert result.train_metrics_clientapp[1]["fedftg-mean-size"] == 2.5


def test_proxy_images_need_the_normalisation_of_the_clients(app: ClientApp) -> None:
    """FedDF around a strategy, on images that the server has."""
    settings = FedDFConfig(proxy={"name": "digits"}, iterations=2, batch_size=8)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="pass the strategy mean and std"):
        refined(BASES["FedAvg"](), settings)
    result = run(refined(BASES["FedAvg"](), settings, mean=(0.3,), std=(0.4,)), LocalGrid.of(app, CLIENTS), 1)
    assert result.train_metrics_clientapp[1]["fedftg-student"] > 0


class Seen(small.FaultyGrid):
    """Notes the first head bias in messages of each kind."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.heads: dict[str, list[float]] = {}
        self.before_push = self.note

    def note(self, messages: list[Message]) -> None:
        for message in messages[:1]:
            head = float(small.state(message.content["arrays"])["head.bias"][0])
            self.heads.setdefault(message.metadata.message_type, []).append(head)


@pytest.mark.parametrize(("weight", "sent"), [(0.0, [0.0, 1.0]), (0.5, [0.0, 6.0]), (1.0, [0.0, 11.0])])
def test_clients_train_on_the_broadcast_and_evaluate_the_deployed_model(weight: float, sent: list[float]) -> None:
    """From zeros the aggregate moves by 1 a round, refining adds 10: clients get 1 + 10 weight in round 2."""
    zero = {key: torch.zeros_like(value) for key, value in small.net().state_dict().items()}
    app, central = moving_app(2 / 3), list[float]()

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1})}), reply_to=message)

    def look(_: int, arrays: ArrayRecord) -> None:
        central.append(float(small.state(arrays)["head.bias"][0]))

    options = {"min_train_nodes": 2, "min_available_nodes": 2}
    strategy = refined(flower.FedAvg(**options), AddConfig(broadcast=weight))
    grid = Seen(app, {1: {"partition-id": 0}, 2: {"partition-id": 1}})
    result = strategy.start(grid, ArrayRecord(zero), 2, evaluate_fn=look)
    deployed = [11.0, sent[1] + 11]
    assert grid.heads["train"] == pytest.approx(sent)
    assert grid.heads["evaluate"] == pytest.approx(deployed)
    assert central == pytest.approx([0.0, *deployed])
    assert float(small.state(result.arrays)["head.bias"][0]) == pytest.approx(deployed[1])
    assert (strategy.deployed is None) == (weight == 1)


@pytest.mark.parametrize(
    ("options", "evaluate_fn", "refined_in"),
    [(TWO, None, [3]), (TWO, lambda *_: None, [1, 2, 3]), ({**TWO, "fraction_evaluate": 1.0}, None, [1, 2, 3])],
)
def test_refining_for_evaluation_alone_waits_for_one(
    options: dict[str, Any], evaluate_fn: Any, refined_in: list[int], app: ClientApp
) -> None:
    given = AddConfig(broadcast=0.0, when="evaluation")
    strategy = refined(flower.FedAvg(**options), given)
    result = run(strategy, LocalGrid.of(app, 2), 3, evaluate_fn=evaluate_fn)
    metrics = result.train_metrics_clientapp
    assert [number for number in metrics if "fedftg-mean-size" in metrics[number]] == refined_in
    plain = run(refined(flower.FedAvg(**TWO), "none"), LocalGrid.of(app, 2), 3)
    moved = small.state(result.arrays)["head.bias"] - small.state(plain.arrays)["head.bias"]
    assert torch.allclose(moved, torch.tensor(10.0))


def test_the_label_priors_are_taken_out_by_name(app: ClientApp) -> None:
    shards = small.data(CLIENTS)
    labels = [small.samples(shards, client)[1] for client in range(CLIENTS)]
    strategy = Refined(BASES["FedAvg"](), "head_prior", model=small.net(), image_shape=small.IMAGE_SHAPE)
    found = small.state(run(strategy, LocalGrid.of(app, CLIENTS), 1).arrays)
    plain = small.state(run(refined(BASES["FedAvg"](), "none"), LocalGrid.of(app, CLIENTS), 1).arrays)
    logs = [len(of) * ((torch.bincount(of, minlength=10) + 0.5) / (len(of) + 5)).log() for of in labels]
    prior = torch.stack(logs).sum(dim=0) / sum(map(len, labels))
    expected = plain["head.bias"] - 0.75 * (prior - prior.mean())
    assert torch.allclose(found["head.bias"], expected, atol=1e-6)
    assert all(torch.equal(found[name], plain[name]) for name in plain if name != "head.bias")


def test_frozen_parameters_keep_the_aggregate_s_values(app: ClientApp) -> None:
    model = small.net()
    model.head.requires_grad_(False)
    plain = small.state(run(refined(BASES["FedAvg"](), "none"), LocalGrid.of(app, CLIENTS), 1).arrays)
    found = small.state(run(wrapped(BASES["FedAvg"](), model=model), LocalGrid.of(app, CLIENTS), 1).arrays)
    assert torch.equal(found["head.weight"], plain["head.weight"])
    assert not torch.equal(found["convolution.weight"], plain["convolution.weight"])


class Backwards(LocalGrid):
    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return super().send_and_receive(messages, timeout=timeout)[::-1]


def test_neither_order_nor_node_ids_of_replies_matter(app: ClientApp) -> None:
    expected = run(wrapped(BASES["FedAvg"]()), LocalGrid.of(app, CLIENTS)).arrays
    assert equal(run(wrapped(BASES["FedAvg"]()), Backwards.of(app, CLIENTS)).arrays, expected)
    nodes = {900 - 100 * client: {"partition-id": client} for client in range(CLIENTS)}
    assert equal(run(wrapped(BASES["FedAvg"]()), LocalGrid(app, nodes)).arrays, expected)


def lose_counts(content: RecordDict) -> None:
    del content["metrics"]["class-counts"]


def set_metric(key: str, value: Any) -> Callable[[RecordDict], None]:
    return lambda content: content["metrics"].__setitem__(key, value)


def test_a_client_without_class_counts_counts_in_the_aggregate_and_teaches_nothing(
    app: ClientApp, log: pytest.LogCaptureFixture
) -> None:
    strategy = refined(BASES["FedAvg"](), "none")
    changes = {2: lose_counts, 3: set_metric("class-counts", [0] * 10)}
    result = run(strategy, small.grid_of(app, CLIENTS, changes), rounds=1)
    assert strategy.reports[0].teachers == [0, 3]
    assert strategy.reports[0].left_out == dict.fromkeys([1, 2], "its metric 'class-counts' is missing or all 0")
    assert "client 1 is no teacher" in log.text
    assert result.train_metrics_clientapp[1]["fedftg-left-out"] == 2
    assert equal(result.arrays, run(refined(BASES["FedAvg"](), "none"), LocalGrid.of(app, CLIENTS), 1).arrays)


def replaced(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[RecordDict], None]:
    def act(content: RecordDict) -> None:
        content["arrays"][name] = Array(np.asarray(change(content["arrays"][name].numpy())))

    return act


def not_a_number(array: np.ndarray) -> np.ndarray:
    return np.full_like(array, np.nan)


def two_models(content: RecordDict) -> None:
    content["other"] = content.pop("arrays")
    content["third"] = content["other"]


def test_replies_that_do_not_fit_are_as_clients_that_failed(log: pytest.LogCaptureFixture) -> None:
    changes = {
        2: (replaced("head.bias", not_a_number), 1, "tensor 'head.bias' holds NaN"),
        3: (two_models, 2, "2 ArrayRecords and none is 'arrays'"),
        4: (set_metric("num-examples", float("nan")), 3, "'num-examples' must be a number from 0 .* got nan"),
        5: (set_metric("class-counts", [1] * 9), 4, "class counts must be 10"),
        6: (set_metric("partition-id", 6), 6, "2 nodes are client 6; give each its own 'partition-id'"),
    }
    seven: dict[str, Any] = {"min_train_nodes": 7, "min_available_nodes": 7, "fraction_evaluate": 0.0}
    app, strategy = small.client_app(small.data(7)), wrapped(flower.FedAvg(**seven))
    result = run(strategy, small.grid_of(app, 7, {node: one[0] for node, one in changes.items()}), rounds=1)
    (report,) = strategy.reports
    assert report.teachers == [0]
    assert sorted(report.left_out) == [1, 2, 3, 4, 6]
    for node, (_, client, reason) in changes.items():
        text = report.left_out[client]
        assert re.search(reason, text), text
        assert f"client {client} is no teacher: {text}" in log.text
        assert f"Received error in reply from node {node}: {text}" in log.text
    failing = LocalGrid.of(app, 7)
    for node in range(2, 8):
        failing.leave(node)
        failing.join(node, {"partition-id": "no number"})
    assert equal(result.arrays, run(wrapped(flower.FedAvg(**seven)), failing, rounds=1).arrays)


class FailingConfig(AddConfig):
    error: Any

    def refine(self, *_: Any) -> Any:
        raise self.error


def test_refining_that_is_not_finite_or_fails_gives_the_aggregate(
    app: ClientApp, log: pytest.LogCaptureFixture
) -> None:
    plain = run(refined(BASES["FedAvg"](), "none"), LocalGrid.of(app, CLIENTS), rounds=1)
    wild = refined(BASES["FedAvg"](), AddConfig(amount=1e39))
    assert equal(run(wild, LocalGrid.of(app, CLIENTS), rounds=1).arrays, plain.arrays)
    assert wild.reports[0].rolled_back == "FloatingPointError: convolution.weight of the refined model is not finite"
    assert int(wild._memory["calls"]) == 0
    failing = refined(BASES["FedAvg"](), FailingConfig(error=torch.OutOfMemoryError("out of memory\nand more")))
    result = run(failing, LocalGrid.of(app, CLIENTS), rounds=1)
    assert equal(result.arrays, plain.arrays)
    assert failing.reports[0].rolled_back == "OutOfMemoryError: out of memory"
    assert result.train_metrics_clientapp[1]["fedftg-rolled-back"] == 1
    assert "not refined: OutOfMemoryError" in log.text
    with pytest.raises(KeyError, match="a mistake"):
        run(refined(BASES["FedAvg"](), FailingConfig(error=KeyError("a mistake"))), LocalGrid.of(app, CLIENTS), 1)


def test_a_round_without_a_usable_reply_leaves_the_model_and_is_in_the_checkpoint(
    app: ClientApp, tmp_path: Path
) -> None:
    checkpoint = {"checkpoint": tmp_path / "run"}
    one = run(wrapped(BASES["FedAvg"](), **checkpoint), LocalGrid.of(app, CLIENTS), 1)
    grid = small.grid_of(app, CLIENTS, dict.fromkeys(range(1, CLIENTS + 1), replaced("head.bias", not_a_number)))
    strategy = wrapped(BASES["FedAvg"](), **checkpoint)
    assert equal(run(strategy, grid, 2).arrays, one.arrays)
    (report,) = strategy.reports
    assert report.rolled_back == "the base strategy gave no aggregate; the global model stays as it was"
    assert sorted(report.left_out) == [0, 1, 2, 3]
    found = wrapped(BASES["FedAvg"](), **checkpoint).restore()
    assert found is not None
    assert found[0] == 2
    assert equal(found[1], one.arrays)


@pytest.mark.parametrize("name", ["FedAdam", "FedAvgM", "MultiKrum"])
def test_a_stopped_run_is_resumed_bit_for_bit(
    name: str, app: ClientApp, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    """Adam's moments of the generator and of the base strategy both matter, and the true number of the round."""
    kept = {"config": CONFIG.model_copy(update={"generator_optimizer_state": "kept"})}
    saved = {**kept, "checkpoint": tmp_path / "run"}
    numbers: list[int] = []
    whole = run(wrapped(BASES[name](), **kept), LocalGrid.of(app, CLIENTS), 3)
    run(wrapped(BASES[name](), **saved), LocalGrid.of(app, CLIENTS), 2)
    again = wrapped(BASES[name](), **saved)
    rest = run(again, LocalGrid.of(app, CLIENTS), 3, evaluate_fn=lambda number, _: numbers.append(number))
    assert equal(whole.arrays, rest.arrays)
    assert numbers == [2, 3]
    assert set(rest.train_metrics_clientapp) == {3}
    assert rest.train_metrics_clientapp[3] == whole.train_metrics_clientapp[3]
    assert "resumed after round 2" in log.text
    assert equal(run(wrapped(BASES[name](), **saved), LocalGrid.of(app, CLIENTS), 3).arrays, whole.arrays)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["refined.safetensors"]
    for other, message in (
        (wrapped(BASES[name](), **saved, seed=1), "of a run with seed = 0, this one has 1; use the same"),
        (wrapped(BASES["FedMedian"](), **saved), f"base = {name}, this one has FedMedian"),
        (wrapped(BASES[name](), checkpoint=tmp_path / "run"), "refiner.generator_optimizer_state = kept, this one"),
    ):
        with pytest.raises(InputError, match=message):
            other.restore()


def test_absent_clients_are_taught_for_as_in_the_preset() -> None:
    """With node ids beyond 63 bits in place of partition ids; client numbers are then their low bits."""
    app = small.client_app(small.data(3), partition_id=False)
    nodes = {2**63 + 5 + client: {"partition-id": client} for client in range(3)}

    def two_rounds(**changes: Any) -> tuple[FedFTG, ArrayRecord]:
        grid = LocalGrid(app, nodes)
        strategy = wrapped(flower.FedAvg(**TWO), **changes)

        def leave(number: int, _: ArrayRecord) -> None:
            if number == 1:
                grid.leave(max(grid.get_node_ids()))

        return strategy, run(strategy, grid, 2, evaluate_fn=leave).arrays

    (with_past, one), (_, two) = two_rounds(absent_weight=1.0), two_rounds()
    assert [report.teachers for report in with_past.reports] == [[5, 6, 7], [5, 6]]
    assert not equal(one, two)
    weights = [wrapped(flower.FedAvg(), config=preset)._config.absent_weight for preset in ("fedftg", "paper")]
    assert weights == [1.0, 0.0]


def test_scaffold_deploys_another_average() -> None:
    base = RuleStrategy(model=small.net(), num_clients=3, algorithm="scaffold")
    of = [wrapped(strategy, config="fedftg")._config for strategy in (base, flower.FedAvg())]
    assert [(config.average, config.prior_tau) for config in of] == [("ema", 0.25), ("all", 0.75)]


def test_what_cannot_be_refined_is_refused_in_one_line(app: ClientApp) -> None:
    grid, uncounted = small.grid_of(app, CLIENTS, {}), small.client_app(small.data(CLIENTS), counts=False)
    grid.before_push = lambda _: pytest.fail("arrays that are not the model's were sent")
    other = ArrayRecord(nn.Linear(2, 3).state_dict())
    private = flower.DifferentialPrivacyClientSideFixedClipping(flower.FedAvg(), 1.0, 1.0, 2)
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: wrapped(private), "keeps only the sum of the updates private.*LocalDpMod"),
        (lambda: wrapped(flower.FedAvg(), image_shape=(3, 8, 8)), r"images of shape \(3, 8, 8\)"),
        (lambda: wrapped(flower.FedAvg(), image_shape=(8, 8)), r"images of shape \(8, 8\)"),
        (lambda: wrapped(flower.FedAvg(), config="fedtgf"), "unknown preset 'fedtgf'; did you mean 'fedftg'"),
        (lambda: wrapped(flower.FedAvg(), absent_weight=-1), "absent_weight must be >= 0, got -1"),
        (lambda: wrapped(flower.FedAvg(), model=nn.Flatten(0)), r"logits \(2, classes\)"),
        (lambda: refined(flower.FedAvg(), "nune"), "unknown refiner 'nune'; did you mean 'none'"),
        (
            lambda: wrapped(BASES["FedAvg"]()).start(grid, other, 1),
            "2 arrays have unknown 'weight'; they must be the 9",
        ),
        (
            lambda: run(wrapped(BASES["FedAvg"]()), LocalGrid.of(uncounted, CLIENTS)),
            r"round 1 has the metric 'class-counts'.*class_counts\(labels, 10\)",
        ),
    ]
    for make, message in cases:
        with pytest.raises(InputError, match=message) as caught:
            make()
        assert "\n" not in str(caught.value)
