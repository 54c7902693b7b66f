"""FedGen: the generator, the client's extra term and the server's step, on numbers done by hand."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fedftg
from fedftg.algorithms.base import Batch, ClientResult, LocalTask, ServerState
from fedftg.algorithms.fedgen import FedGenConfig, generate, head, predict
from fedftg.errors import InputError
from fedftg.models.functional import FunctionalModel
from fedftg.rundir import records

HEAD = {"conv": torch.zeros(2, 1, 3, 3), "fc.weight": torch.tensor([[1.0, 0.0], [0.0, 2.0]]), "fc.bias": torch.zeros(2)}


def result(client: int, params: dict[str, torch.Tensor], counts: list[float]) -> ClientResult:
    return ClientResult(client, int(sum(counts)), torch.tensor(counts), params, {}, {}, {}, 0.0)


def test_features_by_hand() -> None:
    """Noise 3, label 1: hidden (3 - 1, -(3) + 2) = (2, -1) -> relu (2, 0); out 0.5 * 2 + 1 = 2."""
    generator = {
        "hidden.weight": torch.tensor([[1.0, 5.0, -1.0], [-1.0, 5.0, 2.0]]),
        "hidden.bias": torch.zeros(2),
        "out.weight": torch.tensor([[0.5, 9.0]]),
        "out.bias": torch.ones(1),
    }
    assert generate(generator, torch.tensor([[3.0]]), torch.tensor([1])).tolist() == [[2.0]]
    assert predict(HEAD, torch.tensor([[3.0, 4.0]])).tolist() == [[3.0, 8.0]]


def test_the_last_matrix_is_the_head_and_there_must_be_one() -> None:
    assert head({"embedding": torch.zeros(3, 3), **HEAD}) == "fc.weight"
    with pytest.raises(InputError, match="needs a model with a trainable"):
        FedGenConfig().build(2).server.init({"conv": torch.zeros(1, 1, 3, 3)})


def test_generated_features_come_to_look_like_their_class_to_those_who_hold_it() -> None:
    """Client 1's head has its classes exchanged, and holds class 0 alone: that client is right about class 0."""
    server = FedGenConfig(generator_steps=200, generator_lr=0.01).build(2).server
    exchanged = {**HEAD, "fc.weight": HEAD["fc.weight"].flip(0)}
    state = ServerState(0, HEAD, {}, server.init(HEAD), {})
    after, metrics = server.step(state, [result(0, HEAD, [0, 30]), result(1, exchanged, [10, 0])])
    assert after.server["class_counts"].tolist() == [10, 30]
    labels = torch.tensor([0, 1]).repeat(50)
    features = generate(after.server, torch.randn(100, 32, generator=torch.Generator().manual_seed(1)), labels)
    assert (predict(exchanged, features[labels == 0]).argmax(dim=1) == 0).all()
    assert (predict(HEAD, features[labels == 1]).argmax(dim=1) == 1).all()
    assert 0 <= metrics["generator_loss"] < 0.1
    assert torch.equal(after.params["fc.weight"], (3 * HEAD["fc.weight"] + exchanged["fc.weight"]) / 4)


def run(folder: Path, **algorithm: object) -> list[dict[str, object]]:
    given = [f"algorithm.{key}={value}" for key, value in algorithm.items()]
    given += ["rounds=2", "local.steps=3", "refiner.name=none", "executor.name=sequential"]
    done = fedftg.run("default", overrides=given, out=folder)
    return [{**row, "seconds": None} for row in records.read(done.folder / "rounds.jsonl")]


def test_the_term_counts_from_the_second_round_and_weight_0_is_fedavg(tmp_path: Path) -> None:
    fedavg = run(tmp_path / "a", name="fedavg")
    without, fedgen = (run(tmp_path / str(w), name="fedgen", weight=w, generator_steps=2) for w in (0, 1))
    losses = [[row["loss"] for row in rows] for rows in (fedavg, without, fedgen)]
    assert losses[0] == losses[1]
    assert losses[2][0] == losses[0][0]
    assert losses[2][1] != losses[0][1]


def test_the_term_by_hand() -> None:
    """All labels drawn are 1; features (0, 5) of any noise; head logits (0, 10): CE = log(1 + e^-10)."""
    local = FedGenConfig(weight=2.0).build(1).local
    model = FunctionalModel(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(2, 2)))
    params = {"1.weight": torch.tensor([[1.0, 0.0], [0.0, 2.0]]), "1.bias": torch.zeros(2)}
    message = FedGenConfig().build(1).server.init(params)
    message |= {"out.weight": 0 * message["out.weight"], "out.bias": torch.tensor([0.0, 5.0])}
    task = LocalTask(2, 0, params, {}, {}, message, 1, 1.0, 0.1, 0)
    batch = Batch(torch.zeros(4, 1, 1, 2), torch.zeros(4, dtype=torch.int64))
    before = local.loss(model, params, {}, batch, task)
    counted = replace(task, message=message | {"class_counts": torch.tensor([0.0, 7.0])})
    extra = local.loss(model, params, {}, batch, counted) - before
    assert extra.item() == pytest.approx(2 * torch.tensor(-10.0).exp().log1p().item(), rel=1e-3)
