"""FedFTG around Flower's strategies, on the in-process grid."""

from __future__ import annotations

import gc
import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
import small_federation as small

from fedftg.algorithms.base import ServerState
from fedftg.distill.distiller import Distiller
from fedftg.distill.generator import Generator
from fedftg.distill.teachers import ListedTeachers
from fedftg.errors import InputError
from fedftg.flower import FedDyn, FedFTG
from fedftg.flower import base_strategies as bases
from fedftg.flower.local_grid import LocalGrid
from fedftg.models.functional import FunctionalModel, values
from fedftg.seeds import SERVER, forked, torch_rng

CLIENTS = 4
CONFIG = small.CONFIG
NO_CHANGE = CONFIG.model_copy(update={"student_lr": 0.0, "restore_buffers": True})
ALL = {"min_train_nodes": CLIENTS, "min_evaluate_nodes": CLIENTS, "min_available_nodes": CLIENTS}


@pytest.fixture(autouse=True)
def frozen_garbage() -> Iterator[None]:
    """QFedAvg and Bulyan collect garbage for every client, which takes seconds beside all that tests have loaded."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def app() -> ClientApp:
    return small.client_app(small.data(CLIENTS))


def wrapped(base: Strategy, **changes: Any) -> FedFTG:
    return FedFTG(base, **{"model": small.net(), "image_shape": small.IMAGE_SHAPE, "config": CONFIG, **changes})


def run(strategy: Strategy, grid: Grid, rounds: int = 2, **more: Any) -> Result:
    return strategy.start(grid, small.initial(), rounds, **more)


def strategy_settings(strategy: FedFTG) -> dict[str, Any]:
    (settings,) = bases.settings(strategy.strategy)
    return settings


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
    "QFedAvg": lambda: flower.QFedAvg(client_learning_rate=0.1, **ALL),
    "clipping on the server": lambda: flower.DifferentialPrivacyServerSideFixedClipping(
        flower.FedAvg(**ALL), 0.0, 0.5, CLIENTS
    ),
}


def whole_as_floats(record: ArrayRecord) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(array.numpy() * 1.0)) for name, array in record.items()})


def aggregate_then_distil(base: Strategy, grid: LocalGrid, rounds: int) -> dict[str, Tensor]:
    """What FedFTG must give, written out: the base's aggregate, and one call of the Distiller a round."""
    model = FunctionalModel(small.net())
    seed = int(torch.randint(2**62, (), generator=torch_rng(0, 0, SERVER, "refiner")))
    with forked(seed, torch.device("cpu")):
        generator = Generator(CONFIG.noise_dim, small.NUM_CLASSES, small.IMAGE_SHAPE, CONFIG.generator_width)
    distiller = Distiller(CONFIG, generator)
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
            if isinstance(base, flower.QFedAvg):  # it divides in place
                reply.content["arrays"] = whole_as_floats(reply.content["arrays"])
        if isinstance(base, flower.QFedAvg):
            base.current_arrays = whole_as_floats(arrays)
        aggregate, _ = base.aggregate_train(number, replies)
        assert aggregate is not None
        like = small.net().state_dict()
        mixed = {name: torch.from_numpy(aggregate[name].numpy().copy()) for name in like}
        mixed = {
            n: (t.to(like[n].dtype) if like[n].is_floating_point() else t.round().long()) for n, t in mixed.items()
        }
        student = model.module(*({name: mixed[name] for name in part} for part in model.init()))
        rng = torch_rng(0, number, SERVER, "refine")
        scale = CONFIG.lr_decay ** (number - 1)
        distiller.refine(student, ListedTeachers(teachers), torch.tensor(counts), rng=rng, lr_scale=scale)
        params, buffers = values(student)
        arrays = ArrayRecord({name: {**params, **buffers}[name] for name in like})
    return small.state(arrays)


@pytest.mark.parametrize("name", BASES)
def test_each_strategy_is_its_aggregate_distilled(name: str, app: ClientApp) -> None:
    strategy = wrapped(BASES[name](), accept_privacy_loss=True)
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
    assert "class-counts" not in result.train_metrics_clientapp[1]
    assert "partition-id" not in result.train_metrics_clientapp[1]
    assert result.train_metrics_clientapp[1]["fedftg-teachers"] == CLIENTS


@pytest.mark.parametrize("name", ["FedAvg", "FedAdam", "FedMedian", "Krum"])
def test_a_refiner_that_changes_nothing_gives_the_base_s_result(name: str, app: ClientApp) -> None:
    plain = run(BASES[name](), LocalGrid.of(app, CLIENTS), rounds=1)
    result = run(wrapped(BASES[name](), config=NO_CHANGE), LocalGrid.of(app, CLIENTS), rounds=1)
    for key, value in small.state(result.arrays).items():
        expected = torch.from_numpy(plain.arrays[key].numpy().copy())
        assert torch.equal(value, expected.to(value.dtype)), key
    assert small.state(result.arrays)["norm.num_batches_tracked"].dtype == torch.int64
    loss = result.train_metrics_clientapp[1]["train_loss"]
    assert loss == plain.train_metrics_clientapp[1]["train_loss"]


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


def by_hand(base: Strategy, app: ClientApp, rounds: int, refined_by: float) -> list[float]:
    """The bias of the model after each round, from 0; "refining" adds a number to all parameters."""

    class Adding:
        def refine(self, state: ServerState, results: Any, rng: Any) -> tuple[ServerState, dict[str, float]]:
            moved = {name: value + refined_by for name, value in state.params.items()}
            return ServerState(state.round, moved, state.buffers, {}, state.refiner), {}

    strategy = wrapped(base, config=NO_CHANGE)
    strategy._refiner = Adding()  # type: ignore[assignment]
    grid = LocalGrid.of(app, 2)
    zero = {name: torch.zeros_like(value) for name, value in small.net().state_dict().items()}
    seen: list[float] = []

    def look(number: int, arrays: ArrayRecord) -> None:
        seen.append(float(small.state(arrays)["head.bias"][0]))

    strategy.start(grid, ArrayRecord(zero), rounds, evaluate_fn=look)
    return seen[1:]


TWO = {"min_train_nodes": 2, "min_available_nodes": 2, "fraction_evaluate": 0.0}


def test_averages_by_hand() -> None:
    """Clients 0 and 1 of 1 and 3 examples add 1 and 2: (1 * 1 + 3 * 2) / 4 = 1.75 a round, and 10 by refining."""
    assert by_hand(flower.FedAvg(**TWO), moving_app(1.0, lambda client: 1 + 2 * client), 2, 10.0) == [11.75, 23.5]


def test_momentum_starts_from_what_clients_received() -> None:
    """The clients add 2/3 and 4/3, on average 1; momentum 0.5, rate 0.5 (at rate 1 the current model cancels).

    Round 1: gradient 0 - 1 = -1, velocity -1, model 0 + 0.5 = 0.5, refined 10.5. Round 2: clients give 11.5, gradient
    10.5 - 11.5 = -1, velocity 0.5 * -1 - 1 = -1.5, model 10.5 + 0.75 = 11.25, refined 21.25. Had the strategy kept its
    own 0.5 as current model, the gradient would be 0.5 - 11.5 = -11 and the model 0.5 + 5.75 = 6.25.
    """
    base = flower.FedAvgM(server_momentum=0.5, server_learning_rate=0.5, **TWO)
    assert by_hand(base, moving_app(2 / 3), 2, 10.0) == pytest.approx([10.5, 21.25], abs=1e-5)


def test_adam_starts_from_what_clients_received() -> None:
    """Without moments (beta 0) and tau 1, a step is eta * d / (|d| + 1): 0.5 for d = 1.

    Round 1: 0 + 0.5, refined 10.5. Round 2: clients give 11.5, d = 1, 10.5 + 0.5 = 11, refined 21.
    """
    base = flower.FedAdam(eta=1.0, beta_1=0.0, beta_2=0.0, tau=1.0, **TWO)
    assert by_hand(base, moving_app(2 / 3), 2, 10.0) == pytest.approx([10.5, 21.0], abs=1e-5)


def test_q_fedavg_starts_from_what_clients_received() -> None:
    """With q = 0 it is the plain mean: 1 a round."""
    base = flower.QFedAvg(client_learning_rate=1.0, q=0.0, **TWO)
    assert by_hand(base, moving_app(2 / 3), 2, 10.0) == pytest.approx([11.0, 22.0], abs=1e-5)


def test_the_order_of_replies_does_not_matter(app: ClientApp) -> None:
    class Backwards(LocalGrid):
        def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
            return super().send_and_receive(messages, timeout=timeout)[::-1]

    there = run(wrapped(BASES["FedAvg"]()), LocalGrid.of(app, CLIENTS))
    back = run(wrapped(BASES["FedAvg"]()), Backwards.of(app, CLIENTS))
    assert equal(there.arrays, back.arrays)


def test_node_ids_do_not_matter_where_partition_ids_are_told(app: ClientApp) -> None:
    there = run(wrapped(BASES["FedAvg"]()), LocalGrid.of(app, CLIENTS))
    nodes = {900 - 100 * client: {"partition-id": client} for client in range(CLIENTS)}
    other = run(wrapped(BASES["FedAvg"]()), LocalGrid(app, nodes))
    assert equal(there.arrays, other.arrays)


def test_without_partition_ids_clients_are_known_by_their_nodes() -> None:
    strategy = wrapped(BASES["FedAvg"]())
    run(strategy, LocalGrid.of(small.client_app(small.data(CLIENTS), partition_id=False), CLIENTS), rounds=1)
    assert strategy.reports[0].teachers == [1, 2, 3, 4]


def test_class_counts_that_are_missing_everywhere_are_named() -> None:
    strategy = wrapped(BASES["FedAvg"]())
    grid = LocalGrid.of(small.client_app(small.data(CLIENTS), counts=False), CLIENTS)
    with pytest.raises(InputError, match=r"round 1: .*lack 'class-counts'.*class_counts\(labels, 10\)") as caught:
        run(strategy, grid, rounds=1)
    assert "\n" not in str(caught.value)


def lose_counts(content: RecordDict) -> None:
    del content["metrics"]["class-counts"]


def test_a_client_without_class_counts_counts_in_the_aggregate_and_teaches_nothing(
    app: ClientApp, log: pytest.LogCaptureFixture
) -> None:
    strategy = wrapped(BASES["FedAvg"](), config=NO_CHANGE)
    result = run(strategy, small.grid_of(app, CLIENTS, {2: lose_counts}), rounds=1)
    assert strategy.reports[0].teachers == [0, 2, 3]
    assert "lack 'class-counts'" in strategy.reports[0].left_out[1]
    assert "client 1 is no teacher" in log.text
    assert equal(result.arrays, run(wrapped(BASES["FedAvg"](), config=NO_CHANGE), LocalGrid.of(app, CLIENTS), 1).arrays)


def replaced(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[RecordDict], None]:
    def act(content: RecordDict) -> None:
        content["arrays"][name] = Array(np.asarray(change(content["arrays"][name].numpy())))

    return act


def not_a_number(array: np.ndarray) -> np.ndarray:
    return np.full_like(array, np.nan)


def two_models(content: RecordDict) -> None:
    content["other"] = content.pop("arrays")
    content["third"] = content["other"]


def set_metric(key: str, value: Any) -> Callable[[RecordDict], None]:
    return lambda content: content["metrics"].__setitem__(key, value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (replaced("head.bias", not_a_number), "'head.bias' holds NaN"),
        (replaced("head.bias", lambda a: a[:-1]), r"'head.bias' is float32 \(9,\).* must be float32 \(10,\)"),
        (replaced("head.bias", lambda a: a.astype(np.float64)), "'head.bias' is float64"),
        (lambda content: content["arrays"].pop("head.bias"), "lacks 'head.bias'"),
        (two_models, "2 ArrayRecords and none is 'arrays'"),
        (set_metric("num-examples", float("nan")), "'num-examples' is nan"),
        (set_metric("num-examples", -1), "'num-examples' is -1"),
        (set_metric("num-examples", 2**60), r"numbers from 0 to 2\*\*53"),
        (set_metric("num-examples", [40]), r"'num-examples' is \[40\]"),
        (set_metric("partition-id", -1), "'partition-id' must be a whole number from 0"),
        (set_metric("partition-id", 2.0), "'partition-id' must be a whole number from 0"),
        (lambda content: content["metrics"].pop("num-examples"), "lacks metric 'num-examples' in 'metrics'$"),
        (set_metric("more", 1.0), "has metric 'more' in 'metrics'$"),
        (set_metric("train_loss", [1.0]), "lacks metric 'train_loss'.* has metric 'train_loss' .*of length 1$"),
        (
            lambda content: content.update({"more": MetricRecord({"b": 1})}),
            "has metric 'b' in 'more', a record of metrics 'more'",
        ),
        (lambda content: content.update({"more": ArrayRecord()}), "has a record of arrays 'more'$"),
        (lambda content: content.update({"own": content.pop("arrays")}), "lacks .* 'arrays' and has .* arrays 'own'$"),
    ],
)
def test_a_reply_that_does_not_fit_is_as_a_client_that_failed(
    change: Callable[[RecordDict], None], reason: str, app: ClientApp, log: pytest.LogCaptureFixture
) -> None:
    strategy = wrapped(BASES["FedAvg"]())
    result = run(strategy, small.grid_of(app, CLIENTS, {3: change}), rounds=1)
    assert strategy.reports[0].teachers == [0, 1, 3]
    (text,) = strategy.reports[0].left_out.values()
    assert re.search(reason, text), text
    assert text in log.text
    failing = LocalGrid.of(app, CLIENTS)
    failing.leave(3)
    failing.join(3, {"partition-id": "no number"})
    assert equal(result.arrays, run(wrapped(BASES["FedAvg"]()), failing, rounds=1).arrays)


def test_two_nodes_with_one_partition_id_are_both_left_out(app: ClientApp) -> None:
    strategy = wrapped(BASES["FedAvg"]())
    result = run(strategy, small.grid_of(app, CLIENTS, {3: set_metric("partition-id", 1)}), rounds=1)
    assert strategy.reports[0].teachers == [0, 3]
    assert strategy.reports[0].left_out == {1: "2 nodes are client 1; give each its own 'partition-id'"}
    failing = LocalGrid.of(app, CLIENTS)
    for node in (2, 3):
        failing.leave(node)
        failing.join(node, {"partition-id": "no number"})
    assert equal(result.arrays, run(wrapped(BASES["FedAvg"]()), failing, rounds=1).arrays)


def test_of_two_kinds_of_reply_the_complete_one_is_right() -> None:
    """One of two clients does not tell its examples, the other does: as many, and the incomplete one comes first."""
    app = small.client_app(small.data(2))
    strategy = wrapped(flower.FedAvg(**TWO))
    run(strategy, small.grid_of(app, 2, {1: lambda content: content["metrics"].pop("num-examples")}), rounds=1)
    assert strategy.reports[0].teachers == [1]
    assert "lacks metric 'num-examples'" in strategy.reports[0].left_out[0]


def test_a_strategy_that_takes_replies_of_several_kinds_gets_them(app: ClientApp) -> None:
    strategy = wrapped(FedDyn(model=small.net(), num_clients=CLIENTS, fraction_evaluate=0.0))
    strategy.configure_train(1, small.initial(), ConfigRecord(), LocalGrid.of(app, CLIENTS))
    asked = flower.FedAvg(**ALL).configure_train(1, small.initial(), ConfigRecord(), LocalGrid.of(app, CLIENTS))
    strategy.aggregate_train(1, small.grid_of(app, CLIENTS, {2: set_metric("more", 1.0)}).send_and_receive(asked))
    assert strategy.reports[0].teachers == [0, 1, 2, 3]


def test_clients_without_a_single_example_change_nothing(app: ClientApp) -> None:
    strategy = wrapped(BASES["FedAvg"]())
    grid = small.grid_of(app, CLIENTS, dict.fromkeys(range(1, CLIENTS + 1), set_metric("num-examples", 0)))
    assert not run(strategy, grid, rounds=1).arrays
    assert strategy.reports[0].left_out[3] == "no client has a metric 'num-examples' above 0"


class Moody(flower.FedAvgM):
    """Fails in the rounds of ``bad``, or gives infinity there, with its momentum and a list already changed."""

    def __init__(self, bad: tuple[int, ...], infinite: bool) -> None:
        super().__init__(server_momentum=0.5, server_learning_rate=0.5, **ALL)
        self.bad, self.infinite = bad, infinite
        self.seen: dict[str, list[int]] = {"rounds": []}

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        arrays, metrics = super().aggregate_train(server_round, replies)
        self.seen["rounds"].append(server_round)
        if server_round in self.bad:
            for momentum in self.momentum_vector or []:
                momentum += 1
            if not self.infinite:
                raise RuntimeError("no mood\nat all")
            assert arrays is not None
            arrays["head.bias"] = Array(np.full(10, np.inf, np.float32))
        return arrays, metrics


@pytest.mark.parametrize("infinite", [False, True], ids=["fails", "infinite"])
def test_a_base_that_fails_costs_the_round_and_keeps_nothing_of_it(infinite: bool, app: ClientApp) -> None:
    """Round 2 goes wrong: model and momentum stay, and round 3 is what it had been as the second good one."""
    strategy = wrapped(Moody((2,), infinite), config=NO_CHANGE)
    after: list[ArrayRecord] = []
    run(strategy, LocalGrid.of(app, CLIENTS), 3, evaluate_fn=lambda _, arrays: after.append(arrays))
    good = wrapped(Moody((), infinite), config=NO_CHANGE)
    expected: list[ArrayRecord] = []
    run(good, LocalGrid.of(app, CLIENTS), 2, evaluate_fn=lambda _, arrays: expected.append(arrays))
    assert equal(after[1], after[2])
    assert strategy.strategy.seen == {"rounds": [1, 3]}  # type: ignore[attr-defined]
    assert equal(after[3], expected[2])
    reason = (
        "the aggregate is not finite (head.bias)" if infinite else "the base strategy failed (RuntimeError: no mood)"
    )
    assert strategy.reports[1].rolled_back == f"{reason}; the global model stays as it was"
    assert strategy.reports[1].teachers == []


def test_a_base_that_fails_from_the_start_is_told(app: ClientApp) -> None:
    with pytest.raises(RuntimeError, match="no mood"):
        run(wrapped(Moody((1,), False)), LocalGrid.of(app, CLIENTS))


def test_a_later_round_without_class_counts_is_the_base_s(app: ClientApp) -> None:
    grid = small.grid_of(app, CLIENTS, {})
    strategy = wrapped(BASES["FedAvg"](), config=NO_CHANGE)

    def later(number: int, _: ArrayRecord) -> None:
        if number == 1:
            grid.faults.update(small.grid_of(app, CLIENTS, dict.fromkeys(range(1, CLIENTS + 1), lose_counts)).faults)

    result = run(strategy, grid, 2, evaluate_fn=later)
    assert [report.rolled_back for report in strategy.reports] == [None, "there was no teacher"]
    assert equal(result.arrays, run(wrapped(BASES["FedAvg"](), config=NO_CHANGE), LocalGrid.of(app, CLIENTS), 2).arrays)


def test_clients_without_partition_ids_are_told_once(log: pytest.LogCaptureFixture) -> None:
    app = small.client_app(small.data(2), partition_id=False)
    run(wrapped(flower.FedAvg(**TWO), absent_weight=1.0), LocalGrid.of(app, 2))
    told = [r.getMessage() for r in {id(r): r for r in log.records}.values() if "do not tell" in r.getMessage()]
    assert len(told) == 1
    assert "clients do not tell 'partition-id'; a node that starts again" in told[0]
    log.clear()
    run(wrapped(flower.FedAvg(**TWO)), LocalGrid.of(app, 2))
    run(wrapped(flower.FedAvg(**TWO), absent_weight=1.0), LocalGrid.of(small.client_app(small.data(2)), 2))
    assert "do not tell" not in log.text


@pytest.mark.parametrize(
    ("counts", "reason"),
    [
        ([2**53] * 10, "at most 2\\*\\*53 in all"),
        ([1] * 9, "must be 10 whole numbers"),
        ([-1] * 10, "whole numbers >= 0"),
        ([0] * 10, "are all 0"),
        (3, "a list"),
    ],
)
def test_class_counts_that_are_wrong_are_told(counts: Any, reason: str, app: ClientApp) -> None:
    strategy = wrapped(BASES["FedAvg"]())
    run(strategy, small.grid_of(app, CLIENTS, {1: set_metric("class-counts", counts)}), rounds=1)
    assert strategy.reports[0].teachers == [1, 2, 3]
    assert re.search(reason, strategy.reports[0].left_out[0])


def test_a_round_in_which_every_client_fails_leaves_the_model(app: ClientApp) -> None:
    strategy = wrapped(BASES["FedAvg"]())
    grid = small.grid_of(app, 4, dict.fromkeys(range(1, 5), replaced("head.bias", not_a_number)))
    result = strategy.start(grid, small.initial(), 1)
    assert not result.arrays
    (report,) = strategy.reports
    assert report.rolled_back == "the base strategy gave no aggregate; the global model stays as it was"
    assert sorted(report.left_out) == [0, 1, 2, 3]


def test_fine_tuning_that_is_not_finite_or_fails_gives_the_aggregate(
    app: ClientApp, log: pytest.LogCaptureFixture
) -> None:
    plain = run(wrapped(BASES["FedAvg"](), config=NO_CHANGE), LocalGrid.of(app, CLIENTS), rounds=1)
    wild = wrapped(BASES["FedAvg"](), config=CONFIG.model_copy(update={"student_lr": 1e38}))
    before = {name: value.clone() for name, value in wild._memory.items()}
    assert equal(run(wild, LocalGrid.of(app, CLIENTS), rounds=1).arrays, plain.arrays)
    assert "not finite" in str(wild.reports[0].rolled_back)
    assert all(torch.equal(wild._memory[name], value) for name, value in before.items())

    class Failing:
        def refine(self, *_: Any) -> Any:
            raise RuntimeError("out of memory\nand more")

    failing = wrapped(BASES["FedAvg"]())
    failing._refiner = Failing()  # type: ignore[assignment]
    result = run(failing, LocalGrid.of(app, CLIENTS), rounds=1)
    assert equal(result.arrays, plain.arrays)
    assert failing.reports[0].rolled_back == "fine-tuning failed (RuntimeError: out of memory)"
    assert result.train_metrics_clientapp[1]["fedftg-rolled-back"] == 1
    assert "fine-tuning failed" in log.text


def test_an_aggregate_that_is_not_finite_leaves_the_model(app: ClientApp) -> None:
    class Broken(flower.FedAvg):
        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
            arrays, metrics = super().aggregate_train(server_round, replies)
            assert arrays is not None
            if server_round == 2:
                arrays["head.bias"] = Array(np.full(10, np.inf, np.float32))
            return arrays, metrics

    strategy = wrapped(Broken(**ALL))
    one, two = (run(wrapped(Broken(**ALL)), LocalGrid.of(app, CLIENTS), n) for n in (1, 2))
    run(strategy, LocalGrid.of(app, CLIENTS), 2)
    assert equal(one.arrays, two.arrays)
    assert "the aggregate is not finite (head.bias)" in str(strategy.reports[1].rolled_back)


def test_the_generator_persists_over_rounds(app: ClientApp) -> None:
    strategy = wrapped(BASES["FedAvg"]())
    memories = [strategy._memory]
    run(strategy, LocalGrid.of(app, CLIENTS), 2, evaluate_fn=lambda *_: memories.append(strategy._memory))
    assert [int(memory["calls"]) for memory in memories] == [0, 0, 1, 2]
    weights = [memory["generator.noise_layer.weight"] for memory in memories]
    assert not torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[2], weights[3])


def test_a_round_without_a_usable_reply_is_in_the_checkpoint(app: ClientApp, tmp_path: Path) -> None:
    checkpoint = {"checkpoint": tmp_path / "run"}
    one = run(wrapped(BASES["FedAvg"](), **checkpoint), LocalGrid.of(app, CLIENTS), 1)
    grid = small.grid_of(app, CLIENTS, dict.fromkeys(range(1, CLIENTS + 1), replaced("head.bias", not_a_number)))
    assert equal(run(wrapped(BASES["FedAvg"](), **checkpoint), grid, 2).arrays, one.arrays)
    found = wrapped(BASES["FedAvg"](), **checkpoint).restore()
    assert found is not None
    assert found[0] == 2
    assert equal(found[1], one.arrays)


@pytest.mark.parametrize("name", ["FedAdam", "FedAvgM"])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(
    name: str, app: ClientApp, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    """Adam's moments of the generator and of the base strategy both matter, and the true number of the round."""
    kept = {"config": CONFIG.model_copy(update={"generator_optimizer_state": "kept"})}
    numbers: list[int] = []
    whole = run(wrapped(BASES[name](), **kept), LocalGrid.of(app, CLIENTS), 3)
    run(wrapped(BASES[name](), **kept, checkpoint=tmp_path / "run"), LocalGrid.of(app, CLIENTS), 2)
    again = wrapped(BASES[name](), **kept, checkpoint=tmp_path / "run")
    rest = run(again, LocalGrid.of(app, CLIENTS), 3, evaluate_fn=lambda number, _: numbers.append(number))
    assert equal(whole.arrays, rest.arrays)
    assert numbers == [2, 3]
    assert set(rest.train_metrics_clientapp) == {3}
    assert rest.train_metrics_clientapp[3] == whole.train_metrics_clientapp[3]
    assert "goes on after round 2" in log.text
    done = wrapped(BASES[name](), **kept, checkpoint=tmp_path / "run")
    assert equal(run(done, LocalGrid.of(app, CLIENTS), 3).arrays, whole.arrays)
    assert sorted(path.suffix for path in (tmp_path / "run").iterdir()) == [".json", ".safetensors"]
    assert not {"fraction_train", "min_train_nodes"} & strategy_settings(done).keys()
    other = BASES[name]()
    other.weighted_by_key = "size"  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"base strategy\.0\.weighted_by_key = num-examples, this one has size"):
        run(
            wrapped(other, **kept, checkpoint=tmp_path / "run"),
            LocalGrid.of(app, 1),
        )
    with pytest.raises(InputError, match="of a run with seed = 0, this one has 1"):
        run(wrapped(BASES[name](), **kept, checkpoint=tmp_path / "run", seed=1), LocalGrid.of(app, CLIENTS))
    next((tmp_path / "run").glob("*.safetensors")).write_bytes(b"torn")
    with pytest.raises(InputError, match="cannot be read"):
        run(wrapped(BASES[name](), **kept, checkpoint=tmp_path / "run"), LocalGrid.of(app, CLIENTS))


def test_absent_clients_are_taught_for_as_in_the_preset() -> None:
    """With node ids beyond 63 bits in place of partition ids; client numbers are then their low bits."""
    app = small.client_app(small.data(3), partition_id=False)
    nodes = {2**63 + 5 + client: {"partition-id": client} for client in range(3)}

    class Two(LocalGrid):
        def get_node_ids(self) -> list[int]:
            return super().get_node_ids()[:2] if self.late else super().get_node_ids()

        late = False

    def run_two(**changes: Any) -> tuple[FedFTG, ArrayRecord]:
        grid = Two(app, nodes)
        strategy = wrapped(flower.FedAvg(**TWO), **changes)
        first = strategy.start(grid, small.initial(), 1).arrays
        grid.late = True
        strategy._offset = 1
        replies = grid.send_and_receive(list(strategy.configure_train(1, first, ConfigRecord(), grid)))
        arrays, _ = strategy.aggregate_train(1, replies)
        assert arrays is not None
        return strategy, arrays

    (with_past, one), (_, two) = run_two(absent_weight=1.0), run_two()
    assert [report.teachers for report in with_past.reports] == [[5, 6, 7], [5, 6]]
    assert with_past._memory["past.clients"].tolist() == [5, 6, 7]
    assert not equal(one, two)
    assert wrapped(flower.FedAvg(), config="fedftg")._absent_weight == 1.0
    assert wrapped(flower.FedAvg(), config="paper")._absent_weight == 0.0
    with pytest.raises(InputError, match="absent_weight must be >= 0, got -1"):
        wrapped(flower.FedAvg(), absent_weight=-1)


def test_teachers_may_be_those_that_krum_has_taken(app: ClientApp, log: pytest.LogCaptureFixture) -> None:
    selected = wrapped(BASES["MultiKrum"](), teachers="selected")
    assert "discards included" not in log.text
    run(selected, LocalGrid.of(app, CLIENTS), 1)
    far = small.grid_of(app, CLIENTS, {2: replaced("head.weight", lambda a: a + 100)})
    robust = wrapped(BASES["MultiKrum"](), teachers="selected")
    run(robust, far, 1)
    assert len(selected.reports[0].teachers) == len(robust.reports[0].teachers) == 2
    assert 1 not in robust.reports[0].teachers
    everyone = wrapped(BASES["MultiKrum"]())
    assert "discards included" in log.text
    run(everyone, small.grid_of(app, CLIENTS, {2: replaced("head.weight", lambda a: a + 100)}), 1)
    assert everyone.reports[0].teachers == [0, 1, 2, 3]


def test_what_cannot_be_refined_is_refused_in_one_line() -> None:
    private = flower.DifferentialPrivacyClientSideFixedClipping(flower.FedAvg(), 1.0, 1.0, 2)
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: wrapped(private), "promises privacy.*LocalDpMod.*accept_privacy_loss"),
        (lambda: wrapped(flower.FedXgbBagging()), "FedXgbBagging trains decision trees"),
        (lambda: wrapped(wrapped(flower.FedAvg())), "a FedFTG already"),
        (lambda: wrapped("fedavg"), "flwr.serverapp.strategy, got str"),  # type: ignore[arg-type]
        (lambda: wrapped(flower.FedAvg(), image_shape=(3, 8, 8)), r"images of shape \(3, 8, 8\)"),
        (lambda: wrapped(flower.FedAvg(), teachers="best"), "'all' or 'selected', got 'best'"),
        (lambda: wrapped(flower.FedAvg(), config="fedtgf"), "unknown"),
        (lambda: wrapped(flower.FedAvg(), model=nn.Flatten(0)), r"logits \(2, classes\)"),
    ]
    for make, message in cases:
        with pytest.raises(InputError, match=message) as caught:
            make()
        assert "\n" not in str(caught.value)
    assert wrapped(private, accept_privacy_loss=True).strategy is private


def test_arrays_that_are_not_the_model_s_are_refused_before_anything_is_sent(app: ClientApp) -> None:
    sent: list[Any] = []
    grid = LocalGrid.of(app, CLIENTS)
    grid.before_push = sent.append
    other = ArrayRecord(nn.Linear(2, 3).state_dict())
    with pytest.raises(InputError, match=r"2 arrays lack 'convolution\.weight' and have unknown 'weight'"):
        wrapped(BASES["FedAvg"]()).start(grid, other, 1)
    wider = small.initial()
    wider["head.bias"] = Array(np.zeros(11, np.float32))
    with pytest.raises(InputError, match=r"'head.bias' must be \(10,\)"):
        wrapped(BASES["FedAvg"]()).start(grid, wider, 1)
    assert sent == []


def test_settings_of_the_base_are_read_and_written_through_it(app: ClientApp) -> None:
    base = flower.FedAvg(**ALL)
    strategy = wrapped(base)
    assert strategy.weighted_by_key == "num-examples"
    strategy.fraction_evaluate = 0.0
    assert base.fraction_evaluate == 0.0
    assert run(strategy, LocalGrid.of(app, CLIENTS), 1).evaluate_metrics_clientapp == {}
    with pytest.raises(AttributeError):
        _ = strategy.no_such_setting


def test_a_strategy_s_own_loop_is_used(app: ClientApp) -> None:
    class WithLoop(flower.FedAvg):
        best: int = 0

        def start(self, *args: Any, **kwargs: Any) -> Result:
            self.best += 1
            return super().start(*args, **kwargs)

    strategy = wrapped(WithLoop(**ALL))
    result = run(strategy, LocalGrid.of(app, CLIENTS))
    assert strategy.best == 1
    assert len(strategy.reports) == 2
    assert equal(result.arrays, run(wrapped(BASES["FedAvg"]()), LocalGrid.of(app, CLIENTS)).arrays)
    assert "aggregate_train" not in vars(strategy.strategy)


def test_summary_names_both(log: pytest.LogCaptureFixture) -> None:
    log.set_level(logging.INFO)
    wrapped(flower.FedAdam()).summary()
    assert "FedFTG around FedAdam" in log.text
    assert "FedOpt settings" in log.text
