"""A partition that is saved is loaded as it was, and a wrong file is one line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedftg.data.config import PartitionConfig
from fedftg.data.partition import labels_digest, partition, to_json
from fedftg.errors import InputError

LABELS = np.array([0, 1, 0, 1, 1, 0])


def load(path: Path, labels: Any = LABELS) -> list[Any]:
    return partition(labels, PartitionConfig(law="file", file=path), np.random.default_rng())


def saved(parts: list[Any], labels: Any = LABELS, **about: Any) -> str:
    return to_json(parts, labels, law="iid", class_names=["cat", "$dog"], about=about)


def test_object_by_hand() -> None:
    content = json.loads(saved([np.array([0, 1]), np.array([], dtype=np.int64), np.array([3])], seed=4))
    # 48 bytes, written by printf, through sha256sum
    digest = "08a3eabe03ccd84d534cfe5aabb8158407ab007f600462499eb238931ec3febe"
    assert content.pop("skew")["empty_clients"] == 1
    assert content == {
        "law": "iid", "num_samples": 6, "labels_sha256": digest, "class_names": ["cat", "$dog"],
        "class_counts": [[1, 1], [0, 0], [0, 1]], "seed": 4, "indices": [[0, 1], [], [3]],
    }  # fmt: skip
    assert labels_digest(LABELS.astype(np.int32)) == labels_digest(LABELS.astype(">i8")) == digest


@pytest.mark.parametrize("law", ["iid", "dirichlet", "class_dirichlet", "pathological", "shards", "quantity"])
def test_round_trip(tmp_path: Path, law: Any) -> None:
    labels = np.arange(60) % 2
    parts = partition(labels, PartitionConfig(law=law, num_clients=7, classes_per_client=1), np.random.default_rng(0))
    (tmp_path / "partition.json").write_text(saved(parts, labels))
    again = load(tmp_path / "partition.json", labels)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
    assert all(part.dtype == np.int64 for part in again)


def test_plain_lists_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text("[[5, 0], [], [2]]")
    assert [part.tolist() for part in load(path)] == [[0, 5], [], [2]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[[0, 1], [2, 6]]", "client 1 has row 6; rows are 0 to 5, each once"),
        ("[[0], [true]]", "client 1 has row True"),
        ('[["0"]]', "client 0 has row '0'"),
        ("[[0, 1], [3, 1]]", "client 1 has row 1; "),
        ("[0, 1]", "no list of rows for each client"),
        ('{"class_counts": [[3]], "digest": "0"}', "no list of rows .* partition"),
        ('{"num_samples": 7, "indices": [[0]]}', "made for other data than these 6 .*; set data"),
        ('{"labels_sha256": "00", "indices": [[0]]}', "made for other data"),
        ("[[0, 1", "cannot read partition.file"),
        (None, "cannot read partition.file .*No such file"),
    ],
)
def test_wrong_files(tmp_path: Path, text: str | None, expected: str) -> None:
    path = tmp_path / "mine.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=expected) as error:
        load(path)
    assert "\n" not in str(error.value)
