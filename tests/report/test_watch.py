"""Watching a run that another process writes."""

import io
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedftg import cli
from fedftg.report import watch
from fedftg.report.load import load_run

CONFIG = 'name = "a"\nrounds = 4\n[algorithm]\nname = "fedavg"\n[refiner]\nname = "none"\n'


def folder(path: Path, rounds: int) -> Path:
    path.mkdir()
    (path / "config.toml").write_text(CONFIG)
    for number in range(1, rounds + 1):
        add(path, number)
    return path


def add(path: Path, number: int, **more: Any) -> None:
    accuracy = {"selected": 0.1 * number, "refined": 0.2 * number} if number % 2 else {}
    record = {"round": number, "seconds": {"local": 10.0, "evaluate": 2.0}, "accuracy": accuracy, **more}
    with (path / "rounds.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


def shown(path: Path) -> list[str]:
    console = Console(file=io.StringIO(), width=100)
    watch.watch(path, console)
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_where_there_is_no_terminal_it_is_shown_once(tmp_path: Path) -> None:
    """Two of four rounds took 12 seconds each."""
    path = folder(tmp_path / "a", rounds=0)
    assert shown(path) == ["a: fedavg, round 0 of 4, running"]
    add(path, 1)
    rejected = [{"client": 3, "reason": "late"}, {"client": 5, "reason": "NaN"}]
    add(path, 2, accuracy={"refined": 0.4}, rejected=rejected)
    assert shown(path) == [
        "a: fedavg, round 2 of 4, running, 0:00:24 left",
        " round  selected  refined  seconds",
        "     1     10.00    20.00     12.0",
        "     2         -    40.00     12.0",
        "refined ▁█",
        "2 rejected, the last: client 5 in round 2: NaN",
    ]


def test_states(tmp_path: Path) -> None:
    """Quiet for longer than 30 seconds and three rounds of 12."""
    path = folder(tmp_path / "a", rounds=3)
    for ago, state in ((60, "running, 0:00:12 left"), (70, "no new round for 0:01:10")):
        os.utime(path / "rounds.jsonl", (time.time() - ago,) * 2)
        assert shown(path)[0] == f"a: fedavg, round 3 of 4, {state}"
    add(path, 4)
    (path / "summary.json").write_text("{}")
    assert shown(path)[0] == "a: fedavg, round 4 of 4, finished in 0:00:48"


def test_sparkline() -> None:
    assert watch.sparkline([0.0, 0.5, 1.0, 0.0]) == "▁▅█▁"
    assert watch.sparkline([0.5, 0.5]) == "▁▁"
    assert watch.sparkline([]) == ""
    assert watch.sparkline([0.0, 1.0, 0.0, 1.0, 0.5], width=3) == "▁▁█", "every second one, with the last"


def test_a_terminal_is_redrawn_until_the_run_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder(tmp_path / "a", rounds=0)
    waits: list[float] = []

    def write_meanwhile(seconds: float) -> None:
        waits.append(seconds)
        add(path, len(waits))
        with (path / "rounds.jsonl").open("a") as file:
            file.write('{"round"')  # as a run that is writing leaves it
        assert len(load_run(path).rounds) == len(waits)
        text = (path / "rounds.jsonl").read_text()
        (path / "rounds.jsonl").write_text(text.removesuffix('{"round"'))
        if len(waits) == 4:
            (path / "summary.json").write_text("{}")

    monkeypatch.setattr(watch.time, "sleep", write_meanwhile)
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    watch.watch(path, console, every=0.5)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert waits == [0.5] * 4
    for number in range(4):
        assert f"round {number} of 4, running" in text
    assert "round 4 of 4, finished" in text


def test_a_watcher_may_be_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder(tmp_path / "a", rounds=1)
    seen: list[Path] = []

    def interrupted(folder: Path) -> None:
        seen.append(folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(watch, "load_run", interrupted)
    cli.cli.main(["watch", str(path)], standalone_mode=False)
    assert seen == [path]
