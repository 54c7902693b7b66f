"""Averages that are deployed, and the label-prior correction, with numbers derived by hand."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedftg.algorithms.averages import Averaged, head_bias, shifted
from fedftg.algorithms.base import ClientResult, RefinerContext, ServerState, broadcast
from fedftg.algorithms.registry import REFINERS
from fedftg.config import parse
from fedftg.distill.labels import label_log_prior
from fedftg.errors import InputError
from fedftg.models import registry as models
from fedftg.models.functional import FunctionalModel
from fedftg.params import weighted_mean

SHAPE = (3, 8, 8)


def context(module: nn.Module | None = None, num_classes: int = 2) -> RefinerContext:
    module = module or nn.Sequential(nn.Flatten(), nn.Linear(192, num_classes))
    return RefinerContext(FunctionalModel(module), num_classes, SHAPE, torch.device("cpu"))


def built(name: str, **settings: Any) -> Averaged:
    """A refiner of models {"w": number, "head.bias": (2,), "head.weight": (2, 1)}."""
    config = parse(REFINERS[name], {"name": name, **settings})
    return Averaged(config, context(), "head.bias")  # type: ignore[arg-type]


def model(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.tensor(value), "head.bias": torch.full((2,), value), "head.weight": torch.full((2, 1), value)}


def result(client: int, value: float, counts: tuple[int, int] = (1, 1), previous: float | None = None) -> ClientResult:
    before = {} if previous is None else {**model(previous), "n": torch.tensor(0)}
    buffers = {"n": torch.tensor(round(value))}
    return ClientResult(client, sum(counts), torch.tensor(counts), model(value), buffers, {}, {}, 0.0, before)


def play(refiner: Averaged, rounds: list[tuple[float, list[ClientResult]]]) -> list[ServerState]:
    """What is deployed after each round, from its aggregate and its uploads; a round without any is undone."""
    memory, deployed = refiner.init({}, torch.Generator()), []
    for number, (value, results) in enumerate(rounds):
        if not results:
            continue
        state = ServerState(number, model(value), {"n": torch.tensor(round(value))}, {}, memory)
        state = replace(state, refiner=refiner.observe(state, results))
        after, _ = refiner.refine(state, results, torch.Generator())
        deployed.append(after)
        memory = after.refiner
    return deployed


def numbers(refiner: Averaged, rounds: list[tuple[float, list[ClientResult]]]) -> list[float]:
    return [float(state.params["w"]) for state in play(refiner, rounds)]


AGGREGATES = [(value, [result(0, value)]) for value in (8.0, 0.0, 6.0)]


def test_ema_by_hand():
    """8; 8/2 + 0/2 = 4; 4/2 + 6/2 = 5. Counters are rounded."""
    states = play(built("ema", ema_decay=0.5), AGGREGATES)
    assert [float(state.params["w"]) for state in states] == [8, 4, 5]
    assert [int(state.buffers["n"]) for state in states] == [8, 4, 5]
    assert states[0].buffers["n"].dtype == torch.int64


def test_wima_by_hand():
    """W = 2: 8; (8 + 0) / 2; (0 + 6) / 2."""
    assert numbers(built("wima", window=2), AGGREGATES) == [8, 4, 3]


SKIPPING = [
    (0.0, [result(1, 8.0, (3, 0)), result(0, 4.0, (1, 0))]),
    (0.0, [result(2, 1.0, (2, 2)), result(0, 0.0, (1, 0), previous=4.0)]),
]


def test_all_by_hand():
    """(1 * 4 + 3 * 8) / 4 = 7, then (1 * 0 + 3 * 8 + 4 * 1) / 8; halved for its age, client 1 weighs 1.5 of 6.5."""
    assert numbers(built("all"), SKIPPING) == [7, 3.5]
    assert numbers(built("all", recency=1), SKIPPING) == pytest.approx([7, (1.5 * 8 + 4 * 1) / 6.5])
    undone = [SKIPPING[0], (0.0, []), SKIPPING[1]]  # in round 3 client 1 weighs 3 * 1 / 3
    assert numbers(built("all", recency=1), undone) == pytest.approx([7, (1 * 8 + 4 * 1) / 6])


@pytest.mark.parametrize("recency", [0, 2])
def test_exchanging_uploads_is_the_mean_over_the_last_ones(recency):
    rng = torch.Generator().manual_seed(0)
    last: dict[int, tuple[int, float]] = {}
    since: dict[int, int] = {}
    rounds, expected = [], []
    for number in range(1, 31):
        cohort = torch.randperm(6, generator=rng)[:3].tolist()
        given = [(client, float(torch.randn((), generator=rng))) for client in cohort]
        results = [
            result(client, value, (client, 2), last[client][1] if client in last else None) for client, value in given
        ]
        last |= {client: (client + 2, value) for client, value in given}
        since |= dict.fromkeys(cohort, number)
        rounds.append((0.0, results))
        trees = [{"w": torch.tensor(value)} for _, value in last.values()]
        weights = [size * (since[client] / number) ** recency for client, (size, _) in last.items()]
        expected.append(float(weighted_mean(trees, weights)["w"]))
    assert numbers(built("all", recency=recency), rounds) == pytest.approx(expected, abs=1e-7)


def test_rows_of_the_head_by_class():
    """Counts (4, 0) and (0, 2), a thousandth of the samples added to each: row 0 is nearly client 0's."""
    given = [(0.0, [result(0, 1.0, (4, 0)), result(1, 2.0, (0, 2))])]
    (state,) = play(built("all", class_rows=True), given)
    rows = [(4.004 * 1 + 0.002 * 2) / 4.006, (0.004 * 1 + 2.002 * 2) / 2.006]
    assert state.params["head.bias"].tolist() == pytest.approx(rows)
    assert state.params["head.weight"].flatten().tolist() == pytest.approx(rows)
    assert float(state.params["w"]) == pytest.approx(8 / 6)


def test_label_priors_by_hand():
    """Counts (9, 0) have the logs of 9.5/10 and 0.5/10, (0, 4) those of 0.5/5 and 4.5/5."""
    prior = label_log_prior(torch.tensor([[9, 0], [0, 4]]))
    wanted = torch.tensor([[0.95, 0.05], [0.1, 0.9]], dtype=torch.float64).log()
    assert torch.allclose(prior, wanted)
    assert torch.equal(label_log_prior(torch.tensor([9, 0])), prior[0])
    moved = shifted(model(1.0), "head.bias", torch.tensor([4.0, 0.0]))
    assert moved["head.bias"].tolist() == [3, -1]  # the mean, 2, moves no prediction
    assert moved["w"] == 1


def test_two_sums_over_clients_are_enough_for_the_correction():
    """As under secure aggregation: the server knows the sums of n_k and of n_k log p_k, and no client's counts."""
    counts = [torch.tensor([9, 0]), torch.tensor([0, 4]), torch.tensor([5, 6])]
    samples = torch.stack([one.sum() for one in counts]).sum()
    logs = torch.stack([one.sum() * label_log_prior(one) for one in counts]).sum(dim=0)
    by_sums = shifted(model(7.0), "head.bias", -0.75 * logs / samples)
    given = [(7.0, [result(client, 1.0, tuple(one.tolist())) for client, one in enumerate(counts)])]
    assert torch.equal(play(built("head_prior"), given)[0].params["head.bias"], by_sums["head.bias"])


LOG19 = math.log(19)


@pytest.mark.parametrize(
    ("settings", "gap"),
    [
        # Bias of class 0 minus that of class 1, from one client of (9, 0): log 9.5 - log 0.5 = log 19 is taken out.
        ({"prior_tau": 1}, -LOG19),
        ({}, -0.75 * LOG19),
        ({"prior_tau": 1, "target_prior": (9.5, 0.5)}, 0),
        ({"prior_tau": 1, "target_prior": (1, 3)}, -LOG19 - math.log(3)),
        # Round 1 had a client of (0, 4), half as heavy for its age: (9 log 19 - 2 log 9) / 11.
        ({"prior_tau": 1, "prior_of": "all", "recency": 1}, -(9 * LOG19 - 2 * math.log(9)) / 11),
    ],
)
def test_the_bias_that_is_deployed_by_hand(settings, gap):
    given = [(5.0, [result(1, 1.0, (0, 4))]), (7.0, [result(0, 1.0, (9, 0))])]
    bias = play(built("head_prior", **settings), given)[-1].params["head.bias"]
    assert float(bias[0] - bias[1]) == pytest.approx(gap, abs=1e-6)
    assert float(bias.mean()) == pytest.approx(7)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("ema", {"ema_decay": 0}), ("wima", {"window": 1}), ("head_prior", {"prior_tau": 0})],
)
def test_limits_give_the_aggregate_bit_for_bit(name, settings):
    values = torch.randn(4, generator=torch.Generator().manual_seed(1)).tolist()
    states = play(built(name, **settings), [(value, [result(0, 1.0)]) for value in values])
    for value, state in zip(values, states, strict=True):
        assert all(torch.equal(state.params[key], model(value)[key]) for key in state.params)


@pytest.mark.parametrize("name", ["ema", "wima", "all", "head_prior"])
def test_order_and_inputs(name):
    """The order of results does not matter, and what is given stays as it is."""
    refiner, results = built(name, prior_tau=0.5), [result(2, 3.0, (1, 5)), result(0, 1.0, (7, 0))]
    state = replace(play(refiner, AGGREGATES[:1])[0], params=model(2.0))
    results = [replace(results[0]), replace(results[1], previous={**model(8.0), "n": torch.tensor(8)})]
    before = {key: value.clone() for key, value in state.refiner.items()}
    ends = []
    for given in (results, results[::-1]):
        seen = replace(state, refiner=refiner.observe(state, given))
        ends.append(refiner.refine(seen, given, torch.Generator())[0])
    assert all(torch.equal(ends[0].params[key], ends[1].params[key]) for key in ends[0].params)
    assert all(torch.equal(state.refiner[key], before[key]) for key in before)


class Head(nn.Module):
    """Ends as its argument says; the convolution's GroupNorm has as many channels as there are classes."""

    def __init__(self, end: str) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 10, 3), nn.GroupNorm(2, 10), nn.ReLU())
        self.end = end
        self.last = nn.Conv2d(10, 10, 1) if end == "convolution" else nn.Linear(10, 10, bias=end != "none")
        if end == "tied":
            self.embedding = nn.Linear(10, 10)
            self.last.weight = self.embedding.weight
        if end == "frozen":
            self.last.bias.requires_grad_(False)
        if end == "renamed":
            self.last = nn.Identity()
            self.rows, self.shift = nn.Parameter(torch.randn(10, 10)), nn.Parameter(torch.zeros(10))
        if end == "shared":
            self.alias = self.last

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.body(images)
        if self.end == "convolution":
            return self.last(features).mean(dim=(2, 3))
        features = features.mean(dim=(2, 3))
        if self.end == "tied":
            features = self.embedding(features).relu()
        if self.end == "renamed":
            return features @ self.rows.T + self.shift
        logits = self.last(features)
        return F.log_softmax(logits, dim=1) if self.end == "log-softmax" else logits


def found(module: nn.Module) -> str:
    return head_bias(FunctionalModel(module), SHAPE)


@pytest.mark.parametrize(
    ("end", "name"),
    [
        ("linear", "last.bias"), ("convolution", "last.bias"), ("tied", "last.bias"), ("log-softmax", "last.bias"),
        ("shared", "last.bias"), ("renamed", "shift"),
    ],
)  # fmt: skip
def test_the_head_is_found_by_what_it_does(end, name):
    assert found(Head(end)) == name


@pytest.mark.parametrize("name", ["lenet", "lenet_gn", "resnet18_gn"])
def test_heads_of_registered_models(name):
    module = models.build(models.ModelConfig(name=name), 10, SHAPE, seed=0)
    last = [key for key, value in module.named_parameters() if value.shape == (10,)][-1]
    assert found(module) == last


@pytest.mark.parametrize("end", ["none", "frozen"])
@pytest.mark.parametrize("settings", [{"prior_tau": 0.5}, {"class_rows": True}])
def test_no_bias_to_correct_is_one_line(end, settings):
    config = parse(REFINERS["all"], {"name": "all", **settings})
    with pytest.raises(InputError, match="bias of the model's last layer, which must be trainable") as caught:
        config.build(context(Head(end), 10))
    assert "\n" not in str(caught.value)
    assert isinstance(parse(REFINERS["all"], {"name": "all"}).build(context(Head(end), 10)), Averaged)


def test_wrong_settings_are_one_line():
    cases: list[tuple[dict[str, Any], str]] = [
        ({"name": "ema", "broadcast": 0.5}, "when = 'evaluation' needs broadcast = 0, got 0.5; or set when = 'round'"),
        ({"name": "fedftg", "when": "evaluation"}, "when = 'evaluation' needs broadcast = 0, got 1.0"),
        ({"name": "head_prior", "target_prior": [1, 2, 3]}, "must be 2 positive numbers, got .1.0, 2.0, 3.0"),
        ({"name": "head_prior", "target_prior": [1, 0]}, "must be 2 positive numbers, got .1.0, 0.0"),
        ({"name": "all", "average": "ema"}, "average must be .*'all'"),
        ({"name": "wima", "window": 0}, "window must be >= 1, got 0"),
    ]
    for given, message in cases:
        with pytest.raises(InputError, match=message) as caught:
            parse(REFINERS[given["name"]], given).build(context())
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="class_rows needs a parameter 'shiftweight' beside 'shift'"):
        parse(REFINERS["all"], {"name": "all", "class_rows": True}).build(context(Head("renamed"), 10))


def test_broadcast_by_hand():
    """Aggregate 2, refined 6: half-way is 4. Counters are the aggregate's, what is deployed is the refined model."""
    state = ServerState(0, model(2.0), {"n": torch.tensor(2)}, {}, {})
    refined = replace(state, params=model(6.0), buffers={"n": torch.tensor(6)}, refiner={"kept": torch.ones(1)})
    assert broadcast(state, refined, 1.0) is refined
    for weight, sent in ((0.0, 2.0), (0.5, 4.0)):
        after = broadcast(state, refined, weight)
        assert (float(after.params["w"]), int(after.buffers["n"])) == (sent, 2)
        assert float(after.model[0]["w"]) == 6
        assert int(after.model[1]["n"]) == 6
        assert after.refiner is refined.refiner
    # A server rule that sends 3 and deploys 2: the refined model is as far from what is sent as from what is deployed.
    leading = replace(state, params=model(3.0), deployed={**model(2.0), "n": torch.tensor(2)})
    assert [float(broadcast(leading, refined, weight).params["w"]) for weight in (0, 0.5, 1)] == [3, 5, 7]


def test_fedftg_deploys_the_average_beside_the_model_it_sends():
    """It deploys what the average alone does; a student that does not move leaves the aggregate as it is."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    still = {"student_lr": 0, "iterations": 1, "batch_size": 4, "generator_width": 4, "noise_dim": 4}
    average = {"average": "all", "prior_tau": 0.7, "recency": 2.0}
    ends = []
    for name, more in (("fedftg", still), ("all", {})):
        refiner = parse(REFINERS[name], {"name": name, **average, **more}).build(context(module))
        params, buffers = context(module).model.init()
        memory, rng = refiner.init(params, torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1)
        before: dict[int, Any] = {}
        for number in range(3):
            state = ServerState(number, params, buffers, {}, memory)
            results = []
            for client in (number, number + 1):
                noise = torch.Generator().manual_seed(10 * number + client)
                moved = {key: value + torch.randn(value.shape, generator=noise) for key, value in params.items()}
                counts = torch.tensor([client, 3])
                results.append(ClientResult(client, client + 3, counts, moved, {}, {}, {}, 0.0, before.get(client, {})))
                before[client] = moved
            state = replace(state, refiner=refiner.observe(state, results))
            after, _ = refiner.refine(state, results, rng)
            memory = after.refiner
        ends.append(after)
    tuned, averaged = ends
    assert all(torch.equal(tuned.deployed[key], averaged.params[key]) for key in params)
    assert all(torch.equal(tuned.params[key], params[key]) for key in params)
    assert not torch.equal(tuned.deployed["1.bias"], params["1.bias"])
