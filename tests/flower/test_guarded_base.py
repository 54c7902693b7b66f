"""What a base strategy, one of its clients or a restart can do to a round of FedFTG, and what then becomes of it."""

from __future__ import annotations

import itertools
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import strategy as flower
from flwr.serverapp.exception import PrivacyBudgetExhausted
from flwr.serverapp.strategy import Result, Strategy
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import small_federation as small

from fedftg.engine.local_train import LocalConfig
from fedftg.errors import InputError
from fedftg.flower import FedFTG, Scaffold, local_train
from fedftg.flower.local_grid import LocalGrid
from fedftg.flower.rule_strategies import mean_metrics
from fedftg.flower.strategy_snapshot import snapshot

CLIENTS = 4
ALL: dict[str, Any] = {"min_train_nodes": CLIENTS, "min_evaluate_nodes": CLIENTS, "min_available_nodes": CLIENTS}


@pytest.fixture(scope="module")
def app() -> ClientApp:
    return small.client_app(small.data(CLIENTS))


def wrapped(base: Strategy, **changes: Any) -> FedFTG:
    return FedFTG(base, **{"model": small.net(), "image_shape": small.IMAGE_SHAPE, "config": small.CONFIG, **changes})


def run(strategy: Strategy, grid: Any, rounds: int = 1, **more: Any) -> Result:
    return strategy.start(grid, small.initial(), rounds, **more)


def equal(left: ArrayRecord, right: ArrayRecord) -> bool:
    a, b = small.state(left), small.state(right)
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


class Everything(flower.FedAvg):
    """A strategy that keeps one of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.array = np.zeros(3)
        self.view = self.array[:2]
        self.in_tuple = (np.zeros(2),)
        self.tensor = torch.zeros(2)
        self.module = nn.Linear(1, 1)
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=0.1, momentum=0.9)
        self.ordered: OrderedDict[str, int] = OrderedDict(a=1, b=2)
        self.counts: defaultdict[str, int] = defaultdict(int)
        self.recent: deque[int] = deque([1], maxlen=2)
        self.names = {"a"}
        self.nested = {"deep": [{"array": np.zeros(1)}]}
        self.record = small.initial()
        self.inner = flower.FedAdam()
        self.numbers = np.random.default_rng(0)
        self.drawn = torch.Generator().manual_seed(0)
        self.itself: list[Any] = []
        self.itself.append(self.itself)
        self.plain = 1
        self.gone = 1

    def told(self) -> list[Any]:
        moments = [state["momentum_buffer"].tolist() for state in self.optimizer.state.values()]
        return [
            self.array.tolist(), self.view.tolist(), self.in_tuple[0].tolist(), self.tensor.tolist(),
            self.module.weight.tolist(), moments, list(self.ordered.items()), dict(self.counts), list(self.recent),
            self.recent.maxlen, sorted(self.names), self.nested["deep"][0]["array"].tolist(), list(self.record),
            self.inner.eta, str(self.numbers.bit_generator.state), self.drawn.get_state().tolist(),
            len(self.itself), self.plain, getattr(self, "gone", None), hasattr(self, "new"),
        ]  # fmt: skip

    def change(self) -> None:
        self.array += 1
        self.in_tuple[0][:] = 5
        self.tensor += 1
        self.module(torch.ones(1, 1)).sum().backward()
        self.optimizer.step()
        self.ordered["c"] = 3
        self.ordered.move_to_end("a")
        self.counts["x"] += 1
        self.recent.append(2)
        self.names.add("b")
        self.nested["deep"][0]["array"] += 1
        self.nested["deep"].append({})
        self.record.clear()
        self.inner.eta = 9.0
        self.numbers.random()
        torch.rand(1, generator=self.drawn)
        self.itself.append(1)
        self.plain, self.new = 2, 3
        if hasattr(self, "gone"):
            del self.gone


def test_a_snapshot_is_put_back_whole_and_more_than_once() -> None:
    strategy = Everything()
    names, before = strategy.names, strategy.told()
    undo = snapshot([strategy])
    for _ in range(2):
        strategy.change()
        assert all(new != old for new, old in zip(strategy.told(), before, strict=True) if old not in (2, before[9]))
        undo()
        assert strategy.told() == before
    assert strategy.names is names
    strategy.array[0] = 7
    assert strategy.view[0] == 7


BASES: dict[str, Callable[[], Strategy]] = {
    "FedAvg": lambda: flower.FedAvg(**ALL),
    "FedAvgM": lambda: flower.FedAvgM(server_momentum=0.5, server_learning_rate=0.5, **ALL),
    "MultiKrum": lambda: flower.MultiKrum(num_malicious_nodes=1, num_nodes_to_select=2, **ALL),
    "Bulyan": lambda: flower.Bulyan(num_malicious_nodes=0, **ALL),
    "QFedAvg": lambda: flower.QFedAvg(client_learning_rate=0.1, **ALL),
    "clipping": lambda: flower.DifferentialPrivacyServerSideFixedClipping(flower.FedAvg(**ALL), 0.0, 0.5, CLIENTS),
}


def backwards(content: RecordDict) -> None:
    content["arrays"] = ArrayRecord(dict(reversed(content["arrays"].items())))


def junk(content: RecordDict) -> None:
    content["extra"] = ArrayRecord({"x": Array("foo", (1,), "numpy.ndarray", b"junk")})


@pytest.mark.parametrize("name", BASES)
def test_the_order_of_a_client_s_arrays_does_not_matter(name: str, app: ClientApp) -> None:
    """Many of Flower's strategies go by the places of arrays."""
    strategy = wrapped(BASES[name](), accept_privacy_loss=True)
    changed = run(strategy, small.grid_of(app, CLIENTS, {1: backwards, 3: backwards}))
    assert strategy.reports[0].left_out == {}
    plain = run(wrapped(BASES[name](), accept_privacy_loss=True), LocalGrid.of(app, CLIENTS))
    assert equal(changed.arrays, plain.arrays)


@pytest.mark.parametrize("name", [name for name in BASES if name != "clipping"])
def test_junk_in_a_further_record_costs_the_client(name: str, app: ClientApp) -> None:
    strategy = wrapped(BASES[name]())
    run(strategy, small.grid_of(app, CLIENTS, {3: junk}))
    assert strategy.reports[0].teachers == [0, 1, 3]
    assert "has a record of arrays 'extra'" in strategy.reports[0].left_out[2]


class Controlled(flower.FedAvg):
    """Needs a second record of each reply; empties replies and counts calls before it finds that one lacks it."""

    def __init__(self) -> None:
        super().__init__(**ALL)
        self.calls = {"made": 0}

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        self.calls["made"] += 1
        usable = [message for message in replies if message.has_content()]
        for message in usable:
            message.content["metrics"].pop("train_loss")
        controls = [message.content.pop("control") for message in usable]
        assert all(len(control) for control in controls)
        return super().aggregate_train(server_round, usable)


def with_control(content: RecordDict) -> None:
    content["control"] = ArrayRecord({"c": Array(np.zeros(1, np.float32))})


def test_the_usual_kind_of_reply_is_what_most_clients_send(app: ClientApp) -> None:
    """Three of four have a second record; a strategy that needs it gets these, as they arrived, and was called once."""
    strategy = wrapped(Controlled())
    run(strategy, small.grid_of(app, CLIENTS, dict.fromkeys((1, 2, 4), with_control)))
    (report,) = strategy.reports
    assert report.teachers == [0, 1, 3]
    assert report.left_out == {2: "its reply is not made as most are: it lacks a record of arrays 'control'"}
    assert report.rolled_back is None
    assert strategy.strategy.calls == {"made": 1}  # type: ignore[attr-defined]


class Failing(flower.FedAvg):
    """Raises in some rounds."""

    def __init__(self, rounds: tuple[int, ...], error: Exception) -> None:
        super().__init__(**ALL)
        self.rounds, self.error = rounds, error

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        if server_round in self.rounds:
            raise self.error
        return super().aggregate_train(server_round, replies)


def test_a_base_that_goes_on_failing_ends_the_run(app: ClientApp) -> None:
    with pytest.raises(KeyError, match="oops"):
        run(wrapped(Failing((2, 3, 4), KeyError("oops"))), LocalGrid.of(app, CLIENTS), 5)
    strategy = wrapped(Failing((2, 3, 5, 6), KeyError("oops")))
    result = run(strategy, LocalGrid.of(app, CLIENTS), 6)
    lost = [report.round for report in strategy.reports if report.rolled_back]
    assert lost == [2, 3, 5, 6]
    assert [result.train_metrics_clientapp[number]["fedftg-rolled-back"] for number in range(1, 7)] == [
        0,
        1,
        1,
        0,
        1,
        1,
    ]


def test_a_spent_privacy_budget_ends_the_run(app: ClientApp) -> None:
    with pytest.raises(PrivacyBudgetExhausted):
        run(wrapped(Failing((2,), PrivacyBudgetExhausted("spent"))), LocalGrid.of(app, CLIENTS), 3)


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_moments_that_overflow_are_not_kept(app: ClientApp) -> None:
    """A huge but finite update makes Adam's second moment infinite: every later step would be 0."""
    grid = LocalGrid.of(app, CLIENTS)

    def huge(content: RecordDict) -> None:
        content["arrays"]["head.bias"] = Array(np.full(10, 1e25, np.float32))

    def second_round(number: int, _: ArrayRecord) -> None:
        grid.faults.clear()
        if number == 1:
            grid.faults.update(small.grid_of(app, CLIENTS, {2: huge}).faults)

    strategy = wrapped(flower.FedAdam(eta=0.01, **ALL))
    run(strategy, grid, 3, evaluate_fn=second_round)
    assert strategy.reports[0].rolled_back is strategy.reports[2].rolled_back is None
    assert "the aggregate is not finite (0/v_t.dict/head.bias)" in str(strategy.reports[1].rolled_back)
    assert all(np.isfinite(moment).all() for moment in strategy.strategy.v_t.values())  # type: ignore[attr-defined]


def no_examples(content: RecordDict) -> None:
    content["metrics"]["num-examples"] = 0


def no_weight(content: RecordDict) -> None:
    del content["metrics"]["num-examples"]


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("last", [no_examples, no_weight], ids=["told", "not told"])
def test_clients_without_examples_change_nothing(name: str, last: Callable[..., None], app: ClientApp) -> None:
    changes = dict.fromkeys(range(1, CLIENTS), no_examples) | {CLIENTS: last}
    strategy = wrapped(BASES[name](), accept_privacy_loss=True)
    assert not run(strategy, small.grid_of(app, CLIENTS, changes)).arrays
    (report,) = strategy.reports
    assert report.left_out == dict.fromkeys(range(CLIENTS), "no client has a metric 'num-examples' above 0")


def test_a_client_without_examples_is_not_what_krum_takes(app: ClientApp) -> None:
    strategy = wrapped(flower.Krum(num_malicious_nodes=1, **ALL))
    run(strategy, small.grid_of(app, CLIENTS, {2: no_examples}))
    assert strategy.reports[0].left_out == {1: "its 'num-examples' is 0"}
    assert strategy.reports[0].rolled_back is None


def test_memory_that_does_not_suffice_for_the_teachers_gives_the_aggregate(
    app: ClientApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    strategy = wrapped(flower.FedAvg(**ALL))
    monkeypatch.setattr("fedftg.flower.strategy.to_device", full)
    result = run(strategy, LocalGrid.of(app, CLIENTS))
    assert strategy.reports[0].rolled_back == "fine-tuning failed (OutOfMemoryError: CUDA out of memory)"
    assert result.arrays


def test_an_evaluation_that_cannot_be_averaged_costs_no_more_than_itself(app: ClientApp) -> None:
    grid = LocalGrid.of(app, CLIENTS)

    def spoil(reply: Message) -> Message:
        if reply.metadata.message_type.startswith("evaluate"):
            del reply.content["metrics"]["num-examples"]
        return reply

    grid.faults[2] = spoil
    result = run(wrapped(flower.FedAvg(**ALL)), grid, 2)
    assert result.evaluate_metrics_clientapp == {}
    assert sorted(result.train_metrics_clientapp) == [1, 2]


def nothing_usable(content: RecordDict) -> None:
    content["arrays"]["head.bias"] = Array(np.full(10, np.nan, np.float32))


def test_a_run_that_never_went_well_still_asks_for_class_counts_when_resumed(app: ClientApp, tmp_path: Path) -> None:
    kept = {"checkpoint": tmp_path / "run"}
    spoilt = small.grid_of(app, CLIENTS, dict.fromkeys(range(1, CLIENTS + 1), nothing_usable))
    run(wrapped(flower.FedAvg(**ALL), **kept), spoilt, 1)
    countless = LocalGrid.of(small.client_app(small.data(CLIENTS), counts=False), CLIENTS)
    with pytest.raises(InputError, match=r"round 2: .*lack 'class-counts'"):
        run(wrapped(flower.FedAvg(**ALL), **kept), countless, 2)


class Decaying(flower.FedAdam):
    """Moves a setting of Flower's, and takes arguments of its own that differ from session to session."""

    def __init__(self, stamp: str, limit: float) -> None:
        super().__init__(eta=0.02, **ALL)
        self.stamp, self.limit = stamp, limit

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        self.eta *= 0.9
        return super().aggregate_train(server_round, replies)


def test_a_strategy_of_one_s_own_is_resumed(app: ClientApp, tmp_path: Path) -> None:
    kept = {"checkpoint": tmp_path / "run"}
    run(wrapped(Decaying("10:01", float("inf")), **kept), LocalGrid.of(app, CLIENTS), 1)
    again = wrapped(Decaying("12:30", float("inf")), **kept)
    run(again, LocalGrid.of(app, CLIENTS), 2)
    assert [report.round for report in again.reports] == [2]
    other = Decaying("12:30", 1.0)
    other.eta = 0.5
    with pytest.raises(InputError, match=r"base strategy\.0\.eta = 0\.02, this one has 0\.5"):
        wrapped(other, **kept).restore()


class Saying(flower.FedAvg):
    """Says itself what must be the same."""

    def __init__(self, said: Any) -> None:
        super().__init__(**ALL)
        self.said = said

    def resume_settings(self) -> dict[str, Any]:
        return {"said": self.said}


class AnySize(small.Net):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        found = F.relu(self.norm(self.convolution(images)))
        return self.head(F.adaptive_avg_pool2d(found, 4).flatten(1))


class Wide(small.Net):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([super().forward(images), images.flatten(1)[:, :1]], dim=1)


def test_what_must_be_the_same_in_a_resumed_run(app: ClientApp, tmp_path: Path) -> None:
    def refused(folder: str, first: FedFTG, second: FedFTG, match: str) -> None:
        run(first, LocalGrid.of(app, CLIENTS))
        with pytest.raises(InputError, match=match):
            second.restore()

    def clipping(norm: float) -> Strategy:
        return flower.DifferentialPrivacyServerSideFixedClipping(flower.FedAvg(**ALL), 0.0, norm, CLIENTS)

    def made(base: Strategy, folder: str, **more: Any) -> FedFTG:
        return wrapped(base, checkpoint=tmp_path / folder, accept_privacy_loss=True, **more)

    refused("clip", made(clipping(0.5), "clip"), made(clipping(5.0), "clip"), "0.clipping_norm = 0.5, this one has 5.0")
    refused("said", made(Saying(float("inf")), "said"), made(Saying(2), "said"), "0.said = None, this one has 2")
    assert made(Saying(float("nan")), "said").restore() is not None
    with pytest.raises(InputError, match=r"resume_settings\(\) must give what JSON takes"):
        run(made(Saying({1, 2}), "unsaid"), LocalGrid.of(app, CLIENTS))
    plain, sized = flower.FedAvg(**ALL), {"model": AnySize(), "image_shape": (1, 9, 9)}
    refused("shape", made(plain, "shape"), made(plain, "shape", **sized), "image_shape.1 = 8, this one has 9")
    wide = made(plain, "shape", model=Wide())
    with pytest.raises(InputError, match="classes = 10, this one has 11"):
        wide.restore()


def trained_by(batches: Any, local: LocalConfig) -> Message:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return local_train(message, context, model=small.net(), batches=batches, class_counts=[1] * 10)

    grid = LocalGrid.of(app, 2)
    strategy = Scaffold(model=small.net(), num_clients=2, local=local)
    return next(iter(grid.send_and_receive(strategy.configure_train(1, small.initial(), ConfigRecord(), grid))))


def test_iterators_as_batches() -> None:
    data = [small.samples(small.data(2), 0)] * 2
    assert trained_by(itertools.cycle(data), LocalConfig(steps=3)).has_content()
    assert trained_by(iter(data), LocalConfig(epochs=1)).has_content()
    short = trained_by(iter(data), LocalConfig(steps=3))
    assert "batches is an iterator that ended after 2 of 3 steps" in str(short.error.reason)
    assert trained_by([], LocalConfig(steps=3)).has_content()


def test_mean_metrics_weigh_by_what_the_last_record_tells() -> None:
    first = RecordDict({"a": MetricRecord({"num-examples": [1]}), "b": MetricRecord({"num-examples": 3, "loss": 2.0})})
    second = RecordDict({"b": MetricRecord({"num-examples": 1, "loss": 6.0})})
    assert dict(mean_metrics([first, second], "num-examples")) == {"loss": 3.0}
