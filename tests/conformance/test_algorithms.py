"""Every registered algorithm passes every check; a third party's algorithm gets them by registering itself."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from fedftg import params as tree
from fedftg.algorithms.base import LocalTask, ServerState
from fedftg.algorithms.registry import ALGORITHMS
from fedftg.engine.local_train import LocalConfig, train
from fedftg.models.functional import FunctionalModel
from fedftg.seeds import forked

NUM_CLIENTS, CLASSES = 5, 3
SETTINGS = LocalConfig(lr=0.1, epochs=1, batch_size=4)

every_algorithm = pytest.mark.parametrize("name", sorted(ALGORITHMS))


def make_model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return FunctionalModel(
            nn.Sequential(nn.Flatten(), nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, CLASSES))
        )


MODEL = make_model()


def make(name, **settings):
    return ALGORITHMS[name](**settings).build(NUM_CLIENTS)


def initial(algorithm):
    params, buffers = MODEL.init()
    return ServerState(0, params, buffers, algorithm.server.init(params), {})


def batches(client, round, steps=3):
    rng = torch.Generator().manual_seed(100 * round + client)
    return [(torch.randn(4, 2, 2, 2, generator=rng), torch.randint(CLASSES, (4,), generator=rng)) for _ in range(steps)]


def make_task(algorithm, state, client, memory, num_samples=12):
    model, message = (state.params, state.buffers), algorithm.server.message(state)
    return LocalTask(state.round + 1, client, *model, memory, message, num_samples, 1.0, SETTINGS.lr, 0)


def rounds(algorithm, state, memories, numbers, sizes=lambda _: 12):
    """Some rounds with two clients each, memories carried along."""
    memories = dict(memories)
    for number in numbers:
        results = []
        for client in (number % NUM_CLIENTS, (number + 1) % NUM_CLIENTS):
            memory = memories.get(client) or algorithm.local.init_memory(*MODEL.init())
            task = make_task(algorithm, state, client, memory, sizes(client))
            with forked(100 * number + client, torch.device("cpu")):
                result = train(MODEL, algorithm.local, task, batches(client, number), torch.ones(CLASSES), SETTINGS)
            results.append(result)
            memories[client] = result.memory
        state, _ = algorithm.server.step(state, results)
        state = replace(state, round=number)
    return state, memories


def assert_same(left, right):
    assert list(left) == list(right)
    for name in left:
        assert torch.equal(left[name], right[name]), name


def some_results(algorithm, state):
    found = []
    for client in range(3):
        task = make_task(algorithm, state, client, algorithm.local.init_memory(*MODEL.init()), 10 + client)
        found.append(train(MODEL, algorithm.local, task, batches(client, 1), torch.ones(CLASSES), SETTINGS))
    return found


@every_algorithm
def test_inputs_stay_as_they_are(name):
    algorithm = make(name)
    state, memories = rounds(algorithm, initial(algorithm), {}, range(1, 3))
    client, memory = next(iter(memories.items()))
    task = make_task(algorithm, state, client, memory)
    copies = [tree.clone(values) for values in (task.params, task.buffers, task.memory, task.message)]
    result = train(MODEL, algorithm.local, task, batches(0, 1), torch.ones(CLASSES), SETTINGS)
    algorithm.server.step(state, [result])
    for before, after in zip(copies, (task.params, task.buffers, task.memory, task.message), strict=True):
        assert_same(before, after)
    assert_same(copies[0], state.params)


@every_algorithm
def test_a_copied_state_continues_to_the_same_bits(name):
    algorithm = make(name)
    half, memories = rounds(algorithm, initial(algorithm), {}, range(1, 4))
    whole, _ = rounds(algorithm, half, memories, range(4, 8))
    copy = ServerState(half.round, *(tree.clone(part) for part in (half.params, half.buffers, half.server)), {})
    again, _ = rounds(make(name), copy, {k: tree.clone(v) for k, v in memories.items()}, range(4, 8))
    assert_same(whole.params, again.params)
    assert_same(whole.server, again.server)


@every_algorithm
def test_order_of_clients_does_not_matter(name):
    algorithm = make(name)
    state = initial(algorithm)
    results = some_results(algorithm, state)
    one, _ = algorithm.server.step(state, results)
    other, _ = algorithm.server.step(state, results[::-1])
    assert_same(one.params, other.params)
    assert_same(one.buffers, other.buffers)
    assert_same(one.server, other.server)


@every_algorithm
def test_empty_client_is_harmless(name):
    algorithm = make(name)
    state = initial(algorithm)
    results = some_results(algorithm, state)
    task = make_task(algorithm, state, 4, algorithm.local.init_memory(*MODEL.init()), num_samples=0)
    empty = train(MODEL, algorithm.local, task, [], torch.zeros(CLASSES), SETTINGS)
    assert_same(empty.params, state.params)
    without, _ = algorithm.server.step(state, results)
    with_it, _ = algorithm.server.step(state, [*results, empty])
    assert_same(without.params, with_it.params)
    assert_same(without.server, with_it.server)


@every_algorithm
def test_the_model_moves(name):
    algorithm = make(name)
    start = initial(algorithm)
    state, _ = rounds(algorithm, start, {}, range(1, 2))
    assert all(not torch.equal(state.params[key], start.params[key]) for key in ("1.weight", "4.weight"))
    assert not torch.equal(state.buffers["2.running_mean"], start.buffers["2.running_mean"])
    assert state.buffers["2.num_batches_tracked"].item() == 3


def params_after(name, last, sizes=lambda _: 12, **settings):
    return rounds(make(name, **settings), initial(make(name)), {}, range(1, last + 1), sizes)[0].params


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("fedprox", {"mu": 0}),
        ("moon", {"mu": 0}),
        ("feddyn", {"alpha": 0, "weighting": "samples"}),
        ("fedavgm", {"beta": 0}),
        ("fedacg", {"momentum": 0, "beta": 0}),
    ],
)
def test_identity_with_fedavg(name, settings):
    """Over several rounds, with clients of different sizes, bit for bit."""
    sizes = [5, 8, 11, 14, 17].__getitem__
    assert_same(params_after(name, 4, sizes, **settings), params_after("fedavg", 4, sizes))


def test_identity_with_fedavg_equal_sizes():
    """Uniform weights are those by size where sizes are equal; in round 1 SCAFFOLD and FedVARP remember zeros."""
    assert_same(params_after("feddyn", 4, alpha=0), params_after("fedavg", 4))
    assert_same(params_after("scaffold", 1), params_after("fedavg", 1))
    assert_same(params_after("fedvarp", 1), params_after("fedavg", 1))


@every_algorithm
@pytest.mark.parametrize("loss", ["balanced_softmax", "fedrs"])
def test_any_loss_goes_with_any_algorithm(name, loss):
    """The loss changes what a client returns; with tau = 0 and alpha = 1 it is cross-entropy, bit for bit."""
    algorithm = make(name)
    task = make_task(algorithm, initial(algorithm), 1, algorithm.local.init_memory(*MODEL.init()))
    on = SETTINGS.model_copy(update={"loss": loss})
    off = on.model_copy(update={"loss_tau": 0.0, "loss_alpha": 1.0})
    plain, ours, same = (
        train(MODEL, algorithm.local, task, batches(1, 1), torch.tensor([7, 5, 0]), settings).params
        for settings in (SETTINGS, on, off)
    )
    assert_same(same, plain)
    assert not torch.equal(ours["4.bias"], plain["4.bias"])


@pytest.mark.parametrize(
    ("name", "last", "settings"),
    [
        ("fedprox", 7, {"mu": 0.5}),
        ("moon", 7, {"mu": 5.0}),
        ("feddyn", 7, {"alpha": 0.1}),
        *((name, 2, {}) for name in ("scaffold", "fedavgm", "fedacg", "fedvarp")),
    ],
)
def test_differs_from_fedavg_where_it_should(name, last, settings):
    ours, fedavg = params_after(name, last, **settings), params_after("fedavg", last)
    assert not torch.equal(ours["1.weight"], fedavg["1.weight"])
