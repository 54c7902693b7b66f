"""Tensors from Python, samples held back by clients, noise on features, and data that changed between sessions."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedftg
from fedftg.data import sources

SMALL = [
    "rounds=2", "threads=1", "partition.num_clients=4", "cohort={size=2}", "model.name=lenet_gn", "local.epochs=1",
    "local.batch_size=8", "refiner.iterations=1", "refiner.batch_size=4", "refiner.generator_width=4",
]  # fmt: skip


def made(seed: int = 0, count: int = 80) -> fedftg.ImageDataset:
    rng = np.random.default_rng(seed)
    images, labels = rng.integers(0, 256, (count, 1, 12, 12), dtype=np.uint8), rng.integers(0, 3, count)
    return fedftg.ImageDataset.from_tensors(images, labels, images[:20], labels[:20], class_names=["a", "b", "c"])


def test_tensors_run_and_resume_to_the_same(tmp_path: Path, read_records: Any) -> None:
    whole = fedftg.run("default", overrides=SMALL, out=tmp_path / "whole", dataset=made())
    assert 'name = "tensors"' in (tmp_path / "whole" / "config.toml").read_text()
    fedftg.run("default", overrides=[*SMALL, "rounds=1"], out=tmp_path / "parts", dataset=made())
    again = fedftg.run("default", overrides=SMALL, out=tmp_path / "parts", dataset=made(), resume=True)
    assert read_records(tmp_path / "whole") == read_records(tmp_path / "parts")
    assert all(bool((again.state.params[name] == value).all()) for name, value in whole.state.params.items())


def test_resuming_without_the_tensors_or_with_others_is_refused(tmp_path: Path) -> None:
    fedftg.run("default", overrides=[*SMALL, "rounds=1"], out=tmp_path / "run", dataset=made())
    with pytest.raises(fedftg.InputError, match=r"fedftg\.run\(\.\.\., dataset="):
        fedftg.run(out=tmp_path / "run", overrides=["rounds=2"], resume=True)
    before = (tmp_path / "run" / "rounds.jsonl").read_bytes()
    brighter = replace(made(), train_images=made().train_images // 2 + 100)  # with the same labels
    for other in (made(seed=1), brighter, replace(made(), mean=(0.1,))):
        with pytest.raises(fedftg.InputError, match="was started on other data or another partition"):
            fedftg.run("default", overrides=SMALL, out=tmp_path / "run", dataset=other, resume=True)
    assert (tmp_path / "run" / "rounds.jsonl").read_bytes() == before


def test_held_back_samples_give_accuracy_per_client(fedftg: Any, tiny: list[str], tmp_path: Path) -> None:
    shares = ["--set", "partition.test_share=0.25", "--set", "partition.feature_noise=0.1"]
    done = fedftg("run", *tiny, *shares, "--out", "run")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    for row in rows:
        assert set(row["client_accuracy"]) == {"selected", "all", "refined", "sent"}
        for found in row["client_accuracy"].values():
            assert 0 <= found["worst_10"] <= found["mean"] <= 1
            assert found["std"] >= 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["client_accuracy"] == rows[-1]["client_accuracy"]
    # 200 samples, 5 clients of 40 each: 10 of them are held back.
    partition = json.loads((tmp_path / "run" / "partition.json").read_text())
    assert partition["held_back"] == [10] * 5
    assert [sum(counts) for counts in partition["class_counts"]] == [30] * 5
    text = " ".join(done.stdout.split())
    mean = 100 * rows[-1]["client_accuracy"]["refined"]["mean"]
    assert f"per client (round 4): mean {mean:.2f}, worst 10 %" in text


def test_settings_of_data_beside_a_dataset_are_refused(tmp_path: Path) -> None:
    with pytest.raises(fedftg.InputError, match=r"data\.\* has no effect beside dataset="):
        fedftg.run("default", overrides=[*SMALL, "data.max_train=9"], out=tmp_path / "run", dataset=made())
    for setting in (" data={max_train=3}", "data ={name='cifar10'}"):
        with pytest.raises(fedftg.InputError, match="has no effect beside dataset="):
            fedftg.run("default", overrides=[*SMALL, setting], out=tmp_path / "run", dataset=made())
    assert not (tmp_path / "run").exists()


def test_what_needs_no_data_is_told_before_any_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "load", lambda *_, **__: pytest.fail("the data were loaded"))
    with pytest.raises(fedftg.InputError, match="holds no run"):
        fedftg.run("default", out=tmp_path / "none", resume=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("")
    with pytest.raises(fedftg.InputError, match="exists already"):
        fedftg.run("default", out=tmp_path / "full")
