from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedftg.errors import InputError
from fedftg.params import Params
from fedftg.rundir import packs
from fedftg.rundir.packs import ClientRecord, Packs, capacity


def made(value: float) -> ClientRecord:
    memory: Params = {"z": torch.full((2, 3), value), "a/half": torch.full((3,), value, dtype=torch.bfloat16)}
    upload: Params = {
        "z": torch.full((2, 3), -value),
        "n": torch.tensor(int(value)),
        "none": torch.ones(0),
        "z2": memory["z"],
    }
    return ClientRecord(memory, upload)


def assert_same(left: ClientRecord, right: ClientRecord) -> None:
    for ours, theirs in ((left.memory, right.memory), (left.upload, right.upload)):
        assert list(ours) == list(theirs)
        for name, tensor in ours.items():
            assert torch.equal(tensor, theirs[name])
            assert (tensor.shape, tensor.dtype) == (theirs[name].shape, theirs[name].dtype)


def test_round_trip(tmp_path: Path) -> None:
    """Types, shapes and order are kept, also of a scalar and of an empty tensor; clients may keep different things."""
    store = Packs(tmp_path)
    given = {3: made(3.0), 700: made(7.0), 5: ClientRecord({}, {"w": torch.ones(1, dtype=torch.bool)})}
    places = store.write(given.items())
    assert set(places.values()) == {"clients-000001-3.safetensors"}
    for client, record in given.items():
        assert_same(store.read(places[client], client), record)
        assert_same(Packs(tmp_path).read(places[client], client), record)


def test_shared_values_are_counted_and_written_once(tmp_path: Path) -> None:
    """z: 24 bytes twice and not three times, half: 6, n: 8."""
    record = made(1.0)
    assert record.nbytes == 62
    Packs(tmp_path).write([(0, record)])
    flat = load_file(tmp_path / "clients-000001-1.safetensors")
    assert {name: len(value) for name, value in flat.items()} == {"0/float32": 12, "0/bfloat16": 3, "0/int64": 1}


def test_large_records_have_files_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 130 bytes a file two of 62 go together, and one of 400 goes alone."""
    monkeypatch.setattr(packs, "PACK_BYTES", 130)
    large = ClientRecord({"w": torch.ones(100)}, {})
    places = Packs(tmp_path).write([(0, made(0.0)), (1, made(1.0)), (2, made(2.0)), (3, large), (4, made(4.0))])
    assert [places[client] for client in range(5)] == [
        "clients-000001-2.safetensors", "clients-000001-2.safetensors", "clients-000002-1.safetensors",
        "clients-000003-1.safetensors", "clients-000004-1.safetensors",
    ]  # fmt: skip
    assert [capacity(places[client]) for client in (0, 2)] == [2, 1]


def test_numbers_go_on_after_those_in_the_folder(tmp_path: Path) -> None:
    (tmp_path / "clients-000041-7.safetensors").touch()
    assert Packs(tmp_path).write([(0, made(1.0))]) == {0: "clients-000042-1.safetensors"}


def test_only_files_that_no_checkpoint_names_are_dropped(tmp_path: Path) -> None:
    store = Packs(tmp_path)
    first, second, third = (store.write([(0, made(1.0))])[0] for _ in range(3))
    store.drop_unused({second, third})
    assert not (tmp_path / first).exists()
    store.sync({third})  # the checkpoint names the third
    store.drop_unused(set())
    assert [path.name for path in tmp_path.iterdir()] == [third]


def test_a_missing_or_torn_file_is_one_line(tmp_path: Path) -> None:
    store = Packs(tmp_path)
    place = store.write([(0, made(1.0))])[0]
    with pytest.raises(InputError, match="cannot be read"):
        store.read(place, 9)
    (tmp_path / place).write_bytes((tmp_path / place).read_bytes()[:-1])
    with pytest.raises(InputError, match=f"{place} cannot be read"):
        store.read(place, 0)
