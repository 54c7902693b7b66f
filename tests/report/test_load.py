"""Reading run folders: whole, unfinished, torn, damaged, and folders that are no runs."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from fedftg.errors import InputError
from fedftg.report.load import RunRecord, differing, grouped, load_run
from fedftg.rundir import pictures

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


def test_settings_that_differ() -> None:
    """Names and seeds are none, and of what only one run has the other's value is None."""
    configs = ({"name": "a", "x": {"y": 1, "z": 2}}, {"name": "b", "seed": 1, "x": {"y": 1, "z": 3}, "k": {"v": 4}})
    runs = [RunRecord(Path(), config, [], None) for config in configs]
    assert differing(runs) == {"x.z": [2, 3], "k.v": [None, 4]}
    assert differing(runs, ["k"]) == {"x.z": [2, 3]}


def test_table_of_rounds(tmp_path: Path) -> None:
    """A row a round, and NaN where a round has no such value."""
    pytest.importorskip("pandas")
    text = line(1, accuracy={"refined": 0.25}, clients=[3, 4]) + line(2, accuracy={}, clients=[5])
    table = load_run(write(tmp_path / "a", text)).table()
    assert list(table.columns) == ["accuracy.refined", "clients"]
    assert table.index.tolist() == [1, 2]
    assert table.at[1, "accuracy.refined"] == 0.25
    assert math.isnan(table.at[2, "accuracy.refined"])
    empty = load_run(write(tmp_path / "new")).table()
    assert (len(empty), empty.index.name) == (0, "round")


def test_table_without_pandas_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(InputError, match=r"^table\(\) needs pandas, which is not installed; pip install pandas$"):
        load_run(write(tmp_path / "a")).table()


def test_figures_for_notebooks(tmp_path: Path) -> None:
    """Six of eight grids, each titled by its round; classes are named on the first, if its rows are classes."""
    run = load_run(write(tmp_path / "a", line(1, accuracy={"refined": 0.25, "selected": 0.2})))
    assert run.plot()._repr_png_().startswith(b"\x89PNG")
    with pytest.raises(InputError, match=r"/a has no images: its refiner showed none$"):
        run.images()
    (run.folder / "partition.json").write_text('{"class_names": ["cat", "$dog"]}')
    for number in (1, 2, 3, 5, 8, 12, 18, 20):
        pictures.write(run.folder / "images", number, np.zeros((4, 16, 1), dtype=np.uint8), labelled=number < 20)
    figure = run.images()
    assert [axes.get_title() for axes in figure.axes] == [f"round {number}" for number in (1, 2, 5, 8, 18, 20)]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["cat", "$dog"]
    assert figure.axes[0].get_yticks().tolist() == [0.5, 2.5]
    assert [len(axes.get_yticks()) for axes in figure.axes] == [2] * 5 + [0]
    assert figure._repr_png_().startswith(b"\x89PNG")
