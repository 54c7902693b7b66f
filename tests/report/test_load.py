"""Reading run folders: whole, unfinished, torn, damaged, and folders that are no runs."""

import json
import math
from pathlib import Path

import pytest

from fedftg.errors import InputError
from fedftg.report.load import display_names, load_run

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
    text = line(1, seconds={"local": 1.5, "refine": 0.5}, accuracy={"selected": 0.25})
    text += line(2, seconds={"local": 2.0, "refine": None})
    run = load_run(write(tmp_path / "a", text, summary='{"rounds": 2}'))
    assert (run.name, run.algorithm, run.refiner) == ("a", "fedavg", "fedftg")
    assert run.method == "fedavg + fedftg (paper)"
    assert (run.rounds_done, run.rounds_planned) == (2, 3)
    assert run.summary == {"rounds": 2}
    assert run.seconds == 4.0
    assert run.series("accuracy", "selected") == ([1], [0.25])
    assert run.series("accuracy", "all") == ([], [])
    assert run.series("loss", "selected") == ([], [])


def test_unfinished_run_has_no_summary(tmp_path: Path) -> None:
    assert load_run(write(tmp_path / "a", line(1))).summary is None


def test_null_and_nan_become_nan(tmp_path: Path) -> None:
    text = '{"round": 1, "loss": {"refined": null}}\n{"round": 2, "loss": {"refined": NaN}}\n'
    rounds, values = load_run(write(tmp_path / "a", text)).series("loss", "refined")
    assert rounds == [1, 2]
    assert all(math.isnan(value) for value in values)


@pytest.mark.parametrize("tail", ['{"round": 2, "acc', "{", "\x00\x00\x00", '{"round": "x"}'])
def test_torn_last_line_is_left_out(tmp_path: Path, tail: str) -> None:
    run = load_run(write(tmp_path / "a", line(1) + tail))
    assert [record["round"] for record in run.rounds] == [1]


def test_line_torn_inside_a_character(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    (folder / "rounds.jsonl").write_bytes(line(1).encode() + '{"round": 2, "x": "é'.encode()[:-1])
    assert load_run(folder).rounds_done == 1


@pytest.mark.parametrize("damaged", ['{"round": 1\n', '{"clients": [1]}\n', "[1]\n"])
def test_damage_before_the_last_line_is_named(tmp_path: Path, damaged: str) -> None:
    folder = write(tmp_path / "a", line(1) + damaged + line(3))
    with pytest.raises(InputError, match=r"rounds\.jsonl, line 2: ") as caught:
        load_run(folder)
    assert "\n" not in str(caught.value)


def test_empty_or_missing_rounds(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    assert load_run(folder).rounds == []
    (folder / "rounds.jsonl").unlink()
    run = load_run(folder)
    assert (run.rounds_done, run.seconds, run.deployed()) == (0, 0.0, ([], []))


def test_folder_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        load_run(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="it is a file"):
        load_run(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"config\.toml is missing"):
        load_run(tmp_path / "empty")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.toml").write_text("x = 1")
    with pytest.raises(InputError, match=r"rounds\.jsonl is missing"):
        load_run(tmp_path / "other")


def test_parent_of_runs_names_them(tmp_path: Path) -> None:
    write(tmp_path / "runs" / "b")
    write(tmp_path / "runs" / "a")
    with pytest.raises(InputError, match=r"it holds runs, name one of them: a, b$"):
        load_run(tmp_path / "runs")


@pytest.mark.parametrize(("config", "summary"), [("= x", None), (CONFIG, "{"), (CONFIG, "[]")])
def test_damaged_config_or_summary_in_one_line(tmp_path: Path, config: str, summary: str | None) -> None:
    with pytest.raises(InputError, match="cannot read") as caught:
        load_run(write(tmp_path / "a", config=config, summary=summary))
    assert "\n" not in str(caught.value)


def test_defaults_where_config_names_nothing(tmp_path: Path) -> None:
    run = load_run(write(tmp_path / "a", config=""))
    assert (run.algorithm, run.refiner, run.method, run.rounds_planned) == ("?", "none", "?", None)


def test_preset_with_the_refiners_name_is_not_repeated(tmp_path: Path) -> None:
    config = '[algorithm]\nname = "moon"\n[refiner]\nname = "fedftg"\npreset = "fedftg"\n'
    assert load_run(write(tmp_path / "a", config=config)).method == "moon + fedftg"


def test_display_names_tell_equal_folders_apart(tmp_path: Path) -> None:
    folders = [tmp_path / "x" / "a", tmp_path / "y" / "a", tmp_path / "y" / "b"]
    runs = [load_run(write(folder)) for folder in folders]
    assert display_names(runs) == ["x/a", "y/a", "b"]
    assert display_names([runs[0], runs[0]])[0] == display_names([runs[0], runs[0]])[1]


def test_deployed_falls_back_to_selected(tmp_path: Path) -> None:
    run = load_run(write(tmp_path / "a", line(1, accuracy={"selected": 0.5})))
    assert run.deployed() == ([1], [0.5])
