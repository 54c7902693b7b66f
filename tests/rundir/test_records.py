from pathlib import Path

import pytest

from fedftg.errors import InputError
from fedftg.rundir import records
from fedftg.rundir.folder import RunFolder, summarise


def test_append_read_and_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    records.append(path, {"round": 1, "loss": float("nan"), "nested": {"x": [float("inf"), 2.0]}})
    records.append(path, {"round": 2})
    with path.open("a") as file:
        file.write('{"round": 3, "acc')
    assert records.read(path) == [{"round": 1, "loss": None, "nested": {"x": [None, 2.0]}}, {"round": 2}]


def test_cut_keeps_bytes(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    path.write_bytes(b'{"a": 1.10}\n{"a":2}\n{"a": 3')
    records.cut(path, 1)
    assert path.read_bytes() == b'{"a": 1.10}\n'


def test_a_used_folder_is_refused_and_what_a_dead_start_left_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "environment.json.part").write_text("{")
    RunFolder(tmp_path).create("rounds = 1\n", {"a": 1}, {})
    assert RunFolder(tmp_path).read_config() == {"rounds": 1}
    with pytest.raises(InputError, match="exists already"):
        RunFolder(tmp_path).create("", {}, {})
    assert RunFolder(tmp_path).read_config() == {"rounds": 1}


def test_summary_by_hand() -> None:
    """12 rounds, evaluated in the even ones: refined 0.2, 0.4, ..., so mean of all six is 0.7, best 1.2 in round 12."""
    rows = []
    for number in range(1, 13):
        accuracy = {"selected": number / 20, "refined": number / 10} if number % 2 == 0 else {}
        rows.append({"round": number, "accuracy": accuracy, "seconds": {"local": 1.0, "refine": 0.5}})
    rows[11]["accuracy"]["sent"] = 0.5
    rows[3]["rejected"] = [{"client": 1, "reason": "x"}]
    summary = summarise({"name": "n"}, rows, [0.35, 5.0], 12.5)
    assert summary["accuracy"]["refined"] == {
        "final": 1.2, "best": 1.2, "best_round": 12, "mean_last_10": pytest.approx(0.7),
    }  # fmt: skip
    assert list(summary["accuracy"]) == ["selected", "refined", "sent"]
    assert summary["rounds_to"] == {"0.35": 4, "5.0": None}
    assert summary["seconds"]["total"] == 18.0
    assert (summary["rounds"], summary["rejected_updates"], summary["name"]) == (12, 1, "n")


def test_score_by_hand() -> None:
    """Twelve values 0.00, 0.01, ..., 0.11: the last ten are 0.02 to 0.11 with mean 0.065; of equal ones the first."""
    found = records.score((list(range(2, 26, 2)), [index / 100 for index in range(12)]))
    assert found == {"final": 0.11, "best": 0.11, "best_round": 24, "mean_last_10": pytest.approx(0.065)}
    assert records.score(([1, 2, 3], [0.5, 0.75, 0.75]))["best_round"] == 2
    assert records.score(([], [])) == {}
