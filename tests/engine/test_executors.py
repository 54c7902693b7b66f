"""Recorded steps give the results of the sequential executor to the bit; which executor `auto` takes."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fedftg
from fedftg.algorithms.base import Algorithm, Batch, ClientResult, LocalTask
from fedftg.algorithms.registry import ALGORITHMS
from fedftg.data.dataset import ImageDataset
from fedftg.data.federated import FederatedData
from fedftg.engine import executors
from fedftg.engine.cuda_graph import CudaGraphExecutor
from fedftg.engine.executors import (
    WORKERS_FROM,
    ExecutorConfig,
    RunRecipe,
    SequentialExecutor,
    choose,
    local_steps,
)
from fedftg.engine.local_train import LocalConfig
from fedftg.errors import ClientError, InputError
from fedftg.models import registry
from fedftg.models.functional import FunctionalModel
from fedftg.params import Params

SIZES = (12, 9, 12, 5, 1, 0)
"""With batches of 4: full batches only, a last one of 1 (left out with BatchNorm), fewer steps, none at all."""
SETTINGS = LocalConfig(lr=0.1, epochs=2, batch_size=4, momentum=0.5, max_grad_norm=0.8)


def make_data() -> FederatedData:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (sum(SIZES), 1, 8, 8), dtype=np.uint8)
    labels = rng.integers(0, 3, sum(SIZES))
    dataset = ImageDataset.from_tensors(
        images, labels, images[:4], labels[:4], class_names="abc", augment="flip_crop"
    )  # fmt: skip
    return FederatedData(dataset, np.split(np.arange(sum(SIZES)), np.cumsum(SIZES)[:-1]))


DATA = make_data()


def make_model(name: str = "lenet_bn") -> FunctionalModel:
    return FunctionalModel(registry.build(registry.ModelConfig(name=name), 3, (1, 8, 8), 0))


def make_algorithm(name: str = "fedavg") -> Algorithm:
    return ALGORITHMS[name]().build(len(SIZES))  # type: ignore[call-arg]


def make_tasks(algorithm: Algorithm, model: FunctionalModel, round: int = 1) -> list[LocalTask]:
    """Each round has another model, message, memory and rate."""
    params, buffers = model.init()
    noise = torch.Generator().manual_seed(2 + round)

    def some(values: Params) -> Params:
        """Shifted at random; a running variance stays positive, a count stays."""
        shifted = {
            name: value + 0.01 * torch.randn(value.shape, generator=noise) if value.is_floating_point() else value
            for name, value in values.items()
        }
        return {name: value.abs() if name.endswith("running_var") else value for name, value in shifted.items()}

    memories = [some(algorithm.local.init_memory(params, buffers)) for _ in SIZES]
    is_scaffold = type(algorithm.local).__name__ == "ControlledLocal"
    message = some(algorithm.server.init(params)) if is_scaffold else {}
    if round > 1:
        params, buffers = some(params), some(buffers)
    return [
        LocalTask(round, client, params, buffers, memories[client], message, size, size / 6.5, 0.1 / round,
                  100 * round + client)
        for client, size in enumerate(SIZES)
    ]  # fmt: skip


def assert_same_bits(left: ClientResult, right: ClientResult) -> None:
    assert (left.client, left.num_samples, str(left.loss)) == (right.client, right.num_samples, str(right.loss))
    assert torch.equal(left.class_counts, right.class_counts)
    for part in ("params", "buffers", "extra", "memory"):
        ours, theirs = getattr(left, part), getattr(right, part)
        assert list(ours) == list(theirs), part
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), (left.client, part, name)
            assert not ours[name].requires_grad


def assert_like_sequential(
    executor: CudaGraphExecutor, rule: Any, tasks: list[LocalTask], settings: LocalConfig = SETTINGS
) -> None:
    reference = list(SequentialExecutor(executor._model, DATA, settings).run(rule, tasks))
    for left, right in zip(executor.run(rule, tasks), reference, strict=True):
        assert_same_bits(left, right)


Part = Callable[[], None]


class Again:
    """In place of a GPU's recorder: runs the parts as a warm-up, and "replays" by running them again."""

    def __init__(self) -> None:
        self.recorded: list[int] = []

    def __call__(self, parts: Sequence[Part]) -> Part:
        def replay() -> None:
            for part in parts:
                part()

        self.recorded.append(len(parts))
        replay()
        return replay


@pytest.mark.parametrize("loss", ["balanced_softmax", "fedrs"])
def test_recorded_steps_have_the_loss_of_each_client(loss: Any) -> None:
    """Clients take turns in one slot, and its recording reads their class counts."""
    model, algorithm = make_model("lenet"), make_algorithm("moon")
    settings = SETTINGS.model_copy(update={"loss": loss})
    executor = CudaGraphExecutor(model, DATA, settings, 1, recorder=Again())
    assert_like_sequential(executor, algorithm.local, make_tasks(algorithm, model), settings)


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("model_name", ["lenet", "lenet_bn"])
@pytest.mark.parametrize("name", sorted({*ALGORITHMS} - {"fedgen"}))  # whose steps draw
def test_recorded_steps_are_the_sequential_ones(name: str, model_name: str, group: int) -> None:
    """Over two rounds, to the bit; the second has another model and rate, and records nothing."""
    model, algorithm, recorder = make_model(model_name), make_algorithm(name), Again()
    executor = CudaGraphExecutor(model, DATA, SETTINGS, group, recorder=recorder)
    for round in (1, 2):
        assert_like_sequential(executor, algorithm.local, make_tasks(algorithm, model, round))
        # Groups of three have 12, 12, 9 and 5, 1, 0 samples: three, two and one client with a full batch. Single
        # samples come in the third, first and second slot; BatchNorm does without them.
        singles = 0 if model_name == "lenet_bn" else 1
        assert sorted(recorder.recorded) == ([1, *[1] * singles] if group == 1 else [1, *[1] * 3 * singles, 2, 3])


class Own:
    """A local rule of a user's; what it reads besides the batch is given by ``term``."""

    def __init__(self, term: Callable[[LocalTask], Any]) -> None:
        self._term = term

    def init_memory(self, params: Params, buffers: Params) -> Params:
        return {}

    def loss(self, model: FunctionalModel, params: Params, buffers: Params, batch: Batch, _: LocalTask) -> torch.Tensor:
        return nn.functional.cross_entropy(model(params, buffers, batch.images, train=True), batch.labels)

    def correct(self, grads: Params, params: Params, task: LocalTask) -> Params:
        return {name: grad + self._term(task) for name, grad in grads.items()}

    def finish(self, params: Params, buffers: Params, task: LocalTask, num_steps: int) -> tuple[Params, Params]:
        return {}, task.memory


class Declared(Own):
    reads_round = False


def own_tasks(model: FunctionalModel, round: int, **changed: Any) -> list[LocalTask]:
    """Those of FedAvg, each with its own memory and all with a message."""
    message = changed.pop("message", {})
    tasks = make_tasks(make_algorithm(), model, round)
    return [replace(task, message=message, **{name: of(task) for name, of in changed.items()}) for task in tasks]


@pytest.mark.parametrize(
    ("rule", "counts"),
    [
        (Own(lambda task: 0.01 * (task.round in {2, 3}) + 0.1 * task.lr), [3, 6, 9]),
        (Declared(lambda task: task.round / 64 + 0.1 * task.lr), [3, 3, 3]),
        (Declared(lambda task: task.num_samples / 64), [3, 3, 3]),
    ],
    ids=["numbers", "tensors", "neither"],
)
def test_a_rule_that_may_read_the_round_is_recorded_in_each(rule: Own, counts: list[int]) -> None:
    """It may branch on round and rate; one that declares ``reads_round = False`` can compute with them."""
    model, recorder = make_model(), Again()
    executor = CudaGraphExecutor(model, DATA, SETTINGS, 3, recorder=recorder)
    for round, count in zip((1, 2, 3), counts, strict=True):
        assert_like_sequential(executor, rule, own_tasks(model, round))
        assert len(recorder.recorded) == count


def test_other_names_or_shapes_are_recorded_anew() -> None:
    """In a memory, in the message; another rule."""
    model, recorder = make_model("lenet"), Again()
    executor = CudaGraphExecutor(model, DATA, SETTINGS, 1, recorder=recorder)
    rule = Declared(lambda task: 0.01 * sum(value.sum() for value in {**task.message, **task.memory}.values()))
    memory = {"memory": lambda task: {"ab"[task.client % 2]: torch.full((1 + task.client % 2,), 1.0 + task.client)}}
    # Each client but the last, which has no batch, has another memory than the one before; 1 and 3 have two shapes.
    for round, message, count in ((1, torch.ones(1), 7), (2, torch.ones(1), 14), (3, torch.ones(2), 21)):
        assert_like_sequential(executor, rule, own_tasks(model, round, message={"m": message}, **memory))
        assert len(recorder.recorded) == count
    assert_like_sequential(executor, Declared(lambda _: 0.02), own_tasks(model, 3, message={"m": torch.ones(2)}))
    assert len(recorder.recorded) == 23


class Refuses:
    def __call__(self, parts: Sequence[Part]) -> Part:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")


class Wrong:
    def __call__(self, parts: Sequence[Part]) -> Part:
        return lambda: None


@pytest.mark.parametrize(
    ("name", "recorder", "reason"),
    [
        ("scaffold", Refuses(), "not permitted when stream is capturing"),
        ("scaffold", Wrong(), "off by 1 of its length"),
        ("fedgen", Again(), "draws random numbers in its steps"),
    ],
)
def test_what_cannot_be_recorded_falls_back_or_is_an_error(name: str, recorder: Any, reason: str) -> None:
    model, algorithm = make_model(), make_algorithm(name)
    tasks = make_tasks(algorithm, model)
    with pytest.raises(InputError, match=reason) as caught:
        list(CudaGraphExecutor(model, DATA, SETTINGS, 2, recorder=recorder).run(algorithm.local, tasks))
    assert "\n" not in str(caught.value)
    executor = CudaGraphExecutor(model, DATA, SETTINGS, 2, recorder=recorder, may_fall_back=True)
    assert_like_sequential(executor, algorithm.local, tasks)
    assert executor.description.startswith("sequential (cuda_graph: ")
    assert_like_sequential(executor, algorithm.local, tasks)


@pytest.mark.parametrize(
    ("raised", "seen", "message"),
    [
        (ZeroDivisionError, ClientError, "round 1, client 0, local training: ZeroDivisionError: by hand"),
        (InputError, InputError, "by hand"),
    ],
)
def test_a_client_that_fails_is_named(raised: type[Exception], seen: type[Exception], message: str) -> None:
    def fail(_: LocalTask) -> None:
        raise raised("by hand")

    model = make_model()
    for executor in (
        SequentialExecutor(model, DATA, SETTINGS),
        CudaGraphExecutor(model, DATA, SETTINGS, 1, recorder=Again()),
    ):
        with pytest.raises(seen, match=message):
            list(executor.run(Own(fail), own_tasks(model, 1)))


def test_the_environment_says_what_the_clients_ran_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(_: Any, model: FunctionalModel, data: FederatedData, settings: LocalConfig, *__: Any) -> Any:
        return CudaGraphExecutor(model, data, settings, 2, recorder=Refuses(), may_fall_back=True)

    monkeypatch.setattr(executors, "build", build)
    settings = ["rounds=2", "data.name=digits", "data.max_train=60", "data.max_test=20", "partition.num_clients=3",
                "model.name=lenet", "refiner.name=none", "local.epochs=1", "cohort.probability=1"]  # fmt: skip
    fedftg.run("default", overrides=settings, out=tmp_path / "run")
    (session,) = json.loads((tmp_path / "run" / "environment.json").read_text())["sessions"]
    assert session["executor"].startswith("sequential (cuda_graph: a step cannot be recorded")


def test_cuda_graph_says_what_it_needs() -> None:
    with pytest.raises(InputError, match=r"executor\.name=cuda_graph needs device=cuda, got cpu"):
        executors.build(ExecutorConfig(name="cuda_graph"), make_model(), DATA, SETTINGS, recipe())
    dropping = FunctionalModel(nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 3)))
    with pytest.raises(InputError, match="cannot record dropout"):
        CudaGraphExecutor(dropping, DATA, SETTINGS, 1, recorder=Again())
    assert not FunctionalModel(nn.Sequential(nn.Flatten(), nn.Dropout(0.0), nn.Linear(64, 3))).has_dropout
    assert FunctionalModel(nn.MultiheadAttention(4, 2, dropout=0.1)).has_dropout


def recipe(**changed: Any) -> RunRecipe:
    """Four clients a round make 2 epochs of 12 / 5 steps: 39 samples of 5 clients are 3 + 3 + 3 + 2 + 1 batches."""
    fedavg = ALGORITHMS["fedavg"]()  # type: ignore[call-arg]
    whole = RunRecipe((), registry.ModelConfig(name="lenet_bn"), 0, fedavg, rounds=60, cohort=4, threads=1)
    return replace(whole, **changed)


def test_auto_takes_processes_where_they_pay() -> None:
    model = make_model()
    assert local_steps(DATA, SETTINGS, recipe()) == pytest.approx(60 * 4 * 2 * 12 / 5)
    assert local_steps(DATA, SETTINGS, recipe()) > WORKERS_FROM
    assert local_steps(DATA, SETTINGS.model_copy(update={"steps": 7}), recipe()) == 60 * 4 * 7
    name, _, count = choose(model, DATA, SETTINGS, recipe(), 8)
    assert (name, count) == ("workers", 4), "no more processes than clients a round"
    assert choose(model, DATA, SETTINGS, recipe(threads=3), 8)[2] == 3

    class Local(ALGORITHMS["fedavg"]):  # type: ignore[misc]
        pass

    for given, most, expected in (
        (recipe(rounds=50), 8, "about 960 local steps, workers from 1000"),
        (recipe(), 1, "one core"),
        (recipe(cohort=1), 8, "one client a round"),
        (recipe(algorithm=Local()), 8, "put it into a module"),
    ):
        name, reason, _ = choose(model, DATA, SETTINGS, given, most)
        assert name == "sequential"
        assert expected in reason
    built = executors.build(ExecutorConfig(), model, DATA, SETTINGS, recipe(rounds=2))
    assert built.description == "sequential (auto: about 38 local steps, workers from 1000)"
    named = executors.build(ExecutorConfig(name="workers", workers=1000), model, DATA, SETTINGS, recipe())
    assert named.description == "workers: 4 processes of one thread"


def test_auto_by_device() -> None:
    for device, dropout, expected in (
        ("cuda", 0.0, ("cuda_graph", "device cuda")),
        ("cuda", 0.5, ("sequential", "a model with dropout cannot be recorded")),
        ("mps", 0.0, ("sequential", "device mps")),
    ):
        data = make_data()
        data.device = torch.device(device)
        model = FunctionalModel(nn.Sequential(nn.Flatten(), nn.Dropout(dropout), nn.Linear(64, 3)))
        assert choose(model, data, SETTINGS, recipe(), 8)[:2] == expected
