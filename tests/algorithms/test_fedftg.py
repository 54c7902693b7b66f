"""The refiner: which models teach, with which class counts, and what it remembers."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from fedftg.algorithms.base import ClientResult, RefinerContext, ServerState
from fedftg.algorithms.fedftg import FedFTG, FedFTGConfig, absent_counts, known_counts
from fedftg.config import RunConfig
from fedftg.distill.distiller import distil
from fedftg.distill.teachers import stack_or_list
from fedftg.errors import InputError
from fedftg.models.functional import FunctionalModel, values
from fedftg.params import clone

SMALL: dict[str, Any] = {"iterations": 2, "generator_steps": 1, "student_steps": 2, "batch_size": 6, "noise_dim": 4}
SENT: dict[str, Any] = {"average": "aggregate", "prior_tau": 0, "lacking": 0, "last_round": 0}
"""What clients receive is deployed, and every round is fine-tuned."""


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return FunctionalModel(
            nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
        )


def make(model, **settings):
    config = FedFTGConfig(**{**SMALL, **SENT, "generator_width": 4, **settings})
    built = config.build(RefinerContext(model, 3, (1, 8, 8), torch.device("cpu")))
    assert isinstance(built, FedFTG)
    return built


def start(model, refiner):
    params, buffers = model.init()
    return ServerState(0, params, buffers, {}, refiner.init(params, torch.Generator().manual_seed(1)))


def upload(model, client, counts, round=1):
    params, buffers = model.init()
    rng = torch.Generator().manual_seed(10 * round + client)
    moved = {name: tensor + 0.3 * torch.randn(tensor.shape, generator=rng) for name, tensor in params.items()}
    return ClientResult(client, sum(counts), torch.tensor(counts), moved, buffers, {}, {}, 0.0)


def rng(number):
    return torch.Generator().manual_seed(number)


def same(left, right):
    return set(left) == set(right) and all(torch.equal(left[name], right[name]) for name in left)


def test_the_absent_are_taught_by_the_model_before(model):
    """Round 1 has clients 0 (classes 0, 1) and 1 (class 2), round 2 clients 1 and 3: client 0 is absent, so its
    counts (5, 1, 0), halved, go with the model that round 1 ended with."""
    refiner = make(model, absent_weight=0.5)
    state = start(model, refiner)
    first = [upload(model, 0, [5, 1, 0]), upload(model, 1, [0, 0, 4])]
    after, _ = refiner.refine(state, first, rng(5))
    aggregate = replace(state, params=upload(model, 7, [1, 1, 1], round=3).params, refiner=after.refiner, round=1)
    second = [upload(model, 3, [0, 2, 2], round=2), upload(model, 1, [0, 0, 4], round=2)]
    ours, _ = refiner.refine(aggregate, second, rng(6))

    images = refiner._images(0)
    images.load_memory(after.refiner)
    student = model.module(aggregate.params, aggregate.buffers)
    taught = [second[1], second[0]]
    teachers = stack_or_list(
        partial(model, train=False),
        [*(result.params for result in taught), after.params],
        [*(result.buffers for result in taught), after.buffers],
    )
    counts = torch.tensor([[0, 0, 4], [0, 2, 2], [2.5, 0.5, 0]])
    distil(refiner.config, images, student, teachers, counts, rng=rng(6), lr_scale=refiner.config.lr_decay)
    assert same(ours.params, values(student)[0])

    without, _ = replace(refiner, absent_weight=0.0).refine(aggregate, second, rng(6))
    assert not same(ours.params, without.params)


def test_where_all_take_part_nobody_is_absent(model):
    """The numbers are those without the extra teacher, bit for bit."""
    ends = []
    for weight in (0.0, 1.0):
        refiner = make(model, absent_weight=weight)
        state = start(model, refiner)
        for number in (1, 2, 3):
            results = [upload(model, client, [2, 1, client], number) for client in (0, 1)]
            state, _ = refiner.refine(state, results, rng(number))
        ends.append(state.params)
    assert same(*ends)


def test_memory_is_all_that_the_next_round_needs(model):
    refiner = make(model, absent_weight=0.3)
    state, _ = refiner.refine(start(model, refiner), [upload(model, 0, [3, 3, 0]), upload(model, 2, [0, 1, 3])], rng(1))
    next_results = [upload(model, 2, [0, 1, 3], 2)]
    whole, _ = refiner.refine(state, next_results, rng(2))
    kept = replace(state, refiner=clone(state.refiner))
    again, _ = make(model, absent_weight=0.3).refine(kept, next_results, rng(2))
    assert same(whole.params, again.params)
    assert same(whole.refiner, again.refiner)
    assert not any(name.startswith("past.") for name in make(model, preset="paper").init(state.params, rng(0)))


def test_the_pool_is_remembered_and_continues_bit_for_bit(model):
    """Rounds of 12 images, a pool of 20: 12, then 20."""
    refiner, states = make(model, pool_size=20, lambda_bn=0.5), []
    state = start(model, refiner)
    for number in (1, 2, 3):
        results = [upload(model, client, [2, 1, client], number) for client in (0, 1)]
        state, metrics = refiner.refine(replace(state, refiner=clone(state.refiner)), results, rng(number))
        assert metrics["batchnorm"] > 0
        states.append(state)
    assert [len(one.refiner["pool.images"]) for one in states] == [12, 20, 20]
    resumed = replace(states[1], refiner=clone(states[1].refiner))
    again, _ = make(model, pool_size=20, lambda_bn=0.5).refine(resumed, results, rng(3))
    assert same(again.params, state.params)
    assert same(again.refiner, state.refiner)
    emptied = {name: value for name, value in resumed.refiner.items() if not name.startswith("pool.")}
    other, _ = refiner.refine(replace(resumed, refiner=emptied), results, rng(3))
    assert not same(other.params, state.params)
    off, _ = make(model).refine(replace(resumed, refiner=emptied), results, rng(3))
    assert off.refiner.keys() == emptied.keys()


def test_lambda_bn_needs_batchnorm():
    plain = FunctionalModel(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))
    with pytest.raises(InputError, match="lambda_bn needs a model with BatchNorm"):
        make(plain, lambda_bn=1.0)


def test_the_last_counts_of_every_client_are_kept(model):
    """Client 4 first gives (1, 0, 0), then (0, 7, 0): with 2 present, the absent hold (0, 7, 0) + (0, 0, 5)."""
    refiner = make(model, absent_weight=0.3)
    state, _ = refiner.refine(start(model, refiner), [upload(model, 9, [0, 0, 5]), upload(model, 4, [1, 0, 0])], rng(1))
    state, _ = refiner.refine(state, [upload(model, 4, [0, 7, 0]), upload(model, 2, [1, 1, 1])], rng(2))
    assert state.refiner["past.clients"].tolist() == [2, 4, 9]
    assert state.refiner["past.counts"].tolist() == [[1, 1, 1], [0, 7, 0], [0, 0, 5]]
    known = known_counts(state.refiner)
    absent = absent_counts(known, [upload(model, 2, [1, 1, 1])])
    assert absent is not None
    assert absent.tolist() == [0, 7, 5]
    assert absent_counts(known, [upload(model, client, [1, 1, 1]) for client in (2, 4, 9)]) is None
    assert absent_counts({3: torch.zeros(3)}, []) is None
    assert known_counts({}) == {}


def test_what_goes_with_a_preset():
    for name in ("paper", "official"):
        config = FedFTGConfig(preset=name)
        assert (config.absent_weight, config.lacking, config.average, config.prior_tau) == (0, 0, "aggregate", 0)
    config = FedFTGConfig()
    assert (config.absent_weight, config.lacking, config.average, config.prior_of) == (1, 0.1, "all", "all")
    assert FedFTGConfig(absent_weight=0).absent_weight == 0
    assert FedFTGConfig(average="aggregate").prior_of == "cohort"


def test_scaffold_deploys_another_average():
    for preset, expected in ("fedftg", ("ema", 0.25, 20)), ("paper", ("aggregate", 0, 0)):
        given = {"algorithm": {"name": "scaffold"}, "refiner": {"name": "fedftg", "preset": preset}}
        refiner = RunConfig.model_validate(given).refiner
        assert (refiner.average, refiner.prior_tau, refiner.last_round) == expected
    given["refiner"] = {"name": "fedftg", "prior_tau": 0.5}
    assert RunConfig.model_validate(given).refiner.prior_tau == 0.5


def test_after_the_last_round_the_aggregate_stays(model):
    refiner = make(model, last_round=1)
    results = [upload(model, 0, [5, 1, 0]), upload(model, 1, [0, 0, 9])]
    first = start(model, refiner)
    tuned, metrics = refiner.refine(first, results, rng(1))
    assert "student" in metrics
    assert not same(tuned.params, first.params)
    left, metrics = refiner.refine(replace(tuned, round=1, params=first.params), results, rng(2))
    assert "student" not in metrics
    assert same(left.params, first.params)
    assert not tuned.refiner  # nothing will be fine-tuned from it


def test_rounds_that_lack_no_class_are_not_fine_tuned(model):
    """Known: (6, 6, 2), (0, 0, 4). Class 2 is 2 / 14 of the present, 6 / 18 of all: 3 / 7 of its usual share."""
    refiner = make(model, lacking=0.5, absent_weight=1, last_round=3)
    both, first = [upload(model, 0, [6, 6, 2]), upload(model, 1, [0, 0, 4])], start(model, refiner)
    state, metrics = refiner.refine(first, both, rng(1))
    assert metrics == {"least_share": pytest.approx(1)}
    assert same(state.params, first.params)
    later = replace(state, round=1)
    _, metrics = refiner.refine(later, both[:1], rng(2))
    assert metrics["least_share"] == pytest.approx(3 / 7)
    assert "student" in metrics
    _, metrics = make(model, lacking=0.4, absent_weight=1, last_round=3).refine(later, both[:1], rng(2))
    assert set(metrics) == {"least_share"}
    assert refiner.refine(replace(state, round=3), both[:1], rng(2))[1] == {}  # past the last round nothing is known
