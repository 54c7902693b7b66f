from pathlib import Path

import pytest

from fedftg import config as configs
from fedftg.algorithms.feddyn import FedDynConfig
from fedftg.distill.config import PRESETS
from fedftg.errors import InputError


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_round_trip_through_toml(tmp_path: Path) -> None:
    given = ['algorithm.name="feddyn"', "algorithm.alpha=0.1", "cohort.size=3", "refiner.preset=paper"]
    config = configs.load(None, given)
    again = configs.load(write(tmp_path, "run.toml", config.to_toml()))
    assert again == config
    assert again.algorithm == FedDynConfig(alpha=0.1)


def test_set_beats_recipe_and_values_are_toml(tmp_path: Path) -> None:
    path = write(tmp_path, "mine.toml", "rounds = 3\n[data]\nname = 'digits'\n[local]\nlr = 0.5\n")
    config = configs.load(path, ["rounds=7", "local.epochs=2", "data.root=../some/where", "evaluation.track_all=false"])
    assert (config.name, config.rounds, config.local.lr, config.local.epochs) == ("mine", 7, 0.5, 2)
    assert str(config.data.root) == "../some/where"
    assert config.evaluation.track_all is False


def test_preset_fills_and_fields_override() -> None:
    config = configs.load(None, ["refiner.preset=official", "refiner.iterations=3"])
    refiner = config.refiner.model_dump()
    for field, value in PRESETS["official"].model_dump().items():
        assert refiner[field] == (3 if field == "iterations" else value), field


def test_another_preset_replaces_the_fields_of_the_old_one(tmp_path: Path) -> None:
    """Also of a config that a run wrote, which names every field; what differed from the old preset stays."""
    dumped = configs.load(None, ["refiner.preset=official", "refiner.iterations=3"])
    path = write(tmp_path, "run.toml", dumped.to_toml())
    changed = configs.load(path, ["refiner.preset=paper"])
    assert changed.refiner == configs.load(None, ["refiner.preset=paper", "refiner.iterations=3"]).refiner


@pytest.mark.parametrize(
    ("before", "change"),
    [("algorithm.name=fedavg", "algorithm.name=scaffold"), ("refiner.name=leaves", "refiner.start=fresh")],
)
def test_defaults_follow_what_decides_them(tmp_path: Path, before: str, change: str) -> None:
    """The average that FedFTG deploys, by the algorithm; the student's mode, by its start."""
    path = write(tmp_path, "run.toml", configs.load(None, [before]).to_toml())
    expected = configs.load(None, [before, change])
    assert configs.load(path, [change]).refiner == expected.refiner
    assert set(expected.refiner) - set(configs.load(None, [before]).refiner)


def test_cohort_keys_replace_each_other(tmp_path: Path) -> None:
    path = write(tmp_path, "r.toml", "[cohort]\nprobability = 0.5\n")
    assert configs.load(path, ["cohort.size=3"]).cohort.model_dump() == {"size": 3, "probability": None}


def test_overriding_leaves_the_given_settings_alone() -> None:
    given = {"model": {"name": "cnn", "args": {"x": 1}}}
    configs.apply(given, ["model.args.x=2"])
    assert given["model"]["args"] == {"x": 1}


def test_another_name_drops_the_other_settings(tmp_path: Path) -> None:
    path = write(
        tmp_path, "r.toml", '[algorithm]\nname = "feddyn"\nalpha = 0.1\n[refiner]\nname = "fedftg"\npreset = "paper"\n'
    )
    assert configs.load(path, ["algorithm.name=fedavg", "refiner.name=none"]).refiner.name == "none"
    assert configs.load(path, ["algorithm.name=feddyn"]).algorithm == FedDynConfig(alpha=0.1)


def test_extends(tmp_path: Path) -> None:
    write(tmp_path, "base.toml", 'rounds = 9\n[local]\nlr = 0.5\nepochs = 3\n[algorithm]\nname = "fedprox"\nmu = 1.0\n')
    path = write(tmp_path, "child.toml", 'extends = "base.toml"\n[local]\nlr = 0.25\n[algorithm]\nname = "moon"\n')
    config = configs.load(path)
    assert (config.name, config.rounds, config.local.lr, config.local.epochs) == ("child", 9, 0.25, 3)
    assert config.algorithm.name == "moon"


def test_extends_in_a_circle(tmp_path: Path) -> None:
    path = write(tmp_path, "a.toml", 'extends = "b.toml"\n')
    write(tmp_path, "b.toml", 'extends = "a.toml"\n')
    with pytest.raises(InputError, match="circle"):
        configs.load(path)


def test_plugins_register_algorithms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    code = """
from typing import Literal
import fedftg
from fedftg.algorithms.fedavg import FedAvgConfig
class MineConfig(FedAvgConfig):
    name: Literal["mine"] = "mine"
    strength: float = 2.0
fedftg.register_algorithm("mine", MineConfig)
"""
    write(tmp_path, "my_plugin.py", code)
    path = write(tmp_path, "r.toml", 'plugins = ["my_plugin"]\n[algorithm]\nname = "mine"\nstrength = 3.0\n')
    from fedftg.algorithms.registry import ALGORITHMS

    try:
        assert configs.load(path).algorithm.model_dump()["strength"] == 3.0
    finally:
        ALGORITHMS.pop("mine", None)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("partition.alhpa=1", "unknown key 'partition.alhpa'; did you mean 'partition.alpha'?"),
        ("ruonds=1", "unknown key 'ruonds'; did you mean 'rounds'?"),
        ("partition.alpha=-1", "partition.alpha must be > 0, got -1"),
        ("rounds=0", "rounds must be >= 1, got 0"),
        ("rounds=ten", "rounds must be a whole number"),
        ("algorithm.name=fedavgg", "unknown algorithm.name 'fedavgg'; did you mean 'fedavg'? allowed: "),
        ("algorithm.mu=1", "unknown key 'algorithm.mu'; allowed: "),
        ("refiner.name=fedtfg", "unknown refiner.name 'fedtfg'; did you mean 'fedftg'?"),
        ("refiner.preset=papr", "unknown preset 'papr'; did you mean 'paper'?"),
        ("refiner.student_lrr=1", "unknown key 'refiner.student_lrr'; did you mean 'refiner.student_lr'?"),
        ("partition.law=dirichelt", "partition.law must be 'iid', 'dirichlet', "),
        ("partition.law=linear", "got 'linear'; who holds what (docs/data.md); linear, square, exponential were"),
        ("device=gpu", "device must be auto, cpu, cuda or cuda:N; got 'gpu'"),
        ("rounds", "--set needs key=value, got 'rounds'"),
        ("rounds.x=1", "rounds"),
        ("local.lr=inf", "local.lr must be a finite number"),
        ("plugins=3", "plugins must be a list"),
        ("name=..", "name must be"),
        ("plugins=['not_there_at_all']", "plugin 'not_there_at_all' cannot be imported"),
        ("executor.name=ray", "executor.name must be 'auto', 'sequential'"),
    ],
)  # fmt: skip
def test_wrong_settings_give_one_line(override: str, expected: str) -> None:
    with pytest.raises(InputError) as caught:
        configs.load(None, [override])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_size_and_probability_exclude_each_other() -> None:
    with pytest.raises(InputError, match=r"cohort: size and probability exclude each other; give one"):
        configs.from_mapping({"cohort": {"size": 1, "probability": 0.5}})


@pytest.mark.parametrize("text", ["rounds = = 3", "\x00"])
def test_no_toml(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match="is not valid TOML"):
        configs.load(write(tmp_path, "bad.toml", text))


def test_differences_that_resuming_allows() -> None:
    before = configs.load(None, [])
    assert configs.first_difference(before, configs.load(None, ["rounds=99", "data.root=x", "name=other"])) is None
    assert configs.first_difference(before, configs.load(None, ["seed=1"])) == "seed"
    assert configs.first_difference(before, configs.load(None, ["local.lr=0.3"])) == "local.lr"
    with pytest.raises(InputError, match=r"--resume cannot change local\.lr"):
        configs.check_resumable(before, configs.load(None, ["local.lr=0.3"]))


def test_executors_of_the_same_numbers_may_take_each_others_place() -> None:
    before = configs.load(None, ["executor.name=sequential"])
    for name in ("auto", "workers"):
        assert configs.first_difference(before, configs.load(None, [f"executor.name={name}"])) is None
    assert configs.first_difference(before, configs.load(None, ["executor.name=workers", "executor.workers=3"])) is None


def test_a_sweep_is_the_product_of_values_and_seeds() -> None:
    """TOML with commas is one value."""
    found = configs.sweep(["partition.alpha=0.1, 0.3", 'plugins=["a", "b"]', "refiner.name=dense,none"], [4, 5])
    assert len(found) == 8
    assert found[0] == (
        "-alpha0.1-dense-s4", ["partition.alpha=0.1", 'plugins=["a", "b"]', "refiner.name=dense", "seed=4"]
    )  # fmt: skip
    assert found[-1][0] == "-alpha0.3-none-s5"
    assert configs.sweep(["rounds=3"]) == [("", ["rounds=3"])]
