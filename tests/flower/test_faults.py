"""Whatever goes wrong on nodes ends in a finished run, and in its record."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord, RecordDict

import fedftg
from fedftg.flower import wire
from fedftg.flower.server import server_app

SCAFFOLD = ("algorithm.name=scaffold", "refiner.name=none")
ALL = ("cohort.probability=1",)


def changed(change: Callable[[RecordDict], None]) -> Callable[[Message], Message]:
    """What arrives is the reply with its content changed; answers to queries stay as they are."""

    def fault(reply: Message) -> Message:
        if wire.ARRAYS in reply.content:
            change(reply.content)
        return reply

    return fault


def only_in_training(act: Callable[[Message], Message | None]) -> Callable[[Message], Message | None]:
    return lambda reply: act(reply) if reply.has_error() or wire.ARRAYS in reply.content else reply


def with_nan(content: RecordDict) -> None:
    model = content.array_records[wire.ARRAYS].to_torch_state_dict()
    name = next(iter(model))
    model[name].view(-1)[0] = float("nan")
    content[wire.ARRAYS] = wire.encode(dict(model))


def with_wrong_shape(content: RecordDict) -> None:
    arrays = content.array_records[wire.ARRAYS]
    name = next(iter(arrays))
    arrays[name] = Array(torch.zeros(2, 2))


def without_a_tensor(content: RecordDict) -> None:
    arrays = content.array_records[wire.ARRAYS]
    del arrays[next(iter(arrays))]


def with_garbage(content: RecordDict) -> None:
    arrays = content.array_records[wire.ARRAYS]
    name = next(iter(arrays))
    old = arrays[name]
    arrays[name] = Array(old.dtype, old.shape, old.stype, bytes(len(old.data)))


def with_other_counts(content: RecordDict) -> None:
    metrics = content.metric_records[wire.METRICS]
    metrics[wire.CLASS_COUNTS] = [1] * 10


def for_another_client(content: RecordDict) -> None:
    content.metric_records[wire.METRICS][wire.PARTITION_ID] = 2


def without_metrics(content: RecordDict) -> None:
    del content[wire.METRICS]
    content["more"] = MetricRecord({"a": 1})


def without_upload(content: RecordDict) -> None:
    content.pop(wire.EXTRA, None)
    content["more"] = ArrayRecord()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_nan, "non-finite parameter"),
        (with_wrong_shape, "must be ('float32'"),
        (without_a_tensor, "lacks"),
        (with_garbage, "damaged"),
        (with_other_counts, "class-counts"),
        (for_another_client, "not for this client"),
        (without_metrics, "not for this client"),
        (without_upload, "no ArrayRecord 'extra'"),
    ],
)
def test_a_reply_that_does_not_fit_is_recorded_and_left_out(
    federation: Callable[..., Any], change: Callable[[RecordDict], None], reason: str
) -> None:
    fed = federation(*SCAFFOLD, *ALL, "rounds=2")
    grid = fed.grid()
    grid.faults[2] = changed(change)
    run = fed.serve(grid)
    rows = fed.rows("served")
    for row in rows:
        assert [item["client"] for item in row["rejected"]] == [1]
        assert reason in row["rejected"][0]["reason"]
    assert run.summary["rejected_updates"] == 2
    assert all(torch.isfinite(tensor).all() for tensor in run.state.params.values())


def test_a_client_that_raises_and_one_that_never_answers(federation: Callable[..., Any]) -> None:
    fed = federation("refiner.name=none", *ALL, "rounds=2")
    grid = fed.grid()
    grid.faults[1] = only_in_training(lambda reply: None)
    grid.faults[3] = only_in_training(lambda reply: Message(Error(2, "by hand\nin two lines"), reply_to=reply))
    fed.serve(grid)
    for row in fed.rows("served"):
        assert row["rejected"] == [
            {"client": 0, "reason": "no reply within 0.3 s"},
            {"client": 2, "reason": "error 2 of its node: by hand in two lines"},
        ]


def test_the_text_of_an_exception_on_a_node_is_in_the_record(
    federation: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedftg.flower import client

    train = client.train

    def failing(model: Any, rule: Any, task: Any, *rest: Any) -> Any:
        if task.client == 1:
            raise ZeroDivisionError("by hand")
        return train(model, rule, task, *rest)

    monkeypatch.setattr(client, "train", failing)
    fed = federation("refiner.name=none", *ALL, "rounds=1")
    fed.serve(fed.grid())
    assert "ZeroDivisionError" in fed.rows("served")[0]["rejected"][0]["reason"]


def test_a_node_that_leaves_in_mid_round_and_comes_back(federation: Callable[..., Any]) -> None:
    """Its SCAFFOLD memory is on its disk, so from then on it goes on where it was."""
    fed = federation(*SCAFFOLD, *ALL, "rounds=4")
    grid = fed.grid()
    trained: list[list[Message]] = []

    def watch(messages: list[Message]) -> None:
        if wire.ARRAYS not in messages[0].content:
            return
        trained.append(messages)
        if len(trained) == 2:
            grid.leave(2)
        if len(trained) == 3:
            grid.join(9, fed.node(1))

    grid.before_push = watch
    fed.serve(grid)
    rows = fed.rows("served")
    assert "the node is not there" in rows[1]["rejected"][0]["reason"]
    assert rows[2]["rejected"] == [{"client": 1, "reason": "no node with partition-id=1 is there"}]
    assert "rejected" not in rows[0]
    assert "rejected" not in rows[3]
    counted = {m.metadata.dst_node_id: wire.Order.of(m.content).counted for m in trained[3]}
    assert counted[9] == {1: 1}
    assert counted[1] == {0: 3}


@pytest.mark.parametrize(("policy", "rejected"), [("refuse", True), ("reset", False)])
def test_a_restarted_node_without_its_state_is_refused_or_reset(
    federation: Callable[..., Any], policy: str, rejected: bool
) -> None:
    fed = federation(*SCAFFOLD, *ALL, "rounds=3")
    grid = fed.grid(**{"lost-memory": policy})
    rounds = []

    def watch(messages: list[Message]) -> None:
        if wire.ARRAYS in messages[0].content:
            rounds.append(1)
            if len(rounds) == 2:
                grid.leave(1)
                grid.join(1, fed.node(0) | {"state-dir": str(fed.folder / "empty")})

    grid.before_push = watch
    fed.serve(grid, **{"lost-memory": policy})
    rows = fed.rows("served")
    assert ("rejected" in rows[1]) is rejected
    if rejected:
        assert "no memory of round 1" in rows[1]["rejected"][0]["reason"]


def test_a_late_node_joins_at_the_next_round(federation: Callable[..., Any]) -> None:
    fed = federation(*SCAFFOLD, *ALL, "rounds=3")
    grid = fed.grid((0, 1, 3))

    def watch(messages: list[Message]) -> None:
        if wire.ARRAYS in messages[0].content and 3 not in grid.get_node_ids():
            grid.join(3, fed.node(2))

    grid.before_push = watch
    run = fed.serve(grid, set="rounds=2")
    rows = fed.rows("served")
    assert rows[0]["clients"] == [0, 1, 2, 3]
    assert rows[0]["rejected"] == [{"client": 2, "reason": "no node with partition-id=2 is there"}]
    assert "rejected" not in rows[1]
    partition = json.loads((run.folder / "partition.json").read_text())
    assert all(sum(counts) > 0 for counts in partition["class_counts"])
    assert None not in partition["digests"]
    # The average of all uploads stands on the sizes of all four, as if it had been there from the start.
    size = [sum(counts) for counts in partition["class_counts"]]
    assert partition["joined_late"] is True
    assert len(set(size)) == 1
    # A run that goes on knows the size of the late one from the start, and ends with the numbers of one in a piece.
    fed.serve(fed.grid(), resume=True)
    grid = fed.grid((0, 1, 3))
    grid.before_push = watch
    fed.serve(grid, "whole")
    assert fed.rows("served") == fed.rows("whole")


def test_too_few_nodes_is_one_line_and_the_run_goes_on_by_resume(federation: Callable[..., Any]) -> None:
    fed = federation("refiner.name=none", *ALL)
    with pytest.raises(fedftg.InputError, match=r"2 of 4 clients are there after 0\.2 s, min-clients is 3"):
        fed.serve(fed.grid((0, 1)), **{"min-clients": 3})
    assert not (fed.folder / "served").exists()
    grid = fed.grid()

    def watch(messages: list[Message]) -> None:
        if messages[0].metadata.group_id == "2":
            for node in grid.get_node_ids():
                grid.leave(node)

    grid.before_push = watch
    with pytest.raises(fedftg.InputError, match=r"round 3: 0 of the 4 clients .*, and no other; .* with resume=true"):
        fed.serve(grid, **{"min-clients": 2})
    assert "no client update was usable" in fed.rows("served")[1]["rolled_back"]
    run = fed.serve(fed.grid(), resume=True, **{"min-clients": 2})
    assert run.summary["rounds"] == 3


def test_clients_that_stay_away_cost_their_rounds_and_not_the_run(federation: Callable[..., Any]) -> None:
    fed = federation("refiner.name=none", "cohort.size=2", "rounds=6")
    grid = fed.grid((0, 1))
    asked: list[int] = []
    grid.before_push = lambda messages: asked.extend(
        m.metadata.dst_node_id for m in messages if wire.ARRAYS in m.content
    )
    run = fed.serve(grid, **{"min-clients": 2, "wait-seconds": 0.05})
    rows = fed.rows("served")
    assert len(rows) == run.summary["rounds"] == 6
    counted = [row["clients"] for row in rows if "rolled_back" not in row]
    assert all(clients == [0, 1] for clients in counted)
    assert len(asked) == 2 * len(counted)
    alone = next(row for row in rows if 0 in row["clients"] and "rolled_back" in row)
    reasons = {item["client"]: item["reason"] for item in alone["rejected"]}
    assert reasons[0] == "not asked: 1 of the round's clients are there, at least 2 are needed"
    assert reasons[max(reasons)].startswith("no node with partition-id=")


@pytest.mark.parametrize("every", [1, 2])
def test_a_server_that_is_stopped_goes_on_with_the_same_numbers(federation: Callable[..., Any], every: int) -> None:
    """Stopped when the clients of a round are done but the server is not: their newer memories do not count."""
    fed = federation("algorithm.name=scaffold", f"checkpoint.every={every}", "rounds=5", "refiner.name=none")
    whole = fed.simulate()
    grid = fed.grid()
    stopped = RuntimeError("stopped by hand")

    def stop(reply: Message) -> Message:
        if reply.metadata.group_id == "4":
            raise stopped
        return reply

    for node in grid.get_node_ids():
        grid.faults[node] = stop
    with pytest.raises(RuntimeError, match="by hand"):
        fed.serve(grid)
    run = fed.serve(fed.grid(), resume=True)
    assert fed.rows("served") == fed.rows("simulated")
    assert all(torch.equal(run.state.params[name], whole.state.params[name]) for name in whole.state.params)


def test_two_nodes_for_one_client_and_other_recipes_are_refused(federation: Callable[..., Any], tmp_path: Path) -> None:
    fed = federation("refiner.name=none", *ALL, "rounds=1")
    grid = fed.grid()
    grid.join(9, fed.node(2))
    with pytest.raises(fedftg.InputError, match="nodes 3 and 9 both say partition-id=2"):
        fed.serve(grid)
    grid = fed.grid((0, 1, 2), set="local.lr=0.3")
    with pytest.raises(fedftg.InputError, match="its recipe's settings differ from the server's"):
        fed.serve(grid)
    grid = fed.grid(())
    grid.join(1, {})
    with pytest.raises(fedftg.InputError, match="this node has no partition-id"):
        fed.serve(grid)
    grid = fed.grid(())
    grid.join(1, fed.node(4))
    with pytest.raises(fedftg.InputError, match="partition-id must be below 4"):
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
    grid = fed.grid()
    grid.leave(1), grid.leave(3), grid.leave(4)
    with pytest.raises(fedftg.InputError, match="its data is not what client 1 had before"):
        fed.serve(grid, resume=True)
    fed.simulate("simulated")
    with pytest.raises(fedftg.InputError, match="was not made by a Flower server"):
        fed.serve(fed.grid(), "simulated", resume=True)


def test_a_server_killed_in_mid_round_goes_on_with_the_same_numbers(federation: Callable[..., Any]) -> None:
    """The process dies by SIGKILL when two of three clients of round 3 are done."""
    fed = federation(*SCAFFOLD, "rounds=4")
    script = (
        "import os, sys, warnings\n"
        "from pathlib import Path\n"
        "from fedftg.flower.client import client_app\n"
        "from fedftg.flower.testing import LocalGrid\n"
        "from fedftg.flower.server import serve\n"
        "from fedftg.progress import Silent\n"
        "folder = Path(sys.argv[1])\n"
        "recipe = folder / 'recipe.toml'\n"
        "settings = {'out': str(folder / 'served')}\n"
        "nodes = {i + 1: {'partition-id': i, 'state-dir': str(folder / f'node-{i}')} for i in range(4)}\n"
        "grid = LocalGrid(client_app(recipe), nodes, settings)\n"
        "done = []\n"
        "def die(reply):\n"
        "    done.append(reply.metadata.group_id)\n"
        "    if done.count('3') == 2:\n"
        "        os.kill(os.getpid(), 9)\n"
        "    return reply\n"
        "grid.faults = {node: die for node in nodes}\n"
        "serve(grid, recipe, settings, Silent())\n"
    )
    killed = subprocess.run([sys.executable, "-W", "ignore", "-c", script, str(fed.folder)], timeout=400, check=False)
    assert killed.returncode == -9
    assert len(fed.rows("served")) == 2
    run = fed.serve(fed.grid(), resume=True)
    whole = fed.simulate()
    assert fed.rows("served") == fed.rows("simulated")
    assert all(torch.equal(run.state.params[name], whole.state.params[name]) for name in whole.state.params)


def counting(change: Callable[[MetricRecord], Any]) -> Callable[[Message], Message]:
    """What arrives of an evaluation is the reply with its counts changed."""

    def fault(reply: Message) -> Message:
        if reply.has_content() and "selected" in reply.content.metric_records.get(wire.METRICS, {}):
            change(reply.content.metric_records[wire.METRICS])
        return reply

    return fault


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda counts: counts.update({"selected": 10_000}), "whole numbers from 0 to"),
        (lambda counts: counts.update({"refined": 0.5}), "whole numbers from 0 to"),
        (lambda counts: counts.update({wire.PARTITION_ID: 7}), "another task"),
        (lambda counts: counts.pop("refined"), "whole numbers from 0 to"),
    ],
)
def test_an_evaluation_that_does_not_fit_is_left_out_of_the_mean(
    federation: Callable[..., Any], change: Callable[[MetricRecord], Any], reason: str
) -> None:
    fed = federation(*ALL, "partition.test_share=0.3", "rounds=1", "evaluation.track_all=false")
    grid = fed.grid()
    grid.faults[2] = counting(change)
    fed.serve(grid)
    (row,) = fed.rows("served")
    assert [item["client"] for item in row["not_measured"]] == [1]
    assert reason in row["not_measured"][0]["reason"]
    fed.serve(fed.grid(), "whole")
    (whole,) = fed.rows("whole")
    assert "not_measured" not in whole
    assert row["accuracy"] == whole["accuracy"]
    assert set(row["client_accuracy"]) == set(whole["client_accuracy"])
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


def silent(reply: Message) -> None:
    """A node that is listed but dead: nothing comes back."""
    return


def test_a_node_restarted_while_the_run_waits_takes_the_old_ones_place(federation: Callable[..., Any]) -> None:
    fed = federation("refiner.name=none", *ALL, "rounds=1")
    grid = fed.grid((0, 1, 2))
    restarted = []

    def restart(messages: list[Message]) -> None:
        if messages[0].metadata.message_type == "query" and not restarted:
            restarted.append(grid.faults.setdefault(2, lambda reply: reply))

    def dies_after_its_answer(reply: Message) -> Message:
        grid.faults[2] = silent
        grid.join(9, fed.node(1))
        return reply

    grid.faults[2] = dies_after_its_answer
    grid.before_push = restart
    fed.serve(grid)
    (row,) = fed.rows("served")
    assert [item["client"] for item in row["rejected"]] == [3]


def test_a_late_node_with_a_number_that_is_taken_is_refused(
    federation: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Client 1 stays with its living node, so its SCAFFOLD memory is never missed."""
    fed = federation(*SCAFFOLD, *ALL, "rounds=4")
    grid = fed.grid()

    def watch(messages: list[Message]) -> None:
        if wire.ARRAYS in messages[0].content and messages[0].metadata.group_id == "2":
            grid.join(9, fed.node(1) | {"state-dir": str(fed.folder / "other")})

    grid.before_push = watch
    fed.serve(grid)
    for row in fed.rows("served"):
        assert "rejected" not in row
    told = capsys.readouterr().out
    assert told.count("node 9 cannot take part: nodes 2 and 9 both say partition-id=1") == 1


def test_a_late_node_that_holds_nothing(federation: Callable[..., Any]) -> None:
    fed = federation("refiner.name=none", "cohort.size=4", "rounds=3")
    grid = fed.grid((0, 1, 2))

    def empty(reply: Message) -> Message:
        facts = reply.content.config_records[wire.CONFIG]
        facts[wire.CLASS_COUNTS] = [0] * 10
        return reply

    def watch(messages: list[Message]) -> None:
        if wire.ARRAYS in messages[0].content and 4 not in grid.get_node_ids():
            grid.faults[4] = empty
            grid.join(4, fed.node(3))

    grid.before_push = watch
    fed.serve(grid, set="rounds=2")
    assert [row["clients"] for row in fed.rows("served")] == [[0, 1, 2, 3], [0, 1, 2]]
    again = fed.grid()
    again.faults[4] = empty
    fed.serve(again, resume=True)
    assert fed.rows("served")[2]["clients"] == [0, 1, 2]


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        (wire.CLASS_COUNTS, [-1, *[1] * 9], "must be >= 0"),
        ("num-clients", 5, "num clients differ: 5 where 4 is expected"),
        ("class-names", [*map(str, range(9)), "nine"], "class names differ: nine where 9 is expected"),
        ("image-shape", [1, 8, 9], "image shape differ"),
    ],
)
def test_a_first_node_that_is_wrong_decides_nothing(
    federation: Callable[..., Any], key: str, value: Any, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fed = federation("refiner.name=none", *ALL, "rounds=1")
    grid = fed.grid()

    def lie(reply: Message) -> Message:
        if wire.CONFIG in reply.content:
            reply.content.config_records[wire.CONFIG][key] = value
        return reply

    grid.faults[1] = lie
    fed.serve(grid)
    (row,) = fed.rows("served")
    assert [item["client"] for item in row["rejected"]] == [0]
    assert reason in row["rejected"][0]["reason"]
    assert reason in capsys.readouterr().out


def test_without_test_data_a_first_node_that_left_decides_nothing(federation: Callable[..., Any]) -> None:
    fed = federation("refiner.name=none", *ALL, "rounds=1")
    grid = fed.grid((0,))

    def lie_and_leave(reply: Message) -> Message:
        reply.content.config_records[wire.CONFIG]["class-names"] = list("abcdefghij")
        grid.leave(1)
        for client in (1, 2, 3):
            grid.join(client + 1, fed.node(client))
        return reply

    grid.faults[1] = lie_and_leave
    fed.serve(grid, **{"server-data": "none"})
    (row,) = fed.rows("served")
    assert [item["client"] for item in row["rejected"]] == [0]


def test_a_question_that_was_not_taken_or_failed_is_asked_again(
    federation: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedftg.flower.nodes._REASK_SECONDS", 0.05)
    fed = federation("refiner.name=none", *ALL, "rounds=1")
    grid = fed.grid()
    push, failed = grid.push_messages, []

    def lossy(messages: Any) -> list[str]:
        given = list(messages)
        taken = [m for m in given if m.metadata.dst_node_id != 1 or failed]
        for message in given:
            message.metadata.__dict__["_message_id"] = f"not-taken-{id(message)}"
        failed.append(True)
        return push(taken)  # ids of those that were taken only, as Flower's simulation gives them

    def fails_once(reply: Message) -> Message:
        grid.faults.pop(3)
        return Message(Error(2, "by hand"), reply_to=reply)

    grid.push_messages = lossy  # type: ignore[method-assign]
    grid.faults[3] = fails_once
    fed.serve(grid, **{"wait-seconds": 20.0})
    (row,) = fed.rows("served")
    assert "rejected" not in row


def test_an_operator_s_mistakes_end_in_one_line_in_flower_s_terms(
    federation: Callable[..., Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that is taken, and no node at all; the recipe is a string, as one writes it."""
    here = federation()
    taken = here.folder / "taken"
    taken.mkdir()
    (taken / "config.toml").write_text("")
    app = server_app(str(here.recipe))
    told = r"taken exists already; go on with it by resume=true, or give another out$"
    with pytest.raises(fedftg.InputError, match=told):
        here.grid(out=str(taken)).run_server(app)
    monkeypatch.setattr("fedftg.flower.server._LOG_SECONDS", 0.05)
    empty = here.grid([], out=str(here.folder / "new"))
    with pytest.raises(fedftg.InputError, match=r"0 of 4 clients .* 0.2 s.*they may still be starting") as caught:
        empty.run_server(app)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    printed = capsys.readouterr().out
    assert "fedftg: " + str(caught.value) in printed
    assert "0 of 4 clients are there\n" in printed
    assert "--resume" not in printed
    assert not (here.folder / "new").exists()
