"""A division that is written is read back as it was, and a wrong file is told in one line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedftg.data import PartitionConfig, partition, skew
from fedftg.data.saved_partition import labels_digest, read, write
from fedftg.errors import InputError

LABELS = np.array([0, 1, 0, 1, 1, 0])


def saved(path: Path, parts: list[Any], labels: Any = LABELS) -> Path:
    counts = np.stack([np.bincount(labels[part], minlength=int(labels.max()) + 1) for part in parts])
    return write(
        path, parts, labels, law="iid", class_names=["cat", "$dog"], class_counts=counts.tolist(), skew=skew(counts)
    )


def test_object_by_hand(tmp_path: Path) -> None:
    path = saved(tmp_path / "partition.json", [np.array([0, 1]), np.array([], dtype=np.int64), np.array([3])])
    content = json.loads(path.read_text())
    assert list(content) == ["law", "num_samples", "labels_sha256", "class_names", "class_counts", "skew", "indices"]
    assert content["indices"] == [[0, 1], [], [3]]
    assert content["class_counts"] == [[1, 1], [0, 0], [0, 1]]
    assert content["num_samples"] == 6
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
    assert [part.tolist() for part in read(path, LABELS)] == [[0, 5], [], [2]]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[[0, 1], [2, 6]]", "client 1 has row 6; rows are whole numbers from 0 to 5; correct"),
        ("[[-1]]", "client 0 has row -1"),
        ("[[0], [1.0]]", r"client 1 has row 1\.0"),
        ("[[0], [true]]", "client 1 has row true"),
        ('[["0"]]', 'client 0 has row "0"'),
        ("[[0, [1]]]", r"client 0 has row \[1\]"),
        ("[[99999999999999999999999]]", "client 0 has row 9999"),
        ("[[0, 1], [3, 1]]", "row 1 is held twice, by client 0 and by client 1; .* take one out"),
        ("[[0], [3, 1, 3]]", "row 3 is held twice, by client 1; "),
        ("[0, 1]", "client 0 is 0, not a list"),
        ("[]", "not one list of training rows a client"),
        ("[[], []]", "gives no client any sample"),
        ("7", "holds 7, not one list"),
        ('{"class_counts": [[1]]}', "has no 'indices'; give a partition.json of 'fedftg partition'"),
        ('{"indices": {"0": [1]}}', "not one list of training rows a client"),
        ('{"num_samples": 7, "indices": [[0]]}', "made for other data: for 7 training samples, here are 6; set data"),
        ('{"labels_sha256": "00", "indices": [[0]]}', "made for other data: the training labels differ; "),
        ("[[0, 1", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("\udcff", "is not valid JSON"),
    ],
    ids=range(20),
)
def test_wrong_files(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "mine.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=told) as error:
        read(path, LABELS)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400 + len(str(path))


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read partition.file .*No such file"):
        read(tmp_path / "none.json", LABELS)
    with pytest.raises(InputError, match=r"cannot read partition.file .*directory"):
        read(tmp_path, LABELS)


def test_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*; choose another folder"):
        saved(tmp_path / "file" / "partition.json", [np.array([0])])
    (tmp_path / "partition.json").mkdir()
    with pytest.raises(InputError, match=r"cannot write"):
        saved(tmp_path / "partition.json", [np.array([0])])
    assert not (tmp_path / "partition.json.part").exists()


def test_the_record_of_a_run_is_no_partition_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "partition.json").write_text('{"class_names": ["a"], "class_counts": [[3]], "digest": "0"}')
    with pytest.raises(InputError, match="is the record of a run, which counts samples and names no rows"):
        read(tmp_path / "partition.json", LABELS)
