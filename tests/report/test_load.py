"""Reading run folders: whole, unfinished, torn, damaged, and folders that are no runs."""

import json
import math
from pathlib import Path

import pytest

from fedftg.errors import InputError
from fedftg.report.load import RunRecord, grouped, load_run

CONFIG = 'name = "a"\nrounds = 3\n[algorithm]\nname = "fedavg"\n[refiner]\nname = "fedftg"\npreset = "paper"\n'


def write(folder: Path, rounds: str = "", config: str = CONFIG, summary: str | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(config)
    (folder / "rounds.jsonl").write_text(rounds)
    if summary is not None:
        (folder / "summary.json").write_text(summary)
    return folder


def line(number: int, **groups: object) -> str:
    return json.dumps({"round": number, **groups}) + "\n"


def test_finished_run(tmp_path: Path) -> None:
    text = line(1, seconds={"local": 1.5, "refine": 0.5}, accuracy={"selected": 0.25, "refined": None})
    text += line(2, seconds={"local": 2.0})
    run = load_run(write(tmp_path / "a", text, summary='{"rounds": 2}'))
    assert (run.name, run.algorithm, run.refiner) == ("a", "fedavg", "fedftg (paper)")
    assert run.method == "fedavg + fedftg (paper)"
    assert run.summary == {"rounds": 2}
    assert run.seconds == 4.0
    assert run.accuracy("selected") == ([1], [0.25])
    assert run.accuracy("all") == ([], [])
    assert math.isnan(run.accuracy("refined")[1][0])


def test_unfinished_run(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", line(1, seconds={}) + '{"round": 2, "acc')
    run = load_run(folder)
    assert run.summary is None
    assert [record["round"] for record in run.rounds] == [1]
    (folder / "rounds.jsonl").unlink()
    assert load_run(folder).rounds == []


@pytest.mark.parametrize(
    ("config", "rounds", "summary"),
    [("= x", "", None), (CONFIG, "", "{"), (CONFIG, line(1) + '{"round": 1\n' + line(3), None)],
)
def test_damage_is_one_line(tmp_path: Path, config: str, rounds: str, summary: str | None) -> None:
    with pytest.raises(InputError, match=r"cannot read|not valid TOML") as caught:
        load_run(write(tmp_path / "a", rounds, config, summary))
    assert "\n" not in str(caught.value)


def test_folder_is_no_run(tmp_path: Path) -> None:
    for folder in (tmp_path / "nothing", tmp_path):
        with pytest.raises(InputError, match=r"holds no run \(no config.toml\); give the folder of a run"):
            load_run(folder)


def test_groups_by_all_but_the_seed(tmp_path: Path) -> None:
    """Two folders of one name and one seed stay apart; seeds 0 and 7 of a setting are together, whatever the order."""

    def of(name: str, seed: int, alpha: float) -> RunRecord:
        text = f'name = "{name}"\nseed = {seed}\nrounds = 2\n[partition]\nalpha = {alpha}\n'
        return load_run(write(tmp_path / name, config=text))

    runs = [of("x-s7", 7, 0.1), of("y", 0, 0.2), of("x-s0", 0, 0.1), of("deeper/y", 0, 0.2)]
    groups = grouped(runs)
    assert [group.name for group in groups] == ["x", str(runs[1].folder), str(runs[3].folder)]
    assert groups[0].runs == (runs[2], runs[0])
