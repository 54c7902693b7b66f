"""Every executor gives the results of the sequential one: to the bit, or within rounding where it says so."""

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
from fedftg.engine import cuda_graph, executors
from fedftg.engine.batches import groups
from fedftg.engine.choice import Work, choose, local_seconds, multiplications
from fedftg.engine.cuda_graph import CudaGraphExecutor
from fedftg.engine.executors import ExecutorConfig, SequentialExecutor
from fedftg.engine.local_train import LocalConfig
from fedftg.engine.vectorized import VectorizedExecutor
from fedftg.engine.workers import Origin
from fedftg.errors import ClientError, InputError
from fedftg.models import registry
from fedftg.models.functional import FunctionalModel
from fedftg.params import Params

SIZES = (12, 9, 12, 5, 1, 0)
"""With batches of 4: full batches only, a last one of 1 (left out with BatchNorm), fewer steps, none at all."""
SETTINGS = LocalConfig(lr=0.1, epochs=2, batch_size=4, momentum=0.5, max_grad_norm=0.8)

every_algorithm = pytest.mark.parametrize("name", sorted(ALGORITHMS))
every_model = pytest.mark.parametrize("model_name", ["lenet", "lenet_bn"])


def make_data(augment: str = "flip_crop") -> FederatedData:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (sum(SIZES), 1, 8, 8), dtype=np.uint8)
    labels = rng.integers(0, 3, sum(SIZES))
    dataset = ImageDataset.from_tensors(
        images,
        labels,
        images[:4],
        labels[:4],
        class_names="abc",
        augment=augment,  # type: ignore[arg-type]
    )
    return FederatedData(dataset, np.split(np.arange(sum(SIZES)), np.cumsum(SIZES)[:-1]))


DATA = make_data()


def make_model(name: str = "lenet_bn") -> FunctionalModel:
    return FunctionalModel(registry.build(registry.ModelConfig(name=name), 3, (1, 8, 8), 0))


def make_tasks(algorithm: Algorithm, model: FunctionalModel, round: int = 1) -> list[LocalTask]:
    """Each round has another model, message, memory and rate."""
    params, buffers = model.init()
    server = algorithm.server.init(params)
    noise = torch.Generator().manual_seed(2 + round)

    def some(values: Params) -> Params:
        return {
            name: value + 0.01 * torch.randn(value.shape, generator=noise) if value.is_floating_point() else value
            for name, value in values.items()
        }

    memories = [absolute(some(algorithm.local.init_memory(params, buffers))) for _ in SIZES]
    sent = some(server) if name_of(algorithm) == "ControlledLocal" else {}
    if round > 1:
        params, buffers = some(params), absolute(some(buffers))
    return [
        LocalTask(round, client, params, buffers, memories[client], sent, size, size / 6.5, 0.1 / round,
                  100 * round + client)
        for client, size in enumerate(SIZES)
    ]  # fmt: skip


def name_of(algorithm: Algorithm) -> str:
    return type(algorithm.local).__name__


def absolute(memory: Params) -> Params:
    """A running variance is not negative."""
    return {name: value.abs() if name.endswith("running_var") else value for name, value in memory.items()}


def assert_equal(left: ClientResult, right: ClientResult, *, close: float) -> None:
    assert (left.client, left.num_samples) == (right.client, right.num_samples)
    assert torch.equal(left.class_counts, right.class_counts)
    assert left.loss == pytest.approx(right.loss, rel=1e-5, nan_ok=True) if close else str(left.loss) == str(right.loss)
    for part in ("params", "buffers", "extra", "memory"):
        ours, theirs = getattr(left, part), getattr(right, part)
        assert list(ours) == list(theirs), part
        for name in ours:
            if close:
                torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=close)
            else:
                assert torch.equal(ours[name], theirs[name]), (left.client, part, name)
            assert not ours[name].requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@every_model
@every_algorithm
def test_vectorized_within_rounding(
    name: str, model_name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1e-5 after a round, and 1e-10 in float64: what differs is rounding.

    Not MOON without BatchNorm in float32: one client meets a tie of ReLU or max-pool, which rounding decides.
    """
    if (name, model_name, dtype) == ("moon", "lenet", torch.float32):
        pytest.skip("a tie")
    data = make_data()
    normalise = data.normalise
    monkeypatch.setattr(data, "normalise", lambda images: normalise(images).to(dtype))

    def cast(values: Params) -> Params:
        return {key: value.to(dtype) if value.is_floating_point() else value for key, value in values.items()}

    model, algorithm = make_model(model_name), ALGORITHMS[name]().build(len(SIZES))  # type: ignore[call-arg]
    tasks = [
        replace(task, **{part: cast(getattr(task, part)) for part in ("params", "buffers", "memory", "message")})
        for task in make_tasks(algorithm, model)
    ]
    reference = list(SequentialExecutor(model, data, SETTINGS).run(algorithm.local, tasks))
    ours = list(VectorizedExecutor(model, data, SETTINGS, 4).run(algorithm.local, tasks))
    for left, right in zip(ours, reference, strict=True):
        assert_equal(left, right, close=1e-10 if dtype == torch.float64 else 1e-5)


def test_vectorized_names_the_group() -> None:
    class Failing:
        def loss(self, *_: object) -> torch.Tensor:
            raise ZeroDivisionError("by hand")

    model = make_model()
    algorithm = ALGORITHMS["fedavg"]().build(len(SIZES))  # type: ignore[call-arg]
    results = VectorizedExecutor(model, DATA, SETTINGS, 4).run(Failing(), make_tasks(algorithm, model))  # type: ignore[arg-type]
    with pytest.raises(ClientError, match="round 1, client 0, local training of a group of 4 clients: ZeroDivision"):
        next(results)


Part = Callable[[], None]


class Again:
    """In place of a GPU's recorder: runs the parts as a warm-up, and "replays" by running them again."""

    def __init__(self) -> None:
        self.recorded: list[int] = []

    def record(self, parts: Sequence[Part]) -> Part:
        self.recorded.append(len(parts))
        for part in parts:
            part()

        def replay() -> None:
            for part in parts:
                part()

        return replay


@pytest.mark.parametrize("group", [1, 3])
@every_model
@every_algorithm
def test_recorded_steps_are_the_sequential_ones(name: str, model_name: str, group: int) -> None:
    """Over two rounds, to the bit; the second has another model and rate, and records nothing."""
    model, algorithm = make_model(model_name), ALGORITHMS[name]().build(len(SIZES))  # type: ignore[call-arg]
    recorder = Again()
    executor = CudaGraphExecutor(model, DATA, SETTINGS, group, recorder=recorder)
    for round in (1, 2):
        tasks = make_tasks(algorithm, model, round)
        reference = list(SequentialExecutor(model, DATA, SETTINGS).run(algorithm.local, tasks))
        for left, right in zip(executor.run(algorithm.local, tasks), reference, strict=True):
            assert_equal(left, right, close=0)
        # Groups of three have 12, 12, 9 and 5, 1, 0 samples: three, two and one client with a full batch. Single
        # samples come in the third, first and second lane; BatchNorm does without them.
        singles = 0 if model_name == "lenet_bn" else 1
        assert sorted(recorder.recorded) == ([1, *[1] * singles] if group == 1 else [1, *[1] * 3 * singles, 2, 3])
    executor.close()


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


def own_tasks(model: FunctionalModel, round: int, **changed: Any) -> list[LocalTask]:
    """Those of FedAvg, each with its own memory and all with a message."""
    tasks = make_tasks(ALGORITHMS["fedavg"]().build(len(SIZES)), model, round)  # type: ignore[call-arg]
    message = changed.pop("message", {})
    return [replace(task, message=message, **{name: of(task) for name, of in changed.items()}) for task in tasks]


def assert_like_sequential(executor: CudaGraphExecutor, rule: Any, tasks: list[LocalTask], settings: Any) -> None:
    reference = list(SequentialExecutor(executor._model, DATA, settings).run(rule, tasks))
    for left, right in zip(executor.run(rule, tasks), reference, strict=True):
        assert_equal(left, right, close=0)


@pytest.mark.parametrize(
    ("term", "anew"),
    [
        (lambda task: 0.01 * task.round, True),
        (lambda task: 0.1 * task.lr, True),
        (lambda task: 0.01 * (replace(task, memory={}).round in {2, 3}), True),
        (lambda task: task.num_samples / 64, False),
    ],
)
def test_a_rule_that_reads_round_or_rate_is_recorded_in_each_round(
    term: Callable[[LocalTask], Any], anew: bool
) -> None:
    """It reads numbers, as it does elsewhere."""
    model, recorder, rule = make_model(), Again(), Own(term)
    executor = CudaGraphExecutor(model, DATA, SETTINGS, 3, recorder=recorder)
    counts = []
    for round in (1, 2, 3):
        assert_like_sequential(executor, rule, own_tasks(model, round), SETTINGS)
        counts.append(len(recorder.recorded))
    assert counts == ([3, 6, 9] if anew else [3, 3, 3])


def test_other_names_or_shapes_are_recorded_anew() -> None:
    """In a memory, lane by lane; in the message; another rule."""
    model, recorder = make_model("lenet"), Again()
    executor = CudaGraphExecutor(model, DATA, SETTINGS, 1, recorder=recorder)
    rule = Own(lambda task: 0.01 * sum(value.sum() for value in {**task.message, **task.memory}.values()))
    memory = {"memory": lambda task: {"ab"[task.client % 2]: torch.full((1 + task.client % 2,), 1.0 + task.client)}}
    counts = []
    for round, message in ((1, torch.ones(1)), (2, torch.ones(1)), (3, torch.ones(2))):
        assert_like_sequential(executor, rule, own_tasks(model, round, message={"m": message}, **memory), SETTINGS)
        counts.append(len(recorder.recorded))
    # Each client but the last, which has no batch, finds the lane of another memory; client 1 and 3 have two shapes.
    assert counts == [7, 14, 21]
    recorder.recorded.clear()
    executor = CudaGraphExecutor(model, DATA, SETTINGS, 1, recorder=recorder)
    for value, count in ((0.01, 2), (0.02, 4)):
        assert_like_sequential(executor, Own(lambda _, value=value: value), own_tasks(model, 1), SETTINGS)  # type: ignore[misc]
        assert len(recorder.recorded) == count


def test_recordings_that_were_not_used_for_longest_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients have batches of 5 and 2, 5 and 4, 5 and 2, 5, 1. Of two, that of 5 stays; the others take turns."""
    monkeypatch.setattr(cuda_graph, "MOST_RECORDINGS", 2)
    settings = SETTINGS.model_copy(update={"batch_size": 5})
    model, recorder = make_model("lenet"), Again()
    executor = CudaGraphExecutor(model, DATA, settings, 1, recorder=recorder)
    rule, counts = Own(lambda _: 0.0), []
    for round in (1, 2):
        assert_like_sequential(executor, rule, own_tasks(model, round), settings)
        counts.append(len(recorder.recorded))
    assert counts == [5, 9]
    assert executor._recorded is not None
    (lane,) = executor._recorded.lanes
    assert {shape[0] for shape in lane.inputs} == {5, 1}


def test_recordings_make_room_for_another() -> None:
    """Once: a step that finds no room even so cannot be recorded."""

    class Full(Again):
        def record(self, parts: Sequence[Part]) -> Part:
            if executor._recorded is not None and executor._recorded.recordings:
                parts[0]()
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
            return super().record(parts)

    class Never(Again):
        def record(self, parts: Sequence[Part]) -> Part:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    model, rule = make_model("lenet"), Own(lambda _: 0.0)
    executor = CudaGraphExecutor(model, DATA, SETTINGS, 3, recorder=Full())
    assert_like_sequential(executor, rule, own_tasks(model, 1), SETTINGS)
    executor = CudaGraphExecutor(model, DATA, SETTINGS, 3, recorder=Never())
    with pytest.raises(InputError, match="too little memory for the steps of 3 clients at a time; take"):
        list(executor.run(rule, own_tasks(model, 1)))


def test_only_clients_that_fit_go_together() -> None:
    """Memories of other names, or another received model, end a group."""
    model = make_model()
    tasks = make_tasks(ALGORITHMS["fedavg"]().build(6), model)  # type: ignore[call-arg]
    tasks[2] = replace(tasks[2], memory={"x": torch.ones(1)})
    tasks[5] = replace(tasks[5], params=dict(tasks[5].params))
    found = [[task.client for task in group] for group in groups(tasks, 2)]
    assert found == [[0, 1], [2], [3, 4], [5]]


class Refuses:
    def record(self, parts: Sequence[Part]) -> Part:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")


def test_what_cannot_be_recorded_falls_back_or_is_told() -> None:
    class Wrong:
        def record(self, parts: Sequence[Part]) -> Part:
            return lambda: None

    model = make_model()
    algorithm = ALGORITHMS["scaffold"]().build(len(SIZES))  # type: ignore[call-arg]
    tasks = make_tasks(algorithm, model)
    reference = SequentialExecutor(model, DATA, SETTINGS)
    wanted = list(reference.run(algorithm.local, tasks))
    for recorder, reason in (
        (Refuses(), "not permitted when stream is capturing"),
        (Wrong(), "off by 1 of its length"),
    ):
        alone = CudaGraphExecutor(model, DATA, SETTINGS, 2, recorder=recorder)
        with pytest.raises(InputError, match=reason) as caught:
            list(alone.run(algorithm.local, tasks))
        assert "\n" not in str(caught.value)
        executor = CudaGraphExecutor(model, DATA, SETTINGS, 2, recorder=recorder, fallback=reference)
        for left, right in zip(executor.run(algorithm.local, tasks), wanted, strict=True):
            assert_equal(left, right, close=0)
        assert executor.description.startswith("sequential (cuda_graph: ")
        assert len(list(executor.run(algorithm.local, tasks))) == len(SIZES)


def test_the_environment_says_what_the_clients_ran_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(_: Any, model: FunctionalModel, data: FederatedData, settings: LocalConfig, *__: Any) -> Any:
        reference = SequentialExecutor(model, data, settings)
        return CudaGraphExecutor(model, data, settings, 2, recorder=Refuses(), fallback=reference)

    monkeypatch.setattr(executors, "build", build)
    settings = ["rounds=2", "data.name=digits", "data.max_train=60", "data.max_test=20", "partition.num_clients=3",
                "model.name=lenet", "refiner.name=none", "local.epochs=1", "cohort.probability=1"]  # fmt: skip
    fedftg.run("default", overrides=settings, out=tmp_path / "run")
    (session,) = json.loads((tmp_path / "run" / "environment.json").read_text())["sessions"]
    assert session["executor"].startswith("sequential (cuda_graph: a step cannot be recorded")
    assert session["cores"] > 0


def test_cuda_graph_says_what_it_needs() -> None:
    with pytest.raises(InputError, match=r"executor\.name=cuda_graph needs an NVIDIA GPU and device is 'cpu'"):
        executors.build(ExecutorConfig(name="cuda_graph"), make_model(), DATA, SETTINGS)
    dropping = FunctionalModel(nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 3)))
    with pytest.raises(InputError, match="dropout masks"):
        CudaGraphExecutor(dropping, DATA, SETTINGS, 1, recorder=Again())
    assert not FunctionalModel(nn.Sequential(nn.Flatten(), nn.Dropout(0.0), nn.Linear(64, 3))).has_dropout
    assert FunctionalModel(nn.MultiheadAttention(4, 2, dropout=0.1)).has_dropout


def origin(**settings: Any) -> Origin:
    algorithm = ALGORITHMS["fedavg"]()  # type: ignore[call-arg]
    return Origin((), registry.ModelConfig(name="lenet_bn"), 0, settings.get("algorithm", algorithm))


def test_auto_takes_processes_where_they_pay() -> None:
    model = make_model()
    work = Work(rounds=2, cohort=4, threads=1)
    long = replace(work, rounds=200_000)
    assert choose(model, DATA, SETTINGS, origin(), work, 2).name == "sequential"
    chosen = choose(model, DATA, SETTINGS, origin(), long, 8)
    assert (chosen.name, chosen.workers) == ("workers", 4), "no more processes than clients a round"
    assert choose(model, DATA, SETTINGS, origin(), replace(long, threads=3), 8).workers == 3
    assert choose(model, DATA, SETTINGS, origin(), long, 1).name == "sequential"
    assert choose(model, DATA, SETTINGS, origin(), replace(long, cohort=1), 8).name == "sequential"
    assert choose(model, DATA, SETTINGS, None, long, 8).name == "sequential"

    class Local(ALGORITHMS["fedavg"]):  # type: ignore[misc]
        pass

    assert "module" in choose(model, DATA, SETTINGS, origin(algorithm=Local()), long, 8).reason
    built = executors.build(ExecutorConfig(), model, DATA, SETTINGS, origin(), work)
    assert built.description.startswith("sequential (auto: about 0 s of local training on one core is too little")


def test_estimate_by_hand() -> None:
    """One linear layer of 64 x 3 takes 192 multiplications; 39 samples in batches of 4 are 3+3+3+2+1 = 12 steps."""
    model = FunctionalModel(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))
    assert multiplications(model, (1, 8, 8)) == 192
    convolution = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 3))
    assert multiplications(FunctionalModel(convolution), (1, 8, 8)) == 36 * 2 * 9 + 72 * 3
    seconds = local_seconds(model, DATA, SETTINGS, Work(10, 5, 1))
    assert seconds == pytest.approx(10 * 5 * 2 * 12 / 5 * (0.001 + 6 * 4 * 192 / 3e10))
