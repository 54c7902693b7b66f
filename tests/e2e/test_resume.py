"""A run that was killed and resumed is the uninterrupted run, bit for bit."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import fedftg as package
from fedftg.params import Params
from fedftg.rundir import checkpoint, records
from fedftg.rundir.clients import ClientStore
from fedftg.rundir.tensors import read_tensors

# Kills its own process with SIGKILL at one point of round 3, the first time that it gets there.
KILLER = """
import os, signal
from pathlib import Path

POINT, MARK = "{point}", Path("{mark}")

def die():
    if not MARK.exists():
        MARK.touch()
        os.kill(os.getpid(), signal.SIGKILL)

from fedftg.engine import executors
from fedftg.rundir import checkpoint, records, clients, tensors

seen = dict(round=0, calls=0)
train, write_row = executors.train, clients._Rows.write
write_index, write_tensors = checkpoint.write_atomically, tensors.write_atomically

def watched_train(model, rule, task, batches, counts, settings):
    if task.round != seen["round"]:
        seen.update(round=task.round, calls=0)
    seen["calls"] += 1
    if POINT == "local" and task.round == 3 and seen["calls"] == 2:
        die()
    return train(model, rule, task, batches, counts, settings)

def watched_write_row(*arguments):
    number = write_row(*arguments)
    if POINT == "clients" and seen["round"] == 3:  # one row of three is written
        die()
    return number

def watched_write_index(path, content):
    if POINT == "checkpoint-index" and seen["round"] == 3:
        die()
    write_index(path, content)

def watched_write_tensors(path, content):
    if POINT == "checkpoint-file" and seen["round"] == 3 and not MARK.exists():
        path.with_name(path.name + ".part").write_bytes(content[: len(content) // 2])
        die()
    write_tensors(path, content)

executors.train = watched_train
clients._Rows.write = watched_write_row
checkpoint.write_atomically = watched_write_index
tensors.write_atomically = watched_write_tensors
"""

Read = Callable[[Path], list[dict[str, Any]]]


def assert_same_weights(left: Path, right: Path) -> None:
    """Compares state and clients; a client's row may lie in another place where checkpoints differ."""
    kept, states, stores = [], [], []
    for folder in (left / "checkpoint", right / "checkpoint"):
        index = json.loads((folder / "checkpoint.json").read_text())
        kept.append(index["clients"].keys())
        states.append(read_tensors(folder / index["state"]))
        stores.append(ClientStore(dict, {}, [1], True))
        stores[-1].keep_in(folder)
        assert checkpoint.load(stores[-1]) is not None
    assert_same(*states)
    assert kept[0] == kept[1]
    for client in map(int, kept[0]):
        assert_same(*(store.memory(client) for store in stores))
        assert_same(*(store.upload(client) for store in stores))


def assert_same(ours: Params, theirs: Params) -> None:
    assert list(ours) == list(theirs)
    assert all(ours[name].equal(theirs[name]) for name in ours)


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the uninterrupted run of each setting is kept for all points of interruption."""
    return tmp_path_factory.mktemp("uninterrupted")


@pytest.mark.parametrize(
    ("setting", "point", "every"),
    [
        *(
            ("algorithm.name=scaffold", point, 1)
            for point in ("local", "clients", "checkpoint-file", "checkpoint-index")
        ),
        ("algorithm.name=moon", "checkpoint-index", 1),
        ("algorithm.name=moon", "clients", 4),
        ("algorithm.name=feddyn", "local", 2),
        ("refiner.average=all", "clients", 1),
        ("algorithm.name=fedacg", "checkpoint-index", 1),
    ],
)
def test_killed_and_resumed(
    fedftg: Any, tiny: list[str], read_records: Read, uninterrupted: Path, tmp_path: Path, setting: str, point: str,
    every: int,
) -> None:  # fmt: skip
    (tmp_path / "killer.py").write_text(KILLER.format(point=point, mark=tmp_path / "mark"))
    settings = ["default", *tiny, "--set", setting]
    whole = uninterrupted / setting
    if not whole.exists():
        done = fedftg("run", *settings, "--out", str(whole))
        assert done.returncode == 0, done.stderr
    extra = ["--set", 'plugins=["killer"]', "--set", f"checkpoint.every={every}"]
    killed = fedftg("run", *settings, *extra, "--out", "killed", path=tmp_path)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "killed" / "summary.json").exists()
    resumed = fedftg("run", "--resume", "--out", "killed", path=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert ("resumed after round 2" in resumed.stdout) == (every < 4)
    assert read_records(tmp_path / "killed") == read_records(whole)
    assert len(read_records(whole)) == 4
    assert_same_weights(tmp_path / "killed", whole)
    left = {path.name for path in (tmp_path / "killed" / "checkpoint").iterdir()}
    assert left == {"checkpoint.json", "state-000004.safetensors", "clients.bin"}
    assert not list((tmp_path / "killed").rglob("*.part"))
    for file in (whole / "evaluation.json", *(whole / "images").iterdir()):
        assert (tmp_path / "killed" / file.relative_to(whole)).read_bytes() == file.read_bytes(), file


@pytest.mark.parametrize("step", ["write", "commit"])
def test_interrupted_while_the_state_is_written(
    no_refiner: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_records: Read, step: str
) -> None:
    """The round was done, so Ctrl-C keeps it: it is on record once, and the state is written then."""
    settings = [*no_refiner[1::2], "rounds=3", "algorithm.name=scaffold"]
    whole = package.run("default", overrides=settings, out=tmp_path / "whole")
    real, calls = getattr(checkpoint, step), []

    def interrupted(*arguments: Any) -> Any:
        calls.append(step)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return real(*arguments)

    settings.append("checkpoint.every=2")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, step, interrupted)
        with pytest.raises(KeyboardInterrupt):
            package.run("default", overrides=settings, out=tmp_path / "stopped")
    kept = checkpoint.load_state(tmp_path / "stopped" / "checkpoint")
    assert kept is not None
    assert kept.round == len(read_records(tmp_path / "stopped")) == 2
    again = package.run("default", overrides=settings, out=tmp_path / "stopped", resume=True)
    assert read_records(tmp_path / "stopped") == read_records(tmp_path / "whole")
    assert_same(again.state.params, whole.state.params)


def test_interrupted_in_the_last_round(no_refiner: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the last round measured in detail is written although the first try to write it was interrupted."""
    settings = [*no_refiner[1::2], "rounds=2"]
    package.run("default", overrides=settings, out=tmp_path / "whole")

    real = records.write_json

    def interrupted(path: Path, *rest: Any, **named: Any) -> None:
        if path.name == "evaluation.json":
            monkeypatch.undo()
            raise KeyboardInterrupt
        real(path, *rest, **named)

    monkeypatch.setattr(records, "write_json", interrupted)
    with pytest.raises(KeyboardInterrupt):
        package.run("default", overrides=settings, out=tmp_path / "stopped")
    package.run("default", overrides=settings, out=tmp_path / "stopped", resume=True)
    whole, stopped = ((tmp_path / name / "evaluation.json").read_bytes() for name in ("whole", "stopped"))
    assert whole == stopped


def test_four_rounds_are_two_and_two(fedftg: Any, tiny: list[str], read_records: Read, tmp_path: Path) -> None:
    """Also with a checkpoint every third round only, a torn last line, and a longer run asked for on resuming."""
    assert fedftg("run", "default", *tiny, "--out", "whole").returncode == 0
    half = fedftg("run", "default", *tiny, "--set", "rounds=2", "--set", "checkpoint.every=3", "--out", "half")
    assert half.returncode == 0, half.stderr
    with (tmp_path / "half" / "rounds.jsonl").open("a") as file:
        file.write('{"round": 3, "cli')
    rest = fedftg("run", "--resume", "--out", "half", "--set", "rounds=4")
    assert rest.returncode == 0, rest.stderr
    assert read_records(tmp_path / "half") == read_records(tmp_path / "whole")
    assert_same_weights(tmp_path / "half", tmp_path / "whole")
    assert json.loads((tmp_path / "half" / "summary.json").read_text())["rounds"] == 4


def test_same_seed_same_bytes_in_two_processes(
    fedftg: Any, python_m_fedftg: Any, tiny: list[str], read_records: Read, tmp_path: Path
) -> None:
    """One of them forked, as in the other tests, and one as a user starts it."""
    for name, command in (("one", fedftg), ("two", python_m_fedftg)):
        assert command("run", "default", *tiny, "--set", "rounds=2", "--out", name).returncode == 0
    assert read_records(tmp_path / "one") == read_records(tmp_path / "two")
    assert_same_weights(tmp_path / "one", tmp_path / "two")
    other = fedftg("run", "default", *tiny, "--set", "rounds=2", "--set", "seed=1", "--out", "other")
    assert other.returncode == 0
    assert read_records(tmp_path / "other") != read_records(tmp_path / "one")


def test_resuming_is_refused_where_files_were_taken_away(fedftg: Any, no_refiner: list[str], tmp_path: Path) -> None:
    """Checkpoints are large and get deleted; to resume from nothing would overwrite the records of hours."""
    run = tmp_path / "r"
    assert fedftg("run", "default", *no_refiner, "--out", "r").returncode == 0
    rows = run / "rounds.jsonl"
    content = rows.read_bytes()
    lines = content.splitlines(keepends=True)

    def refused(reason: str) -> None:
        before = {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()}
        done = fedftg("run", "--resume", "--out", "r", "--set", "rounds=5")
        assert (done.returncode, done.stdout) == (2, "")
        assert reason in done.stderr
        assert done.stderr.endswith("back, or start a new run with another --out\n")
        assert {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()} == before

    for left, reason in (
        (b"", "lacks round 1 of 4"),
        (b"".join(lines[:1] + lines[2:]), "lacks round 2 of 4"),
        (lines[0] + b"{]\n" + lines[2] + lines[3], "rounds.jsonl cannot be read"),
    ):
        rows.write_bytes(left)
        refused(reason)
    rows.write_bytes(content)
    state, other = "checkpoint/state-000004.safetensors", ("--set", "model.name=lenet_gn", "--out", "o")
    assert fedftg("run", "default", *no_refiner, "--set", "rounds=4", *other).returncode == 0
    kept = (run / state).read_bytes()
    (run / state).write_bytes((tmp_path / "o" / state).read_bytes())
    refused("is of another model: features")
    (run / state).write_bytes(kept)
    (run / "checkpoint" / "checkpoint.json").unlink()
    refused("r has 4 rounds, but checkpoint/checkpoint.json is gone")
    (run / "summary.json").unlink()  # killed in round 5
    refused("r has 4 rounds, but checkpoint/checkpoint.json is gone")
    rows.write_bytes(lines[0])  # killed before the first checkpoint was whole
    done = fedftg("run", "--resume", "--out", "r", "--set", "rounds=2")
    assert done.returncode == 0, done.stderr
    assert len(rows.read_text().splitlines()) == 2


def test_export_is_the_deployed_model_whatever_became_of_clients(fedftg: Any, tiny: list[str], tmp_path: Path) -> None:
    assert fedftg("run", "default", *tiny, "--set", "rounds=1", "--out", "r").returncode == 0
    (tmp_path / "r" / "checkpoint" / "clients.bin").write_bytes(b"torn")
    assert fedftg("export", "r", "--to", "model.safetensors").returncode == 0
    exported = load_file(tmp_path / "model.safetensors")
    state = read_tensors(tmp_path / "r" / "checkpoint" / "state-000001.safetensors")
    parts = {name.partition("/")[2]: value for name, value in state.items() if name.startswith(("params/", "buffers/"))}
    assert set(exported) == set(parts)
    assert all(exported[name].equal(parts[name]) for name in parts)
    done = fedftg("run", "--resume", "--out", "r", "--set", "rounds=2")
    assert done.returncode == 2
    assert "clients.bin is missing or cut off; put the file back, or start a new run with another" in done.stderr
