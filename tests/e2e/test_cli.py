"""The command line as a user meets it."""

import itertools
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedftg import cli


def fails(done: Any, tmp_path: Path, *expected: str) -> None:
    """Exit 2, one line, no traceback, nothing written."""
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    for part in expected:
        assert part in lines[0], lines[0]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run", "nothing.toml"], "nothing"),
        (["run", "defualt"], "did you mean 'default'?"),
        (["run", "--set", "partition.alpha=-1"], "partition.alpha must be > 0, got -1; "),
        (["run", "--set", "partition.num_clients=5000"], "partition.num_clients"),
        (["run", "--set", "cohort.size=21"], "cohort.size must be at most"),
        (["run", "--set", "data.name=cifar10", "--set", "data.root=nowhere"], "nowhere"),
        (["run", "--set", "model.name=lenet_bn", "--set", "local.batch_size=1"], "local.batch_size must be >= 2"),
        (["run", "--set", "refiner.when=evaluation"], "when = 'evaluation' needs broadcast = 0, got 1.0; or set when"),
        (["run", "--resume", "--out", "nothing"], "holds no run"),
        (["rnu"], "run"),
        (["compare", "default"], "two or more"),
        (["export", "nothing", "--to", "x.safetensors"], "holds no run"),
        (["partition", "default", "--set", "partition.law=file"], "needs partition.file"),
        (["partition", "default", "--out", "/proc/nowhere"], "choose another folder by --out"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input(fedftg: Any, tmp_path: Path, arguments: list[str], expected: str) -> None:
    fails(fedftg(*arguments), tmp_path, expected)


def test_run_writes_what_the_contract_says(fedftg: Any, tiny: list[str], tmp_path: Path) -> None:
    done = fedftg("run", *tiny, "--set", "evaluation.every=2", "--set", "evaluation.targets=[0.01, 0.999]")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "default"
    assert {path.name for path in folder.iterdir()} == {
        "config.toml", "environment.json", "partition.json", "rounds.jsonl", "summary.json", "checkpoint", "report",
        "evaluation.json", "images",
    }  # fmt: skip
    rows = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == [1, 2, 3, 4]
    assert all(len(row["clients"]) == 3 for row in rows)
    assert set(rows[1]["accuracy"]) == set(rows[1]["loss"]) == {"selected", "all", "refined"}
    assert rows[0]["accuracy"] == {}
    assert set(rows[0]["seconds"]) == {"local", "aggregate", "refine", "evaluate", "checkpoint"}
    assert set(rows[0]["refine"]) == {
        "least_share",
        "discrepancy",
        "fidelity",
        "diversity",
        "student",
        "teacher_agreement",
    }
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["rounds_to"] == {"0.01": 2, "0.999": None}
    assert summary["peak_memory_mb"] > 0
    assert "round 4/4" in done.stdout
    assert (folder / "report" / "accuracy.png").stat().st_size > 10_000
    assert "| " in (folder / "report" / "table.md").read_text()
    assert max(len(line) for line in done.stdout.splitlines() if not line.startswith("round ")) <= 80
    counts = json.loads((folder / "partition.json").read_text())["class_counts"]
    assert sum(map(sum, counts)) == 200
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert (evaluation["round"], evaluation["clients"]) == (4, {})
    for kind, confusion in evaluation["confusion"].items():
        assert sum(map(sum, confusion)) == 60
        assert sum(row[place] for place, row in enumerate(confusion)) / 60 == rows[3]["accuracy"][kind]
    assert set(evaluation["confusion"]) == set(rows[3]["accuracy"])
    shown = {int(path.stem) for path in (folder / "images").iterdir()}
    assert shown == {row["round"] for row in rows if "student" in row["refine"]} & {1, 2, 3, 4}


def test_base_logs_the_aggregate_as_deployed(fedftg: Any, no_refiner: list[str], tmp_path: Path) -> None:
    done = fedftg("run", *no_refiner, "--out", "base", "--set", "evaluation.ensemble=true")
    assert done.returncode == 0
    rows = [json.loads(line) for line in (tmp_path / "base" / "rounds.jsonl").read_text().splitlines()]
    assert all(row["accuracy"]["refined"] == row["accuracy"]["selected"] for row in rows)
    assert all(row["refine"] == {} for row in rows)
    kinds = {"selected", "all", "refined", "ensemble", "ensemble_prior", "best_client"}
    assert all(set(row["accuracy"]) == set(row["loss"]) == kinds for row in rows)
    assert set(json.loads((tmp_path / "base" / "summary.json").read_text())["accuracy"]) == kinds
    assert "ensemble: of the round's clients" in " ".join(done.stdout.split())


def test_compare_runs_what_is_missing_only(fedftg: Any, tmp_path: Path) -> None:
    small = ["data.max_train=200", "data.max_test=60", "rounds=2", "partition.num_clients=4", "cohort.size=2"]
    settings = [part for item in small for part in ("--set", item)]
    first = fedftg("compare", "default_base", "default", *settings)
    assert first.returncode == 0, first.stderr
    assert "round 2/2" in first.stdout
    assert "vs base" in first.stdout
    stamp = (tmp_path / "runs" / "default" / "summary.json").stat().st_mtime_ns
    second = fedftg("compare", "default_base", "default", *settings)
    assert second.returncode == 0, second.stderr
    assert "round 2/2" not in second.stdout
    assert (tmp_path / "runs" / "default" / "summary.json").stat().st_mtime_ns == stamp
    folders = fedftg("compare", "runs/default_base", "runs/default")
    assert folders.returncode == 0, folders.stderr
    assert list((tmp_path / "runs" / "comparisons").glob("*/accuracy.png"))
    piped = fedftg("compare", "default_base", "default", *settings, "--format", "csv", "--columns", "refined,gain")
    assert [line.split(",")[0] for line in piped.stdout.splitlines()] == ["run", "default_base", "default"]
    assert "run folder: runs/default" in piped.stderr


def test_compare_runs_seeds_and_values_side_by_side(fedftg: Any, tmp_path: Path) -> None:
    """Four runs in two processes are those that one process makes one after the other, and are one row a value."""
    small = ["data.max_train=200", "data.max_test=60", "rounds=1", "partition.num_clients=4", "cohort.size=2"]
    sweep = [part for item in [*small, "partition.alpha=0.1,1"] for part in ("--set", item)]
    listed = fedftg("compare", "default_base", *sweep, "--seeds", "0,3", "--missing")
    assert listed.stdout.splitlines() == [f"missing: default_base-alpha{a}-s{s}" for a in ("0.1", "1") for s in (0, 3)]
    done = fedftg("compare", "default_base", *sweep, "--seeds", "0,3", "--jobs", "2")
    assert done.returncode == 0, done.stderr
    assert "4/4 default_base-alpha" in done.stdout
    assert done.stdout.count("fedavg, 2 seeds") == 2
    alone = [
        part for item in [*small, "partition.alpha=1", "seed=3", "executor.name=sequential"] for part in ("--set", item)
    ]
    assert fedftg("run", "default_base", *alone, "--out", "alone").returncode == 0
    rows = [
        json.loads((tmp_path / run / "rounds.jsonl").read_text()) for run in ("runs/default_base-alpha1-s3", "alone")
    ]
    assert rows[0]["accuracy"] == rows[1]["accuracy"]
    assert (
        "finished: default_base-alpha1-s3"
        in fedftg("compare", "default_base", *sweep, "--seeds", "3", "--jobs", "2", "--missing").stdout
    )


def test_compare_takes_two_folders_of_data_for_two_runs(fedftg: Any, no_refiner: list[str], tmp_path: Path) -> None:
    """Also where one of them has been run already; a copy of a recipe is still refused before anything is trained."""
    images, labels = np.full((40, 8, 8, 3), 40, np.uint8), np.arange(40) % 4
    arrays = {"train_images": images, "train_labels": labels, "test_images": images, "test_labels": labels}
    for name, root in (("a", "a.npz"), ("b", "b.npz"), ("copy", "a.npz")):
        np.savez(tmp_path / root, **arrays)
        (tmp_path / f"{name}.toml").write_text(f'data = {{ name = "arrays", root = "{root}" }}\n')
    own = [part for part in zip(no_refiner[::2], no_refiner[1::2], strict=True) if not part[1].startswith("data.")]
    short = [*itertools.chain(*own), "--set", "rounds=1"]
    refused = fedftg("compare", "a.toml", "copy.toml", *short)
    assert refused.returncode == 2
    assert "a.toml and copy.toml are the same run" in refused.stderr
    assert not (tmp_path / "runs").exists()
    done = fedftg("compare", "a.toml", "b.toml", *short)
    assert done.returncode == 0, done.stderr
    roots = [tomllib.loads((tmp_path / "runs" / name / "config.toml").read_text())["data"]["root"] for name in "ab"]
    assert roots == ["a.npz", "b.npz"]


def test_runs_of_other_lengths_are_refused_before_one_is_trained(fedftg: Any, tmp_path: Path) -> None:
    done = fedftg("compare", "default_base", "--set", "rounds=1,2")
    fails(done, tmp_path, "default_base-rounds1 and default_base-rounds2 are the same run with these settings, rounds")


def test_rows_keep_the_order_given_and_other_seeds_another_folder(
    fedftg: Any, no_refiner: list[str], tmp_path: Path
) -> None:
    (tmp_path / "mine.toml").write_text("")
    short = [*no_refiner, "--set", "rounds=1"]
    assert fedftg("run", "mine.toml", *short, "--set", "seed=5", "--out", "first").returncode == 0
    for seeds in ("0", "1"):
        done = fedftg("compare", "mine.toml", "first", *short, "--seeds", seeds, "--format", "csv", "--columns", "all")
        assert [line.split(",")[0] for line in done.stdout.splitlines()] == ["run", f"mine-s{seeds}", "first"]
    assert len(list((tmp_path / "runs" / "comparisons").glob("mine+first-*/table.csv"))) == 2


def test_partition_writes_heatmap_and_the_partition(fedftg: Any, tmp_path: Path) -> None:
    done = fedftg("partition", "default", "--set", "partition.num_clients=6", "--set", "partition.test_share=0.2",
                  "--out", "p")  # fmt: skip
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "p" / "partition.json").read_text())
    assert len(content["class_counts"]) == len(content["indices"]) == 6
    assert content["law"] == "dirichlet"
    assert {path.name for path in (tmp_path / "p").iterdir()} == {"partition.json", "partition.png"}
    assert (tmp_path / "p" / "partition.png").stat().st_size > 5_000
    for line in ("heatmap: p/partition.png", "partition: p/partition.json"):
        assert f"{line}\n" in done.stdout
    assert "held back" in done.stdout
    assert "clients without samples: 0" in done.stdout
    assert max(len(line) for line in done.stdout.splitlines()) <= 80
    assert done.stderr == ""


def test_saved_partition_is_used_again(fedftg: Any, tmp_path: Path) -> None:
    settings = ["--set", "partition.law=quantity", "--set", "partition.num_clients=7", "--set", "data.max_train=300"]
    assert fedftg("partition", "default", *settings, "--out", "first").returncode == 0
    file = ["--set", "partition.law=file", "--set", "partition.file=first/partition.json", "--set", "seed=5"]
    done = fedftg("partition", "default", *file, "--set", "data.max_train=300", "--out", "again")
    assert done.returncode == 0, done.stderr
    first, again = (json.loads((tmp_path / name / "partition.json").read_text()) for name in ("first", "again"))
    assert (first.pop("law"), again.pop("law")) == ("quantity", "file")
    settings_of = [(content.pop("partition")["law"], content.pop("seed")) for content in (first, again)]
    assert settings_of == [("quantity", 0), ("file", 5)]
    assert first == again
    fails(fedftg("partition", "default", *file, "--out", "other"), tmp_path, "made for other data", "1438")
    assert not (tmp_path / "other").exists()


def test_list_says_what_every_name_is(python_m_fedftg: Any) -> None:
    done = python_m_fedftg("list")
    assert done.returncode == 0
    text = "\n".join(line.rstrip() for line in done.stdout.splitlines())
    lines = re.findall(r"^  (\S+) +(.*)$", text, re.MULTILINE)
    for kind, names in cli.listing().items():
        for name, about in names.items():
            assert any(name == given and about.startswith(line) for given, line in lines if line), (kind, name)
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert ("ema", "deploys an exponential average of the aggregates") in lines
    only = python_m_fedftg("list", "refiners").stdout
    assert "  leaves" in only
    assert "fedprox" not in only


def test_doctor_says_what_is_here(python_m_fedftg: Any) -> None:
    done = python_m_fedftg("doctor")
    assert done.returncode == 0
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert list(lines) == [
        "versions", "python", "platform", "processor", "cores", "threads", "device", "cache", "extras",
    ]  # fmt: skip
    assert f"torch {torch.__version__}" in lines["versions"]
    assert lines["cores"] == str(os.cpu_count())
    assert lines["cache"].endswith("MB of decoded images")


def test_interrupt_is_130_and_resumes_to_the_same(
    fedftg: Any, tiny: list[str], read_records: Any, tmp_path: Path
) -> None:
    """Ctrl-C in the evaluation of round 2, when its clients are done; it makes the only checkpoint."""
    (tmp_path / "stopper.py").write_text(
        "import os, signal\n"
        "from pathlib import Path\n"
        "from fedftg import experiment\n"
        # A shell that starts tests in the background has them ignore the signal.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "evaluate = experiment.evaluate\n"
        "calls = []\n"
        "def watched(*arguments):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 2 and not Path('mark').exists():\n"
        "        Path('mark').touch()\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    return evaluate(*arguments)\n"
        "experiment.evaluate = watched\n"
    )
    settings = [*tiny, "--set", "checkpoint.every=50", "--set", "algorithm.name=scaffold"]
    stopped = fedftg("run", *settings, "--set", 'plugins=["stopper"]', "--out", "r", path=tmp_path)
    assert stopped.returncode == 130, stopped.stderr
    assert len(stopped.stderr.strip().splitlines()) == 1
    assert "--resume" in stopped.stderr
    resumed = fedftg("run", "--resume", "--out", "r", path=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed after round 1" in resumed.stdout
    assert fedftg("run", *settings, "--out", "whole").returncode == 0
    assert read_records(tmp_path / "r") == read_records(tmp_path / "whole")


def test_compare_never_turns_a_base_into_a_copy(fedftg: Any, tiny: list[str], tmp_path: Path) -> None:
    own = [part for part in zip(tiny[::2], tiny[1::2], strict=True) if not part[1].startswith("refiner.")]
    short = [*itertools.chain(*own), "--set", "rounds=1", "--set", "refiner.name=fedftg"]
    done = fedftg("compare", "default_base", "default", *short, "--set", "refiner.iterations=1",
                  "--set", "refiner.generator_width=4")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "not applied to default_base, which has no refiner" in done.stdout
    assert 'name = "none"' in (tmp_path / "runs" / "default_base" / "config.toml").read_text()
    copies = fedftg("compare", "default_base", "default", "--set", "refiner.name=none")
    assert copies.returncode == 2
    assert "are the same run with these settings, rounds aside; compare different ones" in copies.stderr


def test_a_setting_of_one_refiner_beside_another(fedftg: Any, no_refiner: list[str], tmp_path: Path) -> None:
    few = [*no_refiner[2:], "--set", "refiner.name=none,leaves", "--out", "a"]
    given = ["--set", "refiner.iterations=1", "--set", "refiner.pool_batches=1", "--set", "refiner.image_steps=1"]
    done = fedftg("compare", "default_base", *few, *given)
    assert done.returncode == 0, done.stderr
    assert "--set refiner.iterations is not applied to default_base-none, whose refiner has no such" in done.stdout
    assert "iterations = 1\n" in (tmp_path / "a" / "default_base-leaves" / "config.toml").read_text()
    wrong = fedftg("compare", "default_base", *few, "--set", "refiner.iteration=1")
    assert "unknown key 'refiner.iteration'" in wrong.stderr
    again = fedftg("compare", *sorted(map(str, (tmp_path / "a").iterdir())))  # comparisons/ is one of them
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize("setting", [' refiner.name = "fedftg"', 'refiner={name="fedftg", iterations=1}'])
def test_a_base_stays_one_however_a_refiner_is_set(fedftg: Any, tiny: list[str], tmp_path: Path, setting: str) -> None:
    own = [part for part in zip(tiny[::2], tiny[1::2], strict=True) if not part[1].startswith("refiner.")]
    done = fedftg("compare", "default_base", "default", *itertools.chain(*own), "--set", "rounds=1", "--set", setting)
    assert done.returncode == 0, done.stderr
    assert "not applied to default_base, which has no refiner" in done.stdout
    assert 'name = "none"' in (tmp_path / "runs" / "default_base" / "config.toml").read_text()


def test_one_run_is_not_compared_with_itself(fedftg: Any, no_refiner: list[str], tmp_path: Path) -> None:
    """Neither under two paths nor as the recipe that it was run from."""
    assert fedftg("run", "default", *no_refiner, "--set", "rounds=1", "--out", "runs/a").returncode == 0
    (tmp_path / "link").symlink_to(tmp_path / "runs" / "a")
    again = ["default", *no_refiner, "--set", "rounds=1"]
    for items in (["runs/a", "runs/a/"], ["runs/a", "link"], ["runs/a", *again]):
        done = fedftg("compare", *items)
        assert done.returncode == 2, done.stdout
        assert "two of these are the same run; compare different ones" in done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["list"], ["run", "defualt"], ["partition", "defualt"]])
def test_no_torch_where_nothing_is_computed(tmp_path: Path, arguments: list[str]) -> None:
    """Importing torch takes a second and more: these answer before it."""
    code = f"import sys\nfrom fedftg import cli\nsys.argv = ['fedftg', *{arguments}]\n"
    code += "try:\n    cli.main()\nexcept SystemExit:\n    pass\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, capture_output=True)


def test_importing_the_package_loads_no_extra(tmp_path: Path) -> None:
    extras = {"matplotlib", "pyarrow", "datasets", "sklearn", "flwr", "PIL"}
    code = "import sys, fedftg\nfedftg.refine, fedftg.run, fedftg.RunConfig\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, capture_output=True, text=True)
    assert not extras & set(done.stdout.split())
