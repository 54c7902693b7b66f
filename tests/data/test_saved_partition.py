"""A partition that is saved is loaded as it was, and a wrong file is one line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedftg.data.config import PartitionConfig
from fedftg.data.partition import labels_digest, load, partition, save, to_json
from fedftg.errors import InputError

LABELS = np.array([0, 1, 0, 1, 1, 0])


def saved(path: Path, parts: list[Any], labels: Any = LABELS, **about: Any) -> Path:
    return save(path, to_json(parts, labels, law="iid", class_names=["cat", "$dog"], about=about))


def test_object_by_hand(tmp_path: Path) -> None:
    path = saved(tmp_path / "partition.json", [np.array([0, 1]), np.array([], dtype=np.int64), np.array([3])], seed=4)
    text = path.read_text()
    assert text.startswith('{\n  "law": "iid",\n  "num_samples": 6,\n')
    assert text.endswith('  "seed": 4,\n  "indices": [\n    [0,1],\n    [],\n    [3]\n  ]\n}\n')
    content = json.loads(text)
    assert list(content) == [
        "law", "num_samples", "labels_sha256", "class_names", "class_counts", "skew", "seed", "indices",
    ]  # fmt: skip
    assert content["class_counts"] == [[1, 1], [0, 0], [0, 1]]
    # 48 bytes, written by printf, through sha256sum
    assert content["labels_sha256"] == "08a3eabe03ccd84d534cfe5aabb8158407ab007f600462499eb238931ec3febe"
    assert labels_digest(LABELS.astype(np.int32)) == labels_digest(LABELS.astype(">i8")) == content["labels_sha256"]
    assert content["skew"]["empty_clients"] == 1
    assert list(tmp_path.iterdir()) == [path]


@settings(max_examples=60, deadline=None)
@given(
    law=st.sampled_from(["iid", "dirichlet", "class_dirichlet", "pathological", "shards", "quantity"]),
    clients=st.integers(1, 12),
    seed=st.integers(0, 1000),
)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, law: str, clients: int, seed: int) -> None:
    labels = np.random.default_rng(seed).integers(0, 2, size=60)
    labels[:2] = (0, 1)
    config = PartitionConfig(law=law, num_clients=clients, classes_per_client=1)
    parts = partition(labels, config, np.random.default_rng(seed))
    path = saved(tmp_path_factory.mktemp("saved") / "partition.json", parts, labels)
    again = partition(labels, PartitionConfig(law="file", file=path), np.random.default_rng(seed + 1))
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
    assert all(part.dtype == np.int64 for part in again)


def test_plain_lists_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text("[[5, 0], [], [2]]")
    assert [part.tolist() for part in load(path, LABELS)] == [[0, 5], [], [2]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[[0, 1], [2, 6]]", "client 1 has row 6; rows are whole numbers from 0 to 5; correct"),
        ("[[-1]]", "client 0 has row -1"),
        ("[[0], [1.0]]", r"client 1 has row 1\.0"),
        ("[[0], [true]]", "client 1 has row true"),
        ('[["0"]]', 'client 0 has row "0"'),
        ("[[0, 1], [3, 1]]", "row 1 is held twice, by client 0, 1; "),
        ("[[0], [3, 1, 3]]", "row 3 is held twice, by client 1; "),
        ("[0, 1]", "no list of training rows for each client"),
        ("[[], []]", "no list of training rows for each client"),
        ('{"class_counts": [[1]]}', "no list of training rows .*; give a partition.json of 'fedftg partition'"),
        ('{"indices": {"0": [1]}}', "no list of training rows"),
        ('{"num_samples": 7, "indices": [[0]]}', r"made for other data \(its 7 .* not the 6 here\); set data"),
        ('{"labels_sha256": "00", "indices": [[0]]}', "made for other data .*labels"),
        ('{"class_counts": [[3]], "digest": "0"}', "is the record of a run, which counts samples and names no rows"),
        ("[[0, 1", "is not valid JSON"),
        ("\udcff", "is not valid JSON"),
    ],
)
def test_wrong_files(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "mine.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=expected) as error:
        load(path, LABELS)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read partition.file .*No such file"):
        load(tmp_path / "none.json", LABELS)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*; choose another folder"):
        saved(tmp_path / "file" / "partition.json", [np.array([0])])
