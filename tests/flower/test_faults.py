"""Whatever goes wrong on nodes ends in a finished run, and in its record."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, Error, Message, RecordDict

sys.path.insert(0, str(Path(__file__).parent))
from small_federation import FaultyGrid, changed

import fedftg
from fedftg.engine import local_train
from fedftg.flower import wire
from fedftg.flower.server import server_app

SCAFFOLD = ("algorithm.name=scaffold", "refiner.name=none")
ALL = ("cohort.probability=1",)


def trains(reply: Message) -> bool:
    return reply.metadata.message_type == "train"


def before_training(grid: FaultyGrid, act: Callable[[int, list[Message]], Any]) -> None:
    """Calls ``act(round, messages)`` before each round's clients train."""

    def watch(messages: list[Message]) -> None:
        if trains(messages[0]):
            act(int(messages[0].metadata.group_id), messages)

    grid.before_push = watch


def with_tensor(make: Callable[[Array], Array]) -> Callable[[RecordDict], None]:
    def change(content: RecordDict) -> None:
        arrays = content.array_records[wire.ARRAYS]
        name = next(iter(arrays))
        arrays[name] = make(arrays[name])

    return change


def with_nan(array: Array) -> Array:
    values = array.numpy().copy()
    values.flat[0] = np.nan
    return Array(values)


def with_metrics(**values: Any) -> Callable[[RecordDict], None]:
    return lambda content: content.metric_records[wire.METRICS].update(values)


def without(record: str) -> Callable[[RecordDict], Any]:
    return lambda content: content.pop(record)


def without_a_tensor(content: RecordDict) -> None:
    arrays = content.array_records[wire.ARRAYS]
    del arrays[next(iter(arrays))]


UNFIT: list[tuple[Callable[[RecordDict], Any], str]] = [
    (with_tensor(with_nan), "non-finite parameter"),
    (with_tensor(lambda array: Array(np.zeros((2, 2), np.float32))), "must be ('float32'"),
    (without_a_tensor, "lacks"),
    (with_tensor(lambda old: Array(old.dtype, old.shape, old.stype, bytes(len(old.data)))), "damaged"),
    (with_metrics(**{wire.CLASS_COUNTS: [1] * 10}), "not for this client and its data"),
    (with_metrics(**{wire.PARTITION_ID: 2}), "not for this client and its data"),
    (without(wire.METRICS), "not for this client and its data"),
    (without(wire.EXTRA), "no ArrayRecord 'extra'"),
]


def test_replies_that_do_not_fit_are_recorded_and_left_out(federation: Callable[..., Any]) -> None:
    fed = federation(*SCAFFOLD, *ALL, "rounds=2", f"partition.num_clients={len(UNFIT) + 1}")
    grid = fed.grid()
    for client, (change, _) in enumerate(UNFIT):
        grid.faults[client + 1] = changed(change)
    run = fed.serve(grid)
    for row in fed.rows("served"):
        assert [item["client"] for item in row["rejected"]] == list(range(len(UNFIT)))
        for item, (_, reason) in zip(row["rejected"], UNFIT, strict=True):
            assert reason in item["reason"]
    assert run.summary["rejected_updates"] == 2 * len(UNFIT)
    assert all(torch.isfinite(tensor).all() for tensor in run.state.params.values())


def test_a_client_that_raises_and_one_that_never_answers(
    federation: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(model: Any, rule: Any, task: Any, *rest: Any) -> Any:
        if task.client == 1:
            raise ZeroDivisionError("by hand")
        return local_train.train(model, rule, task, *rest)

    def fails(reply: Message) -> Message:
        return Message(Error(2, "by hand\nin two lines"), reply_to=reply) if trains(reply) else reply

    monkeypatch.setattr("fedftg.flower.client.train", failing)
    fed = federation("refiner.name=none", *ALL, "rounds=2")
    grid = fed.grid()
    grid.faults = {1: lambda reply: None if trains(reply) else reply, 3: fails}
    fed.serve(grid)
    for row in fed.rows("served"):
        reasons = [item["reason"] for item in row["rejected"]]
        assert [item["client"] for item in row["rejected"]] == [0, 1, 2]
        assert reasons[::2] == ["no reply within 0.3 s", "error 2 of its node: by hand in two lines"]
        assert "ZeroDivisionError" in reasons[1]


def test_a_node_that_leaves_in_mid_round_and_comes_back(federation: Callable[..., Any]) -> None:
    """Its SCAFFOLD memory is on its disk, so from then on it goes on where it was."""
    fed = federation(*SCAFFOLD, *ALL, "rounds=4")
    grid = fed.grid()
    counted: dict[int, dict[int, int]] = {}

    def watch(number: int, messages: list[Message]) -> None:
        if number == 2:
            grid.leave(2)
        if number == 3:
            grid.join(9, fed.node(1))
        counted.update({message.metadata.dst_node_id: wire.Order.of(message.content).counted for message in messages})

    before_training(grid, watch)
    fed.serve(grid)
    rows = fed.rows("served")
    assert "the node is not connected" in rows[1]["rejected"][0]["reason"]
    assert rows[2]["rejected"] == [{"client": 1, "reason": "no node with partition-id=1 is connected"}]
    assert "rejected" not in rows[0]
    assert "rejected" not in rows[3]
    assert (counted[9], counted[1]) == ({1: 1}, {0: 3})


@pytest.mark.parametrize("policy", ["refuse", "reset"])
def test_a_restarted_node_without_its_state_is_refused_or_reset(federation: Callable[..., Any], policy: str) -> None:
    fed = federation(*SCAFFOLD, *ALL, "rounds=3")
    grid = fed.grid(**{"lost-memory": policy})

    def watch(number: int, _: list[Message]) -> None:
        if number == 2:
            grid.leave(1)
            grid.join(1, fed.node(0) | {"state-dir": str(fed.folder / "empty")})

    before_training(grid, watch)
    fed.serve(grid, **{"lost-memory": policy})
    row = fed.rows("served")[1]
    assert ("rejected" in row) is (policy == "refuse")
    assert policy == "reset" or "no memory of round 1" in row["rejected"][0]["reason"]


def test_a_late_node_joins_at_the_next_round(federation: Callable[..., Any]) -> None:
    fed = federation(*SCAFFOLD, *ALL, "rounds=3")

    def grid() -> FaultyGrid:
        """Client 2 joins while the others train in round 1."""
        made: FaultyGrid = fed.grid((0, 1, 3))
        before_training(made, lambda number, _: made.join(3, fed.node(2)) if number == 1 else None)
        return made

    run = fed.serve(grid(), set="rounds=2")
    rows = fed.rows("served")
    assert rows[0]["clients"] == [0, 1, 2, 3]
    assert rows[0]["rejected"] == [{"client": 2, "reason": "no node with partition-id=2 is connected"}]
    assert "rejected" not in rows[1]
    assert json.loads((run.folder / "partition.json").read_text())["digests"][2] is None
    fed.serve(fed.grid(), resume=True)
    fed.serve(grid(), "whole")
    assert fed.rows("served") == fed.rows("whole")


def test_too_few_nodes_is_one_line_and_the_run_goes_on_by_resume(federation: Callable[..., Any]) -> None:
    fed = federation("refiner.name=none", *ALL)
    with pytest.raises(fedftg.InputError, match=r"2 of 4 clients are connected after 0\.2 s, min-clients is 3"):
        fed.serve(fed.grid((0, 1)), **{"min-clients": 3})
    assert not (fed.folder / "served").exists()
    grid = fed.grid()
    before_training(grid, lambda number, _: [grid.leave(node) for node in grid.get_node_ids()] if number == 2 else None)
    with pytest.raises(fedftg.InputError, match=r"round 3: 0 of the 4 clients .*, and no other; .* with resume=true"):
        fed.serve(grid, **{"min-clients": 2})
    assert "no client update was usable" in fed.rows("served")[1]["rolled_back"]
    run = fed.serve(fed.grid(), resume=True, **{"min-clients": 2})
    assert run.summary["rounds"] == 3


def test_clients_that_stay_away_cost_their_rounds_and_not_the_run(federation: Callable[..., Any]) -> None:
    fed = federation("refiner.name=none", "cohort.size=2", "rounds=6")
    grid = fed.grid((0, 1))
    asked: list[Message] = []
    before_training(grid, lambda _, messages: asked.extend(messages))
    run = fed.serve(grid, **{"min-clients": 2, "wait-seconds": 0.05})
    rows = fed.rows("served")
    assert len(rows) == run.summary["rounds"] == 6
    counted = [row["clients"] for row in rows if "rolled_back" not in row]
    assert all(clients == [0, 1] for clients in counted)
    assert len(asked) == 2 * len(counted)
    alone = next(row for row in rows if 0 in row["clients"] and "rolled_back" in row)
    reasons = {item["client"]: item["reason"] for item in alone["rejected"]}
    assert reasons[0] == "not asked: 1 of the round's clients are connected, min-clients is 2"
    assert reasons[max(reasons)].startswith("no node with partition-id=")


def test_a_server_killed_in_mid_round_goes_on_with_the_same_numbers(federation: Callable[..., Any]) -> None:
    """The process dies by SIGKILL when two of three clients of round 4 are done; the last checkpoint is of round 2."""
    fed = federation(*SCAFFOLD, "checkpoint.every=2", "rounds=5")
    script = """
import os, sys
from pathlib import Path
from fedftg.flower import client_app
from fedftg.flower.server import serve
from fedftg.flower.testing import LocalGrid
from fedftg.progress import Progress
folder = Path(sys.argv[1])
recipe, settings = folder / 'recipe.toml', {'out': str(folder / 'served')}
nodes = {i + 1: {'partition-id': i, 'state-dir': str(folder / f'node-{i}')} for i in range(4)}
grid = LocalGrid(client_app(recipe), nodes, settings)
done = []
def answer(message):
    reply = LocalGrid.answer(grid, message)
    done.append(reply.metadata.group_id)
    if done.count('4') == 2:
        os.kill(os.getpid(), 9)
    return reply
grid.answer = answer
serve(grid, recipe, settings, Progress())
"""
    killed = subprocess.run([sys.executable, "-W", "ignore", "-c", script, str(fed.folder)], timeout=400, check=False)
    assert killed.returncode == -9
    assert len(fed.rows("served")) == 3
    run, whole = fed.serve(fed.grid(), resume=True), fed.simulate()
    assert fed.rows("served") == fed.rows("simulated")
    assert all(torch.equal(run.state.params[name], whole.state.params[name]) for name in whole.state.params)


def test_other_recipes_and_wrong_numbers_are_refused(federation: Callable[..., Any]) -> None:
    fed = federation("refiner.name=none", *ALL, "rounds=1")
    with pytest.raises(fedftg.InputError, match="its recipe or version of fedftg differs"):
        fed.serve(fed.grid((0, 1, 2), set="local.lr=0.3"))
    for config, message in (({}, "partition-id"), (fed.node(4), "partition-id must be below 4")):
        grid = fed.grid(())
        grid.join(1, config)
        with pytest.raises(fedftg.InputError, match=message):
            fed.serve(grid)


def test_resume_refuses_other_data_and_other_runs(federation: Callable[..., Any]) -> None:
    fed = federation("refiner.name=none", *ALL, "rounds=1")
    fed.serve(fed.grid())
    with pytest.raises(fedftg.InputError, match="resume cannot change"):
        fed.serve(fed.grid(set="local.lr=0.3"), resume=True, set="local.lr=0.3")
    partition = fed.folder / "served" / "partition.json"
    record = json.loads(partition.read_text())
    record["digests"][1] = "0" * 64
    partition.write_text(json.dumps(record))
    with pytest.raises(fedftg.InputError, match="its data is not what client 1 had before"):
        fed.serve(fed.grid([1]), resume=True)
    fed.simulate("simulated")
    with pytest.raises(fedftg.InputError, match="was not made by a Flower server"):
        fed.serve(fed.grid(), "simulated", resume=True)


def test_evaluations_that_do_not_fit_are_left_out_of_the_mean(federation: Callable[..., Any]) -> None:
    fed = federation(*ALL, "partition.test_share=0.3", "rounds=1", "evaluation.track_all=false")
    grid = fed.grid()
    grid.faults[3] = changed(with_metrics(**{wire.PARTITION_ID: 7}), "evaluate")
    fed.serve(grid)
    (row,) = fed.rows("served")
    (left_out,) = row["not_measured"]
    assert left_out["client"] == 2
    assert "another task" in left_out["reason"]
    fed.serve(fed.grid(), "whole")
    (whole,) = fed.rows("whole")
    assert "not_measured" not in whole
    assert row["accuracy"] == whole["accuracy"]
    assert row["client_accuracy"] != whole["client_accuracy"]


def test_nodes_that_are_gone_when_the_round_is_evaluated(federation: Callable[..., Any]) -> None:
    fed = federation(*ALL, "partition.test_share=0.3", "rounds=2", "refiner.name=none")
    grid = fed.grid()

    def leave(messages: list[Message]) -> None:
        if messages[0].metadata.message_type == "evaluate" and messages[0].metadata.group_id == "2":
            for node in grid.get_node_ids():
                grid.leave(node)

    grid.before_push = leave
    run = fed.serve(grid)
    first, second = fed.rows("served")
    assert "not_measured" not in first
    assert [item["client"] for item in second["not_measured"]] == [0, 1, 2, 3]
    assert "client_accuracy" not in second
    assert run.summary["client_accuracy"] == first["client_accuracy"]


def test_a_client_stays_with_its_first_node_until_that_is_gone(
    federation: Callable[..., Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that is started again has a new id, and its old one is listed for a while."""
    monkeypatch.setattr("fedftg.flower.nodes._RETRY_SECONDS", 0.0)
    fed = federation(*SCAFFOLD, *ALL, "rounds=4")
    grid = fed.grid()
    grid.join(9, fed.node(1))
    before_training(grid, lambda number, _: grid.leave(2) if number == 2 else None)
    fed.serve(grid)
    assert ["rejected" in row for row in fed.rows("served")] == [False, True, False, False]
    printed = capsys.readouterr().out
    assert printed.count("node 9 cannot take part: node 2 has partition-id=1 already") == 1
    assert "client 1 connected (node 9)" in printed


def test_nodes_that_do_not_fit_are_refused(federation: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    fed = federation("refiner.name=none", *ALL, "rounds=1")
    grid = fed.grid()
    wrong: list[tuple[str, Any, str]] = [
        ("class_names", [*map(str, range(9)), "nine"], "its class names must be ('0', '1'"),
        ("num_clients", 5, "its num clients must be 4, got 5"),
        ("image_shape", [1, 8, 9], "its image shape must be (1, 8, 8), got (1, 8, 9)"),
    ]
    for number, (key, value, _) in enumerate(wrong):
        lie = {key: value}
        grid.faults[number + 1] = changed(lambda content, lie=lie: content["config"].update(lie), "query")
    fed.serve(grid)
    (row,) = fed.rows("served")
    assert [item["client"] for item in row["rejected"]] == [0, 1, 2]
    printed = capsys.readouterr().out
    assert all(reason in printed for _, _, reason in wrong)


def test_an_operator_s_mistakes_end_in_one_line_in_flower_s_terms(
    federation: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder that is taken, and no node at all; the recipe is a string, as one writes it."""
    here = federation()
    taken = here.folder / "taken"
    taken.mkdir()
    (taken / "config.toml").write_text("")
    app = server_app(str(here.recipe))
    told = r"taken exists already; resume it by resume=true, or give another out$"
    with pytest.raises(fedftg.InputError, match=told):
        here.grid(out=str(taken)).run_server(app)
    empty = here.grid([], out=str(here.folder / "new"))
    with pytest.raises(fedftg.InputError, match=r"0 of 4 clients .* 0.2 s.*start more SuperNodes") as caught:
        empty.run_server(app)
    printed = capsys.readouterr().out
    assert "fedftg: " + str(caught.value) in printed
    assert "--resume" not in printed
    assert not (here.folder / "new").exists()
