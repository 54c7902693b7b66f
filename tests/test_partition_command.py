"""The command 'partition' on data that has further columns and images of several kinds."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from fedftg import cli
from fedftg.data import sources
from fedftg.data.dataset import ImageDataset
from fedftg.errors import InputError


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Data with a column; holds what `sources.load` was asked for."""
    calls: list[tuple[str, ...]] = []
    images = np.random.default_rng(0).integers(0, 256, (12, 1, 8, 8), dtype=np.uint8)
    made = ImageDataset.from_tensors(
        images, np.arange(12) % 2, images, np.arange(12) % 2, class_names=["cat", "dog"],
        columns={"style": np.array(["ink", "oil", "oil"] * 4)},
    )  # fmt: skip

    def load(config: Any, **keywords: Any) -> ImageDataset:
        calls.append(keywords["columns"])
        return replace(made, converted={"grey": 3, "CMYK": 1}, notes=("not used: [old]",))

    monkeypatch.setattr(sources, "load", load)
    return calls


def partition(*settings: str, out: Path) -> Any:
    options = [part for setting in settings for part in ("--set", setting)]
    return CliRunner().invoke(cli.cli, ["partition", "default", *options, "--out", str(out)], catch_exceptions=False)


def test_domains_and_converted_images(asked: list[tuple[str, ...]], tmp_path: Path) -> None:
    done = partition("partition.law=domain", "partition.column=style", "partition.num_clients=3", out=tmp_path)
    assert done.exit_code == 0
    assert asked == [("style",)]
    assert "not used: [old]\n" in done.stdout
    content = json.loads((tmp_path / "partition.json").read_text())
    assert content["indices"][0] == [0, 3, 6, 9]
    assert [len(rows) for rows in content["indices"]] == [4, 4, 4]
    assert content["partition"]["column"] == "style"
    assert content["converted"] == {"CMYK": 1, "grey": 3}
    assert "domain, num_clients=3, column=style, seed 0" in done.stdout.splitlines()[0]


def test_another_partition_is_never_overwritten(
    asked: list[tuple[str, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def made(*settings: str, out: str | None = None) -> Path:
        options = [part for setting in ("partition.num_clients=3", *settings) for part in ("--set", setting)]
        where = [] if out is None else ["--out", out]
        done = CliRunner().invoke(cli.cli, ["partition", "default", *options, *where])
        if done.exception is not None:
            raise done.exception
        return Path(done.stdout.splitlines()[-1].removeprefix("partition: "))

    swapped = sources.load(None, columns=())
    first = made()
    content = first.read_bytes()
    assert made() == first  # the same partition: the same folder
    second = made("seed=1")
    assert second.parent.name == f"{first.parent.name}-2"
    assert first.read_bytes() == content
    assert made("seed=1") == second
    assert made(out="here").read_bytes() == content
    for other in ("seed=1", "partition.test_share=0.5"):  # the latter: the same rows, but a share of them held back
        with pytest.raises(InputError, match="here holds another partition already; choose another folder by --out"):
            made(other, out="here")
    monkeypatch.setattr(sources, "load", lambda *_, **__: swapped)
    assert made("partition.law=iid").parent.name.endswith("-3")  # iid: the same rows whatever the labels
    monkeypatch.setattr(sources, "load", lambda *_, **__: replace(swapped, train_labels=1 - swapped.train_labels))
    assert made("partition.law=iid").parent.name.endswith("-4")
